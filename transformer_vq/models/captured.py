"""A token's launches on a GPU as one graph, which is started at the cost of a single one.

A step of decoding in place reads and writes the same memory for every token: its ring, the place in it, the token. So
the launches of one step are those of all. The first token of a loop is read as usual: kernels are compiled, libraries
choose theirs. The second is captured, which runs nothing, and played; the rest are played.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[Tensor], tuple[Tensor, ...]]


def possible(device: torch.device) -> bool:
    """Where there are graphs."""
    return device.type == "cuda"


class Captured:
    """What `run` launches for one token (B, 1); its results lie where they lay after the token before."""

    def __init__(self, run: Run, tokens: Tensor) -> None:
        """Runs nothing yet.  Raises RuntimeError for what cannot be captured, such as waiting for the device."""
        with torch.inference_mode(False):  # it is written to in other modes too
            self.tokens = tokens.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(tokens.device):
            stream = torch.cuda.Stream(tokens.device)  # PyTorch's own for graphs stays on the device that came first
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.made = run(self.tokens)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Play it for these tokens (B, 1)."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.made
