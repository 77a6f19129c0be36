"""launch/slurm.sbatch on a real Slurm of one node, which the test starts on this machine."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from soak import metrics, model, start
from tiny_job import PROGRAM, ROOT

CLUSTER = Path(__file__).with_name("slurm_cluster")
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
SECONDS = 180

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
            yield os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "SAFEGRAD_PROGRAM": PROGRAM,
                                "SAFEGRAD_LAUNCH": str(ROOT / "launch")}
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


STEPS = 4000  # many seconds: Slurm takes a while to preempt a job
LONG = ["config.yaml", "--set", f"train.steps={STEPS}", "--set", "probe=null", "--set",
        "model.lora={rank: 4, dropout: 0.1}"]


@pytest.fixture
def whole(job):
    """Metrics and model of a run that nobody interrupted."""
    alone = start(job, *LONG[1:], "--set", "output=whole")
    _, err = alone.communicate(timeout=SECONDS)
    assert alone.returncode == 0, err
    return metrics(job / "whole"), model(job / "whole")


def begin(job: Path, environment: dict, *options: str,
          template: str = "slurm.sbatch") -> tuple[subprocess.Popen, str]:
    """`sbatch --wait` of a long run that has done some steps by now, and the job's number."""
    waiting = subprocess.Popen(
        ["sbatch", "--wait", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", *options,
         "--output=job.log", ROOT / "launch" / template, *LONG],
        cwd=job, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    number = waiting.stdout.readline().split(";")[0].strip()
    deadline = time.monotonic() + SECONDS
    path = job / "out/metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < 5:
        assert time.monotonic() < deadline, (job / "job.log").read_text()
        time.sleep(0.1)
    return waiting, number


def show(environment: dict, number: str) -> str:
    return subprocess.run(["scontrol", "show", "job", number], env=environment, check=True,
                          capture_output=True, text=True).stdout


def expect_whole(job: Path, environment: dict, waiting: subprocess.Popen, number: str,
                 whole) -> str:
    """The job was stopped once, went on by itself, and lost nothing; its log."""
    deadline = time.monotonic() + SECONDS
    while not re.search(r"JobState=PENDING(.|\n)*Restarts=1 ", show(environment, number)):
        assert waiting.poll() is None, (job / "job.log").read_text()
        assert time.monotonic() < deadline, show(environment, number)
        time.sleep(0.2)
    # Slurm would let it wait for two minutes; at once the node would not know its credential.
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now+5seconds"],
                   env=environment, check=True)
    waiting.communicate(timeout=SECONDS)
    log = (job / "job.log").read_text()
    assert waiting.returncode == 0, log
    stopped = re.search(r"stopped on request after step (\d+)", log)
    assert stopped, log
    assert f"resumes after step {stopped[1]} from out/checkpoints/" in log
    assert 5 <= int(stopped[1]) < STEPS
    assert (metrics(job / "out"), model(job / "out")) == whole
    return log


# What the templates' --signal does ahead of the time limit: to the job's steps, or to the script.
@pytest.mark.parametrize("template, warn", [
    ("slurm.sbatch", ["scancel", "--signal=USR1"]),
    ("slurm-mpirun.sbatch", ["scancel", "--signal=USR1", "--batch"])])
def test_a_warned_job_queues_itself_again_and_ends_as_if_it_had_not_been(
        job, slurm, whole, template, warn):
    waiting, number = begin(job, slurm, template=template)
    subprocess.run([*warn, number], env=slurm, check=True)

    log = expect_whole(job, slurm, waiting, number, whole)
    assert "queues itself again" in log


def test_a_preempted_job_goes_on_when_its_node_is_free_again(job, slurm, whole):
    waiting, number = begin(job, slurm)
    subprocess.run(["sbatch", "--wait", "--partition=urgent", "--exclusive", "--output=urgent.log",
                    "--wrap", "sleep 1"], cwd=job, env=slurm, check=True, timeout=SECONDS,
                   stdin=subprocess.DEVNULL, capture_output=True)

    expect_whole(job, slurm, waiting, number, whole)


def test_a_job_that_may_not_be_requeued_ends_with_the_code_that_says_so(job, slurm):
    waiting, number = begin(job, slurm, "--no-requeue")
    subprocess.run(["scancel", "--signal=USR1", number], env=slurm, check=True)
    waiting.communicate(timeout=SECONDS)

    log = (job / "job.log").read_text()
    assert waiting.returncode == 75, log
    assert "not queued again; submit it again with --resume auto" in log
    code, log = submit(job, slurm, *LONG, "--resume", "auto")
    assert code == 0, log
    assert "resumes after step " in log


def test_a_cancelled_job_does_not_come_back(job, slurm):
    waiting, number = begin(job, slurm)
    subprocess.run(["scancel", number], env=slurm, check=True)
    waiting.communicate(timeout=SECONDS)

    assert waiting.returncode != 0
    deadline = time.monotonic() + SECONDS
    while "JobState=COMPLETING" in (shown := show(slurm, number)):  # processes are still leaving
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)
    assert "JobState=CANCELLED" in shown, shown
    assert "Restarts=0 " in shown
