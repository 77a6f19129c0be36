#!/usr/bin/env python3
"""study.py: runs a grid of fine-tuning runs and their evaluation; goes on where it stopped.

    .venv/bin/python benchmarks/study/study.py benchmarks/study/smollm2.yaml

Makes the data, aligns the start model where the scale asks for it, then trains and judges the
cells of the grid. A cell that is done with the same settings is skipped, so the same command goes
on after an interruption or a change of the grid. Writes a JSON file a cell into the scale's
`results`; summary.py makes tables and pictures of them. docs/evidence.md is about what came out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cells import Cell, Scale, read_scale, read_yaml  # noqa: E402
from errors import InputError, run  # noqa: E402
from judging.records import folder_sha256  # noqa: E402
from measure import FORMAT, judged, measures_of_audit, measures_of_run, write_json  # noqa: E402
from study_data import StudyData, UserData, sha256, tokens_of  # noqa: E402

START = "start"  # the name of the start model among the results
AUDIT_STEPS = 10  # plain steps before an audit scores the samples


class Study:
    """The files of one scale, and how its cells are run."""

    def __init__(self, scale: Scale, cells: list[Cell]):
        self.scale = scale
        self.cells = cells
        self._files: dict[str, Path] = {}  # token files by name
        self._environment = dict(os.environ)
        # Cells share the cores. What the user or a scheduler has set is left alone.
        self._environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // scale.jobs)))
        self._stop = threading.Event()

    @property
    def start(self) -> Path:
        return self.scale.folder / START / "model" if self.scale.align_first else self.scale.model

    @functools.cached_property
    def start_sha256(self) -> str:
        """Large models are read once a study, not once a cell."""
        return folder_sha256([self.start])

    def make_data(self) -> None:
        folder = self.scale.folder / "data"
        data = StudyData(self.scale.model, folder)
        data.write_common()
        self._files = {name: folder / f"{name}.safetensors" for name in ("start", "heldout")}
        for cell in self.cells:
            align, task = f"align-{cell.align_samples}", self._user(cell).name
            if align not in self._files:
                self._files[align] = data.align(cell.align_samples)
            if task not in self._files:
                self._files[task] = data.task(self._user(cell))

    def make_start(self) -> None:
        """Aligns the start model if it is not there, and judges it."""
        if self.scale.align_first and not self._is_done(START, self._start_settings()):
            shutil.rmtree(self.scale.folder / START, ignore_errors=True)
            self._call(START, [*self.scale.launch, "train", self.scale.align_first,
                               *sets(self._start_overrides())])
        if not self._is_done(START, self._start_settings()):
            write_json(self._result(START), {
                "format": FORMAT, "settings": self._start_settings(),
                "weights_sha256": self.start_sha256,
                "judge": self._judge(START, self.start)})

    def run_cells(self) -> None:
        """Every cell that is not done, `jobs` at a time, in order. The first failure ends all."""
        pending = [cell for cell in self.cells if not self.is_done(cell)]
        print(f"{len(self.cells)} cells, {len(self.cells) - len(pending)} done", flush=True)
        with concurrent.futures.ThreadPoolExecutor(self.scale.jobs) as pool:
            running = {pool.submit(self._run_cell, cell) for cell in pending}
            try:
                for ended in concurrent.futures.as_completed(running):
                    ended.result()
            except BaseException:
                self._stop.set()
                raise

    def is_done(self, cell: Cell) -> bool:
        return self._is_done(cell.name, self._settings(cell))

    def _is_done(self, name: str, settings: dict) -> bool:
        return has_settings(self._result(name), settings)

    def _run_cell(self, cell: Cell) -> None:
        if self._stop.is_set():
            return
        begin = time.monotonic()
        content = self._train(cell)
        if cell.judged:
            model = self.scale.folder / "cells" / cell.name / "model"
            content["judge"] = self._judge(cell.name, model)
        write_json(self._result(cell.name), content)
        print(f"{cell.name:44} {time.monotonic() - begin:5.0f} s", flush=True)

    def _train(self, cell: Cell) -> dict:
        """The cell's result without its judge's. A training that an earlier study ended, but did
        not judge, is not repeated.
        """
        folder = self.scale.folder / "cells" / cell.name
        trained = folder.with_name(f"{cell.name}.json")
        settings = self._settings(cell)
        if has_settings(trained, settings) and (folder / "model").exists():
            return json.loads(trained.read_text(encoding="utf-8"))
        trained.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        overrides = self._overrides(cell, folder)
        audit = {}
        if cell.drop_outliers is not None:
            audit = {"audit": self._leave_out(cell, folder, overrides)}
        self._call(cell.name, [*self.scale.launch, "train", self.scale.run, *sets(overrides)])
        content = {"format": FORMAT, "settings": settings, "start_sha256": self.start_sha256,
                   **audit, **measures_of_run(folder)}
        write_json(trained, content)
        return content

    def _leave_out(self, cell: Cell, folder: Path, overrides: dict[str, object]) -> dict:
        """Audits the cell's user data as the scale's run has it, and makes the rest its data."""
        audited, rest = f"{folder}-audit", f"{folder}-kept.safetensors"
        task = overrides["data.task"]
        shutil.rmtree(audited, ignore_errors=True)
        self._call(f"{cell.name}-audit", [
            *self.scale.launch, "audit", self.scale.run, "--steps", str(AUDIT_STEPS),
            *sets({**self._common_overrides(cell), "output": audited})])
        self._call(f"{cell.name}-kept", [
            sys.executable, "tools/audit.py", f"{audited}/audit.jsonl", task,
            "--drop-outliers", f"{cell.drop_outliers:g}", "--out", rest])
        overrides["data.task"] = rest
        batch = read_yaml(Path(self.scale.run))["batch"]
        drawn = AUDIT_STEPS * batch["task_sequences"] / self.scale.samples
        tokens = (1 + drawn) * tokens_of(task) + tokens_of(overrides["data.align"])
        return {**measures_of_audit(Path(audited) / "audit.jsonl", cell.drop_outliers),
                "tokens": round(tokens)}

    def _judge(self, name: str, model: Path) -> dict:
        out = self.scale.folder / "judge" / name
        shutil.rmtree(out, ignore_errors=True)
        splits = self.scale.folder / "data" / "splits.json"
        self._call(f"{name}-judge", [*self.scale.judge, str(model), "--trained-on", str(splits),
                                     "--out", str(out)])
        return judged(out)

    def _call(self, name: str, command: list[str]) -> None:
        if self._stop.is_set():
            raise InputError("stopped")
        log = self.scale.folder / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            code = subprocess.run(command, cwd=ROOT, env=self._environment, stdout=stream,
                                  stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
        if code != 0:
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
            raise InputError(f"{name}: exit code {code}; {log} ends with\n{end}")

    def _user(self, cell: Cell) -> UserData:
        return UserData(self.scale.samples, cell.poison, cell.seed, cell.mixed)

    def _overrides(self, cell: Cell, output: Path) -> dict[str, object]:
        return {**self._common_overrides(cell), "output": str(output), **cell.overrides}

    def _common_overrides(self, cell: Cell) -> dict[str, object]:
        """What all arms on this data share."""
        return {
            "model.path": str(self.start),
            "data.task": str(self._files[self._user(cell).name]),
            "data.align": str(self._files[f"align-{cell.align_samples}"]),
            "probe": f"[{{name: heldout, file: {self._files['heldout']}}}]",
            "train.seed": cell.seed,
        }

    def _start_overrides(self) -> dict[str, object]:
        return {"model.path": str(self.scale.model), "data.task": str(self._files["start"]),
                "output": str(self.scale.folder / START)}

    def _start_settings(self) -> dict:
        recipe = read_yaml(Path(self.scale.align_first)) if self.scale.align_first else None
        return {"recipe": identity(recipe), "data": sha256(self._files["start"]),
                "judge": judge_options(self.scale)}

    def _settings(self, cell: Cell) -> dict:
        """All that a cell's numbers follow from, but for programs and machine."""
        return {
            "arm": cell.arm, "poison": cell.poison, "seed": cell.seed,
            "overrides": cell.overrides, "align_samples": cell.align_samples,
            "mixed": cell.mixed,
            **({} if cell.drop_outliers is None else
               {"drop_outliers": cell.drop_outliers, "audit_steps": AUDIT_STEPS}),
            "run": identity(read_yaml(Path(self.scale.run))),
            "data": [sha256(self._files[name]) for name in (
                self._user(cell).name, f"align-{cell.align_samples}", "heldout")],
            "start": identity(self._start_settings()),
            "judge": judge_options(self.scale) if cell.judged else None,
        }

    def _result(self, name: str) -> Path:
        return self.scale.results / f"{name}.json"


def has_settings(path: Path, settings: dict) -> bool:
    """The result of these settings is there."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings


def sets(overrides: dict[str, object]) -> list[str]:
    """Arguments of the program; YAML has its true and false in small letters."""
    def text(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)
    return [part for key, value in overrides.items() for part in ("--set", f"{key}={text(value)}")]


def identity(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def judge_options(scale: Scale) -> list[str]:
    """How the judge works (device, batches too), not where the programs are."""
    return [word for word in scale.judge[1:] if not word.endswith("judge.py")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the study of one scale; goes on where it stopped.",
        epilog="example: .venv/bin/python benchmarks/study/study.py benchmarks/study/smollm2.yaml")
    parser.add_argument("scale", type=Path, metavar="SCALE", help="a YAML file of benchmarks/study")
    parser.add_argument("--list", action="store_true", help="say which cells are done, run nothing")
    options = parser.parse_args()
    scale, cells = read_scale(options.scale)
    study = Study(scale, cells)
    study.make_data()
    if options.list:
        for cell in cells:
            print(f"{'done' if study.is_done(cell) else '-':5} {cell.name}")
        return
    study.make_start()
    study.run_cells()


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit("stopped; start it again to go on")
