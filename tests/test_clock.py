"""What time goes into: parts that do not overlap, of one thread."""

import threading
import time
from contextlib import suppress

from transformer_vq import clock as module
from transformer_vq.clock import Clock, count, spent


def test_without_a_clock_nothing_happens():
    with spent("data"):
        count("data", 3.0)


def test_the_outer_part_has_it_all(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(part, seconds):
        with spent(part):
            now[0] += seconds

    clock = Clock(("data", "evaluation"))
    with clock.running():
        wait("data", 1)
        with spent("evaluation"):
            wait("data", 2)
            now[0] += 4
        wait("unknown", 8)
        count("data", 0.5)
        count("unknown", 0.5)
        now[0] += 16
        threads = [threading.Thread(target=wait, args=("data", 32))]
        threads[0].start()
        threads[0].join()
        assert clock.read() == clock.lap() == (63.0, {"data": 1.5, "evaluation": 6.0})
        assert clock.lap() == (0.0, {"data": 0.0, "evaluation": 0.0})
    wait("data", 1)
    assert clock.seconds["data"] == 0.0 and module._running.get() is None


def test_an_error_ends_a_part():
    clock = Clock(("data",))
    with clock.running():
        with suppress(KeyError), spent("data"):
            raise KeyError
        assert clock.within == () and clock.beats == 2
