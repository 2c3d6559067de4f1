"""What a thread is at and what its time goes into: whoever waits, reads or writes says so, where a clock runs.

    with spent("evaluation"): ...

Without a clock that costs next to nothing. Parts that are added up do not overlap: what is spent inside of another part
belongs to that one, so the processes' talk during an evaluation is evaluation. Standard library alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_running: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Clock:
    """Seconds by part since `lap` was last called; parts that it was not made with are not added up."""

    def __init__(self, parts: Iterable[str]) -> None:
        self.parts = tuple(parts)
        self.within: tuple[str, ...] = ()
        """Parts that the thread is in, the outermost first."""
        self.beats = 0
        """Grows as long as the thread gets on."""
        self.lap()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What this thread says in here is heard."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    def beat(self) -> None:
        """The thread gets on."""
        self.beats += 1

    def add(self, part: str, seconds: float) -> None:
        """Add to a part."""
        if part in self.seconds:
            self.seconds[part] += seconds

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, altogether and by part."""
        return time.perf_counter() - self.began, dict(self.seconds)

    def lap(self) -> tuple[float, dict[str, float]]:
        """The same, and begin anew."""
        found = self.read() if hasattr(self, "began") else (0.0, {})
        self.began, self.seconds = time.perf_counter(), dict.fromkeys(self.parts, 0.0)
        return found


def count(part: str, seconds: float) -> None:
    """Something else has measured that `part` took so long."""
    clock = _running.get()
    if clock is not None:
        clock.add(part, seconds)


@contextmanager
def spent(part: str) -> Iterator[None]:
    """What happens in here takes time for `part`."""
    clock = _running.get()
    if clock is None:
        yield
        return
    outside, began = clock.within, time.perf_counter()
    clock.within = (*outside, part)
    clock.beat()
    try:
        yield
    finally:
        clock.within = outside
        clock.beat()
        if not any(other in clock.seconds for other in outside):
            clock.add(part, time.perf_counter() - began)
