"""Runs that are stopped, killed or out of room go on as if nothing had been; what does not fit is
refused.

Real jobs of two ranks under mpirun, on a tiny Qwen2 model.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from disk import disk
from soak import metrics, model, ranks_of, soak, start, verify_checkpoints
from test_cli import edit, run, snapshot
from tiny_job import sequences, write_tokens

STOPPED = 75
SECONDS = 120  # within which whole runs must have ended, on a busy machine too


def train(folder: Path, *arguments: str):
    return run(folder, "train", "config.yaml", *arguments, seconds=SECONDS)


def wait_for_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + SECONDS
    path = output / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"no {count} steps"
        time.sleep(0.01)


def signal_rank(rank: int, number: int):
    return lambda job: os.kill(ranks_of(job)[rank], number)


LONG = ["--set", "train.steps=300"]
LORA = ["--set", "model.lora={rank: 4, dropout: 0.1}", "--set", "batch.max_tokens_per_rank=45"]
# how it is asked -> (the signal, what else is set)
WAYS = {
    "SIGTERM to one rank": (signal_rank(1, signal.SIGTERM), LORA),
    "SIGUSR1 to one rank": (signal_rank(0, signal.SIGUSR1), ["--set", "checkpoint.every_steps=7"]),
    "Ctrl-C's signal to one rank": (signal_rank(0, signal.SIGINT), []),
    "SIGUSR1 to mpirun": (lambda job: job.send_signal(signal.SIGUSR1), []),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_end(job, way):
    ask, settings = WAYS[way]
    settings = [*LONG, *settings]
    assert train(job, *settings, "--set", "output=whole").code == 0
    stopped = start(job, *settings)
    wait_for_steps(job / "out", 10)
    ask(stopped)
    out, err = stopped.communicate(timeout=SECONDS)

    assert (stopped.returncode, err) == (STOPPED, "")
    steps = len(metrics(job / "out"))
    assert 10 <= steps < 300
    assert f"stopped on request after step {steps}; run again with --resume auto" in out
    assert (job / "out/checkpoints/latest").read_text() == f"step-{steps:06}\n"
    assert not (job / "out/model").exists()
    assert verify_checkpoints(job / "out") >= 1

    resumed = train(job, *settings, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert f"resumes after step {steps} from out/checkpoints/step-{steps:06}" in resumed.out
    assert metrics(job / "out") == metrics(job / "whole")
    assert model(job / "out") == model(job / "whole")


def test_a_second_signal_ends_at_once_and_the_same_one_twice_does_not(job):
    running = start(job, *LONG)
    wait_for_steps(job / "out", 3)
    first, second = ranks_of(running)
    os.kill(second, signal.SIGSTOP)  # no step will end any more
    begin = time.monotonic()
    for again in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):  # launcher and batch system
        os.kill(first, again)
        time.sleep(0.05)
    # On a machine so busy that a second has passed this says nothing.
    alive = ranks_of(running)
    assert alive == [first, second] or time.monotonic() - begin > 1
    time.sleep(1.1)
    os.kill(first, signal.SIGUSR1)
    running.communicate(timeout=SECONDS)

    assert running.returncode == 128 + signal.SIGUSR1
    assert not list((job / "out").glob("checkpoints/step-*"))


def test_a_second_job_on_the_same_output_is_refused_and_touches_nothing(job):
    first = start(job, *LONG)
    wait_for_steps(job / "out", 3)
    holder = ranks_of(first)[0]
    for pid in ranks_of(first):
        os.kill(pid, signal.SIGSTOP)  # so that nothing but the second job could change a file
    before = snapshot(job / "out")
    second = train(job, "--resume", "auto", "--set", "output=./out/")
    after = snapshot(job / "out")
    for pid in ranks_of(first):
        os.kill(pid, signal.SIGKILL)
    first.communicate(timeout=SECONDS)

    assert (second.code, second.out) == (1, "")
    assert len(second.err.splitlines()) == 1, second.err
    assert f"error: output: ./out/ is in use by process {holder} on " in second.err
    assert "has ended or was killed holds nothing" in second.err and "remove" not in second.err
    assert " since 20" in second.err and "--set output=FOLDER" in second.err
    assert after == before
    assert train(job, "--resume", "auto").code == 0, "the lock of a job that was killed is free"


def test_ten_kills_at_random_instants_lose_nothing(job):
    tally = soak(job, kills=10, seed=5)

    assert tally.kills.total() == 10
    assert tally.kills["writing"] + tally.kills["sealing"] >= 1
    assert tally.resumed >= 1 and tally.finished


@pytest.fixture
def saved(job):
    """A run of 8 steps that was left with checkpoints after 3 and 6."""
    assert train(job, "--set", "train.steps=8", "--set", "checkpoint.every_steps=3").code == 0
    edit(job / "config.yaml", "steps: 3\n", "steps: 8\n")
    return job


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


LAST = "out/checkpoints/step-000006"
SHARD = LAST + "/shard-00001-of-00002.safetensors"
# what is wrong -> (how it comes about, what is typed, what the message says)
REFUSED = {
    "no --resume": (lambda f: None, [],
                    ["out/checkpoints has checkpoints, the newest after step 6", "--resume auto"]),
    "another learning rate": (
        lambda f: None, ["--resume", "auto", "--set", "optimizer.lr=2e-3"],
        [LAST, "optimizer.lr: was 0.001, is 0.002", "--allow-change"]),
    "other data under the same name": (
        lambda f: write_tokens(f, "task", sequences(12, seed=9)), ["--resume", "auto"],
        ["data.task content", "--allow-change"]),
    "another model under the same name": (
        lambda f: flip_bit(f / "model/model.safetensors"), ["--resume", "auto"],
        ["model weights", "--allow-change"]),
    "the run's folder": (
        lambda f: None, ["--resume", "out"],
        ["--resume out: this is a run's folder", "out/checkpoints/step-000100"]),
    "no such checkpoint": (
        lambda f: None, ["--resume", "out/checkpoints/step-000005"],
        ["--resume out/checkpoints/step-000005: there is no such folder"]),
    "a checkpoint that was not completed": (
        lambda f: shutil.copytree(f / LAST, f / (LAST + ".tmp")), ["--resume", LAST + ".tmp/"],
        [f"--resume {LAST}.tmp: this is what a crash left behind", "--resume auto"]),
    "a checkpoint of another run": (
        lambda f: shutil.copytree(f / LAST, f / "other/checkpoints/step-000006"),
        ["--resume", "other/checkpoints/step-000006"], ["has checkpoints of its own"]),
    "a flipped bit in a shard": (
        lambda f: flip_bit(f / SHARD), ["--resume", "auto"],
        [SHARD + ": is damaged", "--resume out/checkpoints/step-000003"]),
    "a shard that is missing": (
        lambda f: (f / SHARD).unlink(), ["--resume", LAST + "/"],
        [SHARD + ": cannot open", "--resume out/checkpoints/step-000003"]),
    "a flipped bit in the manifest": (
        lambda f: flip_bit(f / LAST / "manifest.json"), ["--resume", "auto"],
        [LAST + "/manifest.json: is damaged", "--resume out/checkpoints/step-000003"]),
    "--allow-change alone": (lambda f: None, ["--allow-change"], ["--resume"]),
}


def test_check_says_what_train_would_say_of_the_folder(saved):
    assert ("out (holds a run with checkpoints: train needs --resume auto there, or another folder)"
            ) in run(saved, "check", "config.yaml").out


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_does_not_fit_is_refused_with_one_line(saved, mistake):
    change, arguments, told = REFUSED[mistake]
    change(saved)
    before = {name: content for name, (content, _) in snapshot(saved).items()
              if "reference" not in name}

    ended = train(saved, *arguments)

    assert (ended.code, ended.out) == (1, "")
    assert len(ended.err.splitlines()) == 1, ended.err
    for text in told:
        assert text in ended.err
    assert {name: content for name, (content, _) in snapshot(saved).items()
            if "reference" not in name} == before


def test_a_change_that_is_allowed_is_told(saved):
    ended = train(saved, "--resume", "auto", "--set", "optimizer.lr=2e-3", "--allow-change")

    assert ended.code == 0
    assert f"warning: changed since {LAST}: optimizer.lr: was 0.001, is 0.002" in ended.err
    assert [line["lr"] for line in metrics(saved / "out")] == [1e-3] * 6 + [2e-3] * 2


def test_the_layout_and_the_place_of_the_data_may_change(saved):
    expected = metrics(saved / "out")
    shutil.move(saved / "task.safetensors", saved / "moved.safetensors")
    ended = run(saved, "train", "config.yaml", "--resume", "auto", "--set",
                "data.task=moved.safetensors", "--set", "parallel.shards=1", ranks=3)

    assert (ended.code, ended.err) == (0, "")
    for line, other in zip(metrics(saved / "out"), expected, strict=True):
        # float32 gradients summed in another order; 1e-5 is the promise
        assert line["loss_task"] == pytest.approx(other["loss_task"], rel=1e-5)


@pytest.mark.parametrize("latest", [None, "step-000009\n"])
def test_where_latest_is_wrong_auto_says_so_and_finds_the_newest(saved, latest):
    expected = metrics(saved / "out"), model(saved / "out")
    path = saved / "out/checkpoints/latest"
    path.write_text(latest) if latest else path.unlink()
    ended = train(saved, "--resume", "auto")

    assert ended.code == 0
    assert "warning: out/checkpoints/latest " in ended.err and LAST in ended.err
    assert "resumes after step 6" in ended.out
    assert (metrics(saved / "out"), model(saved / "out")) == expected


def test_auto_without_checkpoints_says_that_it_starts_at_the_beginning(job):
    ended = train(job, "--resume", "auto")

    assert (ended.code, ended.err) == (0, "")
    assert "no checkpoint in out/checkpoints: starts at the beginning" in ended.out


def test_metrics_that_a_crash_cut_short_are_measured_again(saved):
    expected = metrics(saved / "out")
    with (saved / "out/metrics.jsonl").open("a") as file:
        file.write('{"step":9,"lo')
    ended = train(saved, "--resume", "auto")

    assert ended.code == 0
    assert metrics(saved / "out") == expected
    assert (f"resumes after step 6 from {LAST}; done again: steps 7 to 8, the run had been"
            " through all of its steps\n") in ended.out
    assert re.search(r"^done in \S+ \(steps 7 to 8\) · task .* of 2 steps · model", ended.out, re.M)


def test_nothing_is_counted_as_saved_before_it_is_on_the_disk(job):
    diary = job / "diary"
    running = start(job, "--set", "checkpoint.every_steps=3", "--set", "train.steps=4", "--set",
                    "output=runs/out", variables=disk(job, diary=diary))
    _, err = running.communicate(timeout=SECONDS)
    assert (running.returncode, err) == (0, "")
    lines = [line.replace(f"{job}/runs/out", "OUT").replace(f"{job}", "HERE")
             for line in diary.read_text().splitlines()]
    step, shards = "OUT/checkpoints/step-000003", [f"shard-0000{i}-of-00002" for i in range(2)]

    def place(line: str) -> int:
        assert lines.count(line) == 1, (line, lines)
        return lines.index(line)

    # What must survive a power cut, each before what relies on it.
    sealed = place(f"rename {step}")
    assert place("sync OUT/metrics.jsonl") < sealed
    for shard in shards:
        synced = place(f"sync {step}.tmp/{shard}.safetensors.tmp")
        renamed = place(f"rename {step}.tmp/{shard}.safetensors")
        assert synced < renamed < place(f"sync {step}.tmp/manifest.json.tmp") < sealed
    assert place(f"rename {step}.tmp/SHA256SUMS") < sealed
    latest = place("sync OUT/checkpoints/latest.tmp")
    assert sealed < latest < place("rename OUT/checkpoints/latest")
    assert "sync OUT/checkpoints" in lines[sealed:latest]
    # New folders, in those that they are in.
    for made, above in (("mkdir HERE/runs", "sync HERE"), ("mkdir HERE/runs/out", "sync HERE/runs"),
                        ("mkdir OUT/checkpoints", "sync OUT"),
                        (f"mkdir {step}.tmp", "sync OUT/checkpoints")):
        made = made.replace("HERE/runs/out", "OUT")
        assert above in lines[place(made):sealed], above


def test_a_disk_that_lies_is_found_out_when_the_checkpoint_is_read(job):
    lying = start(job, "--set", "checkpoint.every_steps=3", "--set", "train.steps=8",
                  variables=disk(job, flip="step-000006.tmp/shard-00001"))
    _, err = lying.communicate(timeout=SECONDS)
    assert (lying.returncode, err) == (0, ""), "training itself does not see it"
    edit(job / "config.yaml", "steps: 3\n", "steps: 8\n")
    ended = train(job, "--resume", "auto")

    assert ended.code == 1
    assert SHARD + ": is damaged" in ended.err
    assert "--resume out/checkpoints/step-000003" in ended.err


@pytest.fixture
def small_disk(job):
    """output/checkpoints on a file system with room for one checkpoint (its size is settable)."""
    folder = job / "out/checkpoints"
    folder.mkdir(parents=True)

    def mount(options: str) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                              capture_output=True).returncode == 0

    if os.getuid() != 0 or not mount("size=300k"):
        pytest.skip("a tmpfs cannot be mounted here")
    yield lambda options: mount("remount," + options)
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_job_and_leaves_the_last_checkpoint(job, small_disk):
    settings = ["--set", "train.steps=20", "--set", "checkpoint.every_steps=3"]
    assert train(job, *settings, "--set", "output=whole").code == 0
    ended = train(job, *settings)

    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    assert "out/checkpoints/step-000006.tmp" in ended.err
    assert "No space left on device" in ended.err
    assert verify_checkpoints(job / "out") == 1
    assert small_disk("size=8m")
    assert train(job, *settings, "--resume", "auto").code == 0
    assert metrics(job / "out") == metrics(job / "whole")
    assert model(job / "out") == model(job / "whole")


def test_a_folder_that_becomes_read_only_ends_the_job(job, small_disk):
    assert small_disk("ro")
    ended = train(job, "--set", "checkpoint.every_steps=1", "--set", "train.steps=20")

    assert ended.code == 2
    told = "error: out/checkpoints/step-000001.tmp: cannot be made: Read-only file system"
    assert told in ended.err


# what hangs (on one of the ranks) -> ranks, the rank that says so, what it was at
HANGING = {
    "step-000006.tmp/shard-00001-of-00002.safetensors.tmp":
        (2, 1, "writing out/checkpoints/step-000006.tmp/shard-00001-of-00002.safetensors"),
    "step-000006.tmp/shard-00000-of-00001.safetensors.tmp":
        (1, 0, "writing out/checkpoints/step-000006.tmp/shard-00000-of-00001.safetensors"),
    "checkpoints/step-000006": (2, 0, "sealing out/checkpoints/step-000006"),
    "checkpoints/latest": (2, 0, "sealing out/checkpoints/step-000003"),
}


@pytest.mark.parametrize("path", HANGING)
def test_a_disk_that_hangs_ends_the_job_and_leaves_the_last_checkpoint(job, path):
    ranks, rank, doing = HANGING[path]
    settings = ["--set", "train.steps=20", "--set", "checkpoint.every_steps=3"]
    hanging = start(job, *settings, "--set", "parallel.timeout_seconds=5", ranks=ranks,
                    variables=disk(job, hang=path))
    _, err = hanging.communicate(timeout=SECONDS)

    assert hanging.returncode != 0
    assert err.count("error: ") == 1, err
    assert f"error: no progress for 5 s (parallel.timeout_seconds): rank {rank} (" in err
    assert f" is still {doing}" in err and "--resume auto" in err
    assert verify_checkpoints(job / "out") >= 1
    resumed = train(job, *settings, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert len(metrics(job / "out")) == 20


def test_a_hanging_file_system_is_named_where_no_rank_is_writing(job):
    running = start(job, "--set", "train.steps=1000000", "--set", "parallel.timeout_seconds=5",
                    variables=disk(job, hang=f"{job.name}/out"))
    _, err = running.communicate(timeout=SECONDS)

    assert running.returncode != 0
    assert "error: no progress for 5 s (parallel.timeout_seconds): rank " in err
    assert " is still looking into out: the disk or file system does not answer" in err
