"""`safegrad audit` as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tiny_job import PROGRAM, choices, job, sequences, write_tokens  # noqa: F401
from tokenfile import Sequence, write_token_file
from wheels import sha256_of


def audit(job: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    command = [PROGRAM, "audit", "config.yaml", *arguments]
    if ranks > 1:
        command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n",
                   str(ranks), *command]
    return subprocess.run(command, cwd=job, capture_output=True, text=True)


def read(job: Path) -> list[dict]:
    return [json.loads(line) for line in (job / "out/audit.jsonl").read_text().splitlines()]


def test_it_prints_the_worst_and_writes_all(job):
    ended = audit(job, "--top", "3")
    assert ended.returncode == 0, ended.stderr
    lines = read(job)
    assert sorted(line["index"] for line in lines) == list(range(12))
    assert [line["score"] for line in lines] == sorted(line["score"] for line in lines)
    made = sequences(12, seed=1)
    for line in lines:
        assert line["tokens"] == len(made[line["index"]].tokens)
        assert line["scored"] == sum(made[line["index"]].mask) and line["loss"] > 0
    printed = re.findall(r"^ +(\d+) +(\d+) +\S+ +\S+ +\d+", ended.stdout, re.MULTILINE)
    assert printed == [(str(r + 1), str(lines[r]["index"])) for r in range(3)]
    below = sum(line["score"] < 0 for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    summary = rf"^12 samples, {tokens} tokens, scored after 3 plain steps; \d+:\d\d in all · "
    assert re.search(summary, ended.stdout, re.MULTILINE)
    assert f"{below} below zero" in ended.stdout and "out/audit.jsonl" in ended.stdout
    left = sorted(path.name for path in (job / "out").iterdir())
    assert left == ["audit.jsonl", "lock", "reference"]


def test_ranks_agree(job):
    audit(job)
    alone = read(job)
    ended = audit(job, "--quiet", ranks=2)
    assert ended.returncode == 0 and ended.stdout == "", ended.stderr
    for a, b in zip(alone, read(job), strict=True):
        assert a["index"] == b["index"]
        assert a["score"] == pytest.approx(b["score"], rel=1e-4, abs=1e-6)  # float32 sums


def test_sources_are_named_and_repeated_alignment_samples_score_highest(job):
    # With the cross-entropy as the alignment loss its own samples point along it: they come last.
    mixed = [Sequence(s.tokens, s.mask, source=0) for s in sequences(10, seed=1)]
    mixed += [Sequence(s.tokens, s.mask, source=1) for s in sequences(8, seed=2)]
    write_token_file(job / "task.safetensors", mixed, sha256_of(job / "model/tokenizer.json"), "",
                     sources=["user", "align"])
    ended = audit(job, "--set", "objective.align_loss=sft", "--steps", "0")
    assert ended.returncode == 0 and " user" in ended.stdout, ended.stderr
    by_source = {name: [line["score"] for line in read(job) if line["source"] == name]
                 for name in ("user", "align")}
    mean = {name: sum(scores) / len(scores) for name, scores in by_source.items()}
    assert mean["align"] > mean["user"] and mean["align"] > 0


@pytest.mark.parametrize("arguments, told", [
    (("--set", "data.align=null", "--set", "objective.rule=sft", "--set",
      "batch.align_sequences=0"), "data.align is missing: audit compares"),
    (("--set", "data.task=null"), "data.task is missing: audit needs"),
    (("--set", "batch.max_tokens_per_rank=5"), "batch.max_tokens_per_rank: got 5"),
    (("--top", "-1"), "--top"), (("--steps", "0"), "--steps: got 0, but the KL"),
    (("--set", "output=config.yaml/x"), "is not a folder")])
def test_mistakes_are_named_and_nothing_is_written(job, arguments, told):
    before = sorted(path.name for path in job.iterdir())
    ended = audit(job, *arguments)
    assert ended.returncode == 1 and told in ended.stderr and ended.stderr.count("error:") == 1
    assert sorted(path.name for path in job.iterdir()) == before


def test_a_config_without_alignment_batches_can_be_audited(job):
    ended = audit(job, "--set", "objective.rule=sft", "--set", "batch.align_sequences=0")
    assert ended.returncode == 0, ended.stderr
    assert len(read(job)) == 12
