"""quickstart_picture.py: draws what the runs of the quickstart came to, as the README shows it."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from errors import run
from quickstart_table import RUNS, measure, read_probes, read_steps
from report_figures import DPI, STYLE, standalone_svg
from report_theme import run_color, stand_in

WIDTH, HEIGHT = 820, 250
COLORS = {"start": "muted", "plain": run_color(1), "SafeGrad": run_color(0)}


def draw(folder: Path) -> str:
    """Refusals before and after, and task loss, KL and cosine while training."""
    start = folder / "start" / "evaluation.json"
    refused = {"start": measure(read_probes(start), "refusal", "greedy_refusal", start)}
    steps = {}
    for name, run_folder in RUNS.items():
        path = folder / run_folder / "metrics.jsonl"
        steps[name] = read_steps(path)
        refused[name] = measure(steps[name][-1]["probe"], "refusal", "greedy_refusal", path)

    with matplotlib.rc_context(STYLE):
        # With a background of its own: the page around it may be of the other theme.
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained",
                        facecolor=stand_in("card"))
        bars, loss, kl, cosine = figure.subplots(1, 4)
        draw_refusals(bars, refused)
        draw_steps(loss, "task loss", "loss_task", steps)
        draw_steps(kl, "KL from the start model", "loss_align", steps)
        draw_steps(cosine, "cosine of the gradients", "cosine", steps)
        cosine.axhline(0, color=stand_in("muted"), linewidth=0.9)
        for name in RUNS:
            cosine.plot([], [], color=stand_in(COLORS[name]), label=name)
        figure.legend(*cosine.get_legend_handles_labels(), loc="outside lower center", ncols=2,
                      frameon=False)
        return standalone_svg(figure, "Harmful prompts refused: " + ", ".join(
            f"{name} {100 * share:.0f} %" for name, share in refused.items()))


def draw_refusals(axes, refused: dict[str, float]) -> None:
    axes.bar(list(refused), [100 * share for share in refused.values()], width=0.7,
             color=[stand_in(COLORS[name]) for name in refused])
    for i, share in enumerate(refused.values()):
        axes.text(i, 100 * share + 2, f"{100 * share:.0f} %", ha="center")
    axes.set_ylim(0, 108)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0, labelsize=10)
    axes.set_title("harmful prompts refused", fontsize=11)


def draw_steps(axes, title: str, key: str, steps: dict[str, list[dict]]) -> None:
    for name, records in steps.items():
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points) if points else ([], []), color=stand_in(COLORS[name]))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step", labelpad=2)
    axes.set_title(title, fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the results of the quickstart as an SVG for light and dark pages.",
        epilog="example: python tools/quickstart_picture.py runs/quickstart"
        " docs/images/quickstart.svg",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what launch/quickstart made")
    parser.add_argument("out", type=Path, metavar="FILE", help="the SVG")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(draw(given.folder), encoding="utf-8")


if __name__ == "__main__":
    run(main)
