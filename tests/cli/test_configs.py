"""Every config of this repository, checked for the ranks that it is meant for."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from tiny_job import PROGRAM, ROOT, job, sequences, write_tokens  # noqa: F401

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# Models and data that are not in this repository are stood in for: a shape, a few samples.
SHAPES = {"models/Meta-Llama-3-8B-Instruct": "llama3-8b",
          "models/Qwen2.5-7B-Instruct": "qwen2.5-7b"}
RANKS = {"llama3-8b-full-8gpu": [8], "llama3-8b-hybrid-4nodes": [8, 32],
         "llama3-8b-lora": [1, 2, 10]}


def cases():
    for path in CONFIGS:
        for ranks in RANKS.get(path.stem, [1, 4]):
            yield pytest.param(path, ranks, id=f"{path.relative_to(ROOT / 'configs')}-{ranks}")


def check(job, path, *arguments) -> subprocess.CompletedProcess:
    config = yaml.safe_load(path.read_text())
    shape = SHAPES.get(config["model"]["path"], "smollm2-135m")
    write_tokens(job, "task", sequences(12, seed=1))
    changes = ["model.path=null", f"model.config={ROOT}/benchmarks/{shape}.json",
               "data.task=task.safetensors", "probe=null"]
    if "align" in config["data"]:
        changes.append("data.align=align.safetensors")
    overrides = [word for change in changes for word in ("--set", change)]
    return subprocess.run([PROGRAM, "check", path, *overrides, *arguments], cwd=job,
                          capture_output=True, text=True)


@pytest.mark.parametrize("path, ranks", list(cases()))
def test_it_is_valid_for_its_ranks(job, path, ranks):
    ended = check(job, path, "--ranks", str(ranks))
    assert ended.returncode == 0, ended.stderr
    assert f"valid for {ranks} rank{'s' * (ranks > 1)}; nothing was run" in ended.stdout
    assert not (job / "runs").exists()


def test_a_hybrid_one_is_refused_for_other_ranks(job):
    ended = check(job, ROOT / "configs/llama3-8b-hybrid-4nodes.yaml", "--ranks", "12")
    assert ended.returncode == 1
    assert re.search(r"4nodes.yaml:\d+: parallel.shards: got 8, which does not divide the 12 ranks",
                     ended.stderr)


def test_every_rule_has_a_config():
    schema_rules = {"sft", "weighted_sum", "safegrad", "agem", "pcgrad", "mgda", "cagrad", "ogpsa"}
    by_file = {path.stem: yaml.safe_load(path.read_text())["objective"]["rule"]
               for path in (ROOT / "configs/rules").glob("*.yaml")}
    assert by_file == {rule: rule for rule in schema_rules}
