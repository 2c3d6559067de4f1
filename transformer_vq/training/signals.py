"""Ctrl-C and termination as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self


class Stop:
    """`requested` turns True when SIGINT or SIGTERM arrives inside the `with` block.

    A second Ctrl-C, later than the echo that a launcher sends of the first, interrupts at once. Outside the main thread
    Python delivers no signals, and nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._since > 2:
            raise KeyboardInterrupt
        self._since = self._since if self.requested else now
        self.requested = True
