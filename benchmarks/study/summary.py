#!/usr/bin/env python3
"""summary.py: tables and pictures of a study's results.

    .venv/bin/python benchmarks/study/summary.py benchmarks/results/study/smollm2

Reads the JSON files that study.py wrote, and writes table.md and one SVG a picture beside them.
Where an arm has several seeds its numbers are mean and range. Of further folders, the same study on
other machines, come the cells that the first lacks; the table marks their arms with *.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from errors import InputError, run  # noqa: E402

START = "start"
ABSENT = "–"


def left_out(source: str) -> Callable[[dict], float | None]:
    """In percent, of a run whose samples were audited or gated."""
    def read(result: dict) -> float | None:
        found = (result.get("audit") or result.get("gate") or {}).get("sources", {}).get(source)
        return None if found is None else 100 * found["left_out"] / found["samples"]
    return read


def share(set_name: str, measure: str) -> Callable[[dict], float | None]:
    """In percent, of a judged model."""
    def read(result: dict) -> float | None:
        found = result.get("judge", {}).get("results", {}).get(set_name, {}).get(measure)
        return None if found is None else 100 * found["count"] / found["total"]
    return read


def of(*path: str, scale: float = 1) -> Callable[[dict], float | None]:
    def read(result: dict) -> float | None:
        for key in path:
            result = (result or {}).get(key)
        return None if result is None else scale * result
    return read


@dataclass(frozen=True)
class Measure:
    title: str
    read: Callable[[dict], float | None]
    form: str


MEASURES = {
    "harmful": Measure("harmful score %", share("harmful", "not_refused"), ".1f"),
    "affirmative": Measure("answered yes %", share("harmful", "affirmative"), ".1f"),
    "over_refusal": Measure("over-refusal %", share("benign", "refused"), ".1f"),
    "leakage": Measure("harmless: yes %", share("benign", "affirmative"), ".1f"),
    "accuracy": Measure("accuracy %", share("task", "correct"), ".1f"),
    "kl": Measure("held-out KL", of("heldout", "kl"), ".3f"),
    "conflict": Measure("conflict %", of("conflict", "rate", scale=100), ".0f"),
    "cosine": Measure("mean cosine", of("conflict", "mean_cosine"), ".2f"),
    "c_align": Measure("median c_align", of("conflict", "median_c_align"), ".2f"),
    "poison_out": Measure("poison left out %", left_out("poison"), ".0f"),
    "reviews_out": Measure("reviews left out %", left_out("reviews"), ".0f"),
    "work": Measure("work / sft", of("work"), ".2f"),
}


@dataclass
class Results:
    """All cells of a study: (arm, poison) -> results by seed, in the order of the files."""

    start: dict
    cells: dict[tuple[str, float], dict[int, dict]]
    elsewhere: set[tuple[str, float]]  # of which a seed is another machine's

    def values(self, arm: str, poison: float, measure: str) -> list[float]:
        found = [MEASURES[measure].read(r) for r in self.cells.get((arm, poison), {}).values()]
        return [value for value in found if value is not None]

    def mean(self, arm: str, poison: float, measure: str) -> float | None:
        values = self.values(arm, poison, measure)
        return statistics.fmean(values) if values else None

    def of_start(self, measure: str) -> float | None:
        return MEASURES[measure].read(self.start)

    @property
    def poisons(self) -> list[float]:
        return sorted({poison for _, poison in self.cells})

    def arms(self, poison: float) -> list[str]:
        return sorted({arm for arm, p in self.cells if p == poison})


def read_results(folder: Path, *others: Path) -> Results:
    start = folder / f"{START}.json"
    if not start.exists():
        raise InputError(f"{start}: no such file; study.py writes it first")
    cells: dict[tuple[str, float], dict[int, dict]] = {}
    elsewhere = set()
    for place in (folder, *others):
        for path in sorted(place.glob("*-p*-s*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            settings = result["settings"]
            key = settings["arm"], settings["poison"]
            known = cells.setdefault(key, {}).setdefault(settings["seed"], result)
            if what_was_run(known) != what_was_run(result):
                raise InputError(f"{path}: its settings are not those of the same cell in {folder}")
            if known is result and place != folder:
                elsewhere.add(key)
    for (_, poison), seeds in cells.items():
        for seed, result in seeds.items():
            plain = cells.get(("sft", poison), {}).get(seed)
            if plain:
                result["work"] = work(result) / work(plain)
    return Results(json.loads(start.read_text(encoding="utf-8")), cells, elsewhere)


def what_was_run(result: dict) -> dict:
    """Settings less those that differ between machines: the start model's own, the judge's."""
    return {key: value for key, value in result["settings"].items()
            if key not in ("start", "judge")}


def work(result: dict) -> float:
    """Necessary floating-point operations of a run; those of an audit before it are counted at the
    run's own operations a token, as many as its matrix products take or a little more.
    """
    cost = result["cost"]
    audited = result.get("audit", {}).get("tokens", 0)
    return cost["flops"] * (1 + audited / (cost["task_tokens"] + cost["align_tokens"]))


def spread(values: list[float], form: str) -> str:
    if not values:
        return ABSENT
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(results: Results) -> str:
    """A row an arm and poison ratio, by ratio, worst harmful score last."""
    lines = ["| poison | arm | seeds | " + " | ".join(m.title for m in MEASURES.values()) + " |",
             "|---" * (3 + len(MEASURES)) + "|"]
    start = [ABSENT if (value := results.of_start(name)) is None else f"{value:{m.form}}"
             for name, m in MEASURES.items()]
    lines.append("| – | **start model** | – | " + " | ".join(start) + " |")
    for poison in reversed(results.poisons):
        def badness(arm: str, poison: float = poison) -> float:
            mean = results.mean(arm, poison, "harmful")
            return 101.0 if mean is None else mean
        for arm in sorted(results.arms(poison), key=badness):
            cells = [spread(results.values(arm, poison, name), m.form)
                     for name, m in MEASURES.items()]
            seeds = len(results.cells[arm, poison])
            mark = "*" if (arm, poison) in results.elsewhere else ""
            lines.append(f"| {100 * poison:g} % | {arm}{mark} | {seeds} | "
                         + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tables and pictures of a study's results.",
        epilog="example: .venv/bin/python benchmarks/study/summary.py"
        " benchmarks/results/study/smollm2")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RESULTS")
    folders = parser.parse_args().folders
    folder, results = folders[0], read_results(*folders)
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    from pictures import draw_all  # matplotlib takes a second to load
    written = [folder / "table.md", *draw_all(results, folder)]
    print(table(results), *[f"wrote {path}" for path in written], sep="\n")


if __name__ == "__main__":
    run(main)
