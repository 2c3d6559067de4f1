"""Sequences cut over processes: a line of them, each with a piece, and what passes along it.

Forward, what came before goes from each process to the next; backward, its gradient goes back the same way. A process
sums its piece up before it listens, so what it adds to the time of a hop is O(S + M), whatever the length. One message
a hop: S·(V+1) + M·(K+V) numbers a key head and row, codes and a few integers; the gradient S·V + M·(K+V).

Ranks that share rows are neighbours: the mesh is (dp_replicate, dp_shard, cp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh

from transformer_vq.clock import spent
from transformer_vq.config import ConfigError, RunConfig, TransformerVQConfig
from transformer_vq.models.split import Follow


def check_context(config: RunConfig, processes: int) -> None:
    """Raises ConfigError, in one line, for a run whose sequences cannot be cut so."""
    n, model, train = config.train.context_parallel, config.model, config.train
    if n == 1:
        return
    asked = f"train.context_parallel = {n}"
    piece = train.seq_len // n
    why = None
    if processes % n:
        why = f"must divide the number of processes, {processes}"
    elif train.seq_len % n:
        why = f"must divide train.seq_len = {train.seq_len}"
    elif model.window > piece:
        why = f"pieces of {piece} tokens are shorter than model.window = {model.window}"
    elif model.conv - 1 > piece:
        why = f"pieces of {piece} tokens are shorter than model.conv = {model.conv} reaches"
    elif model.gradients == "block" and piece % (model.block_length or 1):
        why = f"with gradients: block, pieces of {piece} tokens must be whole blocks of {model.block_length}"
    elif (layer := keeps_keys(model)) is not None:
        why = f"layer {layer[0]} keeps every key ({layer[1]}), which no constant state stands for"
    elif train.compile:
        why = "does not go with train.compile = true"
    elif train.teacher is not None:
        why = "does not go with train.teacher, which reads whole sequences"
    elif model.backend == "triton":
        why = "model.backend = triton gives a state no gradient; auto, wide or blockwise"
    if why is not None:
        raise ConfigError(f"{asked}: {why}")


def keeps_keys(model: TransformerVQConfig) -> tuple[int, str] | None:
    """The first layer with full attention, now or before its `start_step`, and why."""
    if model.cache:
        for i, quantizer in enumerate(model.layer_quantizers()):
            if quantizer.kind == "none":
                return i, "kind: none"
            if start := getattr(quantizer, "start_step", 0):
                return i, f"until its start_step = {start}"
    return None


def make_line(context: int, device: torch.device, processes: int, closes: bool) -> ProcessLine | None:
    """This process's line; None where each row is one process's. Every process must call it.

    closes: the last piece's state goes to the first.
    """
    if context == 1:
        return None
    names = ("dp_replicate", "dp_shard", "cp")
    mesh = init_device_mesh(device.type, (processes // context, 1, context), mesh_dim_names=names)
    return ProcessLine(mesh.get_group("cp"), closes)


class ProcessLine:
    """A `Line` of the processes of a group of torch.distributed, or of its first `size`."""

    def __init__(self, group: dist.ProcessGroup | None, closes: bool = False, size: int | None = None) -> None:
        """group: None is the default one."""
        self.group, self.closes = group, closes
        self.rank, self.size = dist.get_rank(group), size or dist.get_world_size(group)
        self.sent = 0
        """Bytes that this process has sent."""
        self._sending: list[tuple[dist.Work | None, Tensor]] = []

    @property
    def first(self) -> bool:
        """See `Line`."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """This process has the last pieces."""
        return self.rank == self.size - 1

    def piece(self, length: int) -> slice:
        """Of rows of `length` tokens, what this process reads."""
        n = length // self.size
        return slice(self.rank * n, (self.rank + 1) * n)

    def pass_on(
        self, anchor: Tensor, start: Sequence[Tensor], own: Sequence[Tensor], follow: Follow, learned: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Line`."""
        tensors = (anchor, *start, *own)
        anchor, *before = PassOn.apply(self, follow, tuple(learned), len(start), *tensors)  # type: ignore[no-untyped-call]
        return anchor, before

    def to_first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Line`."""
        if self.last:
            self.send([x.detach() for x in tensors], 0)
        return self.receive(tensors, self.size - 1) if self.first else list(tensors)

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Send as one message, without waiting; what was sent before has left by then."""
        self._settle()
        message = torch.cat([tensors[i].contiguous().view(torch.uint8).flatten() for i in _by_size(tensors)])
        self.sent += message.numel()
        self._sending = [(dist.isend(message, group=self.group, group_dst=to), message)]

    def receive(self, like: Sequence[Tensor], source: int) -> list[Tensor]:
        """What the other sent, whose shapes and types are those of `like`."""
        message = torch.empty(sum(x.nbytes for x in like), dtype=torch.uint8, device=like[0].device)
        with spent("communication"):
            dist.recv(message, group=self.group, group_src=source)
        found: dict[int, Tensor] = {}
        at = 0
        for i in _by_size(like):
            end = at + like[i].nbytes
            found[i], at = message[at:end].view(like[i].dtype).view(like[i].shape), end
        return [found[i] for i in range(len(like))]

    def _settle(self) -> None:
        with spent("communication"):
            for work, _ in self._sending:
                if work is not None:
                    work.wait()
        self._sending = []


def _by_size(tensors: Sequence[Tensor]) -> list[int]:
    """Their order in a message: widest entries first, so that each is aligned."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())


class PassOn(torch.autograd.Function):
    """`ProcessLine.pass_on`: one node a message, so that all processes meet in the same order forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, line: ProcessLine, follow: Follow, learned: tuple[int, ...], n: int, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """anchor, then n tensors to begin with, then the piece's own -> anchor, then n tensors that came before."""
        start, own = tensors[:n], tensors[n:]
        before = [x.view_as(x) for x in start] if line.first else line.receive(start, line.rank - 1)
        if not line.last:
            line.send(list(follow(before, own)), line.rank + 1)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(before) if i not in learned))
        ctx.save_for_backward(*(x.detach() for x in before), *(x.detach() for x in own))
        ctx.line, ctx.follow, ctx.learned, ctx.n = line, follow, learned, n
        return anchor.view_as(anchor), *before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_anchor: Tensor | None, *d_before: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of what this process passed on comes back from the next; that of what it heard goes back."""
        line, learned, n = ctx.line, ctx.learned, ctx.n
        saved = ctx.saved_tensors  # read once: where the forward pass is repeated, they are let go
        before, own = list(saved[:n]), list(saved[n:])
        d_own: list[Tensor | None] = [None] * len(own)
        if learned:
            d_heard = [torch.zeros_like(before[i]) if d_before[i] is None else d_before[i] for i in learned]
            if not line.last:
                with torch.enable_grad():
                    for i in learned:
                        before[i], own[i] = before[i].requires_grad_(), own[i].requires_grad_()
                    after = ctx.follow(before, own)
                passed = [after[i] for i in learned]
                d_passed = line.receive(passed, line.rank + 1)
                leaves = [*(before[i] for i in learned), *(own[i] for i in learned)]
                found = torch.autograd.grad(passed, leaves, d_passed, materialize_grads=True)
                d_heard = [a + b for a, b in zip(d_heard, found, strict=False)]
                for i, gradient in zip(learned, found[len(learned) :], strict=True):
                    d_own[i] = gradient
            if not line.first:
                line.send(d_heard, line.rank - 1)
        return None, None, None, None, d_anchor, *[None] * n, *d_own
