"""docs/metrics.md has every key that a run writes, and every phase."""

from __future__ import annotations

import re

from tiny_job import ROOT

PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "src/core/metrics.cpp").read_text(encoding="utf-8")
CLOCK = (ROOT / "src/dist/phase_clock.h").read_text(encoding="utf-8")


def rows(table: str) -> list[list[str]]:
    [found] = re.findall(rf"^\| {table} \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.M)
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in found.splitlines()]


def test_every_key_has_a_row_in_the_order_in_which_it_is_written():
    written = SOURCE[SOURCE.index("std::string to_json_line"):SOURCE.index("return json.dump")]
    keys = re.findall(r'(?:put\w*\(|json\[)"(\w+)"', written)
    assert len(keys) > 25 and len(keys) == len(set(keys))

    assert [cells[0].strip() for cells in rows("key")] == [f"`{key}`" for key in keys]
    for key, _unit, meaning, _absent in rows("key"):
        assert meaning.strip(), key


def test_every_phase_is_explained():
    [names] = re.findall(r"kPhaseNames = \{\s*(.*?)\}", CLOCK, re.S)
    phases = set(re.findall(r'"(\w+)"', names))

    assert {name for cells in rows("phase") for name in re.findall(r"`(\w+)`", cells[0])} == phases
