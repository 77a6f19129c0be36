"""Ranks that no longer take part: the job ends, and says which and in what."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_job import PROGRAM, job  # noqa: F401

LOST_RANK = Path(PROGRAM).with_name("tests") / "lost_rank"
MPIRUN = ["mpirun", "--quiet", "--allow-run-as-root", "--oversubscribe"]
# Deadline, 15 s for the ranks' records, 5 s for the report, and what starting takes on a busy
# machine.
ENOUGH = 120


def lose(way: str, ranks: int, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*MPIRUN, "-n", str(ranks), str(LOST_RANK), way, str(folder)],
                          capture_output=True, text=True, timeout=ENOUGH)


def records(folder: Path) -> dict[int, dict]:
    found = {}
    for path in folder.glob("rank-*.json"):
        record = json.loads(path.read_text())
        assert path.name == f"rank-{record['rank']}.json"
        found[record["rank"]] = record
    return found


def awaited(record: dict) -> dict:
    return next(c for c in record["collectives"] if c["number"] == record["awaited"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_stopped_rank_is_named(tmp_path, ranks):
    folder = tmp_path / "flight"
    ended = lose("stops", ranks, folder)
    assert ended.returncode != 0  # mpirun continues a stopped rank before it ends it
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "no progress for 2 s (the test's deadline): rank 1 gives no sign of life" in ended.stderr
    assert "in barrier 4 of world (step 4)" in ended.stderr and str(folder) in ended.stderr
    left = records(folder)
    assert sorted(left) == [r for r in range(ranks) if r != 1]
    for record in left.values():
        last = awaited(record)
        assert (last["operation"], last["group"], last["group_number"]) == ("barrier", "world", 4)
        assert last["subject"] == "step 4" and last["state"] == "awaited"
        assert all(c["state"] == "finished" for c in record["collectives"][:-1])
    assert (folder / "report.txt").read_text().strip() in ended.stderr


def test_a_rank_that_computes_too_long_is_behind_but_alive(tmp_path):
    ended = lose("computes", 3, tmp_path / "flight")
    assert ended.returncode != 0
    assert "rank 1 has not come to barrier 4 of world (step 4)" in ended.stderr
    assert "rank 1: computing; " in ended.stderr and "finished barrier 3 of world" in ended.stderr
    left = records(tmp_path / "flight")
    assert sorted(left) == [0, 1, 2] and left[1]["awaited"] is None


def test_a_rank_that_leaves_is_named(tmp_path):
    ended = lose("leaves", 3, tmp_path / "flight")
    assert ended.returncode != 0
    assert "rank 1 has not come to barrier 4 of world (step 4)" in ended.stderr
    assert "rank 1: in barrier 1 of control (leaving)" in ended.stderr


def test_different_collectives_are_named(tmp_path):
    ended = lose("differs", 3, tmp_path / "flight")
    assert ended.returncode != 0
    assert ("the ranks call different collectives: number 4 of world is barrier (step 4) of 0 "
            "bytes on ranks 0, 2, broadcast (step 4) on rank 1") in ended.stderr


def test_nobody_lost_nothing_written(tmp_path):
    ended = lose("stays", 3, tmp_path / "flight")
    assert ended.returncode == 0 and ended.stdout.count("went on") == 3 and ended.stderr == ""
    assert not (tmp_path / "flight").exists()


def ranks_of(job: Path) -> list[int]:
    """Process ids of the training ranks that run in this folder, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.readlink(entry / "cwd") != str(job):
                continue
            environment = (entry / "environ").read_bytes().split(b"\0")
            if os.readlink(entry / "exe") != os.path.realpath(PROGRAM):
                continue
        except OSError:
            continue
        for variable in environment:
            if variable.startswith(b"OMPI_COMM_WORLD_RANK="):
                found[int(variable.split(b"=")[1])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def test_a_training_rank_that_is_stopped_ends_the_job(job):
    running = subprocess.Popen(
        [*MPIRUN, "-n", "3", PROGRAM, "train", "config.yaml", "--set", "train.steps=1000000",
         "--set", "parallel.timeout_seconds=10"],
        cwd=job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = job / "out/metrics.jsonl"
    try:
        end = time.monotonic() + ENOUGH
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        stopped = ranks_of(job)[0]  # rank 0, which speaks otherwise
        os.kill(stopped, signal.SIGSTOP)
        _, stderr = running.communicate(timeout=ENOUGH)
    finally:
        running.kill()
    assert running.returncode != 0
    assert "no progress for 10 s (parallel.timeout_seconds): rank 0 (" in stderr
    assert f"process {stopped}) gives no sign of life" in stderr
    (incident,) = (job / "out/flight").iterdir()
    left = records(incident)
    assert sorted(left) == [1, 2]
    subjects = {c["subject"] for c in left[1]["collectives"]}
    assert any(s.startswith("step ") for s in subjects) and "block 0" in subjects, subjects
