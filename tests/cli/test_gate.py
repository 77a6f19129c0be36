"""Runs with objective.gate: what they record, write and go on from."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from soak import metrics, model
from test_cli import run
from tiny_job import choices, job, sequences, write_tokens  # noqa: F401

SAMPLES, STEPS = 40, 15
GATE = ["--set", "objective.gate=1", "--set", "batch.task_sequences=10", "--set",
        f"train.steps={STEPS}", "--set", "probe=null"]


@pytest.fixture
def gated(job) -> Path:  # noqa: F811
    write_tokens(job, "task", sequences(SAMPLES, 1))
    return job


def samples(folder: Path, output: str = "out") -> list[dict]:
    return [json.loads(line) for line in (folder / output / "gate.jsonl").read_text().splitlines()]


def test_it_records_what_is_left_out_and_lists_all_samples_at_the_end(gated):
    ended = run(gated, "train", "config.yaml", *GATE)

    assert ended.code == 0, ended.err
    left_out = [line["gated"] for line in metrics(gated / "out")]
    assert left_out[:4] == [0] * 4 and sum(left_out) > 0 and max(left_out) < 10
    assert metrics(gated / "out")[-1]["epoch"] == STEPS * 10 / SAMPLES
    assert f" · {sum(left_out)} draws left out by the gate" in ended.out
    lines = samples(gated)
    scores = [line["score"] for line in lines]
    assert sorted(line["index"] for line in lines) == list(range(SAMPLES))
    assert scores == sorted(scores)
    middle = statistics.median(scores)
    limit = middle - 1.4826 * statistics.median(abs(score - middle) for score in scores)
    assert [line["dropped"] for line in lines] == [score < limit for score in scores]
    assert 0 < sum(line["dropped"] for line in lines) < SAMPLES / 2
    made = sequences(SAMPLES, 1)
    for line in lines:
        assert line["tokens"] == len(made[line["index"]].tokens)
        assert line["scored"] == sum(made[line["index"]].mask)


def test_samples_that_were_never_scored_come_last(gated):
    assert run(gated, "train", "config.yaml", *GATE, "--set", "train.steps=4").code == 0
    scores = [line["score"] for line in samples(gated)]
    known = [score for score in scores if score is not None]
    assert known == sorted(known) and len(known) == 20  # the first two steps have no direction
    assert scores[20:] == [None] * 20
    assert not any(line["dropped"] for line in samples(gated))


def test_it_goes_on_from_a_checkpoint_in_the_second_epoch_on_any_number_of_ranks(gated):
    saves = [*GATE, "--set", "checkpoint.every_steps=6"]
    assert run(gated, "train", "config.yaml", *saves, "--set", "output=whole").code == 0
    for output, ranks in (("same", 2), ("alone", 1)):
        start = "whole/checkpoints/step-000006"
        ended = run(gated, "train", "config.yaml", *saves, "--set", f"output={output}",
                    "--resume", start, ranks=ranks)
        assert ended.code == 0, ended.err
        rest = metrics(gated / "whole")[6:]
        resumed = metrics(gated / output)
        assert sum(line["gated"] for line in rest) > 0
        if ranks == 2:
            assert resumed == rest
            assert model(gated / output) == model(gated / "whole")
            assert samples(gated, output) == samples(gated, "whole")
        for line, other in zip(resumed, rest, strict=True):
            # float32 gradients summed in another order; 1e-5 is the promise
            assert math.isclose(line["loss_task"], other["loss_task"], rel_tol=1e-5)

    ended = run(gated, "train", "config.yaml", *saves, "--set", "objective.gate=0", "--set",
                "output=without", "--resume", start)
    assert ended.code == 1 and "objective.gate: was 1.0, is 0.0" in ended.err


def test_what_is_in_the_way_of_the_list_ends_the_job_before_its_first_step(gated):
    (gated / "out/gate.jsonl/in the way").mkdir(parents=True)
    ended = run(gated, "train", "config.yaml", *GATE)
    assert ended.code == 2 and len(ended.err.splitlines()) == 1, ended.err
    assert "out/gate.jsonl" in ended.err
    assert not (gated / "out/metrics.jsonl").exists()


def test_a_list_of_an_earlier_run_does_not_stay(gated):
    assert run(gated, "train", "config.yaml", *GATE).code == 0
    assert samples(gated)
    assert run(gated, "train", "config.yaml", *GATE, "--set", "objective.gate=0").code == 0
    assert not (gated / "out/gate.jsonl").exists()


def test_scores_are_not_taken_over_to_other_data(gated):
    saves = [*GATE, "--set", "checkpoint.every_steps=6"]
    assert run(gated, "train", "config.yaml", *saves).code == 0
    assert sum(line["gated"] for line in metrics(gated / "out")[6:9]) > 0
    write_tokens(gated, "task", sequences(SAMPLES, 2))  # as many, others
    ended = run(gated, "train", "config.yaml", *saves, "--set", "output=other", "--resume",
                "out/checkpoints/step-000006", "--allow-change")
    assert ended.code == 0, ended.err
    # Of 32 scores the first 30 are there after three steps.
    assert [line["gated"] for line in metrics(gated / "other")[:3]] == [0, 0, 0]


@pytest.mark.parametrize("steps, warned", [(4, True), (5, False)])
def test_a_gate_that_cannot_act_is_told(gated, steps, warned):
    ended = run(gated, "check", "config.yaml", *GATE, "--set", f"train.steps={steps}")
    assert ended.code == 0
    assert ("objective.gate: nothing will be left out: the run draws 40 of 40 samples" in ended.err
            ) == warned


def test_check_says_that_there_is_nothing_to_score_with(gated):
    ended = run(gated, "check", "config.yaml", *GATE, "--set", "objective.rule=sft", "--set",
                "data.align=null", "--set", "batch.align_sequences=0")
    assert ended.code == 1
    assert "objective.gate: got 1, but there is no alignment gradient to score samples" in ended.err
    assert run(gated, "check", "config.yaml", *GATE, "--set", "objective.rule=sft").code == 0


def test_an_audit_of_a_config_with_a_gate_takes_plain_steps(gated):
    for gate in ("0", "1"):
        assert run(gated, "audit", "config.yaml", *GATE, "--steps", "14", "--set",
                   f"objective.gate={gate}", "--set", f"output=audit{gate}").code == 0
    assert (gated / "audit0/audit.jsonl").read_text() == (gated / "audit1/audit.jsonl").read_text()
