"""`safegrad inspect` on everything that safegrad reads or writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tiny_job import PROGRAM, job, sequences  # noqa: F401


def inspect(path: Path, folder: Path | None = None) -> str:
    return subprocess.check_output([PROGRAM, "inspect", str(path)], cwd=folder, text=True)


def refuse(path: Path) -> str:
    ended = subprocess.run([PROGRAM, "inspect", str(path)], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == "" and ended.stderr.count("error:") == 1
    return ended.stderr


def test_a_token_file(job):
    made = sequences(12, seed=1)
    text = inspect(job / "task.safetensors")
    tokens = sum(len(s.tokens) for s in made)
    scored = sum(sum(s.mask) for s in made)
    assert f"12 sequences, {tokens} tokens ({scored} scored), longest {max(len(s.tokens) for s in made)}" in text
    assert "5 choice groups of the classes first, second" in inspect(job / "choice.safetensors")


def test_a_model_folder_and_its_file(job):
    weights = load_file(job / "model/model.safetensors")
    text = inspect(job / "model/")
    assert "Qwen2ForCausalLM" in text and f"{len(weights)} tensors" in text and "with tokenizer.json" in text
    elements = sum(int(np.prod(w.shape)) for w in weights.values())
    assert f"{elements / 1000:.2f} k elements (F32)" in inspect(job / "model/model.safetensors")


def test_a_run_its_checkpoint_and_its_adapter(job):
    subprocess.check_call(
        [PROGRAM, "train", "config.yaml", "--quiet", "--set", "checkpoint.every_steps=2",
         "--set", "model.lora.rank=3", "--set", "model.lora.alpha=6"], cwd=job)
    text = inspect(job / "out")
    assert "rule safegrad, LoRA rank 3" in text and "3 steps recorded; the last is 3, loss_task " in text
    assert "checkpoints after steps 2" in text and "the model is in" in text
    text = inspect(job / "out/checkpoints/step-000002")
    assert "checkpoint after step 2 (2 updates)" in text and "written by 1 ranks, 1 shards" in text
    assert "data.task content" in text and "LibTorch" in text
    text = inspect(Path("out/model"), job)
    assert "PEFT adapter folder, LoRA" in text and "rank 3, alpha 6, on k_proj, q_proj, v_proj" in text


def test_what_is_none_of_these_is_refused(job, tmp_path):
    assert "no such file or folder" in refuse(job / "nothing")
    (job / "empty").mkdir()
    assert "neither a model (config.json)" in refuse(job / "empty")
    assert "safetensors" in refuse(job / "config.yaml")
    damaged = job / "task.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "task.safetensors" in refuse(damaged)
