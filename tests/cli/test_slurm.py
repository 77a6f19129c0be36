"""launch/slurm.sbatch on a real Slurm of one node, which the test starts on this machine."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from tiny_job import PROGRAM, ROOT

CLUSTER = Path(__file__).with_name("slurm_cluster")
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
SECONDS = 60

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root to start Slurm's daemons"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def slurm():
    """The environment in which sbatch and srun reach the cluster."""
    with tempfile.TemporaryDirectory(prefix="safegrad-slurm-") as folder:
        try:
            subprocess.run([CLUSTER, "start", folder], check=True, timeout=SECONDS)
            yield os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "SAFEGRAD_PROGRAM": PROGRAM}
        finally:
            subprocess.run([CLUSTER, "stop", folder], check=True, timeout=SECONDS)


def submit(job: Path, environment: dict, *arguments: str) -> tuple[int, str]:
    """Exit code and log of `sbatch launch/slurm.sbatch ARGUMENTS` on two ranks, from `job`."""
    done = subprocess.run(
        ["sbatch", "--wait", "--ntasks-per-node=2", "--cpus-per-task=1", "--output=job.log",
         ROOT / "launch/slurm.sbatch", *arguments],
        cwd=job, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=SECONDS)
    log = job / "job.log"
    return done.returncode, log.read_text() if log.exists() else done.stderr


def test_the_template_trains_on_the_ranks_that_were_asked_for(job, slurm):
    code, log = submit(job, slurm, "config.yaml")

    assert code == 0, log
    assert "2 ranks, mpi, cpu, fully sharded" in log
    steps = [json.loads(line) for line in (job / "out/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert (job / "out/model/model.safetensors").exists()


def test_a_mistake_fails_the_job_with_one_line(job, slurm):
    code, log = submit(job, slurm, "config.yaml", "--set", "objective.rhoo=1")

    assert code == 1
    assert log.count("error: ") == 1 + log.count("srun: error: ")
    assert "did you mean objective.rho?" in log


def test_ranks_that_do_not_find_each_other_write_nothing(job, slurm):
    code, _ = submit(job, slurm | {"SAFEGRAD_MPI": "none"}, "config.yaml")

    assert code != 0
    assert not (job / "out").exists()


def test_a_warning_signal_ends_the_job_with_a_checkpoint_and_its_exit_code(job, slurm):
    arguments = ["config.yaml", "--set", "train.steps=800", "--set", "probe=null"]
    waiting = subprocess.Popen(
        ["sbatch", "--wait", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1",
         "--output=job.log", ROOT / "launch/slurm.sbatch", *arguments],
        cwd=job, env=slurm, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    number = waiting.stdout.readline().split(";")[0].strip()
    deadline = time.monotonic() + SECONDS
    while not (job / "out/metrics.jsonl").exists():
        assert time.monotonic() < deadline, (job / "job.log").read_text()
        time.sleep(0.1)
    # What --signal=USR1@SECONDS does ahead of the time limit: the signal goes to the job's steps.
    subprocess.run(["scancel", "--signal=USR1", number], env=slurm, check=True)
    waiting.communicate(timeout=SECONDS)

    log = (job / "job.log").read_text()
    assert waiting.returncode == 75, log
    assert "stopped on request after step " in log
    code, log = submit(job, slurm, *arguments, "--resume", "auto")
    assert code == 0, log
    assert "resumes after step " in log
