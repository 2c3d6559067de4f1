"""A trained run as a model of Transformers, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_vq.hub.config import TransformerVQHubConfig
from transformer_vq.hub.models import TransformerVQForCausalLM
from transformer_vq.models import TransformerVQ
from transformer_vq.training import load_run

HEAD = {"head.weight": "lm_head.weight", "head.bias": "lm_head.bias", "head_bias": "lm_head.bias"}


def from_run(run: str) -> TransformerVQForCausalLM:
    """The model of `RUN[@best|@last|@STEP]`, in evaluation mode.  Raises ConfigError, CheckpointError."""
    loaded = load_run(run)
    return from_model(loaded.model, seed=loaded.config.seed, step=loaded.step)


def from_model(model: TransformerVQ, seed: int = 0, step: int = 0) -> TransformerVQForCausalLM:
    """The same weights and codebooks, in their dtype, in evaluation mode; `step` optimizer steps lie behind it."""
    settings = model.config
    config = TransformerVQHubConfig(
        model=settings.model_dump(mode="json", exclude={"vocab_size"}), vocab_size=settings.vocab_size or 0, seed=seed
    )
    theirs = TransformerVQForCausalLM(config)
    theirs.to(model.embedding.weight.dtype)  # type: ignore[arg-type]  # their decorator loses the signature
    state = their_state(model.state_dict())
    state["model.steps"] = torch.tensor(step)
    if settings.tied_embedding:
        state["lm_head.weight"] = model.embedding.weight
    theirs.load_state_dict(state)
    theirs.eval()  # type: ignore[no-untyped-call]
    return theirs


def their_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `TransformerVQ` under the names of `TransformerVQForCausalLM`."""
    return {HEAD.get(name) or f"model.backbone.{name}": tensor for name, tensor in state.items()}


def to_model(theirs: TransformerVQForCausalLM) -> TransformerVQ:
    """The way back of `from_model`: the same weights and codebooks, in evaluation mode; bf16 is widened to fp32."""
    settings = theirs.config.settings()
    ours = TransformerVQ(settings, seed=theirs.config.seed)
    if theirs.get_input_embeddings().weight.dtype == torch.float64:
        ours.double()
    bias = "head_bias" if settings.tied_embedding else "head.bias"
    names = {"lm_head.weight": "head.weight", "lm_head.bias": bias}
    state = theirs.state_dict()
    for name in ("model.steps", *(["lm_head.weight"] if settings.tied_embedding else [])):
        del state[name]
    ours.load_state_dict({names.get(name) or name.removeprefix("model.backbone."): x for name, x in state.items()})
    return ours.eval()
