"""safegrad plan: what it prints for people and programs, what it refuses; and train's line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_cli import run, snapshot
from tiny_job import PROGRAM, ROOT

SECONDS = 60
FIGURES = """\
devices:
  small:
    {gpu: true, memory_gib: 0.001, bfloat16_tflops: 1, float32_tflops: 2, memory_gb_per_s: 3,
     inside: wire, between: wire}
networks:
  wire: {gb_per_s: 1}
"""


def plan(folder: Path, *arguments: str):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.run(
        [PROGRAM, "plan", "config.yaml", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def write_odd_model(job: Path) -> None:
    """A shape whose heads no GPU kernel takes."""
    shape = json.loads((job / "model/config.json").read_text()) | {"head_dim": 12}
    (job / "odd.json").write_text(json.dumps(shape))


ODD_MODEL = ["--set", "model.path=null", "--set", "model.config=odd.json"]


def lines_of(ended) -> list[dict]:
    assert (ended.returncode, ended.stderr) == (0, "")
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_it_needs_no_weights_and_writes_nothing(job):
    (job / "model/model.safetensors").unlink()
    before = snapshot(job)

    ended = plan(job, "--ranks", "8")

    assert (ended.returncode, ended.stderr) == (0, "")
    for row in (
        "parameters",
        "optimizer",
        "gradients",
        "buffers",
        "activations",
        "logits",
        "reference cache",
        "peak",
        "largest micro-batch",
        "all_gather",
        "reduce_scatter",
        "scalars",
        "bottleneck: ",
        "\n8 ranks, 1 a machine, fully sharded, messages\nfullest of the first 3 steps: step ",
    ):
        assert row in ended.stdout
    assert re.search(r" [1-9][0-9,]+ tokens/s; bottleneck", ended.stdout)
    together = plan(job, "--ranks", "8", "--ranks-per-node", "8").stdout
    assert "\n8 ranks, 8 a machine, fully sharded, shared memory\n" in together
    assert snapshot(job) == before


def test_several_numbers_of_ranks_give_a_line_each(job):
    ended = plan(job, "--ranks", "1,8,64,1024,4096")

    assert (ended.returncode, ended.stderr) == (0, "")
    header, rows, words = table_of(ended.stdout)
    assert [row[0] for row in rows] == ["1", "8", "64", "1024", "4096"]
    assert words == header[1:]  # each but "ranks" is explained
    assert "(batch.max_tokens_per_rank is 4,096)" in ended.stdout
    assert max(len(line) for line in ended.stdout.splitlines()) <= 160


def table_of(text: str) -> tuple[list[str], list[list[str]], list[str]]:
    """The words of the header, the rows in words, and the first words of the lines below."""
    lines = [line.split() for line in text.splitlines()[2:]]
    rows = [line for line in lines[1:] if line[0].isdigit()]
    return lines[0], rows, [line[0] for line in lines[1 + len(rows):]]


def test_ranks_that_cannot_be_planned_leave_the_others_their_rows(job):
    shards = ("--set", "parallel.shards=2")
    table = plan(job, "--ranks", "3,4,5", *shards)
    as_json = plan(job, "--ranks", "3,4", *shards, "--json")
    none = plan(job, "--ranks", "3,5", *shards)

    _, rows, _ = table_of(table.stdout)
    assert (table.returncode, table.stderr) == (0, "")
    assert [row[0] for row in rows] == ["3", "4", "5"]
    assert " ".join(rows[0][1:]).startswith("parallel.shards: got 2, which does not divide the 3 r")
    assert rows[1][1] == "2" and len(rows[1]) > 10
    lines = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [line["ranks"] for line in lines] == [3, 4]
    assert lines[0]["error"].startswith("parallel.shards: got 2") and lines[1]["fits"] is True
    assert (none.returncode, none.stdout, len(none.stderr.splitlines())) == (1, "", 1)
    assert none.stderr.startswith("error: parallel.shards: got 2")


@pytest.mark.parametrize("device", ["a100", "h100", "h200", "cpu"])
def test_the_device_that_is_typed_is_the_one_that_is_planned(job, device):
    (line,) = lines_of(plan(job, "--ranks", "8", "--device", device, "--json"))
    full = plan(job, "--ranks", "8", "--device", device).stdout
    table = plan(job, f"--device={device}", "--ranks", "8,16").stdout

    assert line["device"] == device
    for text in (full, table):
        assert re.findall(r"\b(a100|h100|h200|cpu)\b", text) == [device]


def test_the_config_may_follow_the_ranks(job):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([PROGRAM, "plan", "--ranks", "8,64", "config.yaml"], cwd=job,
                          env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row[0] for row in table_of(done.stdout)[1]] == ["8", "64"]


def test_json_adds_up_and_the_run_is_as_planned(job):
    lines = lines_of(plan(job, "--ranks", "8,64,1024", "--run", "--json"))

    assert [line["ranks"] for line in lines] == [8, 64, 1024]
    for line in lines:
        assert sum(line["at_peak"].values()) == line["peak_bytes"]
        assert line["peak_bytes"] == pytest.approx(line["run"]["tensor_bytes"], rel=0.05)
        assert line["run"]["traffic"] == line["traffic"]
        assert line["tokens_per_s"] == pytest.approx(
            (line["task_tokens"] + line["align_tokens"]) / line["step_s"]
        )
    assert lines[2]["at_peak"]["weights"] < lines[0]["at_peak"]["weights"]


def test_without_data_files_lengths_are_given(job):
    for name in ("task", "align", "choice"):
        (job / f"{name}.safetensors").unlink()

    refused = plan(job, "--ranks", "8")
    (line,) = lines_of(plan(job, "--ranks", "8", "--tokens-per-sequence", "30", "--run", "--json"))

    assert refused.returncode == 1
    assert ("data.task: task.safetensors is not there, and data.align: align.safetensors is not"
            " there: a plan needs ") in refused.stderr
    assert "--tokens-per-sequence" in refused.stderr
    assert (line["tokens"], line["scored"]) == (30, 29)
    assert line["run"]["traffic"] == line["traffic"]


def test_figures_of_a_file_replace_those_of_the_table(job):
    (job / "figures.yaml").write_text(FIGURES)

    (line,) = lines_of(
        plan(job, "--ranks", "2", "--device", "small", "--figures", "figures.yaml", "--json")
    )

    assert line["device_bytes"] == int(0.001 * 2**30)
    assert line["fits"] is (line["peak_bytes"] <= line["device_bytes"])
    assert line["between"] == "wire"


def test_a_given_figure_stays_where_another_is_measured(job):
    """Rates of a rank: of bfloat16, which this job does not use, there is none."""
    (job / "figures.yaml").write_text(
        "devices:\n  cpu: {float32_tflops: 3, gemm_share: 0.5, memory_gb_per_s: 7}\n"
    )

    (line,) = lines_of(
        plan(job, "--ranks", "2", "--ranks-per-node", "2", "--figures", "figures.yaml", "--json")
    )

    assert (line["gemm_tflops"], line["memory_gb_per_s"]) == (1.5, 7)


def test_a_checkpoints_copy_is_planned_and_a_run_has_none(job):
    (plain,) = lines_of(plan(job, "--ranks", "2", "--json"))
    (line,) = lines_of(
        plan(job, "--ranks", "2", "--set", "checkpoint.every_steps=1", "--run", "--json")
    )

    copy = line["at_peak"]["checkpoint"]
    assert copy > 0 and line["peak_bytes"] == plain["peak_bytes"] + copy
    assert line["run"]["tensor_bytes"] == pytest.approx(line["peak_bytes"] - copy, rel=0.05)


def test_commands_of_the_page_run_without_files_that_are_not_there():
    page = (ROOT / "docs/plan.md").read_text()
    block = next(part for part in page.split("\n\n") if "plan configs/" in part)
    command = shlex.split(block.replace("\\\n", " "))
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }

    ended = subprocess.run(
        [PROGRAM, *command[1:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=SECONDS,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "it fits" in ended.stdout


MISTAKES = {
    "no ranks": ([], ["--ranks"]),
    "ranks that are none": (["--ranks", "0"], ["--ranks"]),
    "an unknown device": (
        ["--ranks", "2", "--device", "b1"],
        ['device: got "b1"', "a100, cpu, h100, h200"],
    ),
    "an unknown network": (
        ["--ranks", "2", "--network", "tin"],
        ['network: got "tin"', "eth-100, ib-200"],
    ),
    "a card that is not named": (
        ["--ranks", "2", "--set", "parallel.device=cuda"],
        ["--device a100, h100"],
    ),
    "a model that the card's kernels do not take": (
        ["--ranks", "2", "--device", "h100", *ODD_MODEL],
        ["head_dim is 12", "multiples of 8 up to 256"],
    ),
    "shards that do not divide": (
        ["--ranks", "6", "--set", "parallel.shards=4"],
        ["parallel.shards: got 4", "6 ranks"],
    ),
    "sequences longer than the model": (
        ["--ranks", "2", "--tokens-per-sequence", "1000"],
        ["got 1000", "at most 128"],
    ),
    "more scored than there are": (
        ["--ranks", "2", "--tokens-per-sequence", "10", "--scored-per-sequence", "10"],
        ["--scored-per-sequence: got 10", "1 to 9"],
    ),
    "a run of a GPU": (
        ["--ranks", "2", "--device", "small", "--figures", "figures.yaml", "--run"],
        ["--run", "--device cpu"],
    ),
    "a figure that is none": (
        ["--ranks", "2", "--figures", "wrong.yaml"],
        ['wrong.yaml:2: devices.h100.memory_gib: got "much"', "a number > 0"],
    ),
    "a figure that nobody knows": (
        ["--ranks", "2", "--figures", "unknown.yaml"],
        ["unknown.yaml:2: devices.h100.memory: no such key", "memory_gib"],
    ),
    "a device without its rates": (
        ["--ranks", "2", "--figures", "half.yaml"],
        ["half.yaml: devices.new", "are needed"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(job, mistake):
    arguments, told = MISTAKES[mistake]
    (job / "figures.yaml").write_text(FIGURES)
    write_odd_model(job)
    (job / "wrong.yaml").write_text("devices:\n  h100: {memory_gib: much}\n")
    (job / "unknown.yaml").write_text("devices:\n  h100: {memory: 80}\n")
    (job / "half.yaml").write_text(
        "devices:\n  new: {memory_gib: 80, inside: nvlink4, between: ib-400}\n"
    )

    ended = plan(job, *arguments)

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("error: ")
    for text in told:
        assert text in ended.stderr


def test_it_is_one_process(job):
    ended = run(job, "plan", "config.yaml", "--ranks", "2", ranks=2)

    assert ended.code == 1
    assert "plan: 2 ranks were started" in ended.err


def test_train_begins_with_the_memory_of_a_rank(job):
    ended = run(job, "train", "config.yaml")

    assert ended.code == 0, ended.err
    assert re.search(
        r"^memory a rank: \d+\.\d [MG]iB planned \(weights \d+\.\d, "
        r"gradients \d+\.\d, optimizer \d+\.\d, activations \d+\.\d, "
        r"buffers \d+\.\d\)$",
        ended.out,
        re.M,
    )


def test_check_knows_the_limits_of_gpu_kernels_without_a_gpu(job):
    write_odd_model(job)

    taken = run(job, "check", "config.yaml", "--set", "parallel.device=cuda", ranks=1)
    refused = run(job, "check", "config.yaml", "--set", "parallel.device=cuda", *ODD_MODEL, ranks=1)

    assert taken.code == 0, taken.err
    assert refused.code == 1
    assert "head_dim is 12" in refused.err and "multiples of 8 up to 256" in refused.err


CARD = ROOT / "benchmarks/results/gpu-check-h200.json"


@pytest.mark.parametrize("row", json.loads(CARD.read_text())["steps"],
                         ids=lambda row: f"{row['label']} {row['rule']}".replace(" ", "_"))
def test_memory_and_time_are_those_that_a_gpu_showed(tmp_path, row):
    align = "align: align.safetensors" if row["align_sequences"] else ""
    (tmp_path / "config.yaml").write_text(f"""\
model: {{config: {ROOT}/benchmarks/{row["model"]}}}
data: {{task: task.safetensors, {align}}}
objective: {{rule: {row["rule"]}}}
batch: {{task_sequences: {row["task_sequences"]}, align_sequences: {row["align_sequences"]},
        max_tokens_per_rank: 65536}}
optimizer: {{lr: 1e-5}}
train: {{steps: {row["steps"]}}}
output: out
""")
    options = [word for key in row["set"] for word in ("--set", key)]
    [line] = lines_of(plan(tmp_path, "--ranks=1", "--device=h200", "--json", *options,
                           f"--tokens-per-sequence={row['sequence_length']}"))

    assert 0.998 < line["peak_bytes"] / 2**30 / row["peak_device_gib"] < 1
    assert 0.915 < line["step_s"] / row["median_step_s"] < 1.035  # 0.92 to 1.03, rounded
