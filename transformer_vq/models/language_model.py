"""The language model: embeddings, layers, head and losses; and what the training loop asks of all quantizers at once.

Axes:   B batch  T length  D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.models.attention import Carried, Context, VQAttention
from transformer_vq.models.decoding import Decoder, Decoding, whole
from transformer_vq.models.dropout import RowDropout, fresh_draws
from transformer_vq.models.gau import GAU
from transformer_vq.models.init import embedding, linear
from transformer_vq.models.linear import looked_up
from transformer_vq.models.norm import RMSNorm
from transformer_vq.models.place import locate
from transformer_vq.models.positions import XLBias, sinusoid
from transformer_vq.models.split import Line, place_before
from transformer_vq.models.state import ModelState, closed
from transformer_vq.models.transformer import TransformerBlock
from transformer_vq.ops.attention.choice import FUSED
from transformer_vq.ops.cross_entropy import linear_logits, summed_cross_entropy
from transformer_vq.ops.estimators.noise import named
from transformer_vq.ops.kernels.device import usable
from transformer_vq.quantizers import Quantized, Quantizer
from transformer_vq.quantizers.seeds import seed_number

BLOCKS: dict[str, type[VQAttention]] = {"gau": GAU, "transformer": TransformerBlock}
IGNORED = -100
DECODED = ("auto", "recurrent")
"""Backends that a short way may stand for: any other name is taken at its word."""
DROPPED = ("embedding", "residual", "layer", "sinusoid")


@dataclass(frozen=True)
class Output:
    """Result of a forward pass.  The losses are None without labels; every loss is fp32 or wider."""

    logits: Tensor | None
    """(B, T, vocab), fp32 or wider; None where they were not asked for."""
    state: ModelState
    """What the next call takes as `state`; detached."""
    loss: Tensor | None
    """loss_lm + loss_quantizers: what training minimises."""
    loss_lm: Tensor | None
    """Cross-entropy in nats, mean over the labels that count; 0 when none does."""
    loss_commit: Tensor
    """Commitment, unweighted, summed over layers; each is a mean over real tokens."""
    loss_quantizers: Tensor
    """The quantizers' own terms, each times its weight, summed over layers; means over real tokens."""
    labels: Tensor | None
    """Number of labels that count, int64: with it, sums over micro-batches and processes are exact."""
    tokens: Tensor
    """Number of real tokens, int64: the denominator of the quantizers' means."""
    metrics: dict[str, Tensor]
    """Codebook health, "layer0/perplexity"; detached scalars."""


class StepOutput(Output):
    """The same for one token inside `frozen()`: the quantizers' numbers are computed when they are first read."""

    def __init__(self, logits: Tensor, state: ModelState, tokens: Tensor, quantized: Callable[[], list[Quantized]]):
        given = {"logits": logits, "state": state, "loss": None, "loss_lm": None, "labels": None, "tokens": tokens}
        self.__dict__.update(given, quantized=quantized)

    @cached_property
    def _told(self) -> dict[str, object]:
        with torch.no_grad():
            return quantizer_fields(self.__dict__["quantized"]())

    def __getattr__(self, name: str) -> object:
        if name in ("loss_commit", "loss_quantizers", "metrics"):
            return self._told[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")


def quantizer_fields(quantized: Sequence[Quantized]) -> dict[str, Any]:
    """The fields of an `Output` that the quantizers fill, from what each layer's says."""
    return {
        "loss_commit": torch.stack([q.commitment for q in quantized]).sum(),
        "loss_quantizers": torch.stack([q.loss for q in quantized]).sum(),
        "metrics": {f"layer{i}/{name}": value for i, q in enumerate(quantized) for name, value in q.metrics.items()},
    }


class AtRows:
    """A model reads the rows that it read then; entered anew each time that a backward pass is run over one forward."""

    def __init__(self, model: Backbone, first_row: int, first_place: int) -> None:
        self.model, self.then, self.now = model, (first_row, first_place), (first_row, first_place)

    def __enter__(self) -> None:
        self.now = int(self.model.first_row), int(self.model.first_place)
        self.model.set_rows(*self.then)

    def __exit__(self, *_: object) -> None:
        self.model.set_rows(*self.now)


class Backbone(nn.Module):
    """Everything but the head: embeddings, layers, final norm. Other libraries' models put their own head on it.

    Weights depend on (config, seed) alone. A forward pass never moves a codebook: in training the quantizers collect,
    and the loop calls `apply_codebook_statistics` once per optimizer step.
    """

    def __init__(self, config: TransformerVQConfig, seed: int = 0, generator: torch.Generator | None = None) -> None:
        """generator: draws the weights; None: a new one of `seed`.  Raises ConfigError when `vocab_size` is not set."""
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size = null: must be the number of tokens of the tokenizer")
        self.config = config
        if config.checkpoint_activations:
            # Quantizers take notes once a step, never when a forward pass is repeated: the compiler need not repeat it.
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        self.checkpoint_activations = config.checkpoint_activations
        """Recompute each block in the backward pass."""
        generator = generator or torch.Generator().manual_seed(seed)
        self.embedding = embedding(config.vocab_size, config.width, generator)
        self.absolute_scale = nn.Parameter(torch.zeros(())) if config.absolute_positions else None
        self.dropout = RowDropout(config.dropout_embedding)
        self.seed, self.rows_named = seed, False
        self.noise, self.first_row, self.first_place = (
            torch.zeros((), dtype=torch.int64, device="cpu") for _ in range(3)
        )
        block = BLOCKS[config.block]
        self.layers = nn.ModuleList(block(config, i, seed, generator) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps) if config.final_norm else nn.Identity()
        self._frozen, self._in_place = False, False
        self._decoder: Decoder | None = None
        self._line: Line | None = None

    def features(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, ModelState, tuple[Quantized, ...]]:
        """Arguments as for `TransformerVQ`: (B, T, D) for the head, new state, each layer's Quantized.

        embedded (B, T, D): in place of the embeddings of `tokens`, of which only the shape is then read.
        Inside `split_over` all of them are of a piece, and the state is that of the rows on the first process.
        """
        line = self._line
        _same_shape(tokens, segments=segments, mask=mask)
        state = whole(state)
        _same_rows(tokens, state)
        zero = tokens.new_zeros(tokens.shape[0])
        before = (zero, zero) if state is None else (state.position, state.segment)
        draws = zero if state is None else state.draws
        dropped = None  # names of the tokens, where something is dropped
        if self.training and any(getattr(self.config, f"dropout_{what}") for what in DROPPED):
            seed = self.noise if self.rows_named else torch.randint(2**62, (), device=tokens.device)
            dropped = named(seed, self.first_row, self.first_place, tokens[..., None], mask).tokens
            rows = self.first_row + torch.arange(len(tokens), device=tokens.device)
            draws = torch.where(draws == 0, fresh_draws(seed, rows), draws)
        if line is not None:
            before = place_before(line, before, tokens.shape, segments, mask)
        positions, position, segment = locate(tokens.shape, before, segments, mask)
        x = looked_up(self.embedding, tokens) if embedded is None else embedded
        if self.absolute_scale is not None:
            table = sinusoid(positions, self.config.width, self.config.position_base, x.dtype)
            x = x + self.absolute_scale * table
        x = self.dropout(x, dropped)
        context = Context(segments, mask, draws, positions, dropped, line)
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        after, quantized = [], []
        for i, layer in enumerate(self.layers):
            goes_on = state is not None and (line is None or line.first)
            carried = state.of_layer(i) if state is not None and goes_on else Carried(None, None)
            if recompute:
                x, left, result = self._checkpointed(layer, x, context, carried)
            else:
                x, left, result = layer(x, context, carried)
            after.append(left)
            quantized.append(result)
        layers = tuple(left.attention for left in after)
        inputs = tuple(left.inputs for left in after if left.inputs is not None)
        left = ModelState(layers, position, segment, draws, inputs)
        return self.norm(x), left if line is None else closed(line, left), tuple(quantized)

    def decoder(self, tokens: Tensor) -> Decoder | None:
        """What reads tokens (B, 1) faster inside `frozen()`; None where it would not, or not the same numbers."""
        if not self._frozen or tokens.ndim != 2 or tokens.shape[1] != 1 or self.config.backend not in DECODED:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(tokens.device.type):
            return None
        if self._decoder is None:
            config = self.config
            fits = config.backend == "auto" and max(config.key_dim, config.value_dim) <= FUSED
            in_place = self._in_place and fits and usable(tokens.device)
            self._decoder = Decoder(self.embedding, self.absolute_scale, self.layers, self.norm, in_place)
        return self._decoder if self._decoder.useful else None

    def _checkpointed(self, layer: nn.Module, *inputs: Any) -> Any:
        """A block that its backward pass runs again: by the rows of now, even if others have been read since."""
        if torch.compiler.is_compiling() or not self.rows_named:
            return checkpoint(layer, *inputs, use_reentrant=False)
        row, place = int(self.first_row), int(self.first_place)
        return checkpoint(
            layer, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), AtRows(self, row, place))
        )

    @property
    def keeps_every_key(self) -> bool:
        """True when some layer does full attention now (`kind: none`, a warm-up): the state grows with the text."""
        return any(layer.keeps_every_key for layer in self.layers)

    @contextmanager
    def frozen(self, in_place: bool = False) -> Iterator[None]:
        """Promise that no weight changes inside: what depends on weights alone is computed once, not in every call.

        For generation: a call of one token, without gradients, autocast, labels, segments and mask, goes a short way
        through all layers (decoding.py); every call without gradients finds the rows of relative positions. A state
        that is handed in is not changed.
        in_place: promise, too, that no call goes on from any state but that of the call before. On a GPU, `backend:
        auto` then decodes by kernels that write it in place; other states are refused.
        Raises RuntimeError unless the model is in evaluation mode.
        """
        if self.training:
            raise RuntimeError("frozen(): call model.eval() first; dropout must not be kept from call to call")
        biases = [module for module in self.modules() if isinstance(module, XLBias)]
        try:
            with torch.no_grad():
                for bias in biases:
                    bias.freeze(True)
            self._frozen, self._in_place = True, in_place
            yield
        finally:
            self._frozen, self._in_place, self._decoder = False, False, None
            for bias in biases:
                bias.freeze(False)

    @contextmanager
    def split_over(self, line: Line | None) -> Iterator[None]:
        """Forward passes in here read pieces of rows, those of one row on the processes of `line`; None: whole rows."""
        self._line = line
        try:
            yield
        finally:
            self._line = None

    @property
    def quantizers(self) -> list[Quantizer]:
        """Every layer's quantizer, in order."""
        return [cast(VQAttention, layer).quantizer for layer in self.layers]

    def apply_codebook_statistics(self) -> None:
        """Move every codebook by what forward passes in training collected; once per optimizer step."""
        for quantizer in self.quantizers:
            quantizer.apply_codebook_statistics()

    def discard_codebook_statistics(self) -> None:
        """Forget what was collected, for a step that is skipped."""
        for quantizer in self.quantizers:
            quantizer.discard_codebook_statistics()

    def set_step(self, step: int) -> None:
        """Tell the optimizer step, on which the quantizers' schedules and warm-ups, and seeded noise depend."""
        self.noise.fill_(seed_number(self.seed, step, "dropout"))
        for quantizer in self.quantizers:
            quantizer.set_step(step)

    def set_rows(self, first_row: int, first_place: int = 0) -> None:
        """Tell which row of the step's batch the next calls begin with, and with which place in the row.

        With the step, all noise and dropout follow from these: a batch may be cut at will. Call it before each forward
        pass of a step that has several.
        """
        self.rows_named = True
        self.first_row.fill_(first_row)
        self.first_place.fill_(first_place)
        for quantizer in self.quantizers:
            quantizer.set_rows(first_row, first_place)


class TransformerVQ(Backbone):
    """A causal language model whose attention keys are quantized, in linear time  [Lingle 2309.16354].

    Plain nn.Module: a `Backbone` with a head and losses.
    """

    def __init__(self, config: TransformerVQConfig, seed: int = 0) -> None:
        """Raises ConfigError when `config.vocab_size` is not set."""
        generator = torch.Generator().manual_seed(seed)
        super().__init__(config, seed, generator)
        assert config.vocab_size is not None  # refused by the backbone
        if config.tied_embedding:
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.head = linear(config.width, config.vocab_size, generator, bias=True)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        logits: bool = True,
    ) -> Output:
        """Read tokens (B, T) int64 after what `state` holds; None: after nothing.

        labels (B, T): labels[b, t] is the token that follows tokens[b, t], nothing is shifted; -100, or a label at
        padding, does not count.  segments (B, T) int64: nothing is seen across a change of id.  mask (B, T) bool, True
        where a token is real: padding touches nothing, and its logits mean nothing.  logits: False leaves them out of
        the result; the loss is then computed in pieces, and a large vocabulary costs no memory.
        Raises ValueError when there is no token, or when shapes or the state's rows differ from tokens'.
        """
        if logits and labels is segments is mask is None and (decoder := self.decoder(tokens)):
            _same_rows(tokens, state)
            x, after, told = decoder(tokens, state)
            return StepOutput(self.logits(x), after, tokens.new_full((), tokens.numel()), told)
        x, state, quantized = self.features(tokens, state, segments, mask)
        all_logits = self.logits(x) if logits else None
        told_by_quantizers = quantizer_fields(quantized)
        loss = loss_lm = count = None
        if labels is not None:
            _same_shape(tokens, labels=labels)
            labels = labels if mask is None else labels.masked_fill(~mask, IGNORED)
            count = (labels != IGNORED).sum()
            if all_logits is None:
                total = self._nats(x.flatten(0, 1), labels.flatten())
            else:
                rows = all_logits.flatten(0, 1)
                total = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, reduction="sum")
            loss_lm = total / count.clamp_min(1)
            loss = loss_lm + told_by_quantizers["loss_quantizers"]
        return Output(
            logits=all_logits,
            state=state,
            loss=loss,
            loss_lm=loss_lm,
            labels=count,
            tokens=tokens.new_full((), tokens.numel()) if mask is None else mask.sum(),
            **told_by_quantizers,
        )

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab), fp32 or wider; a tied head is also computed in that type, as in the paper."""
        if not self.config.tied_embedding:
            return linear_logits(x, self.head.weight, self.head.bias, self.config.logit_scale)
        with torch.autocast(x.device.type, enabled=False):
            return linear_logits(*self._wide_head(x), self.config.logit_scale)

    def _nats(self, x: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of labels (N,) after features (N, D), without holding all logits."""
        scale = self.config.logit_scale
        if not self.config.tied_embedding:
            return summed_cross_entropy(x, self.head.weight, self.head.bias, scale, labels, IGNORED)
        with torch.autocast(x.device.type, enabled=False):
            return summed_cross_entropy(*self._wide_head(x), scale, labels, IGNORED)

    def _wide_head(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, weight and bias of a tied head, fp32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide), self.embedding.weight.to(wide), self.head_bias.to(wide)


def _same_shape(tokens: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless tokens is (B, T) and each other tensor has its shape."""
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; (batch, length) is expected, length at least 1")
    for name, other in others.items():
        if other is not None and other.shape != tokens.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}; tokens' {tuple(tokens.shape)} is expected")


def _same_rows(tokens: Tensor, state: ModelState | None) -> None:
    """Raise ValueError unless the state has a row for each of tokens."""
    rows = len(tokens) if state is None else len((state.start if isinstance(state, Decoding) else state).position)
    if rows != len(tokens):
        raise ValueError(f"state has {rows} rows; tokens' {len(tokens)} are expected")
