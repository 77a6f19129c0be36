"""bench_collectives on two ranks with tiny sizes: what it prints adds up. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny_job import PROGRAM

BENCHMARK = Path(PROGRAM).with_name("bench_collectives")
SECONDS = 60

pytestmark = pytest.mark.skipif(not BENCHMARK.exists(), reason="built without benchmarks")


def run(ranks: int, *arguments: str):
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMP_NUM_THREADS": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
               BENCHMARK, *arguments]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=SECONDS)


def test_every_collective_and_size_is_right_and_bandwidths_follow_their_formulas():
    ended = run(2, "--min-bytes", "1KiB", "--max-bytes", "4100", "--factor", "2", "--repeats", "3",
                "--json")

    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    collectives = ["all_gather", "reduce_scatter", "all_reduce"]
    assert [(line["bytes"], line["collective"]) for line in lines] == [
        (size, name) for size in (1024, 2048, 4096) for name in collectives]
    for line in lines:
        assert (line["backend"], line["device"], line["ranks"]) == ("mpi", "cpu", 2)
        assert line["right"] is True
        assert 0 < line["min_s"] <= line["median_s"] <= line["max_s"]
        assert line["algbw_gb_per_s"] == pytest.approx(line["bytes"] / line["median_s"] / 1e9)
        factor = 1.0 if line["collective"] == "all_reduce" else 0.5  # 2(n-1)/n, (n-1)/n
        assert line["busbw_gb_per_s"] == pytest.approx(factor * line["algbw_gb_per_s"])
    assert ended.stderr.count(" right") == len(lines), "the table for people"


def test_sizes_that_the_ranks_do_not_divide_are_rounded_down():
    ended = run(3, "--min-bytes", "1000", "--max-bytes", "1000", "--repeats", "1", "--json")

    assert ended.returncode == 0, ended.stderr
    assert [json.loads(line)["bytes"] for line in ended.stdout.splitlines()] == [996] * 3


@pytest.mark.parametrize(("arguments", "told"), [
    (["--min-bytes", "0"], "--min-bytes"),
    (["--factor", "3"], "--factor"),
    (["--min-bytes", "8", "--max-bytes", "4"], "no size"),
])
def test_a_mistake_is_refused(arguments, told):
    ended = run(2, *arguments)

    assert ended.returncode not in (0, 2)
    assert told in ended.stderr
