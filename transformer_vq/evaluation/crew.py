"""Processes that make an evaluation together: who calls the model on what, and how findings are put together.

Work comes in *courses*, calls of the model that follow one another because one hands its state to the next. A batch of
windows is a course of one call, a text that is read from its beginning a course of many. A course is dealt whole, and
cut into calls as one process cuts it, so that every call gives the same numbers wherever it is made.

A course that is longer than a process's share of all is made by all together, where there are lines of processes: as
many calls at once as there are processes, one each, which hand on what comes before the next as pieces of one sequence
do (models/split.py). Its numbers are those of one process to rounding.

After each round of calls the processes say whether all is well: an error or a stop of one is everyone's, and nobody
waits for another longer than a call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from transformer_vq.clock import spent
from transformer_vq.models.split import Line

T = TypeVar("T")
K = TypeVar("K")

Progress = Callable[[int, int], None]


class Turn(NamedTuple):
    """A call of a process."""

    course: int
    call: int
    beside: int = 1
    """So many calls of the course are made at once, by the first processes, the first of them by the first."""


@dataclass(frozen=True)
class Crew:
    """The processes of torch's default group, or one alone."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Where the group sends numbers from."""
    in_step: bool = False
    """The model's parameters are cut up over the processes, which must call it together, as often each."""
    lines: Mapping[int, Line] = field(default_factory=dict)
    """By n, 2 to `size`: the first n processes in a line that closes. Empty: no course is made by all together."""

    def turns(self, courses: Sequence[int], together: Sequence[bool] = ()) -> list[Turn | None]:
        """This process's calls, in order; None: it has none while others have.

        courses: calls of each; together: whether all may make it together, none by default, as they do where it is more
        than its share. Every other goes to the process that has the fewest so far.
        """
        share = sum(courses) / self.size
        shared = {i for i, may in enumerate(together) if may and self.lines and courses[i] > share}
        mine: list[Turn | None] = []
        for course in sorted(shared):
            for first in range(0, courses[course], self.size):
                beside = min(self.size, courses[course] - first)
                mine.append(Turn(course, first + self.rank, beside) if self.rank < beside else None)
        loads, rounds = [0] * self.size, len(mine)
        for course, calls in enumerate(courses):
            if course not in shared:
                who = loads.index(min(loads))
                loads[who] += calls
                mine += [Turn(course, call) for call in range(calls) if who == self.rank]
        return [*mine, *([None] * (rounds + max(loads) - len(mine)))]

    def work(
        self,
        courses: Sequence[int],
        do: Callable[[Turn], int],
        idle: Callable[[], object],
        total: int,
        progress: Progress | None = None,
        together: Sequence[bool] = (),
    ) -> None:
        """do(turn), which returns how much was done of `total`, for every call; where it is `in_step`, a process
        without a call of its own does `idle` meanwhile.

        progress(done, total), of all processes, after each round on every process. What one of these raises anywhere,
        every process raises. together: see `turns`.
        """
        done, error = 0, None
        for turn in self.turns(courses, together):
            count = 0
            try:
                if turn is not None:
                    count = do(turn)
                elif self.in_step:
                    idle()
            except Exception as caught:
                if self.in_step or (turn and turn.beside > 1):  # others are in the call: the launcher must end them
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
