"""The README's picture shows what the quickstart's files say, on a background of its own."""

import json
import re

import pytest
from errors import InputError
from quickstart_picture import draw


def probe(share: float) -> dict:
    return {"refusal": {"greedy_refusal": share}}


def write_runs(folder, last_plain: dict):
    safegrad = [{"step": n, "loss_task": 4.0 - n, "loss_align": 0.1 * n, "cosine": -0.2}
                for n in (1, 2)]
    plain = [{"step": n, "loss_task": 4.0 - n} for n in (1, 2)]
    safegrad[-1]["probe"] = probe(0.625)
    plain[-1] |= last_plain
    for name, text in {"start/evaluation.json": json.dumps(probe(0.875)),
                       "plain/metrics.jsonl": "\n".join(map(json.dumps, plain)) + "\n",
                       "safegrad/metrics.jsonl": "\n".join(map(json.dumps, safegrad)) + "\n",
                       }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)


def test_bars_are_as_high_as_their_numbers(tmp_path):
    write_runs(tmp_path, {"probe": probe(0.25)})

    svg = draw(tmp_path)

    assert re.findall(r">(\d+ %)<", svg) == ["88 %", "25 %", "62 %"]
    heights = []
    for color in ("muted", "run1", "run0"):
        bar = re.search(rf'<path d="([^"]*)"[^>]*style="fill: var\(--{color}\)"', svg)[1]
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar)]
        heights.append(max(ys) - min(ys))
    assert [h / heights[0] for h in heights] == pytest.approx([1, 0.25 / 0.875, 0.625 / 0.875])
    assert "prefers-color-scheme:dark" in svg and "fill: var(--card)" in svg


def test_a_stopped_run_is_refused(tmp_path):
    write_runs(tmp_path, {})

    with pytest.raises(InputError, match="plain/metrics.jsonl: the last of its 2 steps"):
        draw(tmp_path)
