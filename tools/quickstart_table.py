"""quickstart_table.py: prints what the runs of the quickstart came to, side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from errors import InputError, run
from runs import compared_steps, cosine_mean

RUNS = {"plain": "plain", "SafeGrad": "safegrad"}  # column -> folder
ABSENT = "–"


def read_steps(path: Path) -> list[dict]:
    """The records of a finished run."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    try:
        steps = [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path}: is not a metrics file: {error}") from error
    if not steps or "probe" not in steps[-1]:
        raise InputError(f"{path}: the last of its {len(steps)} steps has no probe results; the run"
                         " was stopped, start it again")
    return steps


def read_probes(path: Path) -> dict:
    """What `safegrad evaluate` printed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not the output of safegrad evaluate: {error}") from error


def measure(probes: dict, name: str, key: str, where: Path) -> float:
    try:
        return probes[name][key]
    except KeyError:
        raise InputError(f"{where}: there is no {key} of a probe {name} in it; the quickstart's"
                         " configs have one") from None


def probe_column(probes: dict, where: Path, heldout_kl: float) -> list[str]:
    return [
        f"{100 * measure(probes, 'refusal', 'greedy_refusal', where):.0f} %",
        f"{100 * measure(probes, 'harmless', 'greedy_refusal', where):.0f} %",
        f"{100 * measure(probes, 'accuracy', 'correct', where):.1f} %",
        f"{heldout_kl:.3f}",
    ]


def run_column(steps: list[dict], where: Path) -> list[str]:
    probes = steps[-1]["probe"]
    column = probe_column(probes, where, measure(probes, "heldout", "kl", where))
    compared, cosine = compared_steps(steps), cosine_mean(steps)
    conflicts = sum(bool(step.get("conflict")) for step in compared)
    column.append(f"{100 * conflicts / len(compared):.0f} %" if compared else ABSENT)
    column.append(ABSENT if cosine is None else f"{cosine:.2f}")
    column.append(f"{sum(step['seconds'] for step in steps):.0f}")
    return column


def table(folder: Path) -> str:
    labels = ["", "harmful prompts refused", "harmless prompts refused", "task accuracy",
              "held-out KL", "steps with conflict", "mean cosine of u and a",
              "seconds of training"]
    start = folder / "start" / "evaluation.json"
    # The start model is the reference of the KL: its distance to itself is 0 by definition.
    columns = [labels, ["start", *probe_column(read_probes(start), start, 0.0), *3 * [ABSENT]]]
    for name, run_folder in RUNS.items():
        path = folder / run_folder / "metrics.jsonl"
        columns.append([name, *run_column(read_steps(path), path)])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for label, *cells in zip(*columns):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("   ".join([label.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the results of the quickstart as a table: the start model, plain"
        " fine-tuning, and SafeGrad.",
        epilog="example: python tools/quickstart_table.py runs/quickstart",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER",
                        help="holds start/evaluation.json, plain/metrics.jsonl and"
                        " safegrad/metrics.jsonl")
    folder = parser.parse_args().folder
    print(table(folder))
    print("\nThe trained adapters, ready for peft, and the steps of each run:")
    for run_folder in RUNS.values():
        print(f"  {folder / run_folder}/model   {folder / run_folder}/metrics.jsonl")


if __name__ == "__main__":
    run(main)
