"""`cmake --install`: a tree that may be moved."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_job import PROGRAM, ROOT, job  # noqa: F401

SECONDS = 120  # for a job of seconds on a busy machine
TORCH = Path(importlib.util.find_spec("torch").origin).parent


def run(*command, folder: Path, **environment) -> subprocess.CompletedProcess:
    base = {key: value for key, value in os.environ.items() if key != "SAFEGRAD_PROGRAM"}
    base |= {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run([str(word) for word in command], cwd=folder, env=base | environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """An installed tree, in another place than it was installed to."""
    folder = tmp_path_factory.mktemp("install")
    done = run("cmake", "--install", Path(PROGRAM).parent, "--prefix", folder / "first", folder=folder)
    assert done.returncode == 0, done.stderr
    return (folder / "first").rename(folder / "moved")


def loaded_torch(program: Path, folder: Path) -> str:
    """The libtorch_cpu.so that the loader takes for a program."""
    return re.search(r"libtorch_cpu\.so => (\S+)", run("ldd", program, folder=folder).stdout)[1]


def test_installed_launchers_start_the_installed_program(prefix, job):  # noqa: F811
    done = run(prefix / "share/safegrad/launch/local", "-n", 2, "train", "config.yaml", folder=job)
    assert done.returncode == 0, done.stderr
    assert (job / "out/model/model.safetensors").exists()

    # What Slurm would start, with what it would set.
    path = f"{prefix / 'bin'}:{os.environ['PATH']}"
    done = run("bash", prefix / "share/safegrad/launch/slurm-mpirun.sbatch", "config.yaml", "--set", "output=by_slurm",
               folder=job, PATH=path, SLURM_NTASKS="2", SLURM_CPUS_PER_TASK="1")
    assert done.returncode == 0, done.stderr
    assert (job / "by_slurm/model/model.safetensors").exists()

    scripts = sorted((prefix / "share/safegrad/launch").iterdir())
    assert [script.name for script in scripts] == ["hosts", "local", "mpirun.sh", "slurm-mpirun.sbatch", "slurm.sbatch"]
    assert not [script for script in scripts if "build/safegrad" in script.read_text()]
    assert (prefix / "share/safegrad/configs/rules/safegrad.yaml").exists()
    shapes = {path.name for path in (prefix / "share/safegrad/shapes").iterdir()}
    assert shapes == {path.name for path in (ROOT / "benchmarks").glob("*.json")} and shapes


def test_libtorch_beside_the_tree_goes_before_the_one_of_the_build(prefix, tmp_path):
    assert Path(loaded_torch(prefix / "bin/safegrad", tmp_path)).parent == TORCH / "lib"
    shutil.copytree(prefix, tmp_path / "safegrad")
    (tmp_path / "torch").symlink_to(TORCH)
    assert Path(os.path.normpath(loaded_torch(tmp_path / "safegrad/bin/safegrad", tmp_path))).parent == tmp_path / "torch/lib"
