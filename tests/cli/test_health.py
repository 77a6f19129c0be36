"""Steps that are not finite: skipped by all ranks, recorded with what broke, and after too many in
a row the end of the run; losses that stand out are recorded with their samples.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cli import Ended, run
from tiny_job import MODEL, sequences, write_tokens
from tokenfile import Sequence

BAD = 117  # the last token of the Qwen3 model, beyond what sequences() draws


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out/checkpoints").glob("step-*"))


def errors(done: Ended) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("error: ")]


def explode(folder: Path, *arguments: str) -> Ended:
    """The first step's update leaves weights of 1e30: no later loss is finite."""
    return run(folder, "train", "config.yaml", "--set", "optimizer.lr=1e30", "--set",
               "train.steps=50", "--set", "train.max_skipped_steps=3", *arguments)


def test_steps_that_are_not_finite_end_the_run_with_a_report(job):
    done = explode(job)

    assert done.code == 2, done.err
    assert len(errors(done)) == 1, done.err
    for text in ("out/metrics.jsonl: steps 2 to 4 were not finite and were skipped, 3 in a row",
                 "train.max_skipped_steps", "loss align on ranks 0, 1", "loss task on ranks 0, 1",
                 "gradients of ", "(task, align)", "The weights are those after step 1",
                 "are not saved", "a lower optimizer.lr"):
        assert text in errors(done)[0], errors(done)[0]
    assert "--resume" not in errors(done)[0]  # there is nothing to go on from
    assert "dtype" not in errors(done)[0] and "clip_norm" not in errors(done)[0]
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert [line.split(",")[0] for line in warnings] == [
        f"warning: step {step} is skipped" for step in (2, 3, 4)]
    assert not (job / "out/model").exists() and not (job / "out/checkpoints").exists()

    first, *skipped = records(job)
    assert "not_finite" not in first and not first["skipped"]
    assert [record["step"] for record in skipped] == [2, 3, 4]
    for record in skipped:
        assert record["skipped"] and record["loss_task"] is None
        assert record["not_finite"]["losses"] == {"task": [0, 1], "align": [0, 1]}
        assert len(record["not_finite"]["blocks"]) > 2
        assert len(record["not_finite"]["samples"]["task"]) == 4


def test_a_state_that_is_saved_is_not_saved_again(job):
    settings = ["--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep_last=1"]
    # However often it is tried again: none at skipped steps, and the last good step's stays.
    for again in ([], ["--resume", "auto"], ["--resume", "auto"]):
        done = explode(job, *settings, *again)
        assert done.code == 2, done.err
        assert "saved in out/checkpoints/step-000001" in errors(done)[0]
        assert checkpoints(job) == ["step-000001"]


def test_a_state_that_no_checkpoint_has_is_saved_at_the_end(job):
    done = explode(job, "--set", "checkpoint.every_steps=2")

    assert done.code == 2, done.err
    assert "saved in out/checkpoints/step-000004" in errors(done)[0]
    assert checkpoints(job) == ["step-000004"]
    assert (job / "out/checkpoints/latest").read_text().strip() == "step-000004"


def test_the_advice_to_change_the_config_says_how_to_go_on_with_it(job):
    done = explode(job, "--set", "checkpoint.every_steps=1")
    assert "a lower optimizer.lr" in errors(done)[0]
    assert "--resume FOLDER --allow-change, FOLDER a checkpoint older" in errors(done)[0]

    changed = ["--set", "optimizer.lr=1e-4", "--set", "train.steps=50",
               "--set", "train.max_skipped_steps=2", "--resume"]
    refused = run(job, "train", "config.yaml", *changed, "auto")
    assert refused.code == 1 and "--allow-change" in refused.err, refused.err
    followed = run(job, "train", "config.yaml", *changed, "out/checkpoints/step-000001",
                   "--allow-change")
    # Taken, in vain here: the weights after the first step are the exploded ones.
    assert "steps 2 to 3 were not finite" in errors(followed)[0]


def test_when_to_give_up_may_change_on_resume(job):
    explode(job, "--set", "checkpoint.every_steps=1")

    done = run(job, "train", "config.yaml", "--resume", "out/checkpoints/step-000001", "--set",
               "train.steps=50", "--set", "optimizer.lr=1e30", "--set", "train.max_skipped_steps=2")

    assert done.code == 2, done.err
    assert "steps 2 to 3 were not finite and were skipped, 2 in a row" in errors(done)[0]
    assert [record["step"] for record in records(job)] == [1, 2, 3]


def break_embedding(folder: Path, token: int) -> None:
    """One row of the embedding becomes infinite; the output matrix is another one."""
    for path in (folder / "model").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8:8 + length]).get("model.embed_tokens.weight")
        if entry is None:
            continue
        assert entry["dtype"] == "F32"
        row = np.full(entry["shape"][1], np.inf, np.float32).tobytes()
        begin = 8 + length + entry["data_offsets"][0] + token * len(row)
        content[begin:begin + len(row)] = row
        path.write_bytes(bytes(content))
        return
    raise AssertionError("no embedding")


def test_one_bad_sample_costs_one_step_and_is_named(job):
    qwen3 = MODEL.parent / "qwen3"
    shutil.rmtree(job / "model")
    shutil.copytree(qwen3, job / "model")
    (job / "model/tokenizer.json").write_text("{}")
    break_embedding(job, token=BAD)
    content = sequences(12, seed=1)
    content[7].tokens[1] = BAD
    write_tokens(job, "task", content)

    done = run(job, "train", "config.yaml")

    assert done.code == 0, done.err
    assert "1 step skipped (not finite)" in done.out
    skipped = [record for record in records(job) if record["skipped"]]
    assert len(records(job)) == 3 and len(skipped) == 1
    what = skipped[0]["not_finite"]
    assert list(what["losses"]) == ["task"] and len(what["losses"]["task"]) == 1
    assert 7 in what["samples"]["task"] and len(what["samples"]["task"]) < 4
    assert all(objectives == ["task"] for objectives in what["blocks"].values())


def test_a_loss_that_stands_out_is_recorded_with_its_sample(job):
    """59 sequences are the same, one is not; it comes again in the second epoch."""
    def sample(tokens):
        return Sequence(tokens, [0, 0, 1, 1, 1, 1])
    content = [sample([1, 2, 3, 4, 5, 6]) for _ in range(60)]
    content[37] = sample([1, 2, 96, 95, 94, 93])
    write_tokens(job, "task", content)

    done = run(job, "train", "config.yaml", "--set", "batch.task_sequences=1", "--set",
               "batch.align_sequences=1", "--set", "train.steps=120", "--set", "probe=null",
               "--set", "optimizer.lr=3e-3")

    assert done.code == 0, done.err
    spikes = [record for record in records(job) if "loss_spike" in record]
    second = [record for record in spikes if record["loss_spike"]["samples"] == [37]
              and record["step"] > 60]
    assert len(second) == 1, spikes
    spike = second[0]
    assert spike["loss_task"] > spike["loss_spike"]["limit"] > spike["loss_spike"]["median"]
    assert f"warning: step {spike['step']}: the task loss" in done.err
    before = [record["loss_task"] for record in records(job)][:spike["step"] - 1][-50:]
    assert spike["loss_spike"]["median"] == pytest.approx(np.median(before), rel=1e-12)
