"""Ranks of one job that were given different things, and ranks that do not find each other: refused
within seconds, by the ranks' names, and before anything is written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cli import edit, run, snapshot
from test_launchers import run_ranks
from tiny_job import PROGRAM, sequences, write_job, write_tokens

SECONDS = 20


def run_each(folder: Path, *ranks: list[str]) -> subprocess.CompletedProcess:
    """One rank with each list of mpirun's and the program's arguments."""
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMP_NUM_THREADS": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none"]
    for i, arguments in enumerate(ranks):
        command += [":"] * (i > 0) + ["-n", "1", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=SECONDS)


def expect_refused(folder: Path, ranks: list[list[str]], *texts: str) -> None:
    before = snapshot(folder)
    done = run_each(folder, *ranks)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (1, "", 1), done.stderr
    for text in texts:
        assert text in errors[0], errors[0]
    assert snapshot(folder) == before


def train(*arguments: str) -> list[str]:
    return [PROGRAM, "train", *arguments]


def test_two_configs_that_agree_train(job):
    shutil.copyfile(job / "config.yaml", job / "b.yaml")
    done = run_each(job, train("config.yaml"), train("b.yaml"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 ranks" in done.stdout


def test_another_value_is_named_with_its_ranks(job):
    shutil.copyfile(job / "config.yaml", job / "b.yaml")
    edit(job / "b.yaml", "1.0e-3", "2.0e-3")
    expect_refused(job, [train("config.yaml"), train("b.yaml"), train("config.yaml")],
                   "optimizer.lr: 0.001 on ranks 0, 2; 0.002 on rank 1; give every rank the same")


def test_another_data_file_is_named_with_its_ranks(job):
    write_tokens(job, "other", sequences(9, seed=7))
    shutil.copyfile(job / "config.yaml", job / "b.yaml")
    edit(job / "b.yaml", "task: task.safetensors", "task: other.safetensors")
    expect_refused(job, [train("config.yaml"), train("b.yaml")],
                   "data.task: task.safetensors on rank 0; other.safetensors on rank 1")


def change_task(folder):
    write_tokens(folder, "task", sequences(12, seed=7))


def change_one_weight(folder):
    path = folder / "model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last tensor's last element
    path.write_bytes(bytes(content))


def change_model_config(folder):
    edit(folder / "model/config.json", '"hidden_act": "silu"', '"hidden_act":  "silu"')


@pytest.mark.parametrize("change, name", [
    (change_task, "data.task content: "),
    (change_one_weight, "model weights (sample): "),
    (change_model_config, "model config.json (SHA-256): "),
])
def test_another_content_under_the_same_name_is_named_with_its_ranks(tmp_path, change, name):
    """As where a copy on one machine is older than on the others."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_job(tmp_path / folder)
    change(tmp_path / "b")
    expect_refused(tmp_path, [["-wdir", str(tmp_path / "a"), *train("config.yaml")],
                              ["-wdir", str(tmp_path / "b"), *train("config.yaml")]],
                   name, " on rank 0; ", " on rank 1; give every rank the same")


def test_another_command_is_named_with_its_ranks(job):
    expect_refused(job, [train("config.yaml"), [PROGRAM, "check", "config.yaml"]],
                   "command: train on rank 0; check on rank 1")


def test_a_mistyped_command_line_of_one_rank_ends_all(job):
    expect_refused(job, [train("config.yaml"), train("config.yaml", "--fast")], "--fast")


def test_another_number_of_threads_is_a_warning(job):
    check = [PROGRAM, "check", "config.yaml"]
    done = run_each(job, check, ["env", "OMP_NUM_THREADS=2", *check])
    assert done.returncode == 0
    assert ("warning: the ranks differ in threads (OMP_NUM_THREADS): 1 on rank 0; 2 on rank 1"
            in done.stderr.splitlines())


ALONE = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4",
                "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
                "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "4",
                "SLURM_NODELIST": "node-1", "SLURM_JOB_NODELIST": "node-1"}


@pytest.mark.parametrize("name", ["PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_world_of_one_is_not_what_a_launcher_of_many_promised(job, name):
    before = snapshot(job)
    codes, outputs, errors = run_ranks(job, [ALONE | {name: "4"}], "train", "config.yaml")
    assert (codes, outputs) == ([1], [""])
    assert len(errors) == 1 and f"4 ranks were started ({name})" in errors[0], errors
    assert "srun --mpi=pmix" in errors[0]
    assert snapshot(job) == before


@pytest.mark.parametrize("variables", [BATCH_SCRIPT, {"SLURM_STEP_NUM_TASKS": "1"},
                                       BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_one_process_inside_an_allocation_is_one_rank(job, variables):
    codes, outputs, errors = run_ranks(job, [ALONE | variables], "check", "config.yaml")
    assert (codes, errors) == ([0], [])
    assert outputs[0].startswith("config.yaml: valid for 1 rank; nothing was run\n")


def test_mpirun_in_a_step_of_more_tasks_is_the_launcher_that_counts(job, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    done = run(job, "check", "config.yaml", ranks=1)
    assert done.code == 0
    assert done.out.startswith("config.yaml: valid for 1 rank; nothing was run\n")
