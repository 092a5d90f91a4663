"""Work shared out among Python threads. They pay where NumPy or a kernel releases the GIL for 0.1 ms at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from .backend import kernels

_LEAST = 1 << 20  # values for which a thread is started: half a millisecond to two
_Result = TypeVar("_Result")


def n_threads_for(size: int, most: int) -> int:
    """Threads for work on `size` values: as many as the kernels take, but at most `most`, and one for little work."""
    return max(1, min(kernels().threads(), size // _LEAST, most))


def in_order(work: Callable[[int, int], _Result], n_items: int, n_threads: int) -> list[_Result]:
    """Return [work(0, thread), work(1, thread), ...], where `thread` is the number of the calling one, from 0.

    The order is that of the items, for any number of threads. The threads end with the call. If one fails, or the
    system gives none, the caller does all: so the error that it raises is that of the first item that fails.

    Examples
    --------
    >>> in_order(lambda item, thread: item**2, 5, n_threads=2)
    [0, 1, 4, 9, 16]
    """

    def share(thread: int) -> list[_Result]:
        return [work(item, thread) for item in range(thread, n_items, n_threads)]

    if n_threads > 1:
        with suppress(Exception), ThreadPoolExecutor(n_threads) as executor:
            shares = list(executor.map(share, range(n_threads)))
            return [shares[item % n_threads][item // n_threads] for item in range(n_items)]
    return [work(item, 0) for item in range(n_items)]
