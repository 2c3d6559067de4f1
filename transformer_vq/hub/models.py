"""Our language model in the classes of Transformers: a backbone, and the backbone with a head.

What a `TransformerVQ` computes is computed here by the same modules; only names, arguments and outputs are theirs.
Labels too: `labels[b, t]` is the token at t itself, and what is predicted from t is `labels[b, t+1]`.

Axes:   B batch  T length  D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from transformer_vq.hub.cache import TransformerVQCache
from transformer_vq.hub.codebooks import follow
from transformer_vq.hub.config import TransformerVQHubConfig
from transformer_vq.hub.inputs import check_state, documents, real_tokens
from transformer_vq.models import TransformerVQ
from transformer_vq.models.language_model import Backbone
from transformer_vq.quantizers import Quantized
from transformer_vq.quantizers.processes import is_distributed

IGNORED = -100
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Names that activation checkpointing and compilation put between a block and its parts."""


class AddLoss(torch.autograd.Function):
    """x as it is; in the backward pass `loss` gets gradient 1, as if it were added to whatever is minimised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """x (…), loss () -> x."""
        ctx.loss = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the loss."""
        return grads[0], torch.ones_like(ctx.loss)


class TransformerVQPreTrainedModel(PreTrainedModel):
    """What both models share: how weights are named, drawn and moved."""

    config_class = TransformerVQHubConfig
    config: TransformerVQHubConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["GAU", "TransformerBlock"]  # noqa: RUF012  # annotated in their base class  # a class attribute of theirs
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _drawn(self) -> None:
        """The constructor has drawn all weights, unless it ran on the meta device: none needs to be drawn again."""
        if not any(p.is_meta for p in self.parameters()):
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # a mark of theirs

    def _init_weights(self, module: nn.Module) -> None:
        """What our own model has in this module's place: same settings, same seed, codebooks included."""
        if not self._fresh:
            with torch.device("cpu"):
                self._fresh = (TransformerVQ(self.config.settings(), seed=self.config.seed),)
        name = next(name for name, inner in self.named_modules() if inner is module)
        place = our_name(name)
        if place is None:
            return
        drawn = self._fresh[0].get_submodule(place)
        for kind in ("named_parameters", "named_buffers"):
            theirs = dict(getattr(drawn, kind)(recurse=False))
            for key, tensor in getattr(module, kind)(recurse=False):
                if key in theirs and not getattr(tensor, "_is_hf_initialized", False):
                    with torch.no_grad():
                        tensor.copy_(theirs[key])

    _fresh: tuple[TransformerVQ, ...] = ()
    """While weights are drawn, where they come from; a tuple, because a module would become a part of this one."""

    def initialize_weights(self) -> None:
        """Draw the weights that are still to be drawn."""
        try:
            super().initialize_weights()  # type: ignore[no-untyped-call]
        finally:
            self._fresh = ()


def our_name(name: str) -> str | None:
    """Where a module of one of these models stands in a `TransformerVQ`; None: nowhere."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("model.")
    if name == "lm_head":
        return "head"
    first, _, rest = name.partition(".")
    return rest if first == "backbone" else None


class TransformerVQModel(TransformerVQPreTrainedModel):
    """Tokens in, the last hidden state out. Owns the codebooks and what moves them.

    In training the quantizers' loss is added to whatever is minimised, unless the caller takes it from `last_loss` and
    adds it itself (`add_loss=False`), as the model with a head does for labels. Rows are counted from one optimizer
    step to the next, so that noise and dropout follow from (seed, step, row) however a step's batch is cut.
    """

    micro_batches: int = 1
    """In how many forward passes a step's batch is read by a trainer that computes the loss itself and accumulates: the
    quantizers' loss, of which such a trainer does not know, then has this share in each. A scaled loss (fp16) does not
    scale it."""

    steps: Tensor
    """() int64: optimizer steps taken, which the quantizers' schedules and noise follow."""

    def __init__(self, config: TransformerVQHubConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config.settings(), seed=config.seed)
        self.gradient_checkpointing = False
        self.last_loss: Tensor | None = None
        """The quantizers' loss of the last forward pass: their terms, weighted, a mean over its real tokens."""
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = None
        self._rows = 0
        self._drawn()
        self.post_init()  # type: ignore[no-untyped-call]
        follow(self)

    @property
    def embeddings(self) -> nn.Embedding:
        """Of tokens."""
        return self.backbone.embedding

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.backbone.layers

    @property
    def norm(self) -> nn.Module:
        """Before the head."""
        return self.backbone.norm

    def get_input_embeddings(self) -> nn.Embedding:
        """Of tokens."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """In their place."""
        assert isinstance(value, nn.Embedding)
        self.backbone.embedding = value

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            if not getattr(self.steps, "_is_hf_initialized", False):
                self.steps.zero_()
            return
        super()._init_weights(module)

    def after_optimizer_step(self) -> None:
        """Move the codebooks by what was collected since the last step."""
        self._wake()
        self._rows = 0
        self.backbone.apply_codebook_statistics()
        self.steps += 1
        self._steps = int(self._steps or 0) + 1
        self.backbone.set_step(self._steps)

    def _wake(self) -> None:
        """What the quantizers keep in Python follows tensors that were loaded behind their back."""
        if self._steps is None:
            self._steps = int(self.steps)
            for quantizer in self.backbone.quantizers:
                quantizer.wake()
            self.backbone.set_step(self._steps)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TransformerVQCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        add_loss: bool = True,
        **ignored: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) int64, or inputs_embeds (B, T, D) -> last_hidden_state (B, T, D) and the cache.

        attention_mask (B, T) or (B, past + T), 1 = real: padding anywhere enters nothing; places follow from the real
        tokens.  Documents packed into rows are kept apart: by cu_seqlens or cu_seq_lens_q (N+1,), their borders in one
        row, by seq_idx (B, T), the document of each token, or, with neither mask nor cache, wherever position_ids
        (B or 1, T) do not go up by one.  Raises ValueError for inputs or a cache that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        B, T = given.shape[:2]
        self._wake()
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is not None and not isinstance(cache, TransformerVQCache):
            raise ValueError(f"cache is a {type(cache).__name__}; a TransformerVQCache is needed, or None")
        state = None if cache is None else cache.state
        if state is not None:
            check_state(state, self.backbone, B)
        borders = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        places = position_ids if attention_mask is None and cache is None else None  # as Transformers' own masks do
        always = self.backbone.config.checkpoint_activations
        self.backbone.checkpoint_activations = self.gradient_checkpointing or always
        tokens = torch.zeros(B, T, dtype=torch.int64, device=given.device) if input_ids is None else input_ids
        if self.training:
            self.backbone.set_rows(first_row() + self._rows)
            self._rows += B if torch.is_grad_enabled() else 0
        x, after, quantized = self.backbone.features(
            tokens,
            state,
            segments=documents(B, T, given.device, borders, seq_idx, places),
            mask=real_tokens(attention_mask, B, T, 0 if cache is None else cache.seen),
            embedded=inputs_embeds,
        )
        self.last_loss = quantizer_loss(quantized)
        if self.training and add_loss and torch.is_grad_enabled():
            x = AddLoss.apply(x, self.last_loss / self.micro_batches)  # type: ignore[no-untyped-call]
        if use_cache:
            cache = TransformerVQCache() if cache is None else cache
            cache.advance(after, T)
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache if use_cache else None)


class TransformerVQForCausalLM(TransformerVQPreTrainedModel, GenerationMixin):
    """The language model: what `TransformerVQ` computes, with Transformers' arguments and outputs."""

    _tied_weights_keys = {"lm_head.weight": "model.backbone.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TransformerVQHubConfig) -> None:
        super().__init__(config)
        self.model = TransformerVQModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        if not self.lm_head.weight.is_meta:
            self._init_weights(self.lm_head)
            self._fresh = ()
            if config.tie_word_embeddings:
                nn.init.zeros_(self.lm_head.bias)
        self._drawn()
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head and self.config.tie_word_embeddings:
            if not getattr(module.bias, "_is_hf_initialized", False):
                nn.init.zeros_(module.bias)
            return  # the weight is the embedding's
        super()._init_weights(module)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        head: nn.Linear = self.lm_head
        return head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """In its place."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TransformerVQCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As the base model, and logits (B, T or logits_to_keep, vocab), fp32 or wider.

        labels (B, T): tokens, -100 where none counts; shifted inside. The loss is the mean cross-entropy, with
        `num_items_in_batch` its sum over that many, plus in training the quantizers' loss with the same weight.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            add_loss=labels is None,
            **others,
        )
        x = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(x[:, kept] if labels is None else x)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(f"labels has shape {tuple(labels.shape)}; {tuple(logits.shape[:2])} is expected")
            following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            counted = following != IGNORED
            total = F.cross_entropy(logits.flatten(0, 1), following.flatten().to(logits.device), reduction="sum")
            items = counted.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            loss = total / items
            if self.training and self.model.last_loss is not None:
                share = 1.0 if num_items_in_batch is None else counted.sum() / num_items_in_batch
                loss = loss + share * self.model.last_loss.to(loss.device)
            logits = logits[:, kept]
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache)

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab), as `TransformerVQ.logits`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.config.tie_word_embeddings:
            with torch.autocast(x.device.type, enabled=False):
                logits = F.linear(x.to(wide), self.lm_head.weight.to(wide), self.lm_head.bias.to(wide))
        else:
            logits = self.lm_head(x).to(wide)
        scaled: Tensor = logits * self.model.backbone.config.logit_scale
        return scaled


def first_row() -> int:
    """Of this process, among the rows of a step on all; no process reads so many."""
    return distributed.get_rank() * 2**32 if is_distributed() else 0


def quantizer_loss(quantized: tuple[Quantized, ...]) -> Tensor:
    """The layers' losses, weighted and summed."""
    return torch.stack([q.loss for q in quantized]).sum()
