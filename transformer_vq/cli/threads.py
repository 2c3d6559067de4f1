"""How threads wait for one another, settled before PyTorch is imported: its OpenMP looks once, when it is loaded."""

from __future__ import annotations

import os
import sys

from transformer_vq.cli.console import console, print_lines

BUSY = 60.0
"""Percent of all cores' time that others take; a moment's look, so that what has just ended does not count."""
LOOK = 0.2  # seconds


WORDS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By which a user says how threads wait."""
TURNS = 10_000
"""Of the loop in which a thread of GNU's OpenMP waits: longer than from one operation to the next. By itself it takes
300,000, and after every operation keeps a core that our own threads want.
"""


def settle_threads(quiet: bool) -> None:
    """Let threads sleep at once where others use the cores, and say so unless `quiet`; elsewhere, after a short wait.

    An OpenMP thread that is done waits in a loop for its fellows. On idle cores that saves the time of waking up. Where
    others want the cores, who loops keeps them from those who work, and a step takes several times as long as with
    sleep. The numbers that come out are the same.

    A word of the user's own (OMP_WAIT_POLICY, GOMP_SPINCOUNT, KMP_BLOCKTIME) stands, and one thread waits for nobody.
    """
    if _settled():
        return
    import psutil

    taken = psutil.cpu_percent(interval=LOOK)
    if taken < BUSY:
        wait_shortly()
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    sentence = f"others take {taken:.0f} % of this machine: threads wait asleep (OMP_WAIT_POLICY=passive)"
    print_lines(console(to_stderr=True, quiet=quiet), {"threads": sentence})


def wait_shortly() -> None:
    """Threads wait in the loop for `TURNS`, then sleep, unless the user has said otherwise."""
    if not _settled():
        os.environ["GOMP_SPINCOUNT"] = str(TURNS)


def _settled() -> bool:
    one = os.environ.get("OMP_NUM_THREADS") == "1"
    return one or "torch" in sys.modules or any(word in os.environ for word in WORDS)
