"""Our settings as Transformers keeps them: `config.json` with the keys of `model:` under `model`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from transformer_vq.config import TransformerVQConfig, validate


class TransformerVQHubConfig(PreTrainedConfig):
    """Transformers' names for sizes, and the settings themselves.

    model: the keys of `model:` without `vocab_size`, which resizing embeddings changes.  seed: fresh weights and the
    quantizers' noise follow from it.  run: what an exported run was trained with, for the way back (importing.py).
    Raises ConfigError, one line, for settings that are none.
    """

    model_type = "transformer_vq"
    has_no_defaults_at_init = True  # all keys are written, those at their defaults too

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        vocab_size: int = 256,
        seed: int = 0,
        use_cache: bool = True,
        max_position_embeddings: int = 1 << 20,
        run: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """max_position_embeddings: what programs ask that cut texts; the model itself reads texts of any length."""
        settings = validate({**(model or {}), "vocab_size": vocab_size}, TransformerVQConfig)
        self.model = settings.model_dump(mode="json", exclude={"vocab_size"})
        self.vocab_size = vocab_size
        self.seed = seed
        self.use_cache = use_cache
        self.run = run
        self.logit_scale = settings.logit_scale  # for trainers that compute logits themselves
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = settings.width
        self.num_hidden_layers = settings.layers
        self.num_attention_heads = settings.heads
        self.num_key_value_heads = settings.key_value_heads
        names = ("logit_scale", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        others = {key: value for key, value in others.items() if key not in names}  # they follow from `model`
        others["tie_word_embeddings"] = settings.tied_embedding
        super().__init__(**others)

    def settings(self) -> TransformerVQConfig:
        """What our own model takes."""
        return validate({**self.model, "vocab_size": self.vocab_size}, TransformerVQConfig)
