"""Signals as requests that the loop answers: to stop (Ctrl-C, SIGTERM), and to write a checkpoint (SIGUSR1).

How long an answer takes: a stop waits for the end of the optimizer step, and SIGTERM on a single process for one
micro-batch only; during an evaluation for one of its batches, on the process that evaluates. Then a checkpoint is
written, and nothing else. SIGUSR1 waits for the end of the step, or of the evaluation; Windows has none.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
CHECKPOINT = getattr(signal, "SIGUSR1", None)


class Signals:
    """`stop` and `checkpoint` turn True when the signal arrives while `stoppable()` or `heard()` holds; `hurry` when
    it was SIGTERM, after which a scheduler waits for some seconds only.

    A second Ctrl-C, later than the echo that a launcher sends of the first, interrupts at once. Outside the main thread
    Python delivers no signals, and nothing is installed.
    """

    def __init__(self) -> None:
        self.stop = self.hurry = self.checkpoint = False
        self._since = 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """SIGUSR1 asks for a checkpoint, and no longer ends the process; who handles it already, goes on doing so."""
        numbers = [] if CHECKPOINT is None else [CHECKPOINT]
        free = [n for n in numbers if signal.getsignal(n) in (signal.SIG_DFL, signal.SIG_IGN)]
        with _installed(free, self._ask_checkpoint):
            yield

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop."""
        with _installed([signal.SIGINT, signal.SIGTERM], self._ask_stop):
            yield

    def _ask_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.checkpoint = True

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self.hurry = self.hurry or number == signal.SIGTERM
        now = time.monotonic()
        if self.stop and number == signal.SIGINT and now - self._since > 2:
            raise KeyboardInterrupt
        self._since = self._since if self.stop else now
        self.stop = True


@contextmanager
def _installed(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
