"""Work shared out among threads: the order of its results, errors, and what stays behind."""

import os
import subprocess
import sys
import threading
import time

import pytest

from fmn_ref.kernels.backend import backend
from fmn_ref.kernels.threads import in_order, n_threads_for


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("n_items", [0, 1, 2, 6, 7, 50])
def test_results_are_in_the_order_of_the_items(n_items, n_threads):
    def work(item, thread):
        time.sleep(0.001 * (item % 3 == 0))
        return item, thread

    assert in_order(work, n_items, n_threads) == [(item, item % n_threads) for item in range(n_items)]


def test_the_work_is_done_at_the_same_time():
    """Each of three items waits for the two others."""
    barrier = threading.Barrier(3, timeout=30)
    assert sorted(in_order(lambda item, thread: barrier.wait(), 3, 3)) == [0, 1, 2]


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_error_is_that_of_the_first_item_that_fails_and_no_thread_stays(n_threads):
    def work(item, thread):
        if item in (2, 3, 5):
            raise ValueError(f"item {item}")

    before = threading.active_count()
    with pytest.raises(ValueError, match="item 2"):
        in_order(work, 8, n_threads)
    assert threading.active_count() == before


def test_an_interrupt_reaches_the_caller_once():
    seen = []

    def work(item, thread):
        seen.append(item)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_order(work, 2, 2)
    assert sorted(seen) in ([0], [0, 1])


def test_where_the_system_gives_no_thread_the_caller_does_all(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert in_order(lambda item, thread: (item, threading.current_thread()), 3, 2) == [
        (item, threading.current_thread()) for item in range(3)
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_it_works_while_python_ends_and_in_a_forked_process():
    code = """
import atexit, os
from fmn_ref.kernels.threads import in_order
def work(): return in_order(lambda item, thread: item, 9, 3) == list(range(9))
assert work()
child = os.fork()
if child == 0:
    os._exit(0 if work() else 1)
assert os.waitpid(child, 0)[1] == 0
atexit.register(lambda: print(work()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(("size", "most", "expected"), [(0, 9, 1), (2**20, 9, 1), (3 * 2**20, 9, 3), (2**40, 2, 2)])
def test_the_number_of_threads(monkeypatch, size, most, expected):
    monkeypatch.setenv("FMN_NUM_THREADS", "5")
    wanted = expected if backend().name == "cpp" else min(expected, backend().threads)
    assert n_threads_for(size, most) == wanted
    assert n_threads_for(size, 0) == 1


def test_no_more_threads_than_the_kernels_take(monkeypatch):
    monkeypatch.setenv("FMN_NUM_THREADS", "5")
    assert n_threads_for(2**40, 100) == (5 if backend().name == "cpp" else backend().threads)
