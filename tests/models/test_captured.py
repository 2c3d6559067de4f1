"""Capturing a graph with what needs a GPU replaced: where it happens, and what a failure leaves behind."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from transformer_vq.models import captured
from transformer_vq.models.captured import Captured, possible

GPU = torch.device("cuda", 1)


class Graph:
    """A capture that ends cleanly unless it is told not to."""

    broken = False

    def __init__(self):
        self.state = "new"

    def capture_begin(self, capture_error_mode):
        self.state = "capturing"

    def capture_end(self):
        self.state = "ended"
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        self.state = "played"


class Tokens:
    """Of a device that is not here."""

    device = GPU

    def clone(self):
        return self

    def copy_(self, other):
        self.read = other


@pytest.fixture
def gpu(monkeypatch):
    now = SimpleNamespace(stream="default", made=[])

    @contextmanager
    def entered(stream):
        before, now.stream = now.stream, stream
        try:
            yield
        finally:
            now.stream = before

    def stream(device):
        now.made.append(SimpleNamespace(device=device, wait_stream=lambda other: None))
        return now.made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now.stream)
    monkeypatch.setattr(captured, "_streams", {})
    monkeypatch.setattr(captured, "_refused", [])
    monkeypatch.setattr(Graph, "broken", False)
    return now


def test_every_graph_of_a_device_is_captured_on_one_stream_of_it(gpu):
    seen = []
    graphs = [Captured(lambda tokens: seen.append(gpu.stream) or ("made",), Tokens()) for _ in range(3)]
    assert [stream.device for stream in gpu.made] == [GPU] and seen == gpu.made * 3
    assert gpu.stream == "default" and graphs[0](Tokens()) == ("made",) and graphs[0].graph.state == "played"
    assert possible(GPU) and not possible(torch.device("cpu"))


@pytest.mark.parametrize("broken", [False, True])
def test_a_failure_is_told_and_leaves_the_stream_and_is_not_tried_again(gpu, broken, monkeypatch):
    monkeypatch.setattr(Graph, "broken", broken)

    def waits(tokens):
        raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        Captured(waits, Tokens())
    assert gpu.stream == "default" and not possible(GPU)
    assert all(graph.state == "ended" for graph in captured._refused)


def test_an_end_that_fails_is_a_failure(gpu, monkeypatch):
    monkeypatch.setattr(Graph, "broken", True)
    with pytest.raises(RuntimeError, match="previous error"):
        Captured(lambda tokens: (), Tokens())
    assert gpu.stream == "default" and not possible(GPU)


def test_an_interruption_ends_the_capture_and_graphs_go_on(gpu):
    def interrupted(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Captured(interrupted, Tokens())
    assert gpu.stream == "default" and possible(GPU)
