"""The report says and draws what the run folders hold, whatever state they are in."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from errors import InputError
from report_figures import BINS
from report_page import page
from report_theme import BACKGROUNDS, COLORS, MAX_RUNS, TEXT
from runs import config_differences, read_runs
from trackers import write_tensorboard, write_wandb

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
CONFIG = """\
# safegrad 0.1.0, LibTorch 2.11.0, 2 ranks, 1 threads a rank, cpu
model:
  path: model
objective:
  rule: {rule}
  align_loss: kl
optimizer:
  lr: {lr}
  betas: [0.9, 0.999]
train:
  steps: {steps}
probe:
  - name: heldout
    file: heldout.safetensors
output: somewhere/{rule}
"""


def step(number: int, **changes) -> dict:
    """A step of two objectives, with u·u = 4, a·a = 1."""
    record = {"step": number, "epoch": number / 4, "loss_task": 4.0 / number, "loss_align": 0.5,
              "uu": 4.0, "ua": -1.0, "aa": 1.0, "cosine": -0.5, "conflict": True, "c_task": 1.0,
              "c_align": 2.0, "grad_norm": 3.0, "clip": 0.25, "lr": 0.001, "task_tokens": 60,
              "align_tokens": 40, "seconds": 2.0, "tokens_per_s": 50.0, "speed_of_light": 0.75,
              "memory_bytes": 2**30 + number * 2**29, "skipped": False,
              "phase_seconds": {"forward": 0.5, "backward": 1.25}}
    return record | changes


def agreeing(number: int, **changes) -> dict:
    return step(number, ua=1.0, cosine=0.5, conflict=False, c_align=1.0, **changes)


def skipped(number: int) -> dict:
    """As safegrad writes it: NaN is null, and what was not computed keeps its default."""
    return step(number, loss_task=None, uu=None, ua=None, cosine=None, conflict=False, c_task=1.0,
                grad_norm=0.0, clip=1.0, skipped=True, c_align=None)


def plain(number: int) -> dict:
    return {key: value for key, value in agreeing(number).items()
            if key not in ("loss_align", "ua", "aa", "cosine", "c_align")}


def write_run(folder: Path, steps: list[dict], rule="safegrad", lr="0.001", planned=None,
              tail="") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        CONFIG.format(rule=rule, lr=lr, steps=planned or len(steps)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps) + tail)
    return folder


def report(*folders: Path) -> tuple[str, dict]:
    """The page, and the numbers that it holds, read back from it."""
    content, _ = page(read_runs(list(folders)))
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content, re.S)
    assert len(found) == 1
    return content, json.loads(found[0])


class Reader(HTMLParser):
    """Rows of the tables, and every tag with its attributes."""

    def __init__(self, content: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict]] = []
        self._cell = False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def cells(content: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in Reader(content).rows if row}


def text_of(content: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", content.split("<script")[0]))


def picture(content: str, title: str) -> str:
    found = re.findall(rf"<figure><h3>{re.escape(title)}</h3>(.*?)</figure>", content, re.S)
    assert len(found) == 1, title
    return found[0]


def drawn_points(svg: str, run: int) -> list[tuple[float, float]]:
    """The corners of the longest line in a run's colour."""
    style = rf'style="fill: none; stroke: var\(--run{run}\)'
    paths = re.findall(rf'<path d="([^"]*)"[^>]*{style}', svg)
    path = max(paths, key=len)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_the_table_holds_what_the_steps_come_to(tmp_path):
    probe = {"heldout": {"kl": 0.125, "loss": 2.0}}
    steps = [agreeing(1), step(2, probe={"heldout": {"kl": 0.25, "loss": 3.0}}), step(3),
             step(4, loss_align=0.75, checkpoint_seconds=0.5, probe=probe)]

    content, data = report(write_run(tmp_path / "a", steps, planned=8))

    rows = cells(content)
    assert rows["rule"] == ["safegrad"]
    assert rows["learning rate"] == ["0.001"]
    assert rows["steps"] == ["4"]
    assert rows["task loss, first step"] == ["4"]
    assert rows["task loss, last step"] == ["1"]
    assert rows["task loss, mean of the last 10"] == ["2.083"]  # (4 + 2 + 4/3 + 1) / 4
    assert rows["alignment loss, last step"] == ["0.75"]
    assert rows["steps in conflict"] == ["75 %"]
    assert rows["mean cosine"] == ["−0.25"]  # (0.5 - 3 * 0.5) / 4
    assert rows["tokens/s"] == ["50"]
    assert rows["time of the steps"] == ["8 s"]
    assert rows["time stopped for checkpoints"] == ["0.5 s"]
    assert rows["peak memory of a rank"] == ["3.00 GiB"]
    assert rows["heldout · kl"] == ["0.25 (step\u00a02) → 0.125 (step\u00a04)"]
    assert "steps 1 to 4 of 8 (not finished)" in text_of(content)
    assert "in conflict in 3 of 4 steps (75 %)" in text_of(content)
    pictures = data["pictures"]
    assert pictures["loss_task"]["a"] == {"steps": [1, 2, 3, 4], "values": [4, 2, 1.33333, 1]}
    assert pictures["cosine"]["a"]["values"] == [0.5, -0.5, -0.5, -0.5]
    assert pictures["conflict_rate"]["a"]["values"] == [0, 50, 66.6667, 75]
    assert pictures["norm_task"]["a"]["values"] == [2, 2, 2, 2]
    assert pictures["c_align"]["a"]["values"] == [1, 2, 2, 2]
    assert pictures["speed_of_light"]["a"]["values"] == [75] * 4
    assert pictures["memory"]["a"]["values"] == [1.5, 2, 2.5, 3]
    assert pictures["phases"]["a"] == {"forward": 0.5, "backward": 1.25}
    assert pictures["probe heldout kl"]["a"] == {"steps": [2, 4], "values": [0.25, 0.125]}


def test_layer_wise_surgery_lisa_and_the_gate_have_pictures_of_their_own(tmp_path):
    blocks = {"c_task": [1.0, 1.0], "c_align": [1.0, 4.0], "conflicts": 3}
    layer_wise = write_run(tmp_path / "a", [step(1, block_coefficients=blocks), step(2)])
    lisa = write_run(tmp_path / "b", [step(n, drift=0.5 * n, c_drift=1.0) for n in (1, 2)])
    gated = write_run(tmp_path / "d", [step(n, gated=2 * n) for n in (1, 2)])

    _, data = report(layer_wise, lisa, gated)

    pictures = data["pictures"]
    assert pictures["gated"]["d"]["values"] == [2, 4]
    assert pictures["block_conflicts"]["a"]["values"] == [3, None]
    assert pictures["block_c_align"]["a"]["values"] == [4, None]
    assert pictures["drift"]["b"]["values"] == [0.5, 1]
    assert "drift" not in report(layer_wise)[1]["pictures"]
    # Neither is missed where the rule is another.
    content, _ = report(write_run(tmp_path / "c", [step(1)]))
    assert "nothing to compare it with" not in text_of(content)


def with_surgery(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("objective:\n", "objective:\n  surgery: block\n"))
    return folder


def test_what_the_rule_acts_on_is_said(tmp_path):
    blocks = {"block 0": {"uu": 1.0, "ua": 0.5, "aa": 1.0}}
    steps = [step(1, blocks=blocks)]
    layer_wise = with_surgery(write_run(tmp_path / "a", steps))
    whole = write_run(tmp_path / "b", steps)

    alone, _ = report(layer_wise)
    assert "a: rule safegrad, layer-wise surgery, learning rate 0.001" in text_of(alone)
    assert cells(alone)["rule"] == ["safegrad, layer-wise surgery"]
    by_itself = "The rule acts on each of them by itself (objective.surgery: block)"
    assert f"{by_itself}." in text_of(alone) and "acts on the whole" not in text_of(alone)
    both, _ = report(layer_wise, whole)
    assert f"{by_itself} in a; elsewhere on the whole model" in text_of(both)
    assert cells(both)["rule"] == ["safegrad, layer-wise surgery", "safegrad"]
    assert "The rule acts on the whole model" in text_of(report(whole)[0])


def test_an_alignment_loss_that_was_not_measured_is_neither_drawn_nor_averaged(tmp_path):
    steps = [step(1, align_renewed=True, loss_align=0.5),
             *(step(n, align_renewed=False, loss_align=0.5, ua=-2.0) for n in (2, 3)),
             step(4, align_renewed=True, loss_align=0.75, aa=4.0)]

    content, data = report(write_run(tmp_path / "a", steps))

    pictures = data["pictures"]
    assert pictures["loss_align"]["a"] == {"steps": [1, 4], "values": [0.5, 0.75]}
    assert pictures["norm_align"]["a"] == {"steps": [1, 4], "values": [1, 2]}
    assert len(pictures["cosine"]["a"]["values"]) == 4  # of the task's gradient, which is new
    assert cells(content)["alignment loss, mean of the last 10"] == ["0.625"]


def test_a_line_is_drawn_where_its_numbers_are(tmp_path):
    values = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0]
    steps = [step(i + 1, loss_task=value) for i, value in enumerate(values)]

    content, data = report(write_run(tmp_path / "a", steps))

    points = drawn_points(picture(content, "Task loss"), run=0)
    assert data["pictures"]["loss_task"]["a"]["values"] == values
    assert len(points) == len(values)
    # One scale and offset for all: page units upside down over values.
    scale = (points[5][1] - points[1][1]) / (values[5] - values[1])
    assert scale < -10
    for (x, y), number, value in zip(points, range(7), values):
        # Coordinates have six decimals.
        assert y == pytest.approx(points[1][1] + scale * (value - values[1]), abs=1e-4)
        assert x == pytest.approx(points[0][0] + number * (points[1][0] - points[0][0]), abs=1e-4)


def test_a_skipped_step_is_marked_and_its_defaults_are_not_measurements(tmp_path):
    content, data = report(write_run(tmp_path / "a", [step(1), skipped(2), agreeing(3), step(4)]))

    for key in ("loss_task", "cosine", "grad_norm", "clip", "c_align", "norm_task"):
        values = data["pictures"][key]["a"]["values"]
        assert [value is None for value in values] == [False, True, False, False], key
    summary = data["runs"][0]["summary"]
    assert (summary["skipped"], summary["compared_steps"], summary["conflicts"]) == (1, 3, 2)
    assert "1 step skipped" in text_of(content)
    assert "a: 1 skipped step (×" in picture(content, "Task loss")
    assert "NaN" not in content.split('id="data">')[1]


def test_a_run_whose_steps_were_all_skipped_is_shown(tmp_path):
    content, data = report(write_run(tmp_path / "a", [skipped(1), skipped(2)]))

    assert cells(content)["skipped steps"] == ["2"]
    assert "cosine" not in data["pictures"] and "seconds" in data["pictures"]


def test_a_cut_last_line_is_left_out_and_said(tmp_path):
    content, data = report(
        write_run(tmp_path / "a", [step(1), step(2)], planned=9, tail='{"step":3,"epoch":0.7'))

    assert data["runs"][0]["summary"]["steps"] == 2
    assert "the last line of metrics.jsonl is incomplete" in text_of(content)


def test_lines_that_a_crash_left_and_repeated_steps_are_said(tmp_path):
    folder = write_run(tmp_path / "a", [step(1), step(2, loss_task=7.0)], tail='{"step":3,"ep\n'
                       + json.dumps(step(2, loss_task=0.5)) + "\n" + json.dumps(step(3)) + "\n")

    content, data = report(folder)

    assert data["pictures"]["loss_task"]["a"]["values"] == [4, 0.5, 1.33333]
    assert "line 3 of metrics.jsonl is not a step" in text_of(content)
    assert "steps that are there twice: 1;" in text_of(content)


def test_a_run_of_one_step_is_a_dot(tmp_path):
    content, data = report(write_run(tmp_path / "a", [step(1)]))

    assert data["pictures"]["loss_task"]["a"] == {"steps": [1], "values": [4]}
    marker = re.findall(r"<use [^>]*var\(--run0\)", picture(content, "Task loss"))
    assert len(marker) == 1


def test_plain_fine_tuning_has_no_alignment_and_says_so(tmp_path):
    folder = write_run(tmp_path / "plain", [plain(1), plain(2)], rule="sft")

    content, data = report(folder)
    assert "cosine" not in data["pictures"] and "loss_align" not in data["pictures"]
    assert "There was no alignment gradient" in text_of(content)
    assert "have one gradient and nothing to compare it with" in text_of(content)
    assert "steps in conflict" not in cells(content)

    both, data = report(folder, write_run(tmp_path / "safe", [step(1), step(2)]))
    assert list(data["pictures"]["cosine"]) == ["safe"]
    assert "Not measured in plain." in picture(both, "Cosine of the two gradients")
    assert cells(both)["steps in conflict"] == ["–", "100 %"]


def test_shares_of_a_probe_are_in_percent_and_what_decoding_would_say_comes_first(tmp_path):
    probes = [{"refusal": {"no": 0.9, "yes": 0.1, "greedy_no": share, "greedy_yes": 0.0},
               "heldout": {"kl": 0.25}} for share in (0.5, 0.655)]

    content, data = report(write_run(
        tmp_path / "a", [step(n + 1, probe=probe) for n, probe in enumerate(probes)]))

    rows = cells(content)
    assert rows["refusal · greedy_no"] == ["50.0 % (step\u00a01) → 65.5 % (step\u00a02)"]
    assert rows["heldout · kl"] == ["0.25 (step\u00a01) → 0.25 (step\u00a02)"]
    order = [f"refusal {name}" for name in ("greedy_no", "greedy_yes", "no", "yes")]
    assert [name.removeprefix("probe ") for name in data["pictures"] if "refusal" in name] == order
    assert [row.replace(" · ", " ") for row in rows if row.startswith("refusal")] == order
    assert "greedy_X is the share of prompts whose greedy reply begins like class X" in content


def test_runs_of_before_memory_was_recorded_say_so(tmp_path):
    old = [{k: v for k, v in step(n).items() if k != "memory_bytes"} for n in (1, 2)]
    folder = write_run(tmp_path / "old", old)

    content, data = report(folder)
    assert "memory" not in data["pictures"] and "peak memory of a rank" not in cells(content)
    assert "Recorded in none of these runs: safegrad writes memory_bytes" in text_of(content)

    both, data = report(folder, write_run(tmp_path / "new", [step(1), step(2)]))
    assert list(data["pictures"]["memory"]) == ["new"]
    assert cells(both)["peak memory of a rank"] == ["–", "2.00 GiB"]
    assert "Not measured in old." in picture(both, "Peak memory of the fullest rank, GiB")


def test_as_many_runs_as_there_are_colours_are_overlaid(tmp_path):
    folders = [write_run(tmp_path / f"run-{i}", [step(n) for n in range(1, 3 + i)], lr=f"{i}e-3")
               for i in range(MAX_RUNS)]

    content, data = report(*folders)

    assert [len(run["values"]) for run in data["pictures"]["loss_task"].values()] == [
        2 + i for i in range(MAX_RUNS)]
    task = picture(content, "Task loss")
    assert {i for i in range(20) if f"var(--run{i})" in task} == set(range(MAX_RUNS))
    assert data["config_differences"] == {
        "optimizer.lr": [f"{i}e-3" for i in range(MAX_RUNS)],
        "train.steps": [str(2 + i) for i in range(MAX_RUNS)]}


def test_lists_and_probes_of_configs_are_compared_by_name(tmp_path):
    first = write_run(tmp_path / "a", [step(1)])
    second = write_run(tmp_path / "b", [step(1)])
    text = (second / "config.yaml").read_text()
    text = text.replace("0.999]", "0.95]").replace("name: heldout", "name: other")
    (second / "config.yaml").write_text(text)

    assert config_differences(read_runs([first, second])) == {
        "optimizer.betas": ["0.9, 0.999", "0.9, 0.95"],
        "probe.heldout.name": ["heldout", None], "probe.other.name": [None, "other"],
        "probe.heldout.file": ["heldout.safetensors", None],
        "probe.other.file": [None, "heldout.safetensors"]}


def test_thousands_of_steps_are_thinned_without_losing_a_spike(tmp_path):
    steps = [step(n, loss_task=1.0 + n % 2) for n in range(1, 2001)]
    steps[1234]["loss_task"] = 50.0

    content, data = report(write_run(tmp_path / "a", steps),
                           write_run(tmp_path / "b", [step(n) for n in range(1, 30)]))

    line = data["pictures"]["loss_task"]["a"]
    per_point = line["steps_per_point"]
    assert len(line["values"]) <= BINS and per_point == math.ceil(2000 / BINS)
    at = 1234 // per_point
    assert line["high"][at] == 50.0 and max(line["high"][:at]) == 2.0 and min(line["low"]) == 1.0
    inside = [s["loss_task"] for s in steps[at * per_point:(at + 1) * per_point]]
    assert line["values"][at] == pytest.approx(sum(inside) / per_point, rel=1e-5)  # six digits
    assert data["pictures"]["loss_task"]["b"]["steps_per_point"] == per_point
    assert f"mean of {per_point} steps" in picture(content, "Task loss")


def test_a_huge_coefficient_does_not_flatten_the_others(tmp_path):
    steps = [step(n, c_align=[0.0, 1.0, 2.0][n % 3]) for n in range(1, 20)]
    steps[4]["c_align"] = 1e16

    content, _ = report(write_run(tmp_path / "a", steps))

    chart = picture(content, "Coefficient of the alignment gradient")
    assert "Logarithmic axis." in chart
    heights = [y for _, y in drawn_points(chart, run=0)]
    assert heights[2] - heights[0] > 3  # 0 and 1, in page units: more than two widths of a line


def test_the_heat_map_is_the_cosine_of_every_block(tmp_path):
    blocks = {"block 10": {"uu": 4.0, "ua": -1.0, "aa": 1.0}, "head": {"uu": 1, "ua": 0.5, "aa": 1},
             "block 2": {"uu": 9.0, "ua": 3.0, "aa": 4.0}, "embedding": {"uu": 0, "ua": 0, "aa": 0}}
    nothing = {name: dict.fromkeys(("uu", "ua", "aa")) for name in blocks}
    folder = write_run(tmp_path / "a", [step(1, blocks=blocks), step(2, blocks=nothing)])

    content, data = report(folder, write_run(tmp_path / "b", [step(1)]))

    heat = data["pictures"]["blocks a"]
    assert heat["blocks"] == ["block 2", "block 10", "head"]  # frozen ones have no gradient
    assert heat["values"] == [[0.5, None], [-0.5, None], [0.5, None]]
    assert "Not recorded in b. Set objective.gram_per_block: true" in text_of(content)
    several, _ = report(folder, *(write_run(tmp_path / name, [step(1)]) for name in "cd"))
    assert "Not recorded in c, d. Set objective.gram_per_block" in text_of(several)
    assert text_of(several).count("gram_per_block") == 1
    assert "<image" in picture(content, "a")


def test_a_long_heat_map_says_what_a_column_is(tmp_path):
    blocks = {"block 0": {"uu": 1.0, "ua": 0.5, "aa": 1.0}}
    steps = [step(n, blocks=blocks) for n in range(1, 1001)]

    content, data = report(write_run(tmp_path / "a", steps))

    heat = data["pictures"]["blocks a"]
    assert heat["steps_per_column"] == 5 and heat["steps"][:3] == [1, 6, 11]
    assert "A column is the mean of 5 steps." in picture(content, "a")


def test_the_page_needs_nothing_else_and_tells_what_is_in_its_pictures(tmp_path):
    blocks = {"block 0": {"uu": 1.0, "ua": 0.5, "aa": 1.0}}
    content, _ = report(write_run(tmp_path / "a", [step(1, blocks=blocks), step(2, blocks=blocks)]),
                        write_run(tmp_path / "b", [step(1, blocks=blocks)]))

    tags = Reader(content).tags
    assert not re.search(r"@import|url\((?!#)", content)
    for tag, attributes in tags:
        assert "src" not in attributes, tag
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,")), tag
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    pictures = [a for tag, a in tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(pictures) > 10
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in pictures)
    assert "a: from 4 to 2, between 2 and 4." in pictures[0]["aria-label"]
    assert not re.search(r"#fe01[0-9a-f]{2}", content)  # every stand-in became a variable


def test_names_are_text_and_never_markup(tmp_path):
    evil = '</script><b>&"'
    steps = [step(n, probe={evil: {"kl": 1.0}}, blocks={evil: {"uu": 1., "ua": .5, "aa": 1.}})
             for n in (1, 2)]

    content, data = report(write_run(tmp_path / '<i>&"', steps))

    assert data["runs"][0]["name"] == '<i>&"'
    tags = {tag for tag, _ in Reader(content).tags}
    assert not tags & {"b", "i"}
    assert cells(content)[f"{evil} · kl"] == ["1 (step\u00a01) → 1 (step\u00a02)"]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [write_run(tmp_path / name / "out", [step(1)]) for name in ("x", "y")]

    assert [run.name for run in read_runs(folders)] == ["x/out", "y/out"]


@pytest.mark.parametrize("missing", ["", "config.yaml", "metrics.jsonl"])
def test_what_is_missing_is_named(tmp_path, missing):
    folder = tmp_path / "a"
    if missing:
        (write_run(folder, [step(1)]) / missing).unlink()

    done = subprocess.run([sys.executable, TOOL, folder], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {folder / missing}: no such f")
    assert done.stderr.count("\n") == 1
    assert not missing or "only just started" in done.stderr
    assert not (folder / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path):
    empty = write_run(tmp_path / "empty", [], tail='{"step":1,')
    with pytest.raises(InputError, match="empty/metrics.jsonl: holds no finished step.*started"):
        read_runs([empty])
    begun = write_run(tmp_path / "begun", [], planned=5)  # as before its first step
    done = subprocess.run([sys.executable, TOOL, begun], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: {begun}/metrics.jsonl: holds no finished step")
    good = write_run(tmp_path / "good", [step(1)])
    with pytest.raises(InputError, match="good: given more than once"):
        read_runs([good, tmp_path / "good" / ".." / "good"])
    (good / "config.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(InputError, match="good/config.yaml: is not valid YAML"):
        read_runs([good])


def test_the_command_writes_into_the_first_run_or_where_it_is_told(tmp_path):
    folders = [write_run(tmp_path / f"r{i}", [step(1)]) for i in range(MAX_RUNS + 1)]

    done = subprocess.run([sys.executable, TOOL, *folders[:2]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folders[0] / 'report.html'}: 2 runs, ")
    assert (folders[0] / "report.html").read_text().startswith("<!doctype html>")

    out = tmp_path / "x.html"
    subprocess.run([sys.executable, TOOL, folders[1], "--out", out], check=True)
    assert out.exists() and not (folders[1] / "report.html").exists()

    done = subprocess.run([sys.executable, TOOL, *folders], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {MAX_RUNS + 1} runs were given; at most {MAX_RUNS}")


@pytest.mark.parametrize("package, write", [("tensorboard", write_tensorboard),
                                            ("wandb", write_wandb)])
def test_a_missing_tracker_says_what_to_install(tmp_path, monkeypatch, package, write):
    for module in ("wandb", "tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails

    with pytest.raises(InputError, match=rf"^{package} cannot be imported .*tracker-requirements"):
        write(read_runs([write_run(tmp_path / "a", [step(1)])])[0])


def linear(color: str) -> np.ndarray:
    """Linear red, green and blue of sRGB."""
    parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.array([p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts])


def luminance(color: str) -> float:
    """Of WCAG 2.2: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_their_background(theme):
    assert contrast("#000000", "#ffffff") == 21
    for background in (COLORS[name][theme] for name in BACKGROUNDS):
        for name, pair in COLORS.items():
            if name in (*BACKGROUNDS, "rule"):
                continue
            # The least that WCAG asks for: 4.5 for text, 3 for lines and areas.
            least = 4.5 if name in TEXT else 3.0
            assert contrast(pair[theme], background) >= least, name


# How a colour looks without one kind of cone: Machado, Oliveira, Fernandes 2009, severity 1.
VISIONS = {
    "usual": np.eye(3),
    "no L cones": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "no M cones": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                            [-0.011820, 0.042940, 0.968881]]),
    "no S cones": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear sRGB under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_the_colours_of_runs_differ_with_any_colour_vision(theme, vision):
    assert lab(np.ones(3)) == pytest.approx([100, 0, 0], abs=0.1)
    seen = [lab(VISIONS[vision] @ linear(COLORS[f"run{i}"][theme])) for i in range(MAX_RUNS)]
    for a, b in itertools.combinations(seen, 2):
        # 2.3 is just noticeable side by side; thin lines need several times that.
        assert np.linalg.norm(a - b) > 15
