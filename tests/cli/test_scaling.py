"""benchmarks/scaling on one and two ranks with a tiny shape: what it writes adds up. No time is
judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_job import MODEL, PROGRAM, ROOT

SCRIPT = ROOT / "benchmarks" / "scaling"
BUILD = Path(PROGRAM).parent
SECONDS = 120

pytestmark = pytest.mark.skipif(
    not (BUILD / "bench_step").exists(), reason="built without benchmarks"
)


def scaling(out: Path, *arguments: str):
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    shape = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 1003}
    (out / "shape.json").write_text(json.dumps(shape))  # bench_step draws tokens below 1000
    command = [
        sys.executable,
        SCRIPT,
        "--build",
        BUILD,
        "--out",
        out,
        "--no-picture",
        "--model",
        out / "shape.json",
        "--sequence-length",
        "16",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--launcher",
        "mpirun --quiet --oversubscribe --bind-to none",
        *arguments,
    ]
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_measured_and_planned_stand_side_by_side(tmp_path):
    ended = scaling(tmp_path, "--ranks", "1,2", "--task-sequences", "4", "--align-sequences", "2")

    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    # Hybrid is another layout from 4 ranks on.
    assert [(r["mode"], r["layout"], r["ranks"]) for r in results] == [
        (mode, layout, ranks)
        for mode in ("strong", "weak")
        for ranks, layout in (
            (1, "data parallel"),
            (1, "hybrid"),
            (1, "sharded"),
            (2, "data parallel"),
            (2, "sharded"),
        )
    ]
    for r in results:
        tokens = 16 * 6 * (r["ranks"] if r["mode"] == "weak" else 1)
        assert r["planned"]["task_tokens"] + r["planned"]["align_tokens"] == tokens
        assert r["measured"]["ranks"] == r["planned"]["ranks"] == r["ranks"]
        assert r["measured"]["shards"] == r["planned"]["shards"] == r["shards"]
        sent = {name: t for name, t in r["measured"]["traffic_per_step"].items() if t["calls"]}
        assert sent == r["planned"]["traffic"]
        first = next(o for o in results if (o["mode"], o["layout"]) == (r["mode"], r["layout"]))
        for kind in ("measured", "planned"):
            ratio = first[f"{kind}_s"] / r[f"{kind}_s"]
            expected = ratio / r["ranks"] if r["mode"] == "strong" else ratio
            assert r[f"{kind}_efficiency"] == pytest.approx(expected)
    assert len((tmp_path / "scaling.md").read_text().splitlines()) == 2 + len(results)


def test_sequences_that_do_not_divide_are_refused_before_any_run(tmp_path):
    ended = scaling(tmp_path, "--ranks", "1,2", "--task-sequences", "3", "--launcher", "false")

    assert ended.returncode == 1
    assert (
        ended.stderr == "error: strong scaling: 3 sequences of a step do not divide among 2 ranks\n"
    )


def test_results_before_a_run_that_fails_are_kept(tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(
        '#!/bin/sh\n[ "$2" = 1 ] && exec mpirun --quiet --bind-to none "$@"\nexit 3\n'
    )
    launcher.chmod(0o755)
    ended = scaling(
        tmp_path,
        "--ranks",
        "1,2",
        "--task-sequences",
        "2",
        "--align-sequences",
        "2",
        "--layouts",
        "sharded",
        "--launcher",
        str(launcher),
    )

    assert ended.returncode == 1 and "exit code 3" in ended.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["ranks"] == 1


@pytest.mark.parametrize("page", ["benchmarks/scaling", "docs/performance.md"])
def test_documented_commands_divide(page, tmp_path):
    commands = re.findall(
        r"benchmarks/scaling (--ranks [\d,]+(?: --(?!out)[a-z-]+ [\w,]+)*)",
        (ROOT / page).read_text(),
    )
    assert commands
    for command in commands:
        ended = scaling(tmp_path, *command.split(), "--launcher", "false")
        assert ended.returncode == 1 and "do not divide" not in ended.stderr
