"""A model reads a text in pieces, the state carried, while every layer is listened to.

Memory is bounded by the length of a piece and a few numbers a token and layer: the code of each key, its angle and its
ratio; keys themselves are kept of some tokens only. Layers that keep every key (full attention) hold all of the text.
Attention is measured in fp64 by its definition, whatever the model computes in.

Axes:  H query heads  Hkv key heads  N tokens of the text  T tokens of a piece  K key width  S codes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transformer_vq.evaluation.mode import evaluating
from transformer_vq.models import TransformerVQ
from transformer_vq.models.attention import VQAttention
from transformer_vq.models.positions import Positioned
from transformer_vq.ops.attention import AttentionState, FullState
from transformer_vq.ops.attention.arguments import Arguments
from transformer_vq.ops.attention.mass import Mass, attention_mass, full_mass
from transformer_vq.ops.nearest import lookup
from transformer_vq.ops.turn import turn
from transformer_vq.quantizers.probe import KeyProbe

PIECE = 256
"""Tokens that are read at a time: attention's definition costs their square."""
BINS = 64
"""Stretches of the text over which attention is averaged."""
SAMPLE = 800
"""Keys of a head that are kept for its map, evenly spaced."""


class Heard(NamedTuple):
    """What one layer said of a piece."""

    k: Tensor
    """(1, Hkv, T, K)."""
    k_hat: Tensor
    """(1, Hkv, T, K), what attention reads."""
    codes: Tensor
    """(1, Hkv, T), or no codes (1, Hkv, 0)."""
    positioned: Positioned
    """Queries and what positions add."""
    state: AttentionState | FullState | None
    """What was carried into the piece."""


class LayerReading:
    """What one layer did with a text of N tokens."""

    def __init__(self, layer: VQAttention, tokens: int) -> None:
        self.layer = layer
        codebook = layer.quantizer.codebook.detach().double()
        Hkv, S, K = codebook.shape
        H = layer.config.heads
        self.codebook = codebook.cpu()
        """(Hkv, S, K) fp64; S = 0 for `kind: none`."""
        self.codes = np.zeros((Hkv, tokens), np.int32)
        """(Hkv, N): code of each key; means nothing where S = 0, as the next two."""
        self.angle, self.ratio = np.full((2, Hkv, tokens), np.nan, np.float32)
        """(Hkv, N): from key to code, radians, and ‖code‖/‖key‖."""
        self.edges = np.unique(np.linspace(0, tokens, min(BINS, tokens) + 1).astype(np.int64))
        """First token of each bin, and N at the end."""
        self.shares = np.zeros((3, H, len(self.edges) - 1))
        """Attention to itself, in the window, beyond; summed over the queries of a bin."""
        self.by_code = np.zeros((Hkv, S))
        """Of what lies beyond, by code; summed over all queries and the query heads of a key head."""
        self.gram, self.sum = np.zeros((Hkv, K, K)), np.zeros((Hkv, K))
        """Σ k kᵀ and Σ k over all keys."""
        self.sampled = np.unique(np.linspace(0, tokens - 1, min(SAMPLE, tokens)).astype(np.int64))
        """Tokens whose keys are kept."""
        self.keys = np.zeros((Hkv, len(self.sampled), K), np.float32)

    @property
    def has_codes(self) -> bool:
        """False for `kind: none`."""
        return self.codebook.shape[1] > 0

    def add(self, first: int, heard: Heard, segments: Tensor | None) -> None:
        """What was heard of the tokens from `first` on."""
        k = heard.k[0].double()
        T = k.shape[1]
        at = slice(first, first + T)
        if self.has_codes:
            rows = lookup(self.codebook.to(k.device), heard.codes)[0]
            self.codes[:, at] = heard.codes[0].cpu().numpy()
            angle, ratio = turn(k, rows)
            self.angle[:, at], self.ratio[:, at] = angle.cpu().numpy(), ratio.cpu().numpy()
        self.gram += (k.mT @ k).cpu().numpy()
        self.sum += k.sum(1).cpu().numpy()
        kept = (self.sampled >= first) & (self.sampled < first + T)
        self.keys[:, kept] = k[:, self.sampled[kept] - first].float().cpu().numpy()
        mass = self._mass(heard, segments)
        bins = np.searchsorted(self.edges, np.arange(first, first + T), side="right") - 1
        for share, values in zip(self.shares, (mass.itself, mass.window, mass.beyond), strict=True):
            for row, head in zip(share, values[0].cpu().numpy(), strict=True):
                np.add.at(row, bins, head)
        if mass.by_code.shape[2] and self.has_codes:
            self.by_code += mass.by_code[0].cpu().numpy()

    def _mass(self, heard: Heard, segments: Tensor | None) -> Mass:
        layer, config = self.layer, self.layer.config
        q, bias, rotary = (None if x is None else x.double() for x in heard.positioned)
        assert q is not None
        if layer.keeps_every_key:
            before = heard.state if isinstance(heard.state, FullState) else None
            return full_mass(q, heard.k.double(), config.window, bias, rotary, before, segments)
        k_hat, codes, codebook = heard.k_hat.double(), heard.codes, self.codebook.to(q.device)
        if not layer.quantizes:  # only exact keys count, as in `VQAttention.attend`
            codes = torch.zeros(k_hat.shape[:-1], dtype=torch.int64, device=q.device)
            codebook = k_hat.new_zeros(k_hat.shape[1], 1, k_hat.shape[-1])
        state = heard.state if isinstance(heard.state, AttentionState) else None
        if state is not None:
            state = state._replace(v=state.v[..., :0], mean=state.mean[..., :0])
        arguments = Arguments(
            q,
            k_hat,
            k_hat[..., :0],  # values are not looked at
            codes,
            codebook,
            window=config.window,
            block_len=config.block_length,
            bias=bias,
            rotary=rotary,
            state=state,
            segments=segments,
            cache=config.cache,
        )
        return attention_mass(arguments)


def read(
    model: TransformerVQ,
    tokens: NDArray[Any],
    layers: Sequence[int],
    documents: NDArray[np.int64] | None = None,
    piece: int = PIECE,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, LayerReading]:
    """Read tokens (N,) from the first to the last; what each of `layers` did. The result does not depend on `piece`.

    documents: first token of each, across which attention does not see; None: the text is one.
    progress(done, N) is called after every piece.  Raises ValueError where there is no token.
    """
    if len(tokens) == 0:
        raise ValueError("a text without tokens has nothing to look at")
    found = {i: LayerReading(cast(VQAttention, model.layers[i]), len(tokens)) for i in layers}
    state = None
    with evaluating(model) as device, model.frozen(), listening(model, layers) as heard:
        for first in range(0, len(tokens), piece):
            row = torch.from_numpy(tokens[first : first + piece].astype(np.int64))[None].to(device)
            segments = None
            if documents is not None:
                places = np.arange(first, first + row.shape[1])
                segments = torch.from_numpy(np.searchsorted(documents, places, side="right") - 1)[None].to(device)
            before = state
            _, state, _ = model.features(row, state, segments)
            for i, reading in found.items():
                reading.add(first, heard(i)._replace(state=None if before is None else before.layers[i]), segments)
            if progress is not None:
                progress(min(first + piece, len(tokens)), len(tokens))
    return found


@contextmanager
def listening(model: TransformerVQ, layers: Sequence[int]) -> Iterator[Callable[[int], Heard]]:
    """Yields what each layer said in the last forward pass, by its number."""
    positioned: dict[int, Positioned] = {}

    def listener(i: int) -> Callable[[nn.Module, tuple[Any, ...], Positioned], None]:
        def listen(_: nn.Module, __: tuple[Any, ...], result: Positioned) -> None:
            positioned[i] = result

        return listen

    chosen = {i: cast(VQAttention, model.layers[i]) for i in layers}
    hooks = [layer.position.register_forward_hook(listener(i)) for i, layer in chosen.items()]
    try:
        with KeyProbe({i: layer.quantizer for i, layer in chosen.items()}) as probe:
            yield lambda i: Heard(
                probe.keys[i], probe.results[i].quantized, probe.results[i].codes, positioned[i], None
            )
    finally:
        for hook in hooks:
            hook.remove()
