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
    """Every arm at the largest poison ratio that most arms ran at, best first: what it keeps, what
    it learns, what it refuses without need; mean and range over seeds.
    """
    poison = max(results.poisons, key=lambda p: (len(results.arms(p)), p), default=0)
    arms = [arm for arm in results.arms(poison) if results.values(arm, poison, "harmful")]
    arms.sort(key=lambda arm: results.mean(arm, poison, "harmful"))
    figure, axes = plt.subplots(1, 3, figsize=(9, 1 + 0.21 * len(arms)), sharey=True)
    names = ("harmful", "over_refusal", "accuracy")
    titles = ("harmful prompts not refused, %", "harmless prompts refused, %", "task accuracy, %")
    for axis, name, title in zip(axes, names, titles):
        for row, arm in enumerate(arms):
            values = results.values(arm, poison, name)
            if not values:
                continue
            colour = HEADLINE.get(arm, ("", MUTED))[1]
            axis.plot([min(values), max(values)], [row, row], color=colour, linewidth=2, alpha=0.5)
            axis.plot(results.mean(arm, poison, name), row, "o", color=colour, markersize=5)
        start = results.of_start(name)
        if start is not None:
            axis.axvline(start, color=MUTED, linestyle=":", linewidth=1)
        axis.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.5)
        axis.set_title(title, loc="left", fontsize=10)
    seeds = [len(results.values(arm, poison, "harmful")) for arm in arms]
    labels = [HEADLINE.get(arm, (arm, ""))[0] for arm in arms]
    axes[0].set_yticks(range(len(arms)), [f"{label} ({n})" for label, n in zip(labels, seeds)],
                       fontsize=8)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.text(0, -0.01, f"{100 * poison:g} % poison; number of seeds in brackets, bars show "
                "their range; dotted: the start model", fontsize=8)
    figure.tight_layout()
    return figure


def running_mean(series, width: int = 9):
    """Over up to `width` values around each."""
    half = width // 2
    parts = [series[max(0, i - half):i + half + 1] for i in range(len(series))]
    return [sum(part) / len(part) for part in parts]


def conflict(results):
    """Left: cosine of u and a step by step under SafeGrad; right: share of steps in conflict."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    colours = plt.get_cmap("viridis")
    for poison in results.poisons:
        seeds = results.cells.get(("safegrad", poison))
        if not seeds:
            continue
        steps = zip(*(seed["steps"]["cosine"] for seed in seeds.values()))
        # There is none where a = 0: counted as 0.
        series = running_mean([sum(c or 0.0 for c in cosines) / len(cosines) for cosines in steps])
        left.plot(range(1, len(series) + 1), series, linewidth=1.5,
                  color=colours(0.1 + 0.8 * poison / max(results.poisons[-1], 1e-9)),
                  label=f"{100 * poison:g} %")
    left.axhline(0, color=MUTED, linewidth=0.8)
    left.set_xlabel("step")
    left.set_title("cosine of u and a, SafeGrad (mean of seeds, 9 steps)", loc="left", fontsize=10)
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
