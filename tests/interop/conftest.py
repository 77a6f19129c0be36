"""A Python with the packages that people load exports and metrics with, made once in .cache/."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import stand_ins

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cli"), str(ROOT / "tools")]
WITHOUT_DEPENDENCIES = ROOT / "tests" / "interop" / "requirements.txt"
WITH_DEPENDENCIES = ROOT / "tools" / "tracker-requirements.txt"


@dataclass
class Outside:
    """The other Python."""

    python: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, text: str = "", folder: Path = ROOT) -> str:
        """What `python command` prints, given `text`; a failure shows the end of what it said."""
        done = subprocess.run([self.python, *command], input=text, env=self.environment,
                              cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout


def packages_of_this_python() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def make_environment(folder: Path) -> None:
    """A virtual environment that also sees the packages of this one."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "tested.pth").write_text(
        f"import site; site.addsitedir({str(packages_of_this_python())!r})\n")
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install",
           "--quiet"]
    for options in (["--no-deps", "-r", WITHOUT_DEPENDENCIES], ["-r", WITH_DEPENDENCIES]):
        done = subprocess.run([*pip, *options], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            pytest.skip(f"pip cannot install {options[-1]}: {lines[-1]}")
    if torch := importlib.util.find_spec("torch"):
        stand_ins.build(Path(torch.origin).parent, folder / "stand-ins")
    (folder / "complete").touch()


@pytest.fixture(scope="session")
def outside() -> Outside:
    lists = WITHOUT_DEPENDENCIES.read_bytes() + WITH_DEPENDENCIES.read_bytes()
    key = hashlib.sha256(lists + str(packages_of_this_python()).encode()).hexdigest()[:12]
    folder = ROOT / ".cache" / f"interop-{key}"
    if not (folder / "complete").exists():
        make_environment(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if any((folder / "stand-ins").glob("*")):
        environment["LD_LIBRARY_PATH"] = str(folder / "stand-ins")
    return Outside(folder / "bin" / "python", environment)
