"""The program as people start it: every mistake ends the whole job with one line and writes
nothing; a good config trains, and does so the same way each time.

Every job runs on two ranks under mpirun with a tiny Qwen2 model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenfile
from tiny_job import MAX_POSITIONS, MODEL, PROGRAM, VOCABULARY, sequences, write_tokens
from tokenfile import Sequence, write_token_file
from wheels import sha256_of

SECONDS = 20  # within which a refused job must have ended


@dataclass
class Ended:
    code: int
    out: str
    err: str


def run(folder: Path, *arguments: str, ranks: int = 2, seconds: float = SECONDS) -> Ended:
    """The program on `ranks` ranks, with `folder` as its working directory."""
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMP_NUM_THREADS": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
               PROGRAM, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=seconds)
    return Ended(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of everything in a folder."""
    return {str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"",
                                            path.stat().st_mtime_ns)
            for path in [folder, *folder.rglob("*")]}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def in_config(old: str, new: str):
    return lambda folder: edit(folder / "config.yaml", old, new)


def in_model_config(old: str, new: str):
    return lambda folder: edit(folder / "model/config.json", old, new)


def cut(name: str, keep: float):
    """Leaves the first part of a file."""
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])
    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def not_safetensors(folder):
    (folder / "model/model.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(1000))


def damaged_header(folder):
    path = folder / "model/model.safetensors"
    content = path.read_bytes()
    assert content[8:9] == b"{"
    path.write_bytes(content[:8] + b"[" + content[9:])


def task_sequence(tokens: list[int]):
    return lambda folder: write_tokens(
        folder, "task", [*sequences(3, seed=1), Sequence(tokens, [0] + [1] * (len(tokens) - 1))])


def task_arrays(offsets: list[int]):
    """A task file that write_token_file would refuse to write."""
    def change(folder):
        metadata = {"format": tokenfile.FORMAT, "template_sha256": "",
                    "tokenizer_sha256": sha256_of(folder / "model/tokenizer.json")}
        arrays = {"tokens": np.zeros(10, np.int32), "loss_mask": np.tile(np.uint8([0, 1]), 5),
                  "offsets": np.array(offsets, np.int64)}
        if len(offsets) == 1:
            arrays |= {"tokens": np.zeros(0, np.int32), "loss_mask": np.zeros(0, np.uint8)}
        (folder / "task.safetensors").write_bytes(tokenfile._safetensors(arrays, metadata))
    return change


def become_an_earlier_run(folder):
    shutil.copytree(folder / "model", folder / "out/model")


def become_an_adapter(folder):
    (folder / "model").rename(folder / "base")
    shutil.copytree(MODEL / "adapter", folder / "model")
    config = json.loads((folder / "model/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../base"
    (folder / "model/adapter_config.json").write_text(json.dumps(config))


def nothing(_folder):
    pass


# what is wrong -> (how it comes about, what is typed besides, what the message says)
MISTAKES = {
    # the command line and the config
    "unknown option": (nothing, ["--fast"], ["--fast"]),
    "no such config": (remove("config.yaml"), [], ["config.yaml", "No such file"]),
    "unknown key": (
        in_config("rule: safegrad", "rule: safegrad\n  rhoo: 1"), [],
        ["config.yaml:8: objective.rhoo: no such key", "objective.rho?", "rule, rho, "]),
    "duplicate key": (
        in_config("  steps: 3", "  steps: 3\n  steps: 4"), [],
        ["config.yaml:15: train.steps", "line 14"]),
    "missing key": (in_config("output: out\n", ""), [], ["config.yaml: output: missing"]),
    "mistyped value": (
        in_config("1.0e-3", "fast"), [],
        ["config.yaml:12: optimizer.lr: got \"fast\"", "a number"]),
    "value out of range": (
        in_config("steps: 3", "steps: 0"), [], ["config.yaml:14: train.steps: got 0", "> 0"]),
    "word that is not allowed": (
        in_config("rule: safegrad", "rule: sgd"), [],
        ["config.yaml:7: objective.rule: got \"sgd\"", "allowed: sft | weighted_sum | safegrad"]),
    "unknown key on the command line": (
        nothing, ["--set", "train.step=1"], ["--set train.step: no such key", "train.steps?"]),
    "device that is not there": (
        nothing, ["--set", "parallel.device=cuda"],
        ["parallel.device: cuda", "sees no GPU", "auto or cpu"]),
    # the model
    "no model folder": (nothing, ["--set", "model.path=nowhere"], ["model.path", "nowhere"]),
    "no weights": (
        remove("model/model.safetensors"), [], ["model", "has neither model.safetensors nor"]),
    "truncated weights": (
        cut("model/model.safetensors", 0.5), [], ["model/model.safetensors", "data bytes"]),
    "weights cut inside the header": (
        cut("model/model.safetensors", 0.01), [], ["model/model.safetensors", "header"]),
    "weights in another format": (
        not_safetensors, [], ["model/model.safetensors: is no safetensors file: its first 8 "]),
    "damaged header": (
        damaged_header, [], ["model/model.safetensors", "is this a safetensors file?"]),
    "weights of another shape": (
        in_model_config('"intermediate_size": 42', '"intermediate_size": 44'), [],
        ["model", "mlp", "42", "44"]),
    "weights of fewer layers": (
        in_model_config('"num_hidden_layers": 2', '"num_hidden_layers": 3'), [],
        ["model", "model.layers.2."]),
    "unknown architecture": (
        in_model_config("Qwen2ForCausalLM", "MambaForCausalLM"), [],
        ["model/config.json: architectures", "MambaForCausalLM", "LlamaForCausalLM"]),
    # the data
    "no token file": (remove("task.safetensors"), [], ["task.safetensors", "No such file"]),
    "truncated token file": (
        cut("align.safetensors", 0.7), [], ["align.safetensors", "data bytes"]),
    "another tokenizer": (
        lambda folder: (folder / "model/tokenizer.json").write_text("[]"), [],
        ["task.safetensors", "tokenizer"]),
    "offsets out of range": (
        task_arrays([0, 4, 12]), [], ["task.safetensors", "offsets run from 0 to 12", "0 to 10"]),
    "offsets that descend": (
        task_arrays([0, 8, 4, 10]), [], ["task.safetensors", "sequence 1", "8 to 4"]),
    "empty token file": (task_arrays([0]), [], ["task.safetensors", "is empty"]),
    "token outside the vocabulary": (
        task_sequence([5, VOCABULARY, 7]), [],
        ["task.safetensors: sequence 3: token 107 at position 1", "[0, 107)"]),
    "sequence longer than the model": (
        task_sequence([1] * (MAX_POSITIONS + 1)), [],
        ["task.safetensors: sequence 3 has 129 tokens", "at most 128"]),
    "sequence longer than a micro-batch": (
        task_sequence([1] * 40), ["--set", "batch.max_tokens_per_rank=39"],
        ["batch.max_tokens_per_rank: got 39", "sequence 3 of task.safetensors has 40 tokens"]),
    # the job
    "shards that do not divide the ranks": (
        nothing, ["--set", "parallel.shards=3"],
        ["config.yaml: --set parallel.shards: got 3, which does not divide the 2 ranks; "]),
    "output under a file": (
        nothing, ["--set", "output=config.yaml/run"], ["output: ", "config.yaml", "not a folder"]),
    "output over the model it starts from": (
        become_an_earlier_run, ["--set", "model.path=out/model"],
        ["output: out/model", "training starts from it"]),
    "output in the model that it starts from": (
        nothing, ["--set", "output=./model"], ["output: ./model", "training starts from it"]),
    "a new adapter on an adapter": (
        become_an_adapter, ["--set", "model.lora.rank=2"],
        ["model.path: model is a PEFT adapter", "model.lora.merge"]),
    "output that cannot be written": (
        nothing, ["--set", "output=/proc/safegrad"], ["output: /proc", "cannot be"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_job_with_one_line_and_writes_nothing(job, mistake):
    change, arguments, told = MISTAKES[mistake]
    change(job)
    earlier = job / "out"
    (earlier / "model").mkdir(parents=True, exist_ok=True)
    (earlier / "metrics.jsonl").write_text('{"step":1}\n')
    if not (earlier / "model/model.safetensors").exists():
        (earlier / "model/model.safetensors").write_bytes(b"the result of another day")
    before = snapshot(job)

    ended = run(job, "train", "config.yaml", *arguments)

    assert ended.code == 1
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    for text in told:
        assert text in ended.err
    assert snapshot(job) == before


def test_check_accepts_a_good_config_and_writes_nothing(job):
    before = snapshot(job)

    ended = run(job, "check", "config.yaml")

    assert (ended.code, ended.err) == (0, "")
    first, *rest = ended.out.splitlines()
    assert first == "config.yaml: valid for 2 ranks; nothing was run"
    said = {line.split()[0]: line for line in rest}
    for name, text in {
        "model": ", full fine-tuning (0.02 M of 0.02 M trained)", "task": "12 sequences, ",
        "align": "8 sequences, ", "probes": "heldout every 2 steps, choice; all at the end",
        "steps": "3 (1 epoch) of 4 + 4 sequences, rule safegrad, rho 1, lr 0.001",
        "ranks": "2 ranks, mpi, cpu, fully sharded",
        "memory": "iB planned (", "output": "out (would be made)",
    }.items():
        assert text in said.pop(name), ended.out
    assert not said
    assert snapshot(job) == before


def test_check_says_what_would_run_elsewhere(job):
    """On other ranks, on a GPU that is not here, into the folder of a run."""
    (job / "out").mkdir()
    (job / "out/metrics.jsonl").write_text('{"step":1}\n')
    ended = run(job, "check", "config.yaml", "--ranks", "4", "--set", "parallel.shards=2",
                "--set", "parallel.device=cuda", "--set", "train={epochs: 2}", "-v", ranks=1)

    assert (ended.code, ended.err) == (0, "")
    for text in ("valid for 4 ranks;", "4 ranks, nccl, cuda", "2 replicas x 2 shards",
                 "6 (2 epochs) of 4 + 4 sequences",
                 "out (holds a run without checkpoints, whose files would be replaced)",
                 "weights "):
        assert text in ended.out
    files = re.findall(r"^(?:weights|data\.\w+|probe) +(\S+), (\d+\.\d\d) KiB$", ended.out, re.M)
    assert [Path(name).name for name, _ in files] == [
        "model.safetensors", "task.safetensors", "align.safetensors", "align.safetensors",
        "choice.safetensors"]
    for name, size in files:
        assert float(size) == pytest.approx((job / name).stat().st_size / 1024, abs=0.006)


@pytest.mark.parametrize("ranks, settings, warnings", [
    (9, {}, ["1 of 9 ranks have no sequence in a step, which draws 8 in all: "]),
    (8, {"batch.task_sequences": 12, "batch.align_sequences": 8, "schedule.warmup_steps": 2}, []),
    (1, {"batch.task_sequences": 13, "batch.align_sequences": 9, "schedule.warmup_steps": 3}, [
        "batch.task_sequences: a step draws 13 of the 12 sequences of task.safetensors, ",
        "batch.align_sequences: a step draws 9 of the 8 sequences of align.safetensors, ",
        "schedule.warmup_steps: the run has 3 steps, so optimizer.lr is not reached in 3 of "]),
])
def test_what_is_surely_a_mistake_in_sizes_is_a_warning(job, ranks, settings, warnings):
    ended = run(job, "check", "config.yaml", "--ranks", str(ranks),
                *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
                ranks=1)

    assert ended.code == 0
    assert len(ended.err.splitlines()) == len(warnings), ended.err
    for line, warning in zip(ended.err.splitlines(), warnings):
        assert line.startswith(f"warning: {warning}")


def test_what_a_run_does_is_said_before_it_begins(job):
    settings = {"objective.rule": "cagrad", "objective.surgery": "block", "train.steps": "1",
                "objective.align_every": "2", "optimizer.lr": "2e-5", "parallel.shards": "1"}
    ended = run(job, "train", "config.yaml",
                *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")))

    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[3] == ("1 step (0.333 epochs) of 4 + 4 sequences, rule cagrad, cagrad_c 0.4,"
                        " surgery by block, alignment every 2 steps, lr 2e-05")
    # Of the alignment set and the probe that has no choices, which is the same file.
    assert lines[5] == ("reading the weights, and the start model's hidden states of 16 sequences"
                        " (kept in out/reference)")
    assert re.fullmatch("speed of light: .* at [0-9]+ GFLOP/s of all ranks", lines[6])
    plain = run(job, "train", "config.yaml", "--set", "objective.rule=sft",
                "--set", "data.align=null", "--set", "batch.align_sequences=0", "--set", "probe=[]",
                "--set", "objective.surgery=block")
    assert "rule sft, lr 0.001\n" in plain.out and "\nreading the weights\n" in plain.out


def test_check_tells_every_mistake_of_the_config(job):
    edit(job / "config.yaml", "rule: safegrad", "rule: sgd\n  rhoo: 1")
    edit(job / "config.yaml", "steps: 3", "steps: 0")

    ended = run(job, "check", "config.yaml")

    assert (ended.code, ended.out) == (1, "")
    lines = ended.err.splitlines()
    assert lines[0] == "error: config.yaml: 3 mistakes:"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "  config.yaml:8", "  config.yaml:7", "  config.yaml:15"]


def test_check_refuses_what_train_refuses(job):
    ended = run(job, "check", "config.yaml", "--set", "objective.rule=sgd")

    assert ended.code == 1
    assert ended.err.count("error: ") == 1 and "objective.rule: got \"sgd\"" in ended.err


def test_help_names_the_commands_and_the_exit_codes():
    ended = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, timeout=SECONDS)

    assert (ended.returncode, ended.stderr) == (0, "")
    for text in ("train", "check", "evaluate", "Exit codes: 0 ", "config.yaml, metrics.jsonl"):
        assert text in ended.stdout


KEYS = {"step", "epoch", "loss_task", "loss_align", "uu", "ua", "aa", "cosine", "conflict",
        "c_task", "c_align", "grad_norm", "clip", "lr", "task_tokens", "align_tokens", "flops",
        "skipped"}
MEASURED = {"seconds", "tokens_per_s", "speed_of_light", "memory_bytes", "phase_seconds"}


def read_steps(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_times(steps: list[dict]) -> list[dict]:
    return [{key: value for key, value in step.items() if key not in MEASURED} for step in steps]


def test_a_run_writes_its_folder_and_the_same_again(job):
    first = run(job, "train", "config.yaml")
    second = run(job, "train", "config.yaml", "--set", "output=again")
    # Into the folder of the first run, whose cached reference is used.
    steps = read_steps(job / "out")
    weights = (job / "out/model/model.safetensors").read_bytes()
    third = run(job, "train", "config.yaml")

    assert [first.code, second.code, third.code] == [0, 0, 0], first.err
    assert [set(step) - {"probe"} for step in steps] == [KEYS | MEASURED] * 3
    assert [set(step.get("probe", {})) for step in steps] == [
        set(), {"heldout"}, {"heldout", "choice"}]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[0]["loss_align"] == 0 and steps[2]["loss_align"] > 0  # it left the reference
    assert steps[2]["probe"]["heldout"]["kl"] > 0
    for other in ("again", "out"):
        assert without_times(read_steps(job / other)) == without_times(steps)
        assert (job / other / "model/model.safetensors").read_bytes() == weights
    assert weights != (MODEL / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.json"):
        assert (job / "out/model" / name).read_bytes() == (job / "model" / name).read_bytes()
    assert "valid" in run(job, "check", "out/config.yaml").out
    memory = [step["memory_bytes"] for step in steps]
    assert memory == sorted(memory) and memory[0] > 2**24  # LibTorch alone is more
    *_, choice, heldout, done = first.out.splitlines()
    percent = {name: f"{100 * share:.1f} %" for name, share in steps[2]["probe"]["choice"].items()}
    assert choice == (
        f"probe choice: greedy reply first {percent['greedy_first']}, second"
        f" {percent['greedy_second']}; likeliest first {percent['first']}, second"
        f" {percent['second']}")
    assert re.fullmatch(r"probe heldout: kl \d\S+ loss \d\S+", heldout)
    assert re.match(r"done in \d+:\d\d · task \d.* · model in out/model$", done)


def test_evaluate_prints_json_and_writes_nothing(job):
    before = snapshot(job)

    ended = run(job, "evaluate", "config.yaml")

    assert (ended.code, ended.err) == (0, "")
    results = json.loads(ended.out)
    assert set(results) == {"heldout", "choice"}
    assert results["heldout"]["loss"] > 0
    assert set(results["choice"]) == {"first", "second", "greedy_first", "greedy_second"}
    assert sum(results["choice"].values()) == pytest.approx(1.0)
    assert snapshot(job) == before
