"""The command `safegrad`: becomes the native program that lies in this package.

It takes this process over, so signals, exit codes and mpirun see the program itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def torch_folder() -> Path:
    """The installed torch; ends the process unless it is what this program was built with."""
    built_with = (PACKAGE / "libtorch_version.txt").read_text().strip()
    advice = f"pip install torch=={built_with}, or build safegrad again"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"error: torch is not installed beside {sys.executable}; {advice}")
    folder = Path(spec.origin).parent
    version = re.search(
        r"^__version__ = '(\d+\.\d+\.\d+)", (folder / "version.py").read_text(), re.M
    )
    if version is None or version[1] != built_with:
        sys.exit(
            f"error: {folder} is torch {version[1] if version else 'of no known version'},"
            f" safegrad was built with {built_with}; {advice}"
        )
    return folder


def main() -> None:
    libraries = torch_folder() / "lib"
    # The program looks beside its package first; torch may also be in another site-packages.
    if libraries.resolve() != (PACKAGE.parent / "torch" / "lib").resolve():
        paths = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        os.environ["LD_LIBRARY_PATH"] = ":".join(paths)
    program = str(PACKAGE / "bin" / "safegrad")
    os.execv(program, [program, *sys.argv[1:]])


if __name__ == "__main__":
    main()
