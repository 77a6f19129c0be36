"""Kills ranks of a run at random instants, resumes it, compares it with a run that was left alone.

    SAFEGRAD_PROGRAM=build/safegrad .venv/bin/python tests/cli/soak.py --kills 100 --seed 1

Every start is `train --resume auto`. After each kill every complete checkpoint is verified with
`sha256sum -c`. A run that reaches its end must have the same model bytes and metrics (times apart)
as the one that was left alone; then the next begins in an empty folder. Exits 0 when all of that
held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tiny_job import PROGRAM, write_job

TIMES = {"seconds", "tokens_per_s", "speed_of_light", "phase_seconds", "checkpoint_seconds"}
SETTINGS = ["--set", "train.steps=60", "--set", "checkpoint.every_steps=3", "--set", "probe=null",
            "--set", "model.lora={rank: 4, dropout: 0.1}", "--set", "batch.max_tokens_per_rank=45"]
SECONDS = 60  # within which a job must have ended


def start(folder: Path, *arguments: str, ranks: int = 2) -> subprocess.Popen:
    """`safegrad train config.yaml ARGUMENTS` on ranks under mpirun."""
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMP_NUM_THREADS": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
               PROGRAM, "train", "config.yaml", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(job: subprocess.Popen) -> list[int]:
    """The processes of a job's ranks, in the order of their start; none before it."""
    try:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        program = os.path.realpath(PROGRAM)
        return [int(c) for c in children if os.readlink(f"/proc/{c}/exe") == program]
    except OSError:
        return []


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is measured in seconds."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def model(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "model").iterdir()}


def verify_checkpoints(output: Path) -> int:
    """Checks every complete checkpoint with coreutils; how many there are."""
    folders = [path for path in output.glob("checkpoints/step-*") if path.suffix == ""]
    for path in folders:
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=path,
                       check=True)
    return len(folders)


@dataclass
class Tally:
    kills: int = 0
    whole_jobs: int = 0       # kills that took all ranks at once
    during_checkpoint: int = 0  # kills that left a checkpoint half-written
    resumed: int = 0          # starts that went on from a checkpoint
    finished: list[int] = field(default_factory=list)  # starts that each finished run took


def soak(folder: Path, kills: int, seed: int, ranks: int = 2) -> Tally:
    """AssertionError where a run that was killed ends otherwise than one that was not."""
    chance = random.Random(seed)
    begin = time.monotonic()
    alone = start(folder, *SETTINGS, "--set", "output=alone", ranks=ranks)
    assert alone.wait(SECONDS) == 0, alone.stderr.read()
    usual = time.monotonic() - begin
    expected = metrics(folder / "alone"), model(folder / "alone")

    output = folder / "killed"
    tally, starts = Tally(), 0
    while tally.kills < kills or starts > 0:
        job = start(folder, *SETTINGS, "--set", "output=killed", "--resume", "auto", ranks=ranks)
        starts += 1
        if tally.kills < kills:
            # Setting up takes most of a tiny run's time: most kills fall into what comes after.
            instant = usual * chance.uniform(0.0 if chance.random() < 0.3 else 0.6, 1.0)
            victims, everyone = chance.randrange(ranks), chance.random() < 0.3
            try:
                job.wait(instant)
            except subprocess.TimeoutExpired:
                alive = ranks_of(job)
                for pid in alive if everyone else alive[victims:victims + 1]:
                    os.kill(pid, signal.SIGKILL)
                    tally.kills += not everyone
                tally.kills += everyone and bool(alive)
                tally.whole_jobs += everyone and bool(alive)
        out, err = job.communicate(timeout=SECONDS)
        tally.resumed += "resumes after step" in out
        tally.during_checkpoint += any(output.glob("checkpoints/*.tmp"))
        verify_checkpoints(output)
        print(f"\r{tally.kills} kills", end="", file=sys.stderr, flush=True)
        if job.returncode != 0:
            assert "error:" not in err, err  # killed, and no other reason
            continue
        assert metrics(output) == expected[0], "the metrics differ"
        assert model(output) == expected[1], "the model differs"
        tally.finished.append(starts)
        starts = 0
        shutil.rmtree(output)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="safegrad-soak-") as folder:
        write_job(Path(folder))
        tally = soak(Path(folder), arguments.kills, arguments.seed, arguments.ranks)
    print(f"{tally.kills} kills survived ({tally.whole_jobs} of all ranks at once, "
          f"{tally.during_checkpoint} in the middle of a checkpoint); {tally.resumed} resumes; "
          f"{len(tally.finished)} runs reached their end, each as the one left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
