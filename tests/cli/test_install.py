"""`cmake --install`: a tree that may be moved; the Python package around such a tree.

The wheel itself is built by tests/wheel, by hand: it compiles the program once more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tiny_job import PROGRAM, ROOT, job  # noqa: F401

SECONDS = 120  # for a job of seconds on a busy machine
TORCH = Path(importlib.util.find_spec("torch").origin).parent


def run(*command, folder: Path, **environment) -> subprocess.CompletedProcess:
    base = {key: value for key, value in os.environ.items() if key != "SAFEGRAD_PROGRAM"}
    base |= {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=base | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """An installed tree, in another place than it was installed to."""
    folder = tmp_path_factory.mktemp("install")
    done = run(
        "cmake", "--install", Path(PROGRAM).parent, "--prefix", folder / "first", folder=folder
    )
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
    done = run(
        "bash",
        prefix / "share/safegrad/launch/slurm-mpirun.sbatch",
        "config.yaml",
        "--set",
        "output=by_slurm",
        folder=job,
        PATH=path,
        SLURM_NTASKS="2",
        SLURM_CPUS_PER_TASK="1",
    )
    assert done.returncode == 0, done.stderr
    assert (job / "by_slurm/model/model.safetensors").exists()

    scripts = sorted((prefix / "share/safegrad/launch").iterdir())
    assert [script.name for script in scripts] == [
        "hosts",
        "local",
        "mpirun.sh",
        "slurm-mpirun.sbatch",
        "slurm.sbatch",
    ]
    assert not [script for script in scripts if "build/safegrad" in script.read_text()]
    assert (prefix / "share/safegrad/configs/rules/safegrad.yaml").exists()
    shapes = {path.name for path in (prefix / "share/safegrad/shapes").iterdir()}
    assert shapes == {path.name for path in (ROOT / "benchmarks").glob("*.json")} and shapes


def test_libtorch_beside_the_tree_goes_before_the_one_of_the_build(prefix, tmp_path):
    assert Path(loaded_torch(prefix / "bin/safegrad", tmp_path)).parent == TORCH / "lib"
    shutil.copytree(prefix, tmp_path / "safegrad")
    (tmp_path / "torch").symlink_to(TORCH)
    assert (
        Path(os.path.normpath(loaded_torch(tmp_path / "safegrad/bin/safegrad", tmp_path))).parent
        == tmp_path / "torch/lib"
    )


@pytest.fixture
def package(prefix, tmp_path) -> Path:
    """A site-packages with the package as the wheel lays it out."""
    site = tmp_path / "site"
    shutil.copytree(prefix / "bin", site / "safegrad/bin")
    shutil.copytree(ROOT / "python/safegrad", site / "safegrad", dirs_exist_ok=True)
    shutil.copytree(ROOT / "tools", site / "safegrad/tools")
    (site / "safegrad/libtorch_version.txt").write_text(
        metadata.version("torch").split("+")[0] + "\n"
    )
    return site


def test_the_package_becomes_the_program(package, job):  # noqa: F811
    command = [sys.executable, "-m", "safegrad"]
    assert (
        run(*command, "--version", folder=job, PYTHONPATH=str(package)).stdout
        == run(PROGRAM, "--version", folder=job).stdout
    )
    checked = run(
        "mpirun",
        "--quiet",
        "--oversubscribe",
        "-n",
        2,
        *command,
        "check",
        "config.yaml",
        folder=job,
        PYTHONPATH=str(package),
    )
    assert checked.returncode == 0
    assert checked.stdout.startswith("config.yaml: valid for 2 ranks; nothing was run\n")
    wrong = run(*command, "train", "nowhere.yaml", folder=job, PYTHONPATH=str(package))
    assert wrong.returncode == 1 and "nowhere.yaml" in wrong.stderr


def test_the_package_refuses_another_torch(package, tmp_path):
    (package / "safegrad/libtorch_version.txt").write_text("2.10.1\n")
    refused = run(
        sys.executable, "-m", "safegrad", "--version", folder=tmp_path, PYTHONPATH=str(package)
    )
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    for text in ("error: ", str(TORCH), "2.11.0", "2.10.1", "pip install torch==2.10.1"):
        assert text in refused.stderr


def test_the_packages_tools_run_and_write_nothing_into_it(package, tmp_path):
    tool = [sys.executable, "-m", "safegrad.tool"]
    listed = run(*tool, "--help", folder=tmp_path, PYTHONPATH=str(package))
    programs = {
        path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
    }
    assert set(re.findall(r"^  (\w+)", listed.stdout, re.M)) == programs and "prepare" in programs
    for name in sorted(programs - {"config_page"}):
        helped = run(*tool, name, "--help", folder=tmp_path, PYTHONPATH=str(package))
        assert helped.returncode == 0 and f"usage: {name}.py" in helped.stdout, helped.stderr
    spec = importlib.util.spec_from_file_location(
        "tiny_tokenizer", ROOT / "tests/tools/tiny_tokenizer.py"
    )
    tiny_tokenizer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_tokenizer)
    tiny_tokenizer.make_folder(tmp_path / "model", tiny_tokenizer.QWEN_TEMPLATE)
    (tmp_path / "user.jsonl").write_text('{"prompt": "hi", "response": "hi hi"}\n' * 3)
    made = run(
        *tool,
        "prepare",
        "--model",
        "model",
        "--out",
        "task.safetensors",
        "user.jsonl",
        folder=tmp_path,
        PYTHONPATH=str(package),
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "task.safetensors").exists()
    unknown = run(*tool, "prepaer", folder=tmp_path, PYTHONPATH=str(package))
    assert unknown.returncode == 1 and "prepare" in unknown.stderr

    code = "import wheels, smollm2; print(wheels.CACHE); print(smollm2.DEFAULT_OUT)"
    places = run(
        sys.executable,
        "-c",
        code,
        folder=tmp_path,
        PYTHONPATH=str(package / "safegrad/tools"),
        XDG_CACHE_HOME="/cache",
    ).stdout.split()
    assert places == ["/cache/safegrad/wheels", "models/smollm2-135m-instruct"]
