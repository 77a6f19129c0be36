"""Disks that are slow, lie, hang or keep a diary: disk_shim.cpp, built and put under the ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("disk_shim.cpp")


def disk(folder: Path, **settings: object) -> dict[str, str]:
    """Variables that put the shim under a process; built in `folder` where it is not there.

    Keys as in disk_shim.cpp, in lower case: slow_us, flip, hang, diary.
    """
    library = folder / "libdisk_shim.so"
    if not library.exists():
        subprocess.run(["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", library, SOURCE],
                       check=True)
    names = {f"SAFEGRAD_TEST_DISK_{key.upper()}": str(value) for key, value in settings.items()}
    return {"LD_PRELOAD": str(library)} | names
