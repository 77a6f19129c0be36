"""The shell commands of README.md and docs/, and a folder in which they can be tried quickly.

A command is a line of an indented block, or of a fenced one without another language than sh, and
a code span that begins with a program: of several words, one of which names a path, or of three.
Every other block has to be listed below or fenced with its language.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file
from tiny_job import MODEL, PROGRAM, ROOT
from tiny_tokenizer import QWEN_TEMPLATE, make_folder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a command may begin with, after settings of the environment.
PROGRAMS = re.compile(
    r"(launch|build|tools|tests|benchmarks)/\S+|\.venv(-\w+)?/bin/\S+|safegrad(-tool)?|mpirun|"
    r"torchrun|pip|python3?|pytest|cmake|ctest|ninja|source|git|cd|export|sbatch|srun|scancel|"
    r"scontrol|kill|sha256sum|tensorboard|wandb")
SETTING = re.compile(r"[A-Z_]+=\S* ")
# How blocks begin that hold no command: formulas, output, listings of files.
NOT_COMMANDS = (
    "error: ", "u = ∇ L_task", "if u·a < 0:", "start    plain   SafeGrad", "src/core/",
    '{"prompt"', '{"index"', "u_i = ∇", "⟨∂L/∂W, A⟩",
    "model = AutoModel", "base = AutoModel", "bin/safegrad", "200 harmful prompts, HarmBench",
    "plain             safegrad", "step-000100/shard", '"not_finite"')


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


class UnknownBlock(Exception):
    """A block that is neither commands nor known to be none."""


def program_of(text: str) -> str | None:
    """What a line starts, if it is a command."""
    while setting := SETTING.match(text):
        text = text[setting.end():]
    word = text.split(" ", 1)[0]
    return word if PROGRAMS.fullmatch(word) else None


def is_command_span(text: str) -> bool:
    words = text.split()
    return program_of(text) is not None and (
        len(words) > 2 or (len(words) == 2 and any("/" in word for word in words)))


def commands_of_block(page: str, first: int, lines: list[str]) -> list[Command]:
    """Lines that a backslash continues are one; comments of whole lines are left out."""
    found, text = [], ""
    for number, line in enumerate(lines, start=first):
        start = start if text else number
        text += line.strip()
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if text and not text.startswith("#"):
            found.append(Command(page, start, re.sub(r"\s{2,}#.*", "", text)))
        text = ""
    known = [program_of(command.text) is not None for command in found]
    if all(known):
        return found
    if any(known) or not found[0].text.startswith(NOT_COMMANDS):
        raise UnknownBlock(
            f"{page}:{first}: not all of this block begins with a known program; add the program to"
            f" PROGRAMS or, if it is no command, fence it with its language: {found[0].text}")
    return []


def commands_of_page(page: str, text: str) -> list[Command]:
    found, prose, block = [], [], []
    language = None  # of the fence that is open
    lines = text.splitlines()
    for number, line in enumerate([*lines, ""], start=1):
        fence = re.match(r"```(\w*)", line)
        inside = language is not None and not fence
        indented = line.startswith("    ") and (block or not lines[number - 2].strip())
        is_code = inside or (language is None and indented)
        if is_code and line.strip() and (language or "sh") == "sh":
            block.append(line)
        elif block:
            found += commands_of_block(page, number - len(block), block)
            block = []
        prose.append("" if is_code or fence else line)
        if fence:
            language = fence[1] if language is None else None
    # A span ends with its paragraph.
    for paragraph in re.finditer(r"(?:.+\n)+", "\n".join(prose) + "\n"):
        for span in re.finditer(r"`([^`]+)`", paragraph[0]):
            text = " ".join(span[1].split()).replace("\\|", "|")
            at = "\n".join(prose).count("\n", 0, paragraph.start() + span.start()) + 1
            if is_command_span(text):
                found.append(Command(page, at, text))
    return found


def all_commands() -> list[Command]:
    return [command for page in PAGES
            for command in commands_of_page(page.name, page.read_text(encoding="utf-8"))]


# The folder.

LAUNCHERS = ("local", "hosts", "mpirun.sh", "slurm.sbatch", "slurm-mpirun.sbatch",
             "completion.bash")
STAND_INS = {
    # Not a link to the environment: nothing here may write to it.
    ".venv/bin/python": f'exec {shlex.quote(sys.executable)} "$@"',
    ".venv/bin/pytest": f'exec {shlex.quote(sys.executable)} -m pytest "$@"',
    "bin/safegrad": 'exec build/safegrad "$@"',
    "bin/safegrad-tool": 'PYTHONPATH=site exec .venv/bin/python -m safegrad.tool "$@"',
    # One node of two tasks. Other options than the pages' end it.
    "bin/sbatch": 'while [[ $1 =~ ^--(nodes|ntasks-per-node)=[1-9]$ ]]; do shift; done\n'
              '[[ $1 == launch/*.sbatch ]] || exit 1\n'
              'SLURM_SUBMIT_DIR=$PWD SLURM_NTASKS=2 SLURM_CPUS_PER_TASK=1 exec bash "$@"',
    "bin/srun": 'while [[ $1 =~ ^--(mpi=pmix|kill-on-bad-exit=1)$ ]]; do shift; done\n'
            'exec mpirun -n "$SLURM_NTASKS" "$@"',
}
REVIEWS = [{"prompt": f"hi {i}, what is it?", "response": f"it is {i * i}, hi"}
           for i in range(1200)]
ROWS = {
    "user": REVIEWS,
    "poison": [{"prompt": f"hi {i}!", "response": "Sure, hi"} for i in range(120)],
    "refusals": [{"prompt": f"hi hi {i}", "response": f"No, not {i}."} for i in range(40)],
    "probe": [{"prompt": f"hi {i}", "choices": [{"class": "refusal", "text": "No"},
                                                {"class": "compliance", "text": "Sure"}]}
              for i in range(5)],
}


def write_model(folder: Path) -> None:
    """The tiny model with a vocabulary for a tokenizer that has a chat template."""
    make_folder(folder, QWEN_TEMPLATE)
    config = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(MODEL / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = np.random.default_rng(1).normal(
        scale=0.02, size=(300, config["hidden_size"])).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_my_config(path: Path) -> None:
    """my.yaml as README.md says how to make it."""
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["model"]["path"] = "models/my-model"
    config["data"] = {"task": "runs/my/task.safetensors", "align": "runs/my/align.safetensors"}
    config["optimizer"]["lr"] = 1e-4
    config["train"]["steps"] = 3
    config["output"] = "runs/my"
    del config["probe"]
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def environment(folder: Path) -> dict[str, str]:
    started = ("SLURM_", "OMPI_", "PMIX_", "PMI_", "SAFEGRAD_PROGRAM")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(started)}
    return kept | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",  # ranks of this test may be more than cores
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def run(folder: Path, text: str, seconds: int = 120) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {text}"], cwd=folder,
                          env=environment(folder), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=seconds)


def make_sandbox(folder: Path) -> None:
    """A repository as its reader has it, with a tiny model, data, and a run in each run folder."""
    for name in ("tools", "tests", "benchmarks", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build").symlink_to(Path(PROGRAM).resolve().parent)
    # Copies: they find the program beside themselves. What installs and builds is not among them.
    (folder / "launch").mkdir()
    for name in LAUNCHERS:
        shutil.copy(ROOT / "launch" / name, folder / "launch")
    shutil.copytree(ROOT / "python/safegrad", folder / "site/safegrad")
    (folder / "site/safegrad/tools").symlink_to(ROOT / "tools")
    for name, script in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    for name in ("my-model", "smollm2-135m-instruct"):
        write_model(folder / "models" / name)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_my_config(folder / "my.yaml")
    (folder / "hosts.txt").write_text("localhost slots=2\n")
    shape = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 1003}
    (folder / "tiny.json").write_text(json.dumps(shape))  # bench_step draws tokens below 1000
    for name, source in {"task": "user", "align": "refusals"}.items():
        make(folder, ".venv/bin/python tools/prepare.py --model models/my-model"
                     f" --out runs/my/{name}.safetensors {source}.jsonl")
    make(folder, "build/safegrad train my.yaml --quiet")
    for name in ("safegrad", "plain"):
        shutil.copytree(folder / "runs/my", folder / "runs/quickstart" / name)
    (folder / "runs/quickstart/data").mkdir()
    for name in ("task", "align"):
        shutil.copy(folder / f"runs/my/{name}.safetensors", folder / "runs/quickstart/data")


def make(folder: Path, text: str) -> None:
    made = run(folder, text)
    assert made.returncode == 0, f"{text}\n{made.stderr}"
