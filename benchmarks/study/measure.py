"""measure.py: what is kept of a cell: settings, measures, and every step's scalars."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import audit
from errors import InputError

SERIES = ["gated", "loss_task", "loss_align", "uu", "ua", "aa", "cosine", "c_task", "c_align",
          "grad_norm", "clip"]
FORMAT = "safegrad.study/1"


def read_steps(run: Path) -> list[dict]:
    """The steps of a finished run."""
    path = run / "metrics.jsonl"
    steps = read_lines(path)
    if not steps or "probe" not in steps[-1]:
        raise InputError(f"{path}: its last step has no probe results; the run did not end")
    return steps


def measures_of_run(run: Path) -> dict:
    """`heldout` (loss and KL of refusals that were not trained on), `conflict` over the steps that
    compared two gradients, `cost`, and `steps`: lists with an entry a step, 6 digits.
    """
    steps = read_steps(run)
    compared = [step for step in steps if step.get("cosine") is not None and step["aa"] > 0]
    conflict = None
    if compared:
        conflict = {
            "rate": statistics.fmean(step["conflict"] for step in compared),
            "mean_cosine": statistics.fmean(step["cosine"] for step in compared),
            "median_c_align": statistics.median(step["c_align"] for step in compared),
            "steps": len(compared),
        }
    series = {key: [rounded(step.get(key)) for step in steps] for key in SERIES}
    versions = (run / "config.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return {
        "heldout": steps[-1]["probe"]["heldout"],
        "conflict": conflict,
        **({"blocks": of_blocks(steps)} if "blocks" in steps[-1] else {}),
        **({"gate": measures_of_gate(run / "gate.jsonl")} if "gated" in steps[-1] else {}),
        "cost": {"seconds": sum(step["seconds"] for step in steps),
                 "flops": sum(step["flops"] for step in steps),
                 "task_tokens": sum(step["task_tokens"] for step in steps),
                 "align_tokens": sum(step["align_tokens"] for step in steps)},
        "steps": {key: values for key, values in series.items() if set(values) != {None}},
        "versions": versions.lstrip("# "),
    }


def measures_of_audit(path: Path, deviations: float) -> dict:
    """What tools/audit.py --drop-outliers left out of the user data, by source."""
    lines = read_lines(path)
    scores = np.array([math.nan if line["score"] is None else line["score"] for line in lines])
    return {"sources": by_source(lines, audit.outliers(scores, deviations))}


def measures_of_gate(path: Path) -> dict:
    """What objective.gate would leave out after the last step, by source."""
    lines = read_lines(path)
    return {"sources": by_source(lines, [line["dropped"] for line in lines])}


def by_source(lines: list[dict], left_out: Iterable[bool]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for line, out in zip(lines, left_out):
        counts = found.setdefault(line["source"], {"samples": 0, "left_out": 0})
        counts["samples"] += 1
        counts["left_out"] += int(out)
    return found


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_blocks(steps: list[dict]) -> dict[str, dict[str, float]]:
    """Share of the steps in which a block's own gradients conflict, and their mean cosine; blocks
    and steps without an alignment gradient are left out.
    """
    found = {}
    for block in steps[-1]["blocks"]:
        grams = [step["blocks"][block] for step in steps]
        grams = [gram for gram in grams if gram["uu"] > 0 and gram["aa"] > 0]
        if grams:
            found[block] = {
                "conflict": statistics.fmean(gram["ua"] < 0 for gram in grams),
                "mean_cosine": statistics.fmean(
                    gram["ua"] / math.sqrt(gram["uu"] * gram["aa"]) for gram in grams)}
    return found


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def judged(folder: Path) -> dict:
    """The results of the one model that judge.py wrote into `folder`."""
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise InputError(f"{folder}: has {len(files)} results of judge.py, one was expected")
    content = json.loads(files[0].read_text(encoding="utf-8"))
    return {"preset": content["preset"], "results": content["results"],
            "versions": next(iter(content["judged"].values()))["versions"]}


def write_json(path: Path, content: dict) -> None:
    """A line a key: readable, and short enough to be kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    temporary.write_text("{" + ",\n ".join(lines) + "}\n", encoding="utf-8")
    temporary.replace(path)
