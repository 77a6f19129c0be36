"""The command `safegrad-tool NAME …` runs a program of tools/, as `python tools/NAME.py …`."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent / "tools"


def programs() -> dict[str, str]:
    """Name -> what it does, of the files of tools/ that are programs."""
    found = {}
    for path in sorted(TOOLS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            about = ast.get_docstring(ast.parse(text)).split("\n")[0]
            found[path.stem] = about.removeprefix(f"{path.name}: ")
    return found


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    known = programs()
    if name in ("", "-h", "--help"):
        print("usage: safegrad-tool NAME [OPTION]...\n")
        print("\n".join(f"  {program:20}{about}" for program, about in known.items()))
        sys.exit(0 if name else 1)
    if name not in known:
        sys.exit(f"error: {name}: no such tool; there are {', '.join(known)}")
    # As itself, so that the tools find each other beside it.
    os.execv(sys.executable, [sys.executable, str(TOOLS / f"{name}.py"), *sys.argv[2:]])


if __name__ == "__main__":
    main()
