"""What a person meets: a mistyped command line, a file that is not there, logs, -v."""

from __future__ import annotations

import os
import pty
import re
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from test_cli import SECONDS, run
from tiny_job import PROGRAM

# what is typed -> what is said
TYPED_WRONG = {
    "foo": ["no such command: foo (there are: train, check, ", "; safegrad --help says more"],
    "trian config.yaml": ["no such command: trian; did you mean train? (there are: train, "],
    "--fast": ["no such option: --fast (there are: --help, --version)", "safegrad --help"],
    "": ["a command is missing (there are: train, check, ", "safegrad --help says more"],
    "train config.yaml --steps 3": [
        "train: no such option: --steps; did you mean --set train.steps=3? (there are: --help, ",
        "safegrad train --help says more"],
    "check config.yaml --optimizer.lr=2e-5": ["; did you mean --set optimizer.lr=2e-5? ("],
    "train config.yaml --max-skipped-steps": ["; did you mean --set train.max_skipped_steps=VALUE"],
    "train config.yaml --resum auto": ["train: no such option: --resum; did you mean --resume? ("],
    "train config.yaml -x": ["train: no such option: -x (there are: ", "--set, --quiet, --verbose"],
    "plan config.yaml --rank 3": ["; did you mean --ranks or --set model.lora.rank=3? ("],
    "plan config.yaml": ["plan: --ranks is required; safegrad plan --help says more"],
    "train": ["train: config is required; safegrad train --help says more"],
    "check a.yaml b.yaml": ["check: b.yaml is one argument too many; safegrad check --help"],
    "train config.yaml -q -v": ["train: --quiet excludes --verbose; "],
    "check config.yaml --ranks 0": ["check: --ranks: Value 0 not in range 1 to 1048576; safegrad"],
    "check config.yaml --ranks 2,4": ["Value 2,4 not in range 1 to 1048576; "],
    "audit config.yaml --top -1": ["Value -1 not in range 0 to "],
    "plan config.yaml --ranks 2 --ranks-per-node 0": ["Value 0 not in range 1 to 1048576; "],
    "inspect out --steps 3": ["inspect: no such option: --steps (there are: --help); "],
}


@pytest.mark.parametrize("typed", TYPED_WRONG)
def test_a_mistyped_command_line_is_told_what_is_right(typed, tmp_path):
    done = subprocess.run([PROGRAM, *typed.split()], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=SECONDS)

    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    for text in TYPED_WRONG[typed]:
        assert text in done.stderr


@pytest.mark.parametrize("arguments, told", [
    ([], "config.yaml:4: data.task: task.safetensors: "),
    (["--set", "data.task=no.safetensors"], "config.yaml: --set data.task: no.safetensors: "),
    (["--set", "data.task=align.safetensors"], "config.yaml:17: probe[1].file: choice.safetensors"),
    (["--set", "model.path=no"], "config.yaml: --set model.path: no"),
])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_file_that_is_not_there_is_named_with_the_key_that_gave_it(job, command, arguments, told):
    (job / "task.safetensors").unlink()
    (job / "choice.safetensors").unlink()
    more = ["--ranks", "2", "--json"] if command == "plan" else []
    ended = run(job, command, "config.yaml", *arguments, *more, ranks=1)

    assert (ended.code, ended.out) == (1, "")
    told = told if command == "train" else told.replace("safetensors: ", "safetensors is not there")
    assert ended.err.startswith(f"error: {told}") and len(ended.err.splitlines()) == 1


def test_verbose_says_who_computes_what_was_opened_and_where_the_time_went(job):
    plain = run(job, "train", "config.yaml")
    ended = run(job, "train", "config.yaml", "-v")

    assert (plain.code, ended.code, ended.err) == (0, 0, "")
    added = [line for line in ended.out.splitlines()
             if re.match(r"rank \d|weights|data\.|probe  |before", line)]
    host = socket.gethostname()
    ranks = [re.fullmatch(r"rank (\d): (.*), process (\d+), cpu, 1 thread", line)
             for line in added[:2]]
    assert [(rank[1], rank[2]) for rank in ranks] == [("0", host), ("1", host)]
    assert ranks[0][3] != ranks[1][3]
    assert [line.split()[0] for line in added[2:-1]] == [
        "weights", "data.task", "data.align", "probe", "probe"]
    times = re.fullmatch(
        r"before the first step: (\S+) s \(opening (\S+) s, connecting and output folder (\S+) s,"
        r" weights and reference (\S+) s, measuring the speed of light (\S+) s\)", added[-1])
    total, *parts = map(float, times.groups())
    assert total == pytest.approx(sum(parts), abs=0.03)  # each is rounded to 0.01
    assert parts[-1] >= 0.5  # which is what it takes
    assert not re.search(r"^(rank \d:|weights|before)", plain.out, re.M)


def rank_writes(job: Path, stdout) -> None:
    environment = os.environ | {"TERM": "xterm", "OMPI_ALLOW_RUN_AS_ROOT": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", "2", "sh", "-c",
               'test -t 1 && echo "a terminal" && "$0" train config.yaml', PROGRAM]
    subprocess.run(command, cwd=job, env=environment, stdin=subprocess.DEVNULL, stdout=stdout,
                   timeout=SECONDS, check=True)


def test_a_log_of_a_bare_mpirun_has_no_terminal_codes(job):
    with open(job / "log", "wb") as log:
        rank_writes(job, log)

    text = (job / "log").read_bytes()
    assert b"a terminal" in text  # what the ranks were given
    assert b"step 3/3" in text.replace(b"  ", b" ") and b"done in" in text
    assert b"\x1b" not in text and b"\r" not in text.replace(b"\r\n", b"\n")


def test_a_terminal_of_a_bare_mpirun_is_redrawn_in_place(job):
    controller, terminal = pty.openpty()
    shown = []

    def read():
        try:
            while part := os.read(controller, 65536):
                shown.append(part)
        except OSError:  # its other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    rank_writes(job, terminal)
    os.close(terminal)
    reader.join(SECONDS)
    os.close(controller)
    assert b"\x1b[K" in b"".join(shown)
