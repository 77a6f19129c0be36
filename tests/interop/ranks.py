"""ranks.py: runs the program on two ranks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tiny_job import PROGRAM


def run(folder: Path, *arguments: str) -> str:
    """What the program prints on two ranks, with `folder` as its working directory."""
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMP_NUM_THREADS": "1",
                                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", "2",
               PROGRAM, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
