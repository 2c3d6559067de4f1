"""Independent pieces of work on a CPU: one thread each, with a single thread of PyTorch's inside.

PyTorch shares every operation among all its threads and waits for the slowest before the next. Pieces that do not
depend on each other need not wait, keep their memory in the cache of one core, and lose little when cores are busy.
There are never more threads than `torch.get_num_threads()`: with OMP_NUM_THREADS=1 no thread is started.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def outer_threads(like: Tensor) -> int:
    """How many threads may share work on tensors like this one: 1 but for real tensors on a CPU."""
    return torch.get_num_threads() if like.device.type == "cpu" and type(like) is Tensor else 1


@contextmanager
def alone() -> Iterator[None]:
    """PyTorch's operations in here run in the calling thread: for many small ones, which waking others would slow down.

    A thread whose first operation falls into this moment keeps to one as well; nothing else is seen outside.
    """
    own = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def cut(size: int, parts: int) -> list[slice]:
    """0 … size in slices as equal as can be, none empty."""
    ends = [size * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def share(items: Sequence[Item], begin: Callable[[], Callable[[Item], None]], threads: int) -> None:
    """Call what `begin` returns on every item, without gradients, in any order; each thread begins once.

    Items must not write to the same memory. An exception of one is raised when all threads have stopped.
    """
    if threads == 1 or len(items) == 1:
        work = begin()
        for item in items:
            work(item)
        return
    inference, left = torch.is_inference_mode_enabled(), iter(items)

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work = begin()
            for item in left:  # one iterator for all threads: who is free takes the next
                work(item)

    done = [_pool(threads).submit(run) for _ in range(min(threads, len(items)))]
    wait(done)
    for one in done:
        one.result()


def together(function: Any, argument: Any, threads: int) -> None:
    """Call a compiled function with the same pointer in so many of PyTorch's threads or more, until all return.

    Those of PyTorch's own operations, if it can: they are awake still, where ours would have to be woken, which takes a
    tenth of a millisecond and more. All of them are called, however few are needed, since OpenMP would end the others
    and start them anew. So the function hands out the work itself, and returns at once where none is left.
    As PyTorch's operations, not for a process that was forked after one.
    """
    if threads <= 1:
        function(argument)
    elif (begin := _openmp()) is not None:
        begin(function, argument, ctypes.c_uint(0), ctypes.c_uint(0))
    else:
        share(range(threads), lambda: lambda _: function(argument), threads)


@cache
def _openmp() -> Any:
    """What compilers call for a parallel region, of the OpenMP library that PyTorch has loaded; None where it has none.

    So is it called by what GCC compiles; other compilers' libraries know the name too.
    """
    try:
        begin = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    begin.restype = None
    return begin


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that are kept, each with one thread inside."""
    with _lock:
        if threads not in _pools:
            own = torch.get_num_threads()
            started = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "transformer_vq")

            def settle() -> None:
                torch.get_num_threads()  # a thread's first look copies the setting of all; ours must come after it
                torch.set_num_threads(1)  # of this thread, and of all that have not looked yet: see below
                started.wait()

            waiting = [pool.submit(settle) for _ in range(threads)]
            started.wait()
            wait(waiting)
            torch.set_num_threads(own)
            _pools[threads] = pool
        return _pools[threads]


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
