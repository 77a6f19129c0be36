"""Shared parts of the tests of tools/: tiny model folders, and the real SmolLM2 folder."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import smollm2  # noqa: E402
from chat import Chat  # noqa: E402
from tiny_tokenizer import LLAMA3_TEMPLATE, QWEN_TEMPLATE, make_folder  # noqa: E402


@pytest.fixture
def llama(tmp_path) -> Chat:
    return Chat(make_folder(tmp_path / "llama", LLAMA3_TEMPLATE, bos="<|begin_of_text|>"))


@pytest.fixture
def llama_folder(tmp_path) -> Path:
    return make_folder(tmp_path / "llama", LLAMA3_TEMPLATE, bos="<|begin_of_text|>")


@pytest.fixture
def qwen(tmp_path) -> Chat:
    return Chat(make_folder(tmp_path / "qwen", QWEN_TEMPLATE))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    smollm2.build()
    return smollm2.DEFAULT_OUT


def decode(folder: Path, tokens) -> str:
    """Tokens as text, special ones included."""
    return _tokenizer(folder).decode(list(tokens), skip_special_tokens=False)


@functools.cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def scored_runs(folder: Path, tokens, mask) -> list[str]:
    """The text of each uninterrupted run of scored tokens."""
    runs, previous = [], 0
    for token, bit in zip(tokens, mask):
        if bit and not previous:
            runs.append([])
        if bit:
            runs[-1].append(token)
        previous = bit
    return [decode(folder, run) for run in runs]
