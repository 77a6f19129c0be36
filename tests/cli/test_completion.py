"""Completion in shells: what is offered, against the help texts and the schema."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_job import PROGRAM, ROOT

SECONDS = 60  # the program is asked a few times, on a busy machine


def run(folder: Path, *command: str, given: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, input=given, capture_output=True, text=True, timeout=SECONDS
    )


# One query a line, its words (which may be empty) and an end mark; one line of what is offered.
ASK = """
source "$0"
while IFS=$'\\x1f' read -ra COMP_WORDS; do
  unset "COMP_WORDS[-1]"
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  _safegrad
  echo "${COMPREPLY[*]}"
done
"""


def complete_each(queries: list[list[str]], folder: Path = ROOT) -> list[list[str]]:
    """What bash offers for the last word of each query."""
    lines = "".join("\x1f".join([PROGRAM, *words, "end"]) + "\n" for words in queries)
    done = run(folder, "bash", "-c", ASK, str(ROOT / "launch/completion.bash"), given=lines)
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def complete(*words: str, folder: Path = ROOT) -> list[str]:
    return complete_each([list(words)], folder)[0]


def help_of(*command: str) -> str:
    return subprocess.check_output([PROGRAM, *command, "--help"], text=True)


def options(text: str) -> list[str]:
    found = re.findall(r"^  (-[\w,-]+)", text.split("\nOptions:\n")[1].split("\n\n")[0], re.M)
    return [name for names in found for name in names.split(",")]


def test_every_command_and_option_is_completed():
    commands = re.findall(r"^  (\w+) ", help_of().split("\nSubcommands:\n")[1], re.M)
    assert {"train", "check", "evaluate"} <= set(commands) and complete("") == commands
    assert complete("tr") == ["train"]
    assert complete("-") == options(help_of())
    offered = complete_each([[command, "-"] for command in commands])
    assert offered == [options(help_of(command)) for command in commands]
    assert {"--set", "--resume", "-q"} <= set(complete("train", "-"))


def leaves(section: dict, prefix: str = "") -> dict[str, dict]:
    found = {}
    for name, schema in section["properties"].items():
        found |= (
            leaves(schema, f"{prefix}{name}.")
            if "properties" in schema
            else {prefix + name: schema}
        )
    return found


def words_of(schema: dict) -> list[str]:
    if schema.get("type") == "boolean":
        return ["true", "false"]
    words = [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
    return words + [word for choice in schema.get("anyOf", []) for word in words_of(choice)]


def test_every_key_and_its_words_are_completed():
    keys = leaves(json.loads(subprocess.check_output([PROGRAM, "schema"], text=True)))
    assert complete("train", "my.yaml", "--set", "") == [f"{key}=" for key in keys]
    assert complete("check", "--set", "optimizer.l") == ["optimizer.lr="]
    offered = complete_each([["train", "--set", key, "="] for key in keys])
    assert dict(zip(keys, offered, strict=True)) == {
        key: words_of(schema) for key, schema in keys.items()
    }
    assert complete("train", "--set", "objective.rule", "=", "safe") == ["safegrad"]
    assert complete("train", "--set", "parallel.shards", "=", "") == ["all"]


def test_files_are_completed_where_a_file_is_meant(tmp_path):
    for name in ("my.yaml", "my.txt"):
        (tmp_path / name).touch()
    (tmp_path / "my_runs").mkdir()
    assert complete("train", "my", folder=tmp_path) == ["my.yaml", "my_runs"]
    assert complete("train", "--quiet", "my", folder=tmp_path) == ["my.yaml", "my_runs"]
    assert sorted(complete("inspect", "my", folder=tmp_path)) == ["my.txt", "my.yaml", "my_runs"]
    assert complete("train", "my.yaml", "--resume", "", folder=tmp_path) == ["auto", "my_runs"]
    assert complete("check", "my.yaml", "--ranks", "", folder=tmp_path) == []


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(
    "words, offered",
    [
        (["tr"], ["train"]),
        (["train", "--set", "optimizer.l"], ["optimizer.lr="]),
        (["train", "--set", "objective.rule=safe"], ["safegrad"]),
        (["train", "my"], ["my.yaml", "my_runs/"]),
    ],
)
def test_zsh_is_offered_the_same(tmp_path, words, offered):
    for installed, name in (
        ("bash-completion/completions/safegrad", "bash"),
        ("zsh/site-functions/_safegrad", "zsh"),
    ):
        (tmp_path / installed).parent.mkdir(parents=True)
        shutil.copyfile(ROOT / f"launch/completion.{name}", tmp_path / installed)
    (tmp_path / "my.yaml").touch()
    (tmp_path / "my_runs").mkdir()
    script = (
        'compadd() { while [[ $1 != -- ]] shift; shift; print -l -- "$@" }; compset() { }\n'
        'words=("$@"); CURRENT=$#; PREFIX=$words[-1]; fpath=("$0"); autoload -U _safegrad\n'
        "_safegrad >&2; _safegrad"
    )  # the first call reads it, the second has it
    done = run(
        tmp_path, "zsh", "-f", "-c", script, str(tmp_path / "zsh/site-functions"), PROGRAM, *words
    )
    assert done.stderr == done.stdout
    assert sorted(done.stdout.split()) == offered
