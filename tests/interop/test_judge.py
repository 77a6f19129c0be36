"""tools/judge.py generates with this transformers too, not only with the one that it pins."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tools" / "test_judge_generation.py"


def test_generation_is_an_argmax_loop_here_too(outside):
    printed = outside.run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", TESTS)

    # A file that pytest skips as a whole would end well too.
    assert re.search(r"^\d+ passed", printed, re.M) and "skipped" not in printed, printed[-3000:]
