"""A folder with a tiny model, its data and a config that trains, for jobs of real ranks."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from tokenfile import Sequence, write_token_file  # noqa: E402
from wheels import sha256_of  # noqa: E402

PROGRAM = os.environ.get("SAFEGRAD_PROGRAM", str(ROOT / "build" / "safegrad"))
MODEL = ROOT / "tests" / "gold" / "data" / "qwen2"
VOCABULARY, MAX_POSITIONS = 107, 128  # of that model

CONFIG = """\
model:
  path: model
data:
  task: task.safetensors
  align: align.safetensors
objective:
  rule: safegrad
batch:
  task_sequences: 4
  align_sequences: 4
optimizer:
  lr: 1.0e-3
train:
  steps: 3
probe:
  - {name: heldout, file: align.safetensors, every_steps: 2}
  - {name: choice, file: choice.safetensors}
output: out
"""


def sequences(count: int, seed: int, vocabulary: int = VOCABULARY) -> list[Sequence]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = generator.integers(vocabulary, size=generator.integers(6, 20)).tolist()
        scored = len(tokens) // 2
        made.append(Sequence(tokens, [0] * (len(tokens) - scored) + [1] * scored))
    return made


def choices(groups: int) -> list[Sequence]:
    """Each group: the same two tokens, then one of two scored ones."""
    return [Sequence([group, group + 1, 50 + choice], [0, 0, 1], group=group, choice=choice)
            for group in range(groups) for choice in range(2)]


def write_tokens(folder: Path, name: str, content: list[Sequence], classes=()) -> None:
    tokenizer = sha256_of(folder / "model/tokenizer.json")
    write_token_file(folder / f"{name}.safetensors", content, tokenizer, "", classes=classes)


def write_job(folder: Path, source: Path = MODEL) -> None:
    """A model, its data and a config that trains."""
    model = folder / "model"
    model.mkdir()
    for path in [source / "config.json", *source.glob("model*.safetensors*")]:
        shutil.copyfile(path, model / path.name)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    (model / "tokenizer.json").write_text("{}")
    write_tokens(folder, "task", sequences(12, 1, vocabulary))
    write_tokens(folder, "align", sequences(8, 2, vocabulary))
    write_tokens(folder, "choice", choices(5), classes=["first", "second"])
    (folder / "config.yaml").write_text(CONFIG)


@pytest.fixture
def job(tmp_path) -> Path:
    """A folder with a model, its data and a config that trains."""
    write_job(tmp_path)
    return tmp_path
