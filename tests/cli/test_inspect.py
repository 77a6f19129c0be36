"""`safegrad inspect` on everything that safegrad reads or writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_job import PROGRAM, choices, job, sequences, write_tokens  # noqa: F401
from tokenfile import write_token_file


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
    longest = max(len(s.tokens) for s in made)
    assert f"12 sequences, {tokens} tokens ({scored} scored), longest {longest}" in text
    assert "5 choice groups of the classes first, second" in inspect(job / "choice.safetensors")


def test_a_model_folder_and_its_file(job):
    weights = load_file(job / "model/model.safetensors")
    text = inspect(job / "model/")
    assert "Qwen2ForCausalLM" in text and "with tokenizer.json" in text
    assert f"{len(weights)} tensors" in text
    elements = sum(int(np.prod(w.shape)) for w in weights.values())
    assert f"{elements / 1000:.2f} k elements (F32)" in inspect(job / "model/model.safetensors")


def test_a_run_its_checkpoint_and_its_adapter(job):
    subprocess.check_call(
        [PROGRAM, "train", "config.yaml", "--quiet", "--set", "checkpoint.every_steps=2",
         "--set", "model.lora.rank=3", "--set", "model.lora.alpha=6"], cwd=job)
    text = inspect(job / "out")
    assert "rule safegrad, LoRA rank 3" in text
    assert "3 steps of 3 recorded; the last is 3, loss_task " in text
    assert "checkpoints after steps 2" in text and "the model is in" in text
    text = inspect(job / "out/checkpoints/step-000002")
    assert "checkpoint after step 2 (2 updates)" in text and "written by 1 rank, 1 shard;" in text
    assert "data.task content" in text and "LibTorch" in text
    [command] = re.findall("checked by: (.*)", text)
    subprocess.check_call(["sh", "-c", command], stdout=subprocess.DEVNULL)
    text = inspect(Path("out/model"), job)
    assert "PEFT adapter folder, LoRA" in text
    assert "rank 3, alpha 6, on k_proj, q_proj, v_proj\n  of model\n" in text
    text = inspect(job / "out/model")  # from elsewhere; an adapter is what it is without its base
    assert "rank 3, alpha 6" in text and "\n  of model, which is not found from here\n" in text
    assert "checkpoints after steps 2\n" in inspect(job / "out/checkpoints")
    assert "hidden states of the start model" in inspect(job / "out/reference/")


def test_a_run_that_was_stopped_says_of_how_many_steps_and_what_its_probes_found(job):
    subprocess.check_call([PROGRAM, "train", "config.yaml", "--quiet"], cwd=job)
    lines = (job / "out/metrics.jsonl").read_text().splitlines()
    (job / "out/metrics.jsonl").write_text(lines[0] + "\n" + lines[1] + "\n")
    assert "probe" in json.loads(lines[1])
    text = inspect(job / "out")
    assert "2 steps of 3 recorded; the last is 2, loss_task " in text
    assert re.search(r"^  probe heldout: kl \d\S+ loss \d\S+$", text, re.M)


def test_a_run_of_a_version_with_other_keys_is_still_a_run(job):
    (job / "out").mkdir()
    config = (job / "config.yaml").read_text()
    (job / "out/config.yaml").write_text(
        config.replace("objective:", "objective:\n  gram_per_unit: true"))
    (job / "out/metrics.jsonl").write_text('{"step":1,"loss_task":1.5}\n')
    assert "rule safegrad on model\n  1 step of 3 recorded; the last is 1" in inspect(job / "out")


def test_the_folder_of_an_audit(job):
    (job / "out").mkdir()
    (job / "out/audit.jsonl").write_text('{"index":1}\n{"index":0}\n')
    assert "folder of an audit\n  2 samples scored" in inspect(job / "out")


def test_a_model_of_an_earlier_run_is_not_this_runs(job):
    subprocess.check_call([PROGRAM, "train", "config.yaml", "--quiet"], cwd=job)
    assert "finished: the model is in" in inspect(job / "out")
    os.utime(job / "out/model", (0, 0))  # as if metrics had been written to since
    text = inspect(job / "out")
    assert "not finished; " in text and "is of an earlier run" in text
    assert "nor a run" in refuse(job)  # a config and a model make no run folder


HOSTILE = "\x1b]0;owned\x07\r\u00e4\u2028\u4e16'\n"
# Every byte that is not plain ASCII, so that neither a terminal nor a reader is misled.
SHOWN = r"\x1b]0;owned\x07\x0d\xc3\xa4\xe2\x80\xa8\xe4\xb8\x96'\x0a"


def assert_plain(text: str) -> None:
    assert text.isascii() and text.replace("\n", "").isprintable(), text


def test_texts_of_a_safetensors_file_are_escaped(tmp_path):
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "w.safetensors",
              {HOSTILE: HOSTILE, "long": "\u4e16" * 1000})

    text = inspect(tmp_path / "w.safetensors")

    assert_plain(text)
    assert f"  {SHOWN} = {SHOWN}\n" in text
    [long] = re.findall("  long = (.*)", text)
    assert re.fullmatch(r"(\\xe4\\xb8\\x96){9,11}\.\.\.", long)


def test_texts_of_a_token_file_are_escaped(job):
    named = [replace(sequence, source=0) for sequence in sequences(4, seed=1)]
    write_token_file(job / "task.safetensors", named, "", "", sources=[HOSTILE])
    write_tokens(job, "choice", choices(5), [HOSTILE, "second"])
    for text in (inspect(job / "task.safetensors"), inspect(job / "choice.safetensors")):
        assert_plain(text)
        assert SHOWN in text


def test_texts_of_a_checkpoint_and_an_adapter_are_escaped_and_its_path_is_quoted(job):
    subprocess.check_call(
        [PROGRAM, "train", "config.yaml", "--quiet", "--set", "checkpoint.every_steps=2",
         "--set", "model.lora.rank=3"], cwd=job)
    folder = job / "it's $HOME; echo"
    shutil.move(job / "out/checkpoints/step-000002", folder)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["versions"][HOSTILE] = HOSTILE
    content["inputs"][HOSTILE] = HOSTILE
    manifest.write_text(json.dumps(content))
    text = inspect(folder)
    assert_plain(text)
    assert f"  {SHOWN} {SHOWN}\n" in text and f"  {SHOWN}: {SHOWN}\n" in text
    [command] = re.findall("checked by: (cd .*) && ", text)
    assert subprocess.check_output(["sh", "-c", f"{command} && pwd"],
                                   text=True) == f"{folder}\n"

    adapter = job / "out/model/adapter_config.json"
    adapter.write_text(json.dumps(
        json.loads(adapter.read_text()) | {"base_model_name_or_path": HOSTILE}))
    (job / HOSTILE).symlink_to(job / "model")
    text = inspect(Path("out/model"), job)
    assert_plain(text)
    assert SHOWN in text


@pytest.mark.parametrize("line", ['{"step": "three", "loss_task": 1.5}', '{"step": null}',
                                  '{"step": {}, "loss_task": []}', '{"step": 1e99}', "[]", "?"])
def test_a_metrics_line_without_a_step_number_is_no_mistake(job, line):
    (job / "out").mkdir()
    shutil.copy(job / "config.yaml", job / "out")
    (job / "out/metrics.jsonl").write_text(line + "\n")

    text = inspect(job / "out")

    assert "rule safegrad" in text and "the last is" not in text
    assert ("loss_task 1.5" in text) == ("1.5" in line)


def test_what_the_file_system_refuses_is_an_error_line(job):
    (job / "out").mkdir()
    shutil.copy(job / "config.yaml", job / "out")
    (job / "out/metrics.jsonl").write_text("")
    (job / "out/flight").write_text("not a folder")

    ended = subprocess.run([PROGRAM, "inspect", job / "out"], capture_output=True, text=True)

    assert ended.returncode == 2 and ended.stdout == "", ended
    [line] = ended.stderr.strip().split("\n")
    assert line.startswith("error: ") and "flight" in line


def test_what_is_none_of_these_is_refused(job, tmp_path):
    assert "no such file or folder" in refuse(job / "nothing")
    (job / "empty").mkdir()
    assert "neither a model (config.json)" in refuse(job / "empty")
    assert "safetensors" in refuse(job / "config.yaml")
    damaged = job / "task.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "task.safetensors" in refuse(damaged)
