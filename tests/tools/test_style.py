"""What CONTRIBUTING.md says of Python files and no other tool looks after."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100
FOLDERS = ("tools", "tests", "benchmarks", "launch", "python")


def is_python(path: Path) -> bool:
    if path.suffix:
        return path.suffix == ".py"
    with path.open("rb") as stream:
        first = stream.readline(100)
    return first.startswith(b"#!") and b"python" in first


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))
            if path.is_file() and is_python(path)]


def long_lines(text: str) -> list[int]:
    return [number for number, line in enumerate(text.split("\n"), start=1)
            if len(line) > COLUMNS]


def test_long_lines_are_found():
    assert long_lines("é" * COLUMNS + "\n" + "x" * (COLUMNS + 1) + "\n") == [2]


def test_every_folder_has_python_files():
    names = {str(path.relative_to(ROOT)) for path in python_files()}
    assert {"tools/judge.py", "tests/cli/test_cli.py", "launch/gpu-check"} <= names


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_100_columns_at_most(path):
    assert long_lines(path.read_text(encoding="utf-8")) == []
