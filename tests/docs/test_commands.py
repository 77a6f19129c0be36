"""Every command of README.md and docs/ does what it says, as far as it can be tried here.

A command is run as it stands, in a folder of tiny stand-ins, if it is of a kind that RUN knows to
stay in there. One that is not run is listed in NOT_RUN with the reason; what it names has to be
there all the same. A command that neither table knows makes a test fail.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import doc_commands
import pytest
from doc_commands import Command, UnknownBlock, all_commands, commands_of_page
from tiny_job import PROGRAM, ROOT

# What is run. It writes into the folder alone: no installing, no building, no other machine.
RUN = (
    r"(build/)?safegrad (train|check|plan|schema) .*",
    r"mpirun (--bind-to none )?-n \d+ (build/)?(safegrad train|bench_step) .*",
    r"launch/(local -n \d+|hosts hosts\.txt) train .*",
    r"sbatch [^;&|]*launch/slurm(-mpirun)?\.sbatch \S+",
    r"(\.venv/bin/python tools/prepare\.py|safegrad-tool prepare) .*",
    r"\.venv/bin/python tools/report\.py( runs/\S+)+",
    r"benchmarks/scaling .*",
    r"cmake --install build --prefix /opt/safegrad",
    r"source (PREFIX/share/bash-completion/completions/safegrad|launch/completion\.bash)",
    r"ctest --test-dir build -R \S+",
    r"\.venv/bin/pytest tests/\w+/\w+\.py( -k \"[\w ]+\")?",
)
# What is put in place of a part of a command. The first words are a regular expression.
SUBSTITUTES = {
    r"\bCONFIG\b": "my.yaml",
    r" \[--set KEY=VALUE\]\.\.\.": " --set train.seed=1",
    r"PREFIX/": "opt/safegrad/",
    r"/opt/safegrad": "opt/safegrad",
    r"(mpirun|launch/local) -n [48]\b": r"\1 -n 2",
    r"(build/bench_step) --steps 4": r"\1 --steps 1 --model tiny.json --sequence-length 16",
    r"(benchmarks/scaling) --ranks 1,2,4,8 (.*) --out build/scaling":
        r"\1 --build build --ranks 1,2 \2 --out scaling --model tiny.json --steps 1 --warmup 0"
        r" --sequence-length 16 --no-picture --modes weak --layouts sharded"
        r" --launcher 'mpirun --quiet --oversubscribe --bind-to none'",
    # These are tests themselves: that they are there is enough.
    r"(\.venv/bin/pytest) ": r"\1 -p no:cacheprovider --collect-only -q ",
    r"^ctest (.*)": r'ctest -N \1 | grep "Total Tests: [1-9]"',
}
# How commands begin that are not run, and why. What they name in this repository must be there.
NOT_RUN = {
    "launch/setup": "installs and builds",
    "launch/quickstart": "ten minutes, and downloads; its parts are tested by tests/tools",
    "launch/test": "is what runs this",
    "launch/gpu-check": "needs a GPU",
    "launch/fuzz": "compiles with clang; launch/test runs it",
    "torchrun": "needs GPUs and torchrun; tests/cli/test_launchers.py sets what it would",
    "MASTER_ADDR=node1 MASTER_PORT=29500 srun": "needs GPUs; test_launchers.py sets what it would",
    "scancel": "needs Slurm; tests/cli/test_slurm.py has one",
    "python -m safegrad": "needs the package; tests/cli/test_install.py runs it",
    "pip install": "downloads, or compiles everything; tests/wheel does it by hand",
    "pip wheel": "compiles everything; tests/wheel does it by hand",
    ".venv/bin/python -m pip install": "downloads; tests/interop does it",
    "python3 -m venv .venv-hf": "downloads 5 GB",
    ".venv-hf/": "needs 5 GB of packages; tests/interop runs the same code with others",
    ".venv-gold/": "needs 5 GB of packages; tests/interop compares the same numbers",
    "python convert_": "needs a checkout of llama.cpp, whose programs these are",
    ".venv/bin/python tools/report.py runs/my --": "needs packages that tests/interop installs,"
                                                   " which runs it",
    "tensorboard": "is a server of another project",
    "wandb": "sends data to another project's server",
    ".venv/bin/python tests/cli/soak.py": "an hour",
    "build/safegrad audit": "needs data of the quickstart; test_audit.py runs it",
    "launch/local -n 2 audit": "needs data of the quickstart; test_audit.py runs it",
    ".venv/bin/python tools/audit.py": "needs an audit of it; tests/tools/test_audit.py runs it",
    ".venv/bin/python benchmarks/audit": "hours",
    "benchmarks/cost": "half an hour, and needs 5 GB of packages",
    ".venv/bin/python benchmarks/study/study.py": "hours; tests/tools/test_study.py",
    ".venv/bin/python benchmarks/study/summary.py": "writes here; tests/tools/test_study.py",
    "cmake --preset": "compiles everything with clang",
    "SAFEGRAD_PROGRAM=$PWD/build-asan": "needs a build with clang's sanitizers",
    "ctest -R planted": "needs a build with clang's sanitizers",
}
COMMANDS = all_commands()


def reason_not_run(command: Command) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.text.startswith(start)), None)


def is_run(command: Command) -> bool:
    return (not re.search(r"[;&`$]", command.text)
            and any(re.fullmatch(kind, command.text) for kind in RUN))


def substituted(text: str) -> str:
    for pattern, replacement in SUBSTITUTES.items():
        text = re.sub(pattern, replacement, text)
    return text


@pytest.fixture(scope="module")
def sandbox(docs_sandbox, tmp_path_factory):
    """A page's folder: its commands are run in their order, as its reader would."""
    pages = tmp_path_factory.mktemp("pages")

    def of_page(page: str) -> Path:
        folder = pages / page
        if not folder.exists():
            shutil.copytree(docs_sandbox, folder, symlinks=True)
        return folder

    return of_page


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_run(c)], ids=str)
def test_a_command_ends_well(sandbox, command):
    text = substituted(command.text)
    program = re.search(r"build/(bench_\w+)|benchmarks/scaling", text)
    if program and not (Path(PROGRAM).parent / (program[1] or "bench_step")).exists():
        pytest.skip("built without benchmarks")

    done = doc_commands.run(sandbox(command.page), text)

    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def help_of(program: str, words: list[str]) -> str:
    """What says which options a program of this repository has."""
    if program.startswith("build/"):
        asked = [Path(PROGRAM).parent / program.removeprefix("build/"), *words[:1], "--help"]
        return subprocess.check_output(asked, text=True)
    return (ROOT / program).read_text(encoding="utf-8")


def check_names(text: str) -> int:
    """How many files, options, presets and pinned packages of this repository a command names."""
    words, checked, manual = text.split(), 0, None
    presets = json.loads((ROOT / "CMakePresets.json").read_text())
    for i, word in enumerate(words):
        if re.match(r"(launch|tools|tests|configs|build|benchmarks)/(?!results/)", word):
            assert word.startswith("build/") or (ROOT / word).exists(), word
            if Path(word).suffix in ("", ".py"):
                manual = help_of(word, words[i + 1:])
            checked += 1
        elif word.startswith("--") and manual:
            option = word.split("=")[0]
            assert re.search(rf"{option}\b", manual), f"{text}: no option {option}"
            checked += 1
        elif words[i - 1] == "--preset":
            for kind in ("configurePresets", "buildPresets", "testPresets"):
                assert word in [preset["name"] for preset in presets[kind]], f"{kind}: {word}"
            checked += 1
        elif match := re.fullmatch(r"(\w+)==(\S+)", word):
            pinned = (ROOT / "launch/torch-requirements.txt").read_text()
            assert re.search(rf"^{match[0]}\b", pinned, re.M), f"{match[0]} is not what is pinned"
            checked += 1
    return checked


@pytest.mark.parametrize("command", [c for c in COMMANDS if reason_not_run(c)], ids=str)
def test_what_a_command_names_is_there(command):
    checked = check_names(command.text)

    others = ("python convert_", "tensorboard", "wandb", "scancel", "pip install .", "pip wheel",
              "python -m safegrad", "SAFEGRAD_PROGRAM=$PWD/build-asan", "ctest -R planted")
    assert checked or command.text.startswith(others), "nothing of this command is checked"


def test_every_command_is_known():
    unknown = [str(c) for c in COMMANDS if is_run(c) == (reason_not_run(c) is not None)]
    assert unknown == [], "add each to RUN or to NOT_RUN (and not to both)"


def test_the_tables_hold_nothing_that_no_page_has():
    texts = [command.text for command in COMMANDS]
    assert [start for start in NOT_RUN if not any(t.startswith(start) for t in texts)] == []
    run = [command.text for command in COMMANDS if is_run(command)]
    assert [kind for kind in RUN if not any(re.fullmatch(kind, text) for text in run)] == []
    assert [p for p in SUBSTITUTES if not any(re.search(p, text) for text in run)] == []


def test_the_commands_of_a_page_are_found():
    page = """\
Text with `safegrad` and `safegrad train
my.yaml --quiet`, not `safegrad inspect`.

    # comment
    launch/local -n 2 train \\
        my.yaml    # another

    error: no command

| a | `ctest -R "a\\|b"` |

```
A=1 mpirun x
```
```yaml
mpirun: no
```
"""
    assert [(c.line, c.text) for c in commands_of_page("page", page)] == [
        (5, "launch/local -n 2 train my.yaml"), (13, "A=1 mpirun x"),
        (1, "safegrad train my.yaml --quiet"), (10, 'ctest -R "a|b"')]


@pytest.mark.parametrize("block", ["cargo build", "launch/setup\n    cargo build"])
def test_a_block_with_an_unknown_program_is_refused(block):
    with pytest.raises(UnknownBlock, match="page:3"):
        commands_of_page("page", f"Text.\n\n    {block}\n")
