"""What a reader of the pages has, with the parts of the tests of cli and tools."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "cli"), str(TESTS / "tools")]

import doc_commands  # noqa: E402


@pytest.fixture(scope="session")
def docs_sandbox(tmp_path_factory) -> Path:
    """To be copied, with symlinks=True, by what runs commands in it."""
    folder = tmp_path_factory.mktemp("docs") / "sandbox"
    folder.mkdir()
    doc_commands.make_sandbox(folder)
    return folder
