"""stand_ins.py: lets Python import a PyTorch wheel whose CUDA libraries are not installed.

The wheel is linked with them (4 GB) and loads them even where nothing runs on a GPU. launch/setup
leaves them out, since safegrad itself loads only the CPU part. A stand-in is a library of the same
name with the functions that PyTorch asks for, each of which ends the process when it is called.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing_libraries(torch: Path) -> set[str]:
    """Names of libraries that those of the wheel need and that are not installed beside it."""
    there = {path.name for path in [*torch.glob("lib/*"), *torch.parent.glob("nvidia/*/lib/*")]}
    needed = {name for library in linked_with_cuda(torch)
              for name in re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", library))}
    return {name for name in needed - there if re.match(r"lib(cu|nccl|nvshmem)", name)}


def linked_with_cuda(torch: Path) -> list[Path]:
    """The libraries that `import torch` loads."""
    names = ("libtorch_python", "libtorch_cuda", "libtorch_nvshmem", "libc10_cuda")
    return [torch / "lib" / f"{name}.so" for name in names]


def library_of_version(library: Path) -> dict[str, str]:
    """Version of a function -> name of the library that has it, as `library` remembers them."""
    owners, owner = {}, ""
    for kind, name in re.findall(r"(File|Name): (\S+)", output("readelf", "-VW", library)):
        if kind == "File":
            owner = name
        else:
            owners[name] = owner
    return owners


def wanted_functions(torch: Path) -> dict[tuple[str, str], set[str]]:
    """(library, version) -> functions; both are empty for those that any library may have."""
    wanted: dict[tuple[str, str], set[str]] = {}
    for library in linked_with_cuda(torch):
        owners = library_of_version(library)
        for name in output("nm", "-D", "--undefined-only", library).split():
            function, _, version = name.partition("@")
            if re.match(r"(cu|nccl|nvshmem)", function):
                wanted.setdefault((owners.get(version, ""), version), set()).add(function)
    return wanted


def build(torch: Path, folder: Path) -> None:
    """Makes the stand-ins in `folder`, which LD_LIBRARY_PATH is to name; none if all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = wanted_functions(torch)
    for library in sorted(missing_libraries(torch)):
        versions = {version: functions for (owner, version), functions in wanted.items()
                    if owner == library}
        compile_library(folder, library, versions, wanted.get(("", ""), set()))


def compile_library(folder: Path, name: str, versions: dict[str, set[str]],
                    others: set[str]) -> None:
    source, script = folder / f"{name}.s", folder / f"{name}.map"
    functions = sorted(others.union(*versions.values()))
    source.write_text(".text\n" + "".join(f".globl {f}\n.type {f},@function\n{f}:\n"
                                          for f in functions)
                      + " ud2\n.section .note.GNU-stack,\"\",@progbits\n")
    script.write_text("".join(f"{version} {{ global: {'; '.join(sorted(names))}; }};\n"
                              for version, names in versions.items()))
    output("gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name}",
           *([f"-Wl,--version-script={script}"] if versions else []), "-o", folder / name, source)
