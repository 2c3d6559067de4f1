"""Ends a run that stands still, and says which process holds it up.

A process in an exchange with others cannot be interrupted, so each has a thread that watches whether its main thread
gets on (`clock.beats`), and tells the others so through the launcher's store. When nothing has moved for `timeout`, it
asks where they all stand. To blame is who tells nothing any more (stopped, or holding the interpreter); else, of those
that do not themselves wait for others, who is furthest behind. As long as these get on, the rest waits.

Time in which a process is suspended does not count. Standing still is noticed within one and a half times `timeout`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from transformer_vq.clock import Clock

T = TypeVar("T")
LOOKS = 8  # in a timeout
SELDOM = 10.0  # seconds between two looks at most
SILENT = 3  # looks after which who has told nothing new is silent
STAGES = {
    "checkpoint": "writing a checkpoint",
    "evaluation": "evaluating",
    "data": "reading a batch",
    "passes": "in a forward or backward pass",
    "backward": "in the last backward pass",
    "update": "updating",
}
"""What a main thread may be at, in the order of a step: after so many steps, who is at an earlier one is behind."""
BETWEEN = "between steps"
_runs = count()


class Stand(NamedTuple):
    """Where a process stood when it last told."""

    told: int
    """How often it has told."""
    still: float
    """Seconds since it got on."""
    steps: int
    stage: str
    talks: bool
    """It waits for others."""
    host: str

    def words(self, rank: int) -> str:
        """For a message."""
        return f"process {rank} on {self.host} ({STAGES.get(self.stage, BETWEEN)}, {self.steps} steps done)"


class Watch:
    """Of one process of `processes`, whose main thread `clock` runs with. steps: how many are done."""

    def __init__(
        self, clock: Clock, steps: Callable[[], int], rank: int, processes: int, timeout: float | None, more: str = ""
    ) -> None:
        """timeout: seconds; None: nothing is watched. A process alone is watched while it writes a checkpoint.

        more: added to the message.
        """
        self.clock, self.steps, self.rank, self.processes = clock, steps, rank, processes
        self.timeout, self.more = timeout, more
        self.host = socket.gethostname()
        self.pause = min(SELDOM, (timeout or 0) / LOOKS)
        self.ended = threading.Event()
        self.told, self.still = 0, 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In here nothing may stand still."""
        if self.timeout is None:
            yield
            return
        store: Any = dist.distributed_c10d._get_default_store() if self.processes > 1 else None
        store = store and store.clone()  # a connection of its own: one that waits keeps others out
        threading.Thread(target=self._watch, args=(store, f"transformer_vq/watch/{next(_runs)}/"), daemon=True).start()
        try:
            yield
        finally:
            self.ended.set()

    def _watch(self, store: Any, prefix: str) -> None:
        assert self.timeout is not None
        beats, then = self.clock.beats, time.monotonic()
        if store is not None:
            within(self.timeout, lambda: self._tell(store, prefix))
        while not self.ended.wait(self.pause):
            now = time.monotonic()
            self.still += min(now - then, 2 * self.pause)
            then = now
            if self.clock.beats != beats:
                beats, self.still = self.clock.beats, 0.0
            if store is None:
                if self.still >= self.timeout and "checkpoint" in self.clock.within:
                    self._end(self._complaint({0: self._stand()}, [0]))
                continue
            stands = within(self.timeout, lambda: self._tell(store, prefix))
            if stands is None:
                self._end(f"the launcher's store, kept by it or by process 0, has not answered for {self.timeout:g} s")
            elif stands and self.still >= self.timeout:
                with suppress(RuntimeError):  # of a store that is gone, likewise
                    self._judge(store, prefix)

    def _stand(self) -> Stand:
        within = self.clock.within
        stage = next((part for part in reversed(within) if part in STAGES), "")
        return Stand(self.told, self.still, self.steps(), stage, "communication" in within[-1:], self.host)

    def _tell(self, store: Any, prefix: str) -> bool:
        """Whether the store still takes it."""
        self.told += 1
        try:
            store.set(f"{prefix}{self.rank}", json.dumps(self._stand()))
        except RuntimeError:  # whoever kept it is gone, which the launcher notices
            return False
        return True

    def _judge(self, store: Any, prefix: str) -> None:
        """End the run if those who hold it up do not get on."""
        assert self.timeout is not None
        beats, before = self.clock.beats, self._ask(store, prefix)
        for _ in range(SILENT):
            if self.ended.wait(self.pause):
                return
            self.still += self.pause
            self._tell(store, prefix)
        stands = self._ask(store, prefix)
        silent = [r for r in range(self.processes) if r not in stands or stands[r] == before.get(r)]
        to_blame = silent or behind(stands)
        if not silent and any(stands[rank].still < self.timeout for rank in to_blame):
            return
        if self.ended.is_set() or self.clock.beats != beats:
            return
        first = store.add(f"{prefix}ended", 1) == 1
        self._end(self._complaint(stands, to_blame, bool(silent)) if first else None)

    def _ask(self, store: Any, prefix: str) -> dict[int, Stand]:
        found = {}
        for rank in range(self.processes):
            key = f"{prefix}{rank}"
            if store.check([key]):
                found[rank] = Stand(*json.loads(store.get(key)))
        return found

    def _complaint(self, stands: Mapping[int, Stand], to_blame: Sequence[int], silent: bool = False) -> str:
        who = ", ".join(stands[r].words(r) if r in stands else f"process {r}" for r in to_blame)
        have = "has" if len(to_blame) == 1 else "have"
        what = "been silent, stopped or out of reach," if silent else "not got on"
        return f"{who} {have} {what} for train.timeout = {self.timeout:g} s"

    def _end(self, complaint: str | None) -> None:
        """End this process at once: its main thread cannot be reached."""
        if complaint is None:
            time.sleep(1)  # for who complains to do so before the launcher ends everything
        else:
            print(f"error: {complaint}; the run is ended.{self.more}", file=sys.stderr, flush=True)
        os._exit(1)


def behind(stands: Mapping[int, Stand]) -> list[int]:
    """Of those that do not wait for others (or of all, where all do) who is furthest behind."""
    working = [rank for rank, stand in stands.items() if not stand.talks] or list(stands)
    order = ["", *STAGES]
    place = {rank: (stands[rank].steps, order.index(stands[rank].stage)) for rank in working}
    return [rank for rank in working if place[rank] == min(place.values())]


def within(seconds: float, do: Callable[[], T]) -> T | None:
    """What it returns; None when that takes longer."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(do()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
