"""Kills ranks of a run at random instants, resumes it, compares it with a run that was left alone.

    .venv/bin/python tests/cli/soak.py --kills 100 --seed 1 --ranks 2 3 4

Every start is `train --resume auto`, on a disk that is slow below `checkpoints/` (disk_shim.cpp),
so that kills can be aimed at the writing of a checkpoint and at its sealing. After each kill every
complete checkpoint is verified with `sha256sum -c`. A run that reaches its end must have the same
model bytes and metrics (times apart) as the one that was left alone; then the next begins in an
empty folder, on another number of ranks. Exits 0 when all of that held.
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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from disk import disk
from tiny_job import PROGRAM, write_job

MEASURED = {"seconds", "tokens_per_s", "speed_of_light", "memory_bytes", "phase_seconds",
            "checkpoint_seconds"}
SETTINGS = ["--set", "train.steps=40", "--set", "checkpoint.every_steps=4", "--set", "probe=null",
            "--set", "model.lora={rank: 4, dropout: 0.1}", "--set", "batch.max_tokens_per_rank=45"]
SLOW_US = 20_000  # writing then takes 8 times that, sealing 14 times
# At what a start is aimed -> how often.
AIMS = {"start-up": 0.15, "step": 0.25, "writing": 0.35, "sealing": 0.25}
SECONDS = 120  # within which a job must have ended


def start(folder: Path, *arguments: str, ranks: int = 2,
          variables: dict[str, str] | None = None) -> subprocess.Popen:
    """`safegrad train config.yaml ARGUMENTS` under mpirun; the ranks alone get the variables."""
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMP_NUM_THREADS": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    passed = [word for key, value in (variables or {}).items() for word in ("-x", f"{key}={value}")]
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", *passed,
               "-n", str(ranks), PROGRAM, "train", "config.yaml", *arguments]
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
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def model(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "model").iterdir()}


def verify_checkpoints(output: Path) -> int:
    """Checks every complete checkpoint with coreutils; how many there are."""
    folders = [path for path in output.glob("checkpoints/step-*") if path.suffix == ""]
    for path in folders:
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=path,
                       check=True)
    return len(folders)


def last_step(output: Path) -> int:
    """Of the last whole line of metrics.jsonl."""
    try:
        lines = (output / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


class Watch:
    """What the ranks of one start are at, told from the files that they make."""

    def __init__(self, output: Path):
        self.output = output
        self.config = self.config_time()
        self.resumed_from = self.latest()

    def config_time(self) -> int:
        path = self.output / "config.yaml"
        return path.stat().st_mtime_ns if path.exists() else 0

    def latest(self) -> int:
        path = self.output / "checkpoints/latest"
        return int(path.read_text()[len("step-"):]) if path.exists() else 0

    def phase(self) -> str:
        # Each start writes config.yaml anew once it has cut metrics.jsonl.
        if self.config_time() == self.config or last_step(self.output) <= self.resumed_from:
            return "start-up"
        names = {path.name for path in self.output.glob("checkpoints/step-*")}
        unfinished = [name for name in names if name.endswith(".tmp")]
        complete = [int(name[len("step-"):]) for name in names if "." not in name]
        if any(self.output.glob("checkpoints/step-*.tmp/manifest.json*")):
            return "sealing"
        if unfinished:
            return "writing"
        return "sealing" if complete and max(complete) != self.latest() else "step"


@dataclass
class Tally:
    kills: Counter = field(default_factory=Counter)  # by what the ranks were at
    whole_jobs: int = 0       # kills that took all ranks at once
    ranks: Counter = field(default_factory=Counter)  # by the number of ranks
    resumed: int = 0          # starts that went on from a checkpoint
    finished: list[int] = field(default_factory=list)  # starts that each finished run took


def wait_for(job: subprocess.Popen, watch: Watch, aim: str, chance: random.Random,
             start_up: float) -> bool:
    """Until a random instant of the phase that is aimed at; false if the job has ended before."""
    if aim == "start-up":
        deadline = time.monotonic() + start_up * chance.random()
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return job.poll() is None
    entries, before = chance.randint(1, 3), ""
    later = SLOW_US * 1e-6 * (8 if aim == "writing" else 14) * chance.random() * 0.8
    while job.poll() is None:
        phase = watch.phase()
        entries -= phase == aim and before != aim
        before = phase
        if entries == 0:
            time.sleep(later)
            return True
        time.sleep(0.002)
    return False


def kill(job: subprocess.Popen, watch: Watch, chance: random.Random, tally: Tally) -> None:
    """Kills one rank or all; counts it under what they were at."""
    victim, everyone = chance.random(), chance.random() < 0.35
    alive = ranks_of(job)
    if not alive:
        return
    victims = alive if everyone else [alive[int(victim * len(alive))]]
    try:
        for pid in alive:  # what they are at stays so while it is looked up
            os.kill(pid, signal.SIGSTOP)
        phase = watch.phase()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for pid in set(alive) - set(victims):
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:  # ended by itself in that very moment
        return
    tally.kills[phase] += 1
    tally.whole_jobs += everyone


def soak(folder: Path, kills: int, seed: int, ranks: tuple[int, ...] = (2,)) -> Tally:
    """AssertionError where a run that was killed ends otherwise than one that was not."""
    chance = random.Random(seed)
    slow = disk(folder, slow_us=SLOW_US)
    output = folder / "killed"
    expected, tally = {}, Tally()
    start_up, starts, size = 0.0, 0, ranks[0]
    while tally.kills.total() < kills or starts > 0:
        if size not in expected:
            alone = folder / f"alone-{size}"
            begin, watch = time.monotonic(), Watch(alone)
            job = start(folder, *SETTINGS, "--set", f"output={alone.name}", ranks=size)
            while job.poll() is None and watch.phase() == "start-up":
                time.sleep(0.01)
            start_up = max(start_up, time.monotonic() - begin)
            assert job.wait(SECONDS) == 0, job.stderr.read()
            expected[size] = metrics(alone), model(alone)

        watch = Watch(output)
        job = start(folder, *SETTINGS, "--set", "output=killed", "--resume", "auto", ranks=size,
                    variables=slow)
        starts += 1
        if tally.kills.total() < kills:
            aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
            if wait_for(job, watch, aim, chance, start_up):
                kill(job, watch, chance, tally)
        out, err = job.communicate(timeout=SECONDS)
        tally.resumed += "resumes after step" in out
        verify_checkpoints(output)
        print(f"\r{tally.kills.total()} kills", end="", file=sys.stderr, flush=True)
        if job.returncode != 0:
            assert "error:" not in err, err  # killed, and no other reason
            continue
        assert metrics(output) == expected[size][0], "the metrics differ"
        assert model(output) == expected[size][1], "the model differs"
        tally.finished.append(starts)
        tally.ranks[size] += starts
        starts, size = 0, chance.choice(ranks)
        shutil.rmtree(output)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="safegrad-soak-") as folder:
        write_job(Path(folder))
        tally = soak(Path(folder), arguments.kills, arguments.seed, tuple(arguments.ranks))
    at = ", ".join(f"{tally.kills[aim]} {aim}" for aim in AIMS)
    sizes = ", ".join(f"{count} on {size}" for size, count in sorted(tally.ranks.items()))
    print(f"\n{tally.kills.total()} kills survived ({at}; {tally.whole_jobs} of all ranks at "
          f"once); starts: {sizes} ranks; {tally.resumed} resumes; {len(tally.finished)} runs "
          f"reached their end, each as the one left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
