"""runs.py: reads the run folders that `safegrad train` writes, and says what a run came to."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from errors import InputError

# What a skipped step holds instead of measurements: nothing was combined, nothing was updated.
UPDATE_KEYS = ("c_task", "c_align", "grad_norm", "clip", "cosine")
# What a step with an older alignment gradient repeats of the step that computed it.
HELD_KEYS = ("loss_align", "aa")
LAST = 10  # steps whose mean loss is shown beside that of the last one
NAN = math.nan


@dataclass
class Run:
    """One run folder. Every step is an object of metrics.jsonl, in order and without repeats."""

    folder: Path
    name: str
    config: dict[str, str]  # dotted key -> value as it stands in config.yaml
    versions: str  # the first line of config.yaml: versions, ranks, device
    steps: list[dict]
    notes: list[str] = field(default_factory=list)  # what was left out, for the reader

    def values(self, key: str) -> list[float]:
        """`key` of every step; NaN where it is absent, null or not this step's own measurement."""
        return [value_of(step, key) for step in self.steps]

    @property
    def numbers(self) -> list[int]:
        return [step["step"] for step in self.steps]

    @property
    def planned_steps(self) -> int | None:
        """Steps that the config asks for; None where it counts epochs."""
        steps = self.config.get("train.steps", "")
        return int(steps) if steps.isdigit() else None


def value_of(step: dict, key: str) -> float:
    if step.get("skipped") and key in UPDATE_KEYS:
        return NAN
    if key in HELD_KEYS and is_held(step):
        return NAN
    value = step.get(key)
    return NAN if value is None else float(value)


def is_held(step: dict) -> bool:
    """Of a run with objective.align_every > 1: this step used an older alignment gradient."""
    return step.get("align_renewed") is False


def norm(squared: float) -> float:
    """The length that belongs to an inner product of a gradient with itself."""
    return math.sqrt(squared) if squared >= 0 else NAN


def cosine_of(gram: dict) -> float:
    """The cosine of the two gradients of one unit; NaN where one of them is zero or missing."""
    uu, ua, aa = (NAN if gram.get(key) is None else gram[key] for key in ("uu", "ua", "aa"))
    product = norm(uu) * norm(aa)
    return ua / product if product > 0 else NAN


def read_runs(folders: list[Path]) -> list[Run]:
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise InputError(f"{folder}: given more than once; name each run once")
    names = short_names(resolved)
    return [read_run(folder, name) for folder, name in zip(folders, names)]


def short_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    depth = 1
    while len(names := ["/".join(f.parts[-depth:]) for f in folders]) != len(set(names)):
        depth += 1
    return names


def read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; RUN is the `output` of a safegrad train")
    config_path, metrics_path = folder / "config.yaml", folder / "metrics.jsonl"
    for path in (config_path, metrics_path):
        if not path.is_file():
            raise InputError(f"{path}: no such file: {folder} holds no run, or one that has only"
                             " just started; safegrad train writes it before its first step")
    text = config_path.read_text(encoding="utf-8")
    first = text.split("\n", 1)[0]
    steps, notes = read_steps(metrics_path)
    versions = first.lstrip("# ") if first.startswith("#") else ""
    return Run(folder, name, flatten(load_yaml(config_path, text)), versions, steps, notes)


def load_yaml(path: Path, text: str) -> dict:
    try:
        # BaseLoader leaves every value as it is written, which is what is compared and shown.
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a config: sections are expected")
    return content


def flatten(tree: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            named = {str(item.get("name", i)): item for i, item in enumerate(value)}
            flat |= flatten(named, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ", ".join(value) if isinstance(value, list) else value
    return flat


def read_steps(path: Path) -> tuple[list[dict], list[str]]:
    """The steps of a metrics file, and notes on lines that are not steps.

    A run in progress or a crash leaves a line cut short. A run that went on from an older
    checkpoint may repeat steps; the later record is the one that counts.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    by_number: dict[int, dict] = {}
    notes = []
    repeated = 0
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        step = parse_step(line)
        if step is None:
            last = number == len(lines)  # no newline behind it
            notes.append("the last line of metrics.jsonl is incomplete (a run in progress?) and is"
                         " left out" if last else
                         f"line {number} of metrics.jsonl is not a step and is left out")
            continue
        repeated += step["step"] in by_number
        by_number[step["step"]] = step
    if not by_number:
        raise InputError(f"{path}: holds no finished step: the run has only just started, or ended"
                         " before its first step; make the report when there is one")
    if repeated:
        notes.append(f"steps that are there twice: {repeated}; the later record is shown")
    return [by_number[number] for number in sorted(by_number)], notes


def parse_step(line: str) -> dict | None:
    try:
        step = json.loads(line)
    except ValueError:
        return None
    if not isinstance(step, dict) or not isinstance(step.get("step"), int):
        return None
    return step


def finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def mean(values: list[float]) -> float | None:
    kept = finite(values)
    return math.fsum(kept) / len(kept) if kept else None


def last_of(values: list[float]) -> float | None:
    kept = finite(values)
    return kept[-1] if kept else None


def first_of(values: list[float]) -> float | None:
    return last_of(values[::-1])


def probe_ends(run: Run) -> dict[str, dict]:
    """`probe · measure` -> its first and last value and the steps they were measured after."""
    ends: dict[str, dict] = {}
    for step in run.steps:
        for probe, measures in step.get("probe", {}).items():
            for measure, value in measures.items():
                known = ends.setdefault(f"{probe} · {measure}",
                                        {"first_step": step["step"], "first": value})
                known |= {"last_step": step["step"], "last": value}
    return ends


def compared_steps(steps: list[dict]) -> list[dict]:
    """The steps whose two gradients were compared: there were two, and both were finite."""
    return [step for step in steps
            if not step.get("skipped") and math.isfinite(value_of(step, "ua"))]


def cosine_mean(steps: list[dict]) -> float | None:
    """None where no step has a cosine."""
    return mean([value_of(step, "cosine") for step in steps])


def summarize(run: Run) -> dict:
    """What the table and the sentence about a run say; None where it was not measured."""
    compared = compared_steps(run.steps)
    task, align = run.values("loss_task"), run.values("loss_align")
    checkpoints = finite(run.values("checkpoint_seconds"))
    return {
        "rule": run.config.get("objective.rule", ""),
        "surgery": run.config.get("objective.surgery", "global"),
        "align_every": run.config.get("objective.align_every", "1"),
        "gate": run.config.get("objective.gate", "0"),
        "align_loss": run.config.get("objective.align_loss", ""),
        "lr": run.config.get("optimizer.lr", ""),
        "steps": len(run.steps),
        "first_step": run.steps[0]["step"],
        "last_step": run.steps[-1]["step"],
        "planned_steps": run.planned_steps,
        "skipped": sum(bool(step.get("skipped")) for step in run.steps),
        "loss_task_first": first_of(task),
        "loss_task_last": last_of(task),
        "loss_task_last_mean": mean(task[-LAST:]),
        "loss_align_first": first_of(align),
        "loss_align_last": last_of(align),
        "loss_align_last_mean": mean(align[-LAST:]),
        "compared_steps": len(compared),
        "conflicts": sum(bool(step.get("conflict")) for step in compared),
        "cosine_mean": cosine_mean(run.steps),
        "tokens_per_s_mean": tokens_per_second(run),
        "seconds": math.fsum(finite(run.values("seconds"))),
        "checkpoint_seconds": math.fsum(checkpoints) if checkpoints else None,
        "memory_bytes": last_of(run.values("memory_bytes")),
        "probes": probe_ends(run),
    }


def tokens_per_second(run: Run) -> float | None:
    """All tokens over all seconds: a mean of rates would favour short steps."""
    seconds = math.fsum(finite(run.values("seconds")))
    tokens = math.fsum(finite(run.values("task_tokens")) + finite(run.values("align_tokens")))
    return tokens / seconds if seconds > 0 else None


def config_differences(runs: list[Run]) -> dict[str, list[str | None]]:
    """Key -> its value in each run, for the keys in which they differ; None where it is not set."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "output")
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def scalars(step: dict) -> dict[str, float]:
    """The measurements of a step by the names that trackers show; without what is not finite."""
    tags = {"loss/task": "loss_task", "loss/align": "loss_align", "gradients/cosine": "cosine",
            "gradients/combined_norm": "grad_norm", "gradients/clip": "clip",
            "coefficients/task": "c_task", "coefficients/align": "c_align",
            "coefficients/drift": "c_drift", "optimizer/drift": "drift", "data/gated": "gated",
            "optimizer/lr": "lr", "optimizer/epoch": "epoch", "tokens/task": "task_tokens",
            "tokens/align": "align_tokens", "speed/tokens_per_s": "tokens_per_s",
            "speed/seconds": "seconds", "speed/speed_of_light": "speed_of_light",
            "speed/checkpoint_seconds": "checkpoint_seconds",
            "memory/peak_bytes": "memory_bytes"}
    found = {tag: value_of(step, key) for tag, key in tags.items()}
    found["gradients/task_norm"] = norm(value_of(step, "uu"))
    found["gradients/align_norm"] = norm(value_of(step, "aa"))
    found["optimizer/skipped"] = float(bool(step.get("skipped")))
    if math.isfinite(value_of(step, "ua")):
        found["gradients/conflict"] = float(bool(step.get("conflict")))
    for phase, seconds in step.get("phase_seconds", {}).items():
        found[f"phase_seconds/{phase}"] = seconds
    for probe, measures in step.get("probe", {}).items():
        for measure, value in measures.items():
            found[f"probe_{probe}/{measure}"] = NAN if value is None else value
    for block, gram in step.get("blocks", {}).items():
        found[f"block_cosine/{block.replace(' ', '_')}"] = cosine_of(gram)
    return {tag: value for tag, value in found.items() if math.isfinite(value)}
