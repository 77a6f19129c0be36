"""errors.py: the one exception type of the tools, and how a command ends with it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(Exception):
    """A mistake in what the user gave; the message says what, where, and what to do."""


def run(main: Callable[[], None]) -> None:
    """Runs a command line's main(); an InputError or OSError becomes one line and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
