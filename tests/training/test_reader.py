"""Batches read ahead are those that would be read now."""

import threading

import pytest
import torch

from transformer_vq.training.reader import Reader
from transformer_vq.training.task import MicroBatch

CPU = torch.device("cpu")


def batches(step: int) -> list[MicroBatch]:
    return [MicroBatch((step, slot), {"lm": 1}, 3, slot) for slot in range(2)]


def test_any_order_of_steps():
    reader = Reader(batches, 9, CPU)
    for step in (4, 5, 6, 2, 8):  # goes on, and begins anew elsewhere
        assert [batch.inputs for batch in reader.take(step)] == [(step, 0), (step, 1)]
    reader.close()


def test_the_next_step_is_read_meanwhile_and_none_after_the_last():
    asked, read = [], threading.Event()

    def reading(step):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            read.set()
        return batches(step)

    reader = Reader(reading, 3, CPU)
    reader.take(0)
    assert read.wait(20), "nobody asked for step 1, it is read all the same"
    for step in (1, 2):
        reader.take(step)
    reader.thread.shutdown()
    assert asked == [(0, False), (1, False), (2, False)]
    assert reader.units == 3 * 6 and reader.seconds > 0


def test_an_error_comes_with_its_own_step():
    def broken(step):
        if step == 1:
            raise KeyboardInterrupt("the disk")
        return batches(step)

    reader = Reader(broken, 3, CPU)
    reader.take(0)
    with pytest.raises(KeyboardInterrupt, match="the disk"):
        reader.take(1)
    reader.close()
