"""A real run's report holds the numbers of its metrics.jsonl, and so do the trackers' own files."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from ranks import run
from tiny_job import ROOT, write_job

TOOL = ROOT / "tools" / "report.py"
# Prints {tag: [[step, value], …]} of an event file, as TensorBoard itself reads it.
READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print(json.dumps({tag: [[e.step, e.value, e.wall_time] for e in events.Scalars(tag)]
                  for tag in events.Tags()["scalars"]}))
"""
# Prints the history of an offline run, a list of {key: value}. wandb's own reader is not Python;
# the file is a log in LevelDB's format (pieces of records within blocks of 32 KiB) of its messages.
READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
HEADER, BLOCK, FULL, LAST = 7, 32768, 1, 4
data = Path(sys.argv[1]).read_bytes()
assert data.startswith(b":W&B")
at, record, rows = HEADER, b"", []
while at + HEADER <= len(data):
    if BLOCK - at % BLOCK < HEADER:
        at += BLOCK - at % BLOCK
        continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    record += data[at + HEADER:at + HEADER + length]
    at += HEADER + length
    if kind in (FULL, LAST):
        message = wandb_internal_pb2.Record.FromString(record)
        record = b""
        if message.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                         for item in message.history.item})
print(json.dumps(rows))
"""
STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with everything that metrics.jsonl can hold, gradient accumulation too."""
    folder = tmp_path_factory.mktemp("job")
    write_job(folder)
    run(folder, "train", "config.yaml", "--quiet", "--set=objective.gram_per_block=true",
        f"--set=train.steps={STEPS}", "--set=batch.max_tokens_per_rank=24",
        "--set=checkpoint.every_steps=3")
    return folder / "out"


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy2(trained / name, tmp_path / name)
    return tmp_path


def steps_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_real_run_is_drawn_as_it_was_recorded(outside, copied):
    outside.run(TOOL, copied)

    page = (copied / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    steps = steps_of(copied)
    [name] = data["pictures"]["loss_task"]
    for key in ("loss_task", "loss_align", "cosine", "c_align", "grad_norm", "lr", "seconds"):
        drawn = data["pictures"][key][name]
        assert drawn["steps"] == list(range(1, STEPS + 1))
        assert drawn["values"] == pytest.approx([step[key] for step in steps], rel=1e-5)  # 6 digits
    heat = data["pictures"][f"blocks {name}"]
    assert heat["blocks"] == ["embedding", "block 0", "block 1", "head"]
    gram = steps[4]["blocks"]["block 1"]
    assert heat["values"][2][4] == pytest.approx(
        gram["ua"] / math.sqrt(gram["uu"] * gram["aa"]), rel=1e-5)
    # The blocks make up the model: their inner products add up to the whole's.
    whole = sum(block["ua"] for block in steps[4]["blocks"].values())
    assert whole == pytest.approx(steps[4]["ua"])
    summary = data["runs"][0]["summary"]
    assert summary["conflicts"] == sum(step["conflict"] for step in steps)
    assert summary["checkpoint_seconds"] > 0
    probe = steps[-1]["probe"]["heldout"]["kl"]
    assert summary["probes"]["heldout · kl"]["last"] == probe
    assert data["pictures"]["probe heldout kl"][name]["steps"] == [2, 4, 6]


def test_tensorboard_reads_the_numbers_of_every_step(outside, copied):
    (copied / "metrics.jsonl").open("a").write(
        json.dumps({"step": STEPS + 1, "loss_task": None, "seconds": 1.5, "skipped": True}) + "\n")
    for _ in range(2):  # the second time replaces the first
        outside.run(TOOL, copied, "--tensorboard")

    read = json.loads(outside.run("-c", READ_EVENTS, copied / "tensorboard"))

    steps = steps_of(copied)
    for tag, key in {"loss/task": "loss_task", "loss/align": "loss_align", "optimizer/lr": "lr",
                     "gradients/cosine": "cosine", "coefficients/align": "c_align"}.items():
        assert [number for number, _, _ in read[tag]] == list(range(1, STEPS + 1)), tag
        # Event files hold float32.
        assert [value for _, value, _ in read[tag]] == pytest.approx(
            [step[key] for step in steps[:-1]], rel=1e-6), tag
    assert [value for _, value, _ in read["optimizer/skipped"]] == [0] * STEPS + [1]
    assert read["probe_heldout/kl"][0][:2] == [
        2, pytest.approx(steps[1]["probe"]["heldout"]["kl"], rel=1e-6)]
    assert len(read["block_cosine/block_1"]) == STEPS - 1  # the first has no alignment gradient
    times = [time for _, _, time in read["speed/seconds"]]
    assert times[-1] - times[-2] == pytest.approx(1.5, abs=1e-3)
    assert times[-1] == pytest.approx((copied / "metrics.jsonl").stat().st_mtime, abs=1e-3)


def test_an_offline_run_of_wandb_holds_the_numbers_of_every_step(outside, copied):
    outside.run(TOOL, copied, "--wandb", folder=copied)

    [file] = copied.glob("wandb/offline-run-*/*.wandb")
    rows = json.loads(outside.run("-c", READ_WANDB, file))

    steps = steps_of(copied)
    assert [row["_step"] for row in rows] == list(range(1, STEPS + 1))
    for tag, key in {"loss/task": "loss_task", "gradients/cosine": "cosine"}.items():
        assert [row[tag] for row in rows] == [step[key] for step in steps]
    assert rows[5]["probe_heldout/kl"] == steps[5]["probe"]["heldout"]["kl"]
