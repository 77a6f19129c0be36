"""report_charts.py: which pictures a report has, of which numbers, and what each of them means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from report_figures import (BINS, HeatMap, Line, bar_chart, decades, heat_chart, heat_map_of,
                            line_chart, moving_share, thin)
from runs import NAN, Run, cosine_of, finite, is_held, mean, norm

WINDOW = 20  # steps of the moving conflict rate


@dataclass
class Picture:
    """A picture with its title, its one line of meaning (empty where the section says it for all of
    its pictures), and the numbers that it was drawn from."""

    id: str
    title: str
    meaning: str
    svg: str
    data: dict
    notes: list[str] = field(default_factory=list)


@dataclass
class Section:
    title: str
    pictures: list[Picture]
    text: str = ""  # instead of pictures, or before them
    legend: str = ""  # of a heat map: the largest cosine


@dataclass
class Chart:
    """A line chart of one number of every step."""

    id: str
    title: str
    meaning: str
    values: Callable[[Run], list[float]]
    zero: bool = False
    percent: bool = False
    marks_skipped: bool = False
    trivial: float | None = None  # not drawn if it is nothing else in any run
    sparse: bool = False  # measured after some steps only: the points in between are left out
    held: bool = False  # of the alignment gradient: a step that used an older one measured nothing
    special: bool = False  # of some rules only: that it is not there needs no word


def conflict_rate(run: Run) -> list[float]:
    flags = [NAN if step.get("skipped") or math.isnan(ua) else float(bool(step.get("conflict")))
             for step, ua in zip(run.steps, run.values("ua"))]
    return moving_share(flags, WINDOW)


def key(name: str, scale: float = 1) -> Callable[[Run], list[float]]:
    return lambda run: [scale * value for value in run.values(name)]


def of_blocks(read: Callable[[dict], float]) -> Callable[[Run], list[float]]:
    """Of the range over blocks that a step of layer-wise surgery has."""
    return lambda run: [read(step["block_coefficients"]) if "block_coefficients" in step else NAN
                        for step in run.steps]


def norms(name: str) -> Callable[[Run], list[float]]:
    return lambda run: [norm(value) for value in run.values(name)]


LOSSES = [
    Chart("loss_task", "Task loss",
          "Cross-entropy per response token on the user's data: how much of it is left to learn.",
          key("loss_task"), marks_skipped=True),
    Chart("loss_align", "Alignment loss",
          "KL from the start model per response token (cross-entropy with align_loss: sft): how far"
          " the model has moved away on the alignment set.", key("loss_align"), held=True),
]
CONFLICT = [
    Chart("cosine", "Cosine of the two gradients",
          "Below 0, what the task asks for works against alignment; above, both agree.",
          key("cosine"), zero=True),
    Chart("conflict_rate", "Conflict rate, %",
          f"Share of the last {WINDOW} steps (fewer at the start) with a cosine below 0.",
          conflict_rate, percent=True),
    Chart("c_align", "Coefficient of the alignment gradient",
          "Its weight in the update. SafeGrad raises it above ρ in conflict; it may be large while"
          " the alignment gradient is tiny. With layer-wise surgery, the mean over blocks.",
          key("c_align")),
    Chart("c_task", "Coefficient of the task gradient",
          "Its weight in the update, which pcgrad, mgda and cagrad change.", key("c_task"),
          trivial=1.0),
    Chart("gated", "Samples left out",
          "objective.gate: task draws of a step that were left out by their score.", key("gated"),
          special=True),
    Chart("block_conflicts", "Blocks in conflict",
          "Layer-wise surgery: in how many of the blocks that train the two gradients conflict.",
          of_blocks(lambda found: found["conflicts"]), special=True),
    Chart("block_c_align", "Largest coefficient of a block's alignment gradient",
          "Layer-wise surgery: the weight above is the mean over blocks, this the largest of them.",
          of_blocks(lambda found: found["c_align"][1]), special=True),
]
NORMS = [
    Chart("norm_task", "Norm of the task gradient",
          "How hard the user's data pulls, before coefficients and clipping.", norms("uu")),
    Chart("norm_align", "Norm of the alignment gradient",
          "How hard the alignment set pulls back; 0 at the start model.", norms("aa"), held=True),
    Chart("drift", "Distance from the anchor",
          "Rule lisa: |w − w_anchor|, how far a phase has moved the weights; ρ times it pulls"
          " back.",
          key("drift"), special=True),
    Chart("grad_norm", "Norm of the combined gradient",
          "What the rule made of the two, before clipping.", key("grad_norm")),
    Chart("clip", "Clipping factor", "The combined gradient is multiplied by it; 1 is no clipping.",
          key("clip")),
    Chart("lr", "Learning rate", "What the schedule made of optimizer.lr.", key("lr")),
]
SPEED = [
    Chart("tokens_per_s", "Throughput, tokens/s",
          "Task and alignment tokens of a step over its seconds; a drop is a slow step.",
          key("tokens_per_s")),
    Chart("speed_of_light", "Share of the speed of light, %",
          "The shortest time for the necessary matrix products over the time that the step took.",
          key("speed_of_light", 100)),
    Chart("seconds", "Seconds a step", "Without probes and checkpoints.", key("seconds")),
]
MEMORY = [
    Chart("memory", "Peak memory of the fullest rank, GiB",
          "The most that a rank has held so far: on a CPU the whole process with its libraries, on"
          " a GPU its tensors. It should be level after the first steps, probes and checkpoints.",
          key("memory_bytes", 1 / 2**30)),
]


def draw_chart(chart: Chart, runs: list[Run]) -> Picture | None:
    """None if no run has the number."""
    lines = lines_of(chart, runs)
    drawn = [line for line in lines if not line.empty]
    if all(value == chart.trivial for line in drawn for value in finite(line.low + line.high)):
        return None
    skipped = {}
    if chart.marks_skipped:
        skipped = {i: [s["step"] for s in run.steps if s.get("skipped")]
                   for i, run in enumerate(runs) if any(s.get("skipped") for s in run.steps)}
    svg = line_chart(drawn, zero=chart.zero, percent=chart.percent, skipped=skipped,
                     label=f"{chart.title} over the steps. {spoken(drawn)}")
    notes = [f"{runs[i].name}: {count(len(steps), 'skipped step')} (×, a number was not finite)."
             for i, steps in skipped.items()]
    if absent := [line.name for line in lines if line.empty]:
        notes.append(f"Not measured in {', '.join(absent)}.")
    if drawn[0].per_point > 1:
        notes.append(f"A point is the mean of {drawn[0].per_point} steps, the band their smallest"
                     " and largest value.")
    if decades(drawn) and not chart.percent:
        notes.append("Logarithmic axis.")
    return Picture(chart.id, chart.title, chart.meaning, svg,
                   {line.name: line_data(line) for line in drawn}, notes)


def lines_of(chart: Chart, runs: list[Run]) -> list[Line]:
    points = [[(step["step"], value) for step, value in zip(run.steps, chart.values(run))
               if not (chart.held and is_held(step))] for run in runs]
    if chart.sparse:
        points = [[point for point in of_run if math.isfinite(point[1])] for of_run in points]
    # The same for all runs, so that none looks smoother than another.
    per_point = max(1, math.ceil(max(map(len, points)) / BINS))
    lines = []
    for i, (run, of_run) in enumerate(zip(runs, points)):
        steps, values = [step for step, _ in of_run], [value for _, value in of_run]
        lines.append(thin(i, run.name, steps, values, per_point))
        lines[-1].dots = chart.sparse or len(steps) < len(runs[i].steps)
    return lines


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def spoken(lines: list[Line]) -> str:
    """The lines in words, for those who do not see them."""
    sentences = []
    for line in lines:
        known = [(s, v) for s, v in zip(line.steps, line.values) if math.isfinite(v)]
        sentences.append(f"{line.name}: from {known[0][1]:.3g} to {known[-1][1]:.3g}, between"
                         f" {min(finite(line.low)):.3g} and {max(finite(line.high)):.3g}.")
    return " ".join(sentences)


def line_data(line: Line) -> dict:
    data = {"steps": line.steps, "values": rounded(line.values)}
    if line.per_point > 1:
        data |= {"low": rounded(line.low), "high": rounded(line.high),
                 "steps_per_point": line.per_point}
    return data


def rounded(values: list[float]) -> list[float]:
    """To six digits, which is more than a picture shows."""
    return [float(f"{value:.6g}") for value in values]


def draw_charts(title: str, charts: list[Chart], runs: list[Run], otherwise: str = "") -> Section:
    pictures = [picture for chart in charts if (picture := draw_chart(chart, runs))]
    expected = {chart.id for chart in charts if chart.trivial is None and not chart.special}
    missing = expected - {picture.id for picture in pictures}
    return Section(title, pictures, otherwise if missing else "")


def phases(runs: list[Run]) -> Section:
    title = "Time by phase"
    # Finite where a step has phases at all: a phase that it does not name took no time.
    timed = [[step["phase_seconds"] for step in run.steps if step.get("phase_seconds")]
             for run in runs]
    names = list(dict.fromkeys(name for steps in timed for step in steps for name in step))
    if not names:
        return Section(title, [], "No step of these runs has phase_seconds.")
    rows = {name: [mean([step.get(name) or 0.0 for step in steps]) or 0.0 for steps in timed]
            for name in names}
    rows = dict(sorted(rows.items(), key=lambda row: -max(row[1])))
    data = {run.name: {name: values[i] for name, values in rows.items()}
            for i, run in enumerate(runs)}
    words = " ".join(f"{run}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items())
                     + "." for run, row in data.items())
    picture = Picture("phases", "Mean seconds of a step",
                      "Where a step's time goes, on rank 0; reduce and wait are communication, and"
                      " waiting for slower ranks.",
                      bar_chart(rows, "seconds", f"Mean seconds of each phase. {words}"), data)
    return Section(title, [picture])


HEAT_MEANING = ("Cosine of the two gradients within each block of the model. Grey: not known, or"
                " one gradient is zero.")
GRAM_HINT = "Set objective.gram_per_block: true to have the inner products of every block recorded."


def blocks(runs: list[Run]) -> Section:
    """A heat map for each run that has the inner products of its blocks."""
    title = "Conflict by block"
    heats: dict[str, HeatMap] = {}
    for run in runs:
        names = sorted({name for step in run.steps for name in step.get("blocks", {})},
                       key=block_order)
        rows = {name: [cosine_of(step.get("blocks", {}).get(name, {})) for step in run.steps]
                for name in names}
        rows = {name: values for name, values in rows.items() if finite(values)}
        if rows:
            heats[run.name] = heat_map_of(run.numbers, rows)
    shown = [run for run in runs if run.name in heats]
    text = " ".join([HEAT_MEANING, what_the_rule_sees(shown)] * bool(heats)
                    + why_no_heat_map([run for run in runs if run.name not in heats]))
    if not heats:
        return Section(title, [], text)
    sizes = sorted(abs(v) for heat in heats.values() for row in heat.values for v in finite(row))
    # Full colour for the largest twentieth: one block in strong conflict would fade all others.
    limit = max(math.ceil(sizes[int(0.95 * (len(sizes) - 1))] * 20) / 20, 0.05)
    return Section(title, [heat_picture(name, heat, limit) for name, heat in heats.items()], text,
                   legend=f"{limit:g}")


def what_the_rule_sees(runs: list[Run]) -> str:
    by_block = [run.name for run in runs if run.config.get("objective.surgery") == "block"]
    if not by_block:
        return "The rule acts on the whole model's."
    where = "" if len(by_block) == len(runs) else f" in {', '.join(by_block)}"
    return (f"The rule acts on each of them by itself (objective.surgery: block){where}"
            + ("; elsewhere on the whole model's." if where else "."))


def why_no_heat_map(runs: list[Run]) -> list[str]:
    recorded = [run.name for run in runs if any(step.get("blocks") for step in run.steps)]
    others = [run.name for run in runs if run.name not in recorded]
    return ([f"Not recorded in {', '.join(others)}. {GRAM_HINT}"] * bool(others)
            + [f"In {', '.join(recorded)} one of the two gradients is zero throughout, or there is"
               " only one."] * bool(recorded))


def block_order(name: str) -> tuple:
    """Embedding, blocks by number, then the others: the order of the model."""
    word, _, number = name.partition(" ")
    if word == "block" and number.isdigit():
        return (1, int(number), name)
    return (0, 0, name) if name == "embedding" else (2, 0, name)


def heat_picture(name: str, heat: HeatMap, limit: float) -> Picture:
    averages = {block: mean(row) for block, row in zip(heat.blocks, heat.values)}
    words = ", ".join(f"{block} {value:.2f}" for block, value in averages.items())
    notes = []
    if heat.per_column > 1:
        notes.append(f"A column is the mean of {heat.per_column} steps.")
    return Picture(f"blocks {name}", name, "",
                   heat_chart(heat, limit, f"Cosine by block, mean over the steps: {words}."),
                   {"blocks": heat.blocks, "steps": heat.steps,
                    "values": [rounded(row) for row in heat.values],
                    "steps_per_column": heat.per_column, "limit": limit}, notes)


def probe_charts(runs: list[Run]) -> list[Chart]:
    """One chart for each measure of a probe that some run took more than once."""
    taken: dict[tuple[str, str], int] = {}
    for run in runs:
        here: dict[tuple[str, str], int] = {}
        for step in run.steps:
            for probe, measures in step.get("probe", {}).items():
                for measure in measures:
                    here[probe, measure] = here.get((probe, measure), 0) + 1
        for name, times in here.items():
            taken[name] = max(times, taken.get(name, 0))

    def chart(probe: str, measure: str) -> Chart:
        def values(run):
            found = [step.get("probe", {}).get(probe, {}).get(measure) for step in run.steps]
            return [NAN if value is None else float(value) for value in found]
        return Chart(f"probe {probe} {measure}", f"{probe} · {measure}", probe_meaning(measure),
                     values, sparse=True)

    return [chart(*name) for name in sorted(taken, key=probe_order) if taken[name] > 1]


def probe_order(name: tuple[str, str]) -> tuple:
    """By probe; what decoding would say first."""
    probe, measure = name
    return (probe, not measure.startswith("greedy_"), measure)


def probe_meaning(measure: str) -> str:
    if measure in ("kl", "loss"):
        return {"kl": "KL from the start model, per scored token.",
                "loss": "Cross-entropy per scored token."}[measure]
    if measure.startswith("greedy_"):
        return "Share of prompts whose greedy reply begins like this class."
    return "Share of prompts for which this class is the likeliest."


def sections(runs: list[Run]) -> list[Section]:
    one_objective = ("Runs without an alignment set (rule sft without data.align) have one gradient"
                     " and nothing to compare it with.")
    return [
        draw_charts("Losses", LOSSES, runs, one_objective),
        draw_charts("Conflict of the two gradients", CONFLICT, runs, one_objective),
        draw_charts("Gradients and update", NORMS, runs, one_objective),
        blocks(runs),
        draw_charts("Speed", SPEED, runs),
        phases(runs),
        draw_charts("Memory", MEMORY, runs, "Recorded in none of these runs: safegrad writes"
                    " memory_bytes where the system says how much a process has held."),
        draw_charts("Probes during training", probe_charts(runs), runs),
    ]
