"""Settings of the language model, the keys of `model:` in a config file."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from transformer_vq.config.base import Settings
from transformer_vq.config.explain import explain
from transformer_vq.config.quantizer import QUANTIZER, QUANTIZERS, NoneConfig, QuantizerConfig, VQConfig

PAPER_BLOCK = 128
"""L of `block_len: auto` with `gradients: block`."""


def layer_range(text: str, layers: int) -> range:
    """The layers that a range names: "3", "0-5" or "all".  Raises ValueError naming the range and what exists."""
    if text == "all":
        return range(layers)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not match or first > last or last >= layers:
        raise ValueError(
            f'"{text}": the model has layers 0-{layers - 1}; write ranges like "0-{layers - 1}", "0" or "all"'
        )
    return range(first, last + 1)


class TransformerVQConfig(Settings):
    """Architecture of a Transformer-VQ language model: the keys of `model:`, and `vocab_size`."""

    vocab_size: int | None = Field(None, ge=1, description="tokens in the vocabulary; null: taken from the tokenizer")
    block: Literal["gau", "transformer"] = Field(
        "gau", description="gau: the paper's gated attention unit | transformer: pre-norm, grouped queries, SwiGLU"
    )
    layers: int = Field(4, ge=1, description="attention modules; the paper's 24 layers of two units are 48 here")
    width: int = Field(256, ge=1, description="model width (D)")
    heads: int = Field(1, ge=1, description="query heads (H)")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads, divides heads; null: as many as heads")
    key_dim: int = Field(64, ge=1, description="key width per head (K)")
    value_dim: int = Field(512, ge=1, description="value width per head (V)")
    mlp_dim: int | None = Field(
        None,
        ge=1,
        description="hidden width of SwiGLU, block: transformer only; null: 8/3 of width, up to a multiple of 8",
    )
    window: int = Field(128, ge=0, description="M: keys at distances 0..M are seen exactly, older ones by their code")
    block_len: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="L: length of a block of the linear-time pass; speed, never the result | auto: by counted cost; "
        "with gradients: block, where gradients depend on it, 128",
    )
    conv: int = Field(
        0,
        ge=0,
        le=64,
        description="taps of a short causal convolution on what queries, keys and values are made of; 0: none, as in "
        "the paper; 4 brings copying and recall much earlier",
    )
    position: Literal["xl", "scalar", "rotary", "none"] = Field(
        "xl", description="xl: Transformer-XL bias | scalar: a learned number per head and distance | rotary | none"
    )
    position_base: float = Field(10000.0, gt=1, description="base of the sinusoid's and the rotation's frequencies")
    rotary_frequencies: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        None, description="position: rotary only; radians per token of each of the key_dim/2 pairs; null: position_base"
    )
    absolute_positions: bool = Field(False, description="add a scaled absolute sinusoid to the embeddings")
    cache: bool = Field(True, description="attend to keys beyond the window through their codes; false: window only")
    window_keys: Literal["codes", "exact"] = Field(
        "codes",
        description="how keys inside the window are seen: by their codes, as in the paper | exact: as they are, for "
        "adopted models; needs gradients: window",
    )
    gradients: Literal["window", "block"] = Field(
        "window",
        description="window: keys get gradient from distances <= M, whatever L | block: the paper's, depends on L",
    )
    grad_through_cache: bool = Field(True, description="values get gradient from queries beyond the window too")
    backend: str = Field("auto", min_length=1, description="attention backend: auto or a name")
    tied_embedding: bool = Field(False, description="the output head is the transposed embedding")
    final_norm: bool = Field(True, description="a norm before the output head (the paper's enwik8 model has none)")
    norm_eps: float = Field(1e-6, gt=0, description="ε of every RMS norm, added to the mean square inside the root")
    qk_norm: bool = Field(
        True,
        description="true: queries and keys at length K^(1/4), the paper's | false: as projected, over K^(1/4), for "
        "adopted models; logits hold 1/sqrt(K) either way",
    )
    qkv_bias: bool = Field(False, description="block: transformer only; biases of queries, keys and values")
    out_bias: bool = Field(False, description="block: transformer only; a bias on what attention gives")
    mlp_bias: bool = Field(False, description="block: transformer only; biases of SwiGLU")
    logit_scale: float = Field(1.0, gt=0, description="multiplies the logits, bias included")
    dropout_embedding: float = Field(0.0, ge=0, lt=1, description="dropout after the embeddings")
    dropout_sinusoid: float = Field(0.0, ge=0, lt=1, description="dropout on the sinusoids (xl), a mask a sequence")
    dropout_residual: float = Field(0.0, ge=0, lt=1, description="dropout on what a block adds to the residual stream")
    dropout_layer: float = Field(0.0, ge=0, lt=1, description="chance that a sequence goes without a block")
    checkpoint_activations: bool = Field(False, description="recompute each block in the backward pass to save memory")
    quantizer: QuantizerConfig = Field(
        VQConfig(), description="the quantizer of every layer that per_layer does not name"
    )
    per_layer: dict[str, dict[str, Any]] | None = Field(
        None, description='overrides of quantizer by layer range, like {"0-1": {estimator: rotation}}'
    )

    @field_validator("per_layer", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        """An unquoted `5:` is an int key in YAML."""
        return {str(k) if type(k) is int else k: v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("per_layer")
    @classmethod
    def _known_ranges(
        cls, value: dict[str, dict[str, Any]] | None, info: ValidationInfo
    ) -> dict[str, dict[str, Any]] | None:
        """Every range exists, none overlaps, and each merged quantizer is valid."""
        layers, default = info.data.get("layers"), info.data.get("quantizer")
        if value is None or layers is None or default is None:  # an error is reported for those already
            return value
        named: dict[int, str] = {}
        for text, override in value.items():
            for layer in layer_range(text, layers):
                if layer in named:
                    raise ValueError(f'"{text}": overlaps "{named[layer]}" at layer {layer}; a layer may be named once')
                named[layer] = text
            try:
                merge(default, override)
            except ValidationError as error:
                raise ValueError(f"{text}.{explain(error, *QUANTIZERS)}") from None
        return value

    @model_validator(mode="after")
    def _heads_and_widths(self) -> TransformerVQConfig:
        if self.heads % self.key_value_heads:
            raise ValueError(f"kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        if self.position == "rotary" and self.key_dim % 2:
            raise ValueError(f"key_dim = {self.key_dim}: must be even with position: rotary, which rotates pairs")
        if (self.position == "xl" or self.absolute_positions) and self.width % 2:
            raise ValueError(f"width = {self.width}: must be even, half of the sinusoid is sines and half cosines")
        return self

    @model_validator(mode="after")
    def _what_belongs_together(self) -> TransformerVQConfig:
        if (given := self.rotary_frequencies) is not None:
            if self.position != "rotary":
                raise ValueError(f"rotary_frequencies: needs position: rotary, not {self.position}")
            if len(given) != self.key_dim // 2:
                raise ValueError(f"rotary_frequencies: has {len(given)} numbers; key_dim/2 = {self.key_dim // 2} it is")
        if self.backend == "flash" and self.position in ("xl", "scalar"):
            raise ValueError(
                f"backend = flash: needs position: rotary or none, not {self.position}: its kernels take no bias"
            )
        if self.window_keys == "exact" and self.gradients == "block":
            raise ValueError("window_keys = exact: needs gradients: window; the paper's rule knows codes alone")
        for name in ("qkv_bias", "out_bias", "mlp_bias"):
            if self.block != "transformer" and getattr(self, name):
                raise ValueError(f"{name} = true: needs block: transformer")
        return self

    @property
    def block_length(self) -> int | None:
        """L; None where it is speed alone and nobody set it."""
        if self.block_len != "auto":
            return self.block_len
        return PAPER_BLOCK if self.gradients == "block" else None

    @property
    def key_value_heads(self) -> int:
        """Key and value heads, `kv_heads` or as many as query heads."""
        return self.kv_heads or self.heads

    def layer_quantizers(self) -> list[Any]:
        """The full quantizer settings of each layer, in order: the default with the layer's overrides merged in."""
        merged = [self.quantizer] * self.layers
        for text, override in (self.per_layer or {}).items():
            for layer in layer_range(text, self.layers):
                merged[layer] = merge(self.quantizer, override)
        return merged

    @property
    def full_attention(self) -> bool:
        """True when some layer keeps every key, so that the state grows with the text; with cache: false none does."""
        return self.cache and any(isinstance(q, NoneConfig) for q in self.layer_quantizers())

    def resolved(self) -> TransformerVQConfig:
        """The same model with every layer's quantizer written out in `per_layer`, and nothing left to merge."""
        full = {str(i): q.model_dump() for i, q in enumerate(self.layer_quantizers())}
        return self.model_copy(update={"per_layer": full})


def merge(default: Any, override: dict[str, Any]) -> Any:
    """A layer's quantizer: `override` over `default`, or over its own kind's defaults when it changes `kind`."""
    same = override.get("kind", default.kind) == default.kind
    return QUANTIZER.validate_python({**(default.model_dump() if same else {}), **override})
