"""Processes that make an evaluation together: who calls the model on what, and how findings are put together.

Work comes in *courses*, calls of the model that follow one another because one hands its state to the next. A batch of
windows is a course of one call, a text that is read from its beginning a course of many. A course is dealt whole, and
cut into calls as one process cuts it, so that every call gives the same numbers wherever it is made.

After each round of calls the processes say whether all is well: an error or a stop of one is everyone's, and nobody
waits for another longer than a call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from transformer_vq.clock import spent

T = TypeVar("T")
K = TypeVar("K")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Crew:
    """The processes of torch's default group, or one alone."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Where the group sends numbers from."""
    in_step: bool = False
    """The model's parameters are cut up over the processes, which must call it together, as often each."""

    def turns(self, courses: Sequence[int]) -> list[tuple[int, int] | None]:
        """(course, call) of each of this process's calls, in order; None: the others still have some.

        courses: calls of each. Each goes to the process that has the fewest so far.
        """
        loads, mine = [0] * self.size, []
        for course, calls in enumerate(courses):
            who = loads.index(min(loads))
            loads[who] += calls
            if who == self.rank:
                mine += [(course, call) for call in range(calls)]
        return [*mine, *([None] * (max(loads) - len(mine)))]

    def work(
        self,
        courses: Sequence[int],
        do: Callable[[int, int], int],
        idle: Callable[[], object],
        total: int,
        progress: Progress | None = None,
    ) -> None:
        """do(course, call), which returns how much was done of `total`, for every call; where it is `in_step`, a
        process without a call of its own does `idle` meanwhile.

        progress(done, total), of all processes, after each round on every process. What one of these raises anywhere,
        every process raises.
        """
        done, error = 0, None
        for turn in self.turns(courses):
            count = 0
            try:
                if turn is not None:
                    count = do(*turn)
                elif self.in_step:
                    idle()
            except Exception as caught:
                if self.in_step:  # the others are inside the call: only the launcher can end that
                    raise
                error = error or caught
            done += self._agree(error, count)
            try:
                if progress is not None:
                    progress(done, total)
            except Exception as caught:
                if self.size == 1:
                    raise
                error = caught  # told in the next round: the others are in it
        self._agree(error, 0)

    def everyones(self, value: T) -> list[T]:
        """Each process's value, in the order of the processes; tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with spent("communication"):
            dist.all_gather_object(values, value)
        return values

    def together(self, found: Mapping[K, T]) -> dict[K, T]:
        """What all processes found, each something else, in the order of the keys."""
        whole = {key: value for part in self.everyones(dict(found)) for key, value in part.items()}
        return {key: whole[key] for key in sorted(whole)}  # type: ignore[type-var]

    def _agree(self, error: Exception | None, count: int) -> int:
        """The sum of the processes' counts.  Raises the first error of any."""
        if self.size == 1:
            if error is not None:
                raise error
            return count
        told = torch.tensor([int(error is not None), count], device=self.device)
        with spent("communication"):
            dist.all_reduce(told)
        if told[0]:
            raise next(found for found in self.everyones(error) if found is not None)
        return int(told[1])


ALONE = Crew()
