"""cells.py: what a study consists of, read from its two YAML files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from errors import InputError
from study_data import ALIGN

SCALE_KEYS = {"model": str, "run": str, "grid": str, "samples": int, "launch": str, "judge": str,
              "jobs": int, "folder": str, "results": str}
# Of an arm, with their defaults.
DATA_KEYS = {"align_samples": ALIGN, "mixed": 0, "drop_outliers": None, "judge": True}


@dataclass(frozen=True)
class Scale:
    """One model on one kind of machine."""

    model: Path
    align_first: str | None  # config of the stage that makes the start model; None: `model` is it
    run: str
    samples: int
    launch: list[str]
    judge: list[str]
    jobs: int
    folder: Path
    results: Path


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation."""

    arm: str
    overrides: dict[str, object]  # config key -> value
    align_samples: int
    mixed: int
    drop_outliers: float | None  # what an audit finds is left out: tools/audit.py
    judged: bool
    poison: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-p{100 * self.poison:g}-s{self.seed}"


def read_scale(path: Path) -> tuple[Scale, list[Cell]]:
    keys = read_yaml(path)
    for key, kind in SCALE_KEYS.items():
        if not isinstance(keys.get(key), kind):
            raise InputError(f"{path}: {key}: is {keys.get(key)!r}, must be a {kind.__name__}")
    lists = keys.get("lists", ["cells"])
    if not isinstance(lists, list):
        raise InputError(f"{path}: lists: is {lists!r}, must be a list of names")
    unknown = set(keys) - set(SCALE_KEYS) - {"align_first", "lists"}
    if unknown:
        raise InputError(f"{path}: {', '.join(sorted(unknown))}: no such key")
    scale = Scale(Path(keys["model"]), keys.get("align_first"), keys["run"], keys["samples"],
                  keys["launch"].split(), keys["judge"].split(), keys["jobs"],
                  Path(keys["folder"]), Path(keys["results"]))
    return scale, read_grid(Path(keys["grid"]), lists)


def read_grid(path: Path, lists: Sequence[str] = ("cells",)) -> list[Cell]:
    """All cells of these lists of the grid, in the order in which they run."""
    grid = read_yaml(path)
    for name in lists:
        if not isinstance(grid.get(name), list):
            raise InputError(f"{path}: {name}: no such list of cells")
    cells: dict[str, Cell] = {}
    for group in (group for name in lists for group in grid[name]):
        for seed in group["seeds"]:
            for poison in group["poison"]:
                for arm in group["arms"]:
                    if arm not in grid["arms"]:
                        raise InputError(f"{path}: {arm}: no such arm")
                    cell = make_cell(arm, grid["arms"][arm], poison, seed)
                    if cell.name in cells:
                        raise InputError(f"{path}: {cell.name} is there twice")
                    cells[cell.name] = cell
    return list(cells.values())


def make_cell(arm: str, keys: dict[str, object], poison: float, seed: int) -> Cell:
    data = {key: keys.get(key, default) for key, default in DATA_KEYS.items()}
    overrides = {key: value for key, value in keys.items() if key not in DATA_KEYS}
    return Cell(arm, overrides, data["align_samples"], data["mixed"],
                data["drop_outliers"], data["judge"], poison, seed)


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: keys are expected")
    return content
