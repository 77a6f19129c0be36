"""launch/local on this machine, launch/hosts on two that are made for the test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from tiny_job import PROGRAM, ROOT, job  # noqa: F401

LOCAL, HOSTS = ROOT / "launch/local", ROOT / "launch/hosts"
TWO_HOSTS = Path(__file__).with_name("two_hosts")
ENOUGH = 120  # seconds, for a job of seconds on a busy machine


def start(*command, folder: Path, **environment) -> subprocess.Popen:
    settings = os.environ | {"SAFEGRAD_PROGRAM": PROGRAM, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [str(word) for word in command], cwd=folder, env=settings, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(running: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = running.communicate(timeout=ENOUGH)
        return running.returncode, output
    finally:
        running.kill()


def await_steps(job: Path, steps: int, running: subprocess.Popen) -> None:
    metrics, end = job / "out/metrics.jsonl", time.monotonic() + ENOUGH
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def recorded(job: Path, key: str, output: str = "out") -> list:
    """`key` of every step."""
    lines = (job / output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def recorded_steps(job: Path) -> list[int]:
    return recorded(job, "step")


def test_local_trains_on_the_ranks_that_were_asked_for(job):
    code, output = finish(start(LOCAL, "-n", 3, "train", "config.yaml", folder=job))
    assert code == 0, output
    assert "3 ranks, mpi, cpu, fully sharded" in output
    assert recorded_steps(job) == [1, 2, 3] and (job / "out/model/model.safetensors").exists()


@pytest.mark.parametrize("request_", [signal.SIGINT, signal.SIGTERM])
def test_local_writes_a_checkpoint_when_it_is_interrupted(job, request_):
    many = ["--set", "train.steps=100000", "--set", "probe=null"]
    running = start(LOCAL, "-n", 2, "train", "config.yaml", *many, folder=job)
    await_steps(job, 2, running)
    running.send_signal(request_)
    code, output = finish(running)
    assert code == 75, output
    assert "asked to stop" in output and "stopped on request after step" in output
    done = recorded_steps(job)[-1]
    assert (job / f"out/checkpoints/step-{done:06}/manifest.json").exists()

    code, output = finish(start(
        LOCAL, "-n", 3, "train", "config.yaml", "--resume", "auto", *many[2:],
        "--set", f"train.steps={done + 2}", "--allow-change", folder=job))
    assert code == 0 and f"resumes after step {done}" in output, output
    assert recorded_steps(job) == list(range(1, done + 3))


@pytest.mark.parametrize("words", [
    [], ["train", "config.yaml"], ["-n", "0", "train", "config.yaml"],
    ["-n", "two", "train", "config.yaml"], ["-n", "2", "train"]])
def test_local_says_how_it_is_used(job, words):
    code, output = finish(start(LOCAL, *words, folder=job))
    assert code == 1 and output.startswith("error: usage: launch/local -n RANKS")


@pytest.mark.parametrize("script", [LOCAL, HOSTS])
def test_help_is_no_mistake(tmp_path, script):
    code, output = finish(start(script, "--help", folder=tmp_path))
    assert code == 0 and output.startswith(f"usage: launch/{Path(script).name} ")
    assert "train|check|evaluate|audit CONFIG" in output


@pytest.mark.parametrize("content, message", [
    ("a", "a line is"), ("", "names no machine"), ("# none\n", "names no machine"),
    ("a\n", "a line is: NAME slots=RANKS"), ("a slots=0\n", "a line is"),
    ("a slots=1 more\n", "a line is"),
    ("no-such-machine.invalid slots=1\n", "no-such-machine.invalid: not reached with")])
def test_hosts_says_what_is_wrong_with_its_file(job, content, message):
    (job / "hosts.txt").write_text(content)
    code, output = finish(start(HOSTS, "hosts.txt", "train", "config.yaml", folder=job))
    assert code == 1 and message in output, output
    assert not (job / "out").exists()


@pytest.fixture
def two_hosts():
    """Runs launch/hosts over two machines; .cut() pulls the cable between them."""
    missing = [name for name in ("ip", "sshd", "ssh", "unshare") if not shutil.which(name)]
    if os.getuid() != 0 or missing:
        pytest.skip("needs root and iproute2, openssh-server; missing:"
                    f" {', '.join(missing) or 'root'}")
    probe = subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"],
                           capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"this machine allows no namespaces: {probe.stderr.strip()}")

    class Hosts:
        def __init__(self, folder: Path):
            self.folder = folder

        def control(self, action: str, *arguments) -> None:
            subprocess.run([TWO_HOSTS, action, self.folder, *arguments], check=True, timeout=ENOUGH)

        def launch(self, job: Path, *arguments) -> subprocess.Popen:
            return start(TWO_HOSTS, "run", self.folder, HOSTS, self.folder / "hosts.txt",
                         *arguments, folder=job, SAFEGRAD_SSH=str(self.folder / "ssh.sh"))

    with tempfile.TemporaryDirectory(prefix="safegrad-hosts-") as folder:
        hosts = Hosts(Path(folder))
        hosts.control("stop")  # what a killed test has left
        try:
            hosts.control("start")
            yield hosts
        finally:
            hosts.control("stop")


def test_two_hosts_train_together_as_one_does(job, two_hosts):
    code, output = finish(two_hosts.launch(job, "train", "config.yaml"))
    assert code == 0, output
    assert "2 ranks, mpi, cpu, fully sharded" in output
    apart = recorded(job, "loss_task")
    code, output = finish(start(LOCAL, "-n", 2, "train", "config.yaml", "--set", "output=near",
                                folder=job))
    assert code == 0, output
    near = recorded(job, "loss_task", "near")
    # Sums run in rank order by message and in shared memory alike: the same bits.
    assert apart == near and len(near) == 3


def test_a_cut_cable_ends_the_job_and_is_told(job, two_hosts):
    running = two_hosts.launch(job, "train", "config.yaml", "--set", "train.steps=100000", "--set",
                               "probe=null", "--set", "parallel.timeout_seconds=5")
    await_steps(job, 1, running)
    two_hosts.control("cut")
    code, output = finish(running)
    assert code == 2, output
    assert "no progress for 5 s (parallel.timeout_seconds)" in output
    assert "error: lost the connection to a machine of" in output
    (incident,) = (job / "out/flight").iterdir()
    names = sorted(path.name for path in incident.glob("rank-*.json"))
    assert names == ["rank-0.json", "rank-1.json"]
