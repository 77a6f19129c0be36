"""pictures.py: a study's results as SVG pictures that read on light and dark pages."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

HEADLINE = {  # arm -> label, colour (Okabe and Ito's, told apart by everybody)
    "sft": ("plain", "#D55E00"),
    "agem": ("A-GEM", "#E69F00"),
    "weighted_sum": ("weighted sum, ρ 1", "#56B4E9"),
    "weighted_sum_rho3": ("weighted sum, ρ 3", "#0072B2"),
    "safegrad_supervised": ("SafeGrad, supervised", "#CC79A7"),
    "safegrad": ("SafeGrad, KL", "#009E73"),
}
MUTED = "#808080"  # reads on white and on black


def draw_all(results, folder: Path) -> list[Path]:
    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "safegrad", "font.size": 10, "text.color": MUTED,
        "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "xtick.color": MUTED,
        "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
        "savefig.transparent": True, "legend.frameon": False, "legend.labelcolor": MUTED})
    pictures = {"safety.svg": safety, "trade.svg": trade, "conflict.svg": conflict}
    return [save(draw(results), folder / name) for name, draw in pictures.items()]


def save(figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path


def safety(results):
    """Harmful score and accuracy over the poison ratio; bars are the range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, name, title in zip(axes, ("harmful", "accuracy"),
                                 ("harmful prompts not refused, %", "task accuracy, %")):
        for arm, (label, colour) in HEADLINE.items():
            points = [(100 * p, results.values(arm, p, name)) for p in results.poisons]
            points = [(x, values) for x, values in points if values]
            means = [sum(v) / len(v) for _, v in points]
            low = [m - min(v) for m, (_, v) in zip(means, points)]
            high = [max(v) - m for m, (_, v) in zip(means, points)]
            axis.errorbar([x for x, _ in points], means, [low, high], label=label, color=colour,
                          marker="o", markersize=4, capsize=2, linewidth=1.5)
        start = results.of_start(name)
        if start is not None:
            axis.axhline(start, color=MUTED, linestyle=":", linewidth=1)
            axis.annotate("start model", (1, start), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8)
        axis.set_xlabel("poison among the user's samples, %")
        axis.set_title(title, loc="left", fontsize=10)
    axes[0].set_ylim(-3, 103)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3,
                  bbox_to_anchor=(0.5, -0.16))
    figure.tight_layout()
    return figure


def trade(results):
    """Every arm at the largest poison ratio: what it keeps against what it learns."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    poison = max(results.poisons, default=0)
    for arm in results.arms(poison):
        x, y = (results.mean(arm, poison, name) for name in ("accuracy", "harmful"))
        if x is None or y is None:
            continue
        label, colour = HEADLINE.get(arm, (arm, MUTED))
        axis.plot(x, y, "o", color=colour, markersize=6 if arm in HEADLINE else 4)
        axis.annotate(label, (x, y), xytext=(5, 2), textcoords="offset points", fontsize=7,
                      color=colour)
    axis.set_xlabel("task accuracy, %")
    axis.set_title(f"harmful prompts not refused at {100 * poison:g} % poison, %", loc="left",
                   fontsize=10)
    figure.tight_layout()
    return figure


def conflict(results):
    """Left: cosine of u and a step by step under SafeGrad; right: share of steps in conflict."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    colours = plt.get_cmap("viridis")
    for poison in results.poisons:
        seeds = results.cells.get(("safegrad", poison))
        if not seeds:
            continue
        series = next(iter(seeds.values()))["steps"]["cosine"]
        left.plot(range(1, len(series) + 1), series, linewidth=1.2,
                  color=colours(0.1 + 0.8 * poison / max(results.poisons[-1], 1e-9)),
                  label=f"{100 * poison:g} %")
    left.axhline(0, color=MUTED, linewidth=0.8)
    left.set_xlabel("step")
    left.set_title("cosine of task and alignment gradient, SafeGrad", loc="left", fontsize=10)
    left.legend(title="poison", fontsize=8, title_fontsize=8, ncols=2)
    for arm, label in (("sft_watched", "plain"), ("safegrad", "SafeGrad")):
        points = [(100 * p, results.mean(arm, p, "conflict")) for p in results.poisons]
        points = [(x, y) for x, y in points if y is not None]
        colour = HEADLINE["sft" if arm == "sft_watched" else arm][1]
        if points:
            right.plot(*zip(*points), marker="o", markersize=4, color=colour, label=label)
    right.set_ylim(0, 103)
    right.set_xlabel("poison among the user's samples, %")
    right.set_title("steps in conflict, %", loc="left", fontsize=10)
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure
