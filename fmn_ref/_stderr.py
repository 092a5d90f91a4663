"""Standard error, which may be missing (pythonw, a service, `2>&-`) or break: progress bars and messages.

Every room may use this file; it imports none of them.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any


class _Stream:
    """Standard error as it is now; what cannot be written is dropped, because no bar may end a training."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            self._file.flush()


def shows(progress: bool | None = None) -> bool:
    """Tell whether to show a progress bar; None: if standard error is a terminal."""
    if progress is not None:
        return progress and sys.stderr is not None
    try:
        return sys.stderr.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def say(text: str) -> None:
    """Write a line to standard error, if there is one."""
    stream = _Stream()
    stream.write(f"{printable(text)}\n")
    stream.flush()


def printable(text: str) -> str:
    """Escape what a terminal would act on: a name in a stranger's file may hold its control sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def progress_bar(
    items: Any = None, title: str = "", total: int | None = None, *, progress: bool | None = None, **options: Any
) -> Any:
    """Make a bar of tqdm, with its `options`, that is visible if `shows(progress)`."""
    from tqdm import tqdm

    return tqdm(items, title, total, file=_Stream(), disable=not shows(progress), **options)
