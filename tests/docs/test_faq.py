"""The messages of docs/faq.md are those that the program, the launchers and the tools print."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import doc_commands
import pytest
from tiny_job import ROOT

PAGE = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.M)
SOURCES = [path for pattern in ("src/**/*.cpp", "launch/*", "tools/**/*.py", "python/**/*.py")
           for path in sorted(ROOT.glob(pattern)) if path.is_file()]
CHECK, TRAIN = "build/safegrad check my.yaml", "build/safegrad train my.yaml --quiet"
PREPARE = ".venv/bin/python tools/prepare.py --model models/{} --out x.safetensors user.jsonl"
# How the message with this beginning is made to appear, by the last command.
PROVOKED = {
    "… is not there; launch/setup": "SAFEGRAD_PROGRAM=nowhere launch/local -n 2 check my.yaml",
    "…: no such key": f"{CHECK} --set objective.rhoo=1",
    "…: got …, must be": f"{CHECK} --set objective.rho=-1",
    "…: got …, which does": f"{CHECK} --ranks 4 --set parallel.shards=3",
    "batch.max_tokens": f"{CHECK} --set batch.max_tokens_per_rank=10",
    "…: missing; objective": f"{CHECK} --set data.align=null",
    "…: made with": f"cp -r models/my-model models/b; echo >> models/b/tokenizer.json;"
                    f" {CHECK} --set model.path=models/b",
    "…: no chat template": "cp -r models/my-model models/c;"
                           f" echo {{}} > models/c/tokenizer_config.json; {PREPARE.format('c')}",
    "… ranks were started (…), but": f"OMPI_COMM_WORLD_SIZE=2 {CHECK}",
    "the ranks of this job": "mpirun -n 2 bash -c '" + CHECK
                             + " --set train.seed=$OMPI_COMM_WORLD_RANK'",
    "…: not reached with": "echo 'a.invalid slots=1' > none.txt;"
                           " launch/hosts none.txt check my.yaml",
    "…: steps … to": f"{TRAIN} --set output=runs/nan --set optimizer.lr=1e30"
                     " --set train.steps=9 --set train.max_skipped_steps=2",
    "… has checkpoints": f"{TRAIN} --set output=runs/a --set checkpoint.every_steps=1;"
                         f" {TRAIN} --set output=runs/a",
    "… is of another run": f"{TRAIN} --set output=runs/b --set checkpoint.every_steps=1;"
                           f" {TRAIN} --set output=runs/b --resume auto --set optimizer.lr=1",
    "…: is damaged": f"{TRAIN} --set output=runs/c --set checkpoint.every_steps=1;"
                     " printf x | dd bs=1 seek=2000 conv=notrunc status=none"
                     " of=runs/c/checkpoints/step-000003/shard-00000-of-00001.safetensors;"
                     f" {TRAIN} --set output=runs/c --resume auto",
}


def pattern_of(message: str) -> str:
    """What differs is a … in a message, and not longer than this in the sources. The file, key or
    rank before the first colon may come from another place there.
    """
    return ".{0,150}?".join(re.escape(part) for part in message.strip("…:; ").split("…"))


def literals(text: str) -> str:
    """A source in which the parts of a message stand together, as they are printed."""
    joined = re.sub(r'(?<!\\)"\s+f?"', "", text)
    return joined.replace('\\"', '"')


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [literals(path.read_text(encoding="utf-8")) for path in SOURCES]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_sources(sources, message):
    assert any(re.search(pattern_of(message), text) for text in sources), message


def test_a_message_that_nothing_prints_is_not_in_the_sources(sources):
    for message in ("…: no such kez…", "…: got …, that does not divide"):
        assert not any(re.search(pattern_of(message), text) for text in sources)
    assert len(MESSAGES) >= 20


@pytest.fixture(scope="module")
def sandbox(docs_sandbox, tmp_path_factory):
    return Path(shutil.copytree(docs_sandbox, tmp_path_factory.mktemp("faq") / "of",
                                symlinks=True))


@pytest.mark.parametrize("beginning", PROVOKED)
def test_a_message_appears(sandbox, beginning):
    [message] = [message for message in MESSAGES if message.startswith(beginning)]

    done = doc_commands.run(sandbox, PROVOKED[beginning])

    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(pattern_of(message), errors[0]), done.stderr
