"""One token after another inside `model.frozen()`: the same numbers, without what a call of many tokens needs.

A call of one token through the modules spends nearly all of its time on the way to and between small operations. Here
weights and what follows from them are at hand (prepared.py), attention appends to a memory (ops/attention/step.py), and
what nobody asks for (losses, codebook health, a state in the form that other calls read) is made when it is read.

Layers that keep every key, and layers with modules that are not our own, are called as they are.

Axes:   B batch  H heads  Hkv key heads  G = H/Hkv  D width  K key width  V value width
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_vq.models.attention import Carried, Context, VQAttention
from transformer_vq.models.captured import Captured, possible
from transformer_vq.models.gau import GAU
from transformer_vq.models.norm import RMSNorm
from transformer_vq.models.positions import sinusoid
from transformer_vq.models.prepared import added, finder, head_norm, layer_tables, placer, side_by_side
from transformer_vq.models.state import ModelState
from transformer_vq.models.transformer import TransformerBlock
from transformer_vq.ops.attention import AttentionState, FullState, initial_state
from transformer_vq.ops.attention.step import Memory, close_memory, open_memory, start_memory, step
from transformer_vq.ops.nearest import lookup
from transformer_vq.ops.numerics import wide_dtype
from transformer_vq.ops.threads import alone
from transformer_vq.quantizers import Quantized

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Of weights. In 16 bits what goes from module to module is rounded to them, as in a call of many tokens; norms and
attention are computed in fp32.
"""

WORTH_THREADS = 2**21
"""Multiplications of a layer and step, below which its products are done before a CPU's other threads have woken."""


class Decoding:
    """The state between two tokens: what a `ModelState` holds, in the form that the next step reads.

    Every field and method of `ModelState` is here too; it is made when it is first asked for.
    """

    def __init__(
        self,
        start: ModelState,
        layers: tuple[Any, ...],
        inputs: tuple[Tensor, ...],
        steps: int,
        dtype: torch.dtype,
        reader: object,
        graph: Captured | None = None,
    ):
        """layers: for each its memory, as `LayerStep.open` made it, or what it carries where it has no step.

        dtype: of keys and values in the state. reader: stands for the `Decoder` whose tables the memory and the graph
        hold. graph: of the next step, once it is captured.
        """
        self.start, self.layers_now, self.inputs_now, self.steps = start, layers, inputs, steps
        self.dtype, self.reader, self.graph = dtype, reader, graph

    @cached_property
    def whole(self) -> ModelState:
        """As a call of many tokens would have left it."""
        layers = [
            cast(FullState, x.attention) if isinstance(x, Carried) else close(x, self.dtype) for x in self.layers_now
        ]
        return self.start._replace(layers=tuple(layers), position=self.positions, inputs=self.inputs_now)

    @property
    def positions(self) -> Tensor:
        """(B,) int64."""
        return self.start.position + self.steps

    def one_further(self) -> Decoding:
        """What will be after its graph is played. Raises ValueError for what is not the newest of its loop."""
        from transformer_vq.ops.attention.ring import moved_on  # imports triton

        rings = tuple(moved_on(ring) for ring in self.layers_now)
        return Decoding(self.start, rings, (), self.steps + 1, self.dtype, self.reader, self.graph)

    def check(self) -> None:
        """Raise ValueError where some layer's ring has moved on since."""
        from transformer_vq.ops.attention.ring import check_ring  # imports triton

        for ring in self.layers_now:
            check_ring(ring)

    def take_back(self) -> None:
        """Of a step that was begun and did nothing: it is the newest of its loop again."""
        for ring in self.layers_now:
            ring.taken[0] = ring.steps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # not what copying and pickling look for
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple.__new__, (ModelState, tuple(self.whole))


def close(memory: Any, dtype: torch.dtype) -> AttentionState:
    """What a layer's memory stands for, keys and values of this type."""
    if isinstance(memory, Memory):
        state = close_memory(memory)
        return state.of_type(dtype, dtype, state.mean.dtype)
    from transformer_vq.ops.attention.ring import close_ring  # imports triton

    return close_ring(memory)


def whole(state: ModelState | None) -> ModelState | None:
    """The state itself, also of a `Decoding`."""
    return state.whole if isinstance(state, Decoding) else state


class LayerStep:
    """A layer for one token a row: x (B, D) -> x, the memory with the token, and the key that was quantized."""

    def __init__(self, layer: VQAttention, in_place: bool = False) -> None:
        config, like = layer.config, layer.norm.weight.detach()
        self.layer, self.dtype, self.wide = layer, like.dtype, wide_dtype(like)
        self.heads, self.kv_heads = config.heads, config.key_value_heads
        self.K, self.V = config.key_dim, config.value_dim
        self.norm: Callable[[Tensor], Tensor] = layer.norm.prepared()
        self.head_norm, self.find = head_norm(layer, like), finder(layer)
        self.place, self.rotary = placer(layer, self.wide)
        self.in_place = InPlace(self) if in_place else None
        self.tables = None if in_place else layer_tables(layer, self.rotary)

    def open(self, state: Any, B: int) -> Any:
        """The memory after `state`; a state of another kind, or None: before the first token."""
        if self.in_place is not None:
            return self.in_place.open(state, B)
        assert self.tables is not None
        groups = self.heads // self.kv_heads
        if isinstance(state, AttentionState):
            return open_memory(state, self.tables, groups, self.wide)
        return start_memory(B, self.V, self.tables, groups, self.wide)

    def attend(self, q_and_k: Tensor, v: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor]:
        """q and k side by side (B, (H+Hkv)·K), v (B, Hkv·V) -> heads side by side (B, H·V), memory, k (B, Hkv, K)."""
        B, H, Hkv = len(v), self.heads, self.kv_heads
        normed = self.head_norm(q_and_k.view(B, H + Hkv, self.K))
        k = normed[:, H:]
        if self.dtype != self.wide:
            normed, v = normed.to(self.wide), v.to(self.wide)
        wide_k = normed[:, H:]
        q, bias = self.place(normed[:, :H].reshape(B * Hkv, H // Hkv, self.K))
        one = step if self.in_place is None else self.in_place.step
        codes = self.find(wide_k)
        o, memory = one(memory, q, wide_k.reshape(B * Hkv, self.K), codes, v.reshape(B * Hkv, self.V), bias)
        return o.view(B, H * self.V).to(self.dtype), memory, k

    def __call__(self, x: Tensor, y: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor]:
        """y (B, D): the normed input as projections read it."""
        raise NotImplementedError


class InPlace:
    """In place of the memory of a `LayerStep`: a ring that two kernels write, for a loop that never goes back."""

    def __init__(self, one: LayerStep) -> None:
        config, quantizer = one.layer.config, one.layer.quantizer
        self.codebook = quantizer.codebook.detach().to(one.dtype)
        self.rotary, self.cache, self.exact = one.rotary, config.cache, one.layer.exact_window
        self.window, self.V, self.dtype = config.window, one.V, one.dtype

    def open(self, state: Any, B: int) -> Any:
        """As `LayerStep.open`."""
        from transformer_vq.ops.attention.ring import open_ring  # imports triton

        Hkv, S, K = self.codebook.shape
        if not isinstance(state, AttentionState):
            state = initial_state(B, Hkv, K, self.V, S, self.window, self.dtype, self.codebook.device)
        return open_ring(state, self.codebook, rotary=self.rotary, cache=self.cache)

    def step(
        self, ring: Any, q: Tensor, k: Tensor, codes: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Any]:
        """As `ops.attention.step.step`."""
        from transformer_vq.ops.attention.ring import step

        Hkv = len(self.codebook)
        codes, q, k, v = codes.view(-1), q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        k_hat = k if self.exact else lookup(self.codebook, codes.view(-1, Hkv, 1)).view(len(v), -1)
        bias = None if bias is None else bias.unflatten(0, (-1, Hkv))
        return step(ring, q, k_hat, codes, v, bias)


class TransformerStep(LayerStep):
    """`TransformerBlock`."""

    def __init__(self, layer: TransformerBlock, in_place: bool = False) -> None:
        super().__init__(layer, in_place)
        self.project, self.out = side_by_side(layer.q_proj, layer.kv_proj), added(layer.out_proj)
        self.mlp_norm, self.up = layer.mlp_norm.prepared(), side_by_side(layer.mlp.up_proj)
        self.down = added(layer.mlp.down_proj)

    def __call__(self, x: Tensor, y: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor]:
        """See the base."""
        made, keys = self.project(y), (self.heads + self.kv_heads) * self.K
        o, memory, k = self.attend(made[:, :keys], made[:, keys:], memory)
        x = self.out(x, o)
        gate, up = self.up(self.mlp_norm(x)).chunk(2, 1)
        return self.down(x, F.silu(gate) * up), memory, k


class GAUStep(LayerStep):
    """`GAU`."""

    def __init__(self, layer: GAU, in_place: bool = False) -> None:
        super().__init__(layer, in_place)
        self.project, self.out = side_by_side(layer.q_proj, layer.kvg_proj), added(layer.out_proj)

    def __call__(self, x: Tensor, y: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor]:
        """See the base."""
        made, keys = self.project(y), (self.heads + self.kv_heads) * self.K
        v, gate = F.silu(made[:, keys:]).split((self.kv_heads * self.V, self.heads * self.V), 1)
        o, memory, k = self.attend(made[:, :keys], v, memory)
        return self.out(x, o * gate), memory, k


STEPS: dict[type[VQAttention], Callable[[Any, bool], LayerStep]] = {GAU: GAUStep, TransformerBlock: TransformerStep}


def layer_step(layer: VQAttention, in_place: bool) -> LayerStep | None:
    """The layer's step, or None where the layer must be called as it is. in_place: on a memory that it overwrites."""
    plain = all(type(m) is nn.Linear for name, m in layer.named_modules() if name.endswith("_proj"))
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    if type(layer) not in STEPS or not layer.quantizes or not plain or hooked:
        return None
    return STEPS[type(layer)](layer, in_place)


def one_type(*modules: nn.Module) -> torch.dtype | None:
    """That of all weights; None where they differ. Those of quantizers may be of any."""
    named = [x for module in modules for x in module.named_parameters()]
    found = {p.dtype for name, p in named if ".quantizer." not in name}
    return found.pop() if len(found) == 1 else None


class Decoder:
    """The layers of a backbone for one token a row. It holds while no weight changes."""

    def __init__(
        self,
        embedding: nn.Embedding,
        absolute_scale: Tensor | None,
        layers: nn.ModuleList,
        norm: nn.Module,
        in_place: bool = False,
    ) -> None:
        """in_place: for a loop that never goes back to an earlier state, where kernels run; see `InPlace`."""
        self.embedding, self.absolute_scale = embedding.weight.detach(), absolute_scale
        self.layers = [cast(VQAttention, layer) for layer in layers]
        able = one_type(embedding, layers, norm) in TYPES
        self.steps = [layer_step(layer, in_place) if able else None for layer in self.layers]
        self.norm: Callable[[Tensor], Tensor] = norm.prepared() if isinstance(norm, RMSNorm) else norm
        self.base = self.layers[0].config.position_base
        self.work = max(sum(p.numel() for p in layer.parameters()) for layer in layers)  # of a row, in the largest
        self.placed = absolute_scale is not None or any(
            a is None or b.conv is not None for a, b in zip(self.steps, self.layers, strict=True)
        )
        self.same_memory = in_place and not self.placed  # for every token
        self.key = object()

    @property
    def useful(self) -> bool:
        """Some layer has a step."""
        return any(self.steps)

    def __call__(self, tokens: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState, Callable[[], Any]]:
        """tokens (B, 1) -> (B, 1, D) for the head, state, and what gives each layer's `Quantized` when it is called."""
        mine = getattr(state, "reader", None) is self.key  # of another one weights may have changed since
        now = cast(Decoding, state) if mine else self.open(whole(state), tokens)
        small = tokens.device.type == "cpu" and self.work * len(tokens) < WORTH_THREADS
        with alone() if small else nullcontext():
            x, moved, seen = self.play(tokens, now) if self.playable(now, tokens) else self.read(tokens, now)

        def quantized() -> list[Quantized]:
            pairs = zip(self.layers, seen, strict=True)
            return [layer.quantizer(x[:, :, None]) if isinstance(x, Tensor) else x for layer, x in pairs]

        return x[:, None], cast(ModelState, moved), quantized

    def playable(self, now: Decoding, tokens: Tensor) -> bool:
        """The step is one graph: no layer carries more than its ring, and the loop's first token has been read."""
        return self.same_memory and now.steps > 0 and possible(tokens.device)

    def play(self, tokens: Tensor, now: Decoding) -> tuple[Tensor, Decoding, Sequence[Tensor | Quantized]]:
        """As `read`, by the graph of this loop."""
        moved = now.one_further() if now.graph is not None else self.capture(tokens, now)
        if moved.graph is None:
            return self.read(tokens, now)
        x, keys = moved.graph(tokens)
        return x, moved, keys.clone().unbind()  # whoever asks for keys may do so after the next token

    def capture(self, tokens: Tensor, now: Decoding) -> Decoding:
        """What will be after the token, with the graph that reads it; `now` itself where that cannot be captured."""
        now.check()
        after: list[Decoding] = []

        def run(tokens: Tensor) -> tuple[Tensor, ...]:
            x, moved, seen = self.read(tokens, now)
            after.append(moved)
            return x, torch.stack(cast(list[Tensor], seen))

        try:
            graph = Captured(run, tokens)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on launch by launch, without a graph: {error}", stacklevel=5)
            self.same_memory = False
            now.take_back()
            return now
        except BaseException:  # such as Ctrl-C: the state is still the one to go on from
            now.take_back()
            raise
        after[0].graph = graph
        return after[0]

    def read(self, tokens: Tensor, now: Decoding) -> tuple[Tensor, Decoding, Sequence[Tensor | Quantized]]:
        """(B, D) for the head, the memory with the token, and of each layer the key, or what its quantizer says."""
        x = self.embedding.index_select(0, tokens[:, 0])
        context = None
        if self.placed:
            positions = now.positions[:, None]
            context = Context(None, None, now.start.draws, positions)
            if self.absolute_scale is not None:
                x = x + self.absolute_scale * sinusoid(positions[:, 0], x.shape[1], self.base, x.dtype)
        after: list[Any] = []
        seen: list[Tensor | Quantized] = []
        inputs = []
        for i, (layer, one) in enumerate(zip(self.layers, self.steps, strict=True)):
            before = now.layers_now[i]
            left = now.inputs_now[i] if now.inputs_now else None
            result: Tensor | Quantized
            if one is None:
                assert context is not None and isinstance(before, Carried)
                y, before, result = layer(x[:, None], context, before._replace(inputs=left))
                x, left = y[:, 0], before.inputs
            else:
                y = one.norm(x)
                if layer.conv is not None:
                    assert context is not None
                    mixed, left = layer.mix(y[:, None], context, left)
                    y = mixed[:, 0]
                x, before, result = one(x, y, before)
            after.append(before)
            seen.append(result)
            if left is not None:
                inputs.append(left)
        moved = Decoding(now.start, tuple(after), tuple(inputs), now.steps + 1, now.dtype, self.key)
        return self.norm(x), moved, seen

    def open(self, state: ModelState | None, tokens: Tensor) -> Decoding:
        """Ready to go on from `state`."""
        B, zero = len(tokens), tokens.new_zeros(len(tokens))
        start = state or ModelState((None,) * len(self.layers), zero, zero, zero)  # type: ignore[arg-type]
        layers = [
            Carried(x, None) if one is None else one.open(x, B) for one, x in zip(self.steps, start.layers, strict=True)
        ]
        return Decoding(start, tuple(layers), start.inputs, 0, self.embedding.dtype, self.key)
