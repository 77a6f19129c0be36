"""trackers.py: hands the steps of a run to TensorBoard, or to Weights & Biases without a network.

Both packages are optional: tools/tracker-requirements.txt pins the versions that are tested.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from errors import InputError
from runs import Run, scalars, value_of

SUFFIX = ".safegrad"  # of our event files, so that writing them again replaces no one else's


def need(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{module.split('.')[0]} cannot be imported ({error}); install it with"
            " .venv/bin/python -m pip install -r tools/tracker-requirements.txt") from error


def finish_times(run: Run) -> list[float]:
    """When each step ended: metrics.jsonl has durations only, so counted back from the file's last
    change. Probes and checkpoints in between are not counted."""
    time = (run.folder / "metrics.jsonl").stat().st_mtime
    times = []
    for step in reversed(run.steps):
        times.append(time)
        seconds = value_of(step, "seconds")
        time -= seconds if seconds >= 0 else 0.0
    return times[::-1]


def write_tensorboard(run: Run) -> Path:
    """Writes RUN/tensorboard anew: an event file with the scalars of every step."""
    writers = need("tensorboard.summary.writer.event_file_writer")
    event = need("tensorboard.compat.proto.event_pb2").Event
    summary = need("tensorboard.compat.proto.summary_pb2").Summary
    folder = run.folder / "tensorboard"
    for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()
    writer = writers.EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for step, time in zip(run.steps, finish_times(run)):
        values = [summary.Value(tag=tag, simple_value=value)
                  for tag, value in scalars(step).items()]
        writer.add_event(event(wall_time=time, step=step["step"], summary=summary(value=values)))
    writer.close()
    return folder


def write_wandb(run: Run, project: str = "safegrad") -> Path:
    """Adds an offline run to RUN/wandb, for `wandb sync` to send. Sends nothing itself."""
    wandb = need("wandb")
    # The numbers and the config, and as little about this machine as can be set.
    settings = wandb.Settings(mode="offline", silent=True, console="off", disable_git=True,
                              save_code=False, x_disable_stats=True, x_disable_meta=True,
                              x_disable_machine_info=True, x_save_requirements=False)
    offline = wandb.init(project=project, name=run.name, dir=str(run.folder),
                         config=dict(run.config), settings=settings)
    try:
        for step in run.steps:
            offline.log(scalars(step), step=step["step"])
        return Path(offline.settings.sync_dir)
    finally:
        offline.finish()
