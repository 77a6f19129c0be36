"""The program started without MPI, by what torchrun and srun put into the environment."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from tiny_job import PROGRAM

SECONDS = 40  # a reverse look-up of the store's address may take some of them


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def without_launcher() -> dict[str, str]:
    """This process's environment as if nothing had started it."""
    started = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMIX_", "PMI_")
    return {key: value for key, value in os.environ.items() if not key.startswith(started)}


def run_ranks(folder: Path, variables: list[dict[str, str]], *arguments: str):
    """One process for each set of variables; their exit codes, outputs and error lines."""
    base = without_launcher() | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([PROGRAM, *arguments], cwd=folder, env=base | own, text=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for own in variables]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [line for _, err in ended for line in err.splitlines() if line.startswith("error: ")]
    return [process.returncode for process in processes], [out for out, _ in ended], errors


def torchrun(ranks: int, port: int) -> list[dict[str, str]]:
    return [{"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)} for rank in range(ranks)]


def srun(ranks: int, port: int) -> list[dict[str, str]]:
    return [{"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(ranks),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for rank in range(ranks)]


@pytest.mark.parametrize("launcher", [torchrun, srun])
def test_cpu_ranks_without_mpi_are_refused_by_one_of_them(job, launcher):
    codes, outputs, errors = run_ranks(job, launcher(2, free_port()), "check", "config.yaml",
                                       "--set", "parallel.device=cpu")

    assert codes == [1, 1]
    assert outputs == ["", ""]
    assert len(errors) == 1, errors
    for text in ("parallel.device", "CPU ranks communicate over MPI",
                 "mpirun or srun --mpi=pmix"):
        assert text in errors[0]


def test_ranks_that_meet_at_a_store_agree_on_a_mistake(job):
    codes, _, errors = run_ranks(job, torchrun(3, free_port()), "check", "config.yaml",
                                 "--set", "objective.rule=sgd")

    assert codes == [1, 1, 1]
    assert len(errors) == 1 and "objective.rule: got \"sgd\"" in errors[0]


def test_half_of_a_launchers_variables_is_refused(job):
    variables = torchrun(1, free_port())[0]
    del variables["MASTER_PORT"]

    codes, _, errors = run_ranks(job, [variables], "check", "config.yaml")

    assert codes == [1]
    assert len(errors) == 1 and "but not MASTER_PORT" in errors[0]


def test_without_variables_the_program_is_one_rank(job):
    codes, outputs, errors = run_ranks(job, [{"OMPI_ALLOW_RUN_AS_ROOT": "1"}], "check",
                                       "config.yaml")

    assert (codes, errors) == ([0], [])
    assert outputs[0].startswith("config.yaml: valid for 1 rank; nothing was run\n")
