"""A token's launches on a GPU as one graph, which is started at the cost of a single one.

A step of decoding in place reads and writes the same memory for every token: its ring, the place in it, the token. So
the launches of one step are those of all. The first token of a loop is read as usual: kernels are compiled, libraries
choose theirs. The second is captured, which runs nothing, and played; the rest are played.

By hand and not by `torch.cuda.graph`, which hands back all cached memory each time, captures on the device that came
first, and where a capture fails leaves its stream as the current one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[Tensor], tuple[Tensor, ...]]

_streams: dict[torch.device, torch.cuda.Stream] = {}
"""One a device: libraries keep memory for every stream that they have seen."""
_refused: list[object] = []
"""Graphs whose capture failed. They stay: the allocator may still name them. After one, nothing is captured."""


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def possible(device: torch.device) -> bool:
    """Where there are graphs, and no capture has failed."""
    return device.type == "cuda" and not _refused


class Captured:
    """What `run` launches for one token (B, 1); its results lie where they lay after the token before."""

    def __init__(self, run: Run, tokens: Tensor) -> None:
        """Runs nothing yet.  Raises RuntimeError for what cannot be captured, such as waiting for the device."""
        with torch.inference_mode(False):  # it is written to in other modes too
            self.tokens = tokens.clone()
        self.graph = torch.cuda.CUDAGraph()
        stream = _stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        try:
            with torch.cuda.stream(stream):
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.made = run(self.tokens)
                except BaseException:
                    self._give_up()
                    raise
                self.graph.capture_end()
        except RuntimeError:
            _refused.append(self.graph)
            raise

    def _give_up(self) -> None:
        """End a capture in which something failed: that may fail too, and the first failure is the one to tell of."""
        try:
            self.graph.capture_end()
        except RuntimeError:
            _refused.append(self.graph)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Play it for these tokens (B, 1)."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.made
