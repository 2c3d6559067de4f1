"""The paper's JAX parameters, in and out  [Lingle 2309.16354].

Names, shapes and meaning are the reference implementation's: kernels multiply from the right, so a kernel is the
transpose of `nn.Linear.weight`; a reference layer is two units ("scanned_attn1", "scanned_attn2"), two layers of ours.
The "gradient" of `c_sum` and `c_count` is old value − EMA target: what an SGD step with learning rate 1 subtracts.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer_vq.config import TransformerVQConfig
from transformer_vq.config.model import PAPER_BLOCK
from transformer_vq.config.quantizer import VQConfig
from transformer_vq.models import ModelState, TransformerVQ
from transformer_vq.models.norm import EPSILON
from transformer_vq.ops.attention import AttentionState
from transformer_vq.quantizers.vq import VectorQuantizer

Arrays = dict[str, NDArray[Any]]

# reference name -> ours; what ends in "kernel" is transposed
OUTER = {"token_embedder/embs": "embedding.weight"}
TIED = {"token_embedder/bias_out": "head_bias"}
UNUSED = "token_embedder/bias_out"  # with an untied head
UNTIED = {
    UNUSED: "reference_bias_out",  # read by nothing; kept so that what comes in goes out again
    "out_proj/kernel": "head.weight",
    "out_proj/bias": "head.bias",
}
ABSOLUTE = {"position_embedder/scale": "absolute_scale"}
FINAL_NORM = {"out_ln/g": "norm.weight", "out_ln/b": "norm.bias"}
UNIT = {
    "input_ln/g": "norm.weight",
    "input_ln/b": "norm.bias",
    "q_proj/kernel": "q_proj.weight",
    "kvg_proj/kernel": "kvg_proj.weight",
    "r_proj/kernel": "position.r_proj.weight",
    "res_proj/kernel": "out_proj.weight",
    "u": "position.u",
    "v": "position.v",
    "quantizer/c_sum": "quantizer.ema_sum",
    "quantizer/c_count": "quantizer.ema_count",
}


def from_reference(params: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> TransformerVQ:
    """A model with the reference's parameters and settings, in the dtype of the arrays, in training mode.

    params: every array under its reference name ("transformer_layers_0/scanned_attn1/u"); config: the reference's
    fields (`n_layer`, `d_model`, …; those that do nothing in the model may be missing).  Gradients are the paper's.
    Raises ValueError naming a parameter that is missing, unknown, or of another shape, and when their dtypes differ.
    """
    return model_of(params, reference_config(config))


def model_of(params: Mapping[str, NDArray[Any]], config: TransformerVQConfig) -> TransformerVQ:
    """The same by our own settings.  Raises ValueError also when the reference has no form of such a model."""
    _check(config)
    model = TransformerVQ(config)
    names = reference_names(model.config)
    if names.keys() != params.keys():
        missing, unknown = sorted(names.keys() - params.keys()), sorted(params.keys() - names.keys())
        raise ValueError(f"parameters missing: {_some(missing)}; unknown with this config: {_some(unknown)}")
    dtypes = {array.dtype.name for array in params.values()}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
        raise ValueError(f"parameters are {', '.join(sorted(dtypes))}: all must be float32, or all float64")
    model.to(torch.from_numpy(np.array(params["token_embedder/embs"])).dtype)
    for name, ours in names.items():
        source, target = _turned(name, torch.from_numpy(np.array(params[name]))), _tensor(model, ours)
        if source.shape != target.shape:
            raise ValueError(f"{name} has shape {params[name].shape}, {tuple(_turned(name, target).shape)} is expected")
        with torch.no_grad():
            target.copy_(source)
    return model


def reference_config(config: Mapping[str, Any]) -> TransformerVQConfig:
    """The reference's settings as ours.  Raises ValueError naming a field that is missing."""
    try:
        return TransformerVQConfig(
            vocab_size=config["n_vocab"],
            block="gau",
            layers=2 * config["n_layer"],
            width=config["d_model"],
            heads=config["n_head"],
            key_dim=config["d_k"],
            value_dim=config["d_v"],
            window=config["mem_len"],
            block_len=config["block_len"],
            position="xl",
            position_base=float(config["pe_lam"]),
            absolute_positions=config["pe_abs"],
            cache=config["agg_cache"],
            gradients="block",
            grad_through_cache=config["grad_thru_cache"],
            tied_embedding=config["e_tie"],
            final_norm=config["e_preln"],
            logit_scale=float(config["e_scale"]),
            dropout_embedding=config["p_dropemb"],
            dropout_sinusoid=config["p_dropsin"],
            dropout_residual=config["p_dropres"],
            dropout_layer=config["p_droplyr"],
            quantizer=VQConfig(codes=config["n_code"], ema=float(config["c_gamma"]), commit=float(config["c_beta"])),
        )
    except KeyError as error:
        raise ValueError(f"the reference's settings lack {error}") from None


def to_reference(model: TransformerVQ, what: Literal["params", "grads"] = "params") -> Arrays:
    """Every parameter, or its gradient, under the reference's name; a parameter that got none has gradient 0.

    Gradients of `c_sum` and `c_count` come from the statistics pending in this process; without any they are 0.
    bf16 comes out as float32, which numpy has.  Raises ValueError when the reference has no form of this model.
    """
    _check(model.config)
    names = reference_names(model.config)
    tensors = {name: _tensor(model, ours) for name, ours in names.items()}
    if what not in ("params", "grads"):
        raise ValueError(f'what = "{what}": must be "params" or "grads"')
    if what == "grads":
        tensors = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in tensors.items()}
    arrays = {name: _array(_turned(name, x)) for name, x in tensors.items()}
    if what == "params":
        return arrays
    for i, quantizer in enumerate(model.quantizers):
        assert isinstance(quantizer, VectorQuantizer)  # by _check
        total, count = quantizer.pending()
        if count.any():
            new_sum, new_count = quantizer.ema_target(total, count)
            arrays[f"{_unit(i)}quantizer/c_sum"] = _array(quantizer.ema_sum - new_sum)
            arrays[f"{_unit(i)}quantizer/c_count"] = _array(quantizer.ema_count - new_count)
    return arrays


def reference_settings(config: TransformerVQConfig) -> dict[str, Any]:
    """Our settings as the reference's fields, the way back of `reference_config`.  Raises ValueError as `to_reference`.

    An estimator, or a schedule, that the reference does not know is not in them: it changes training, not the model.
    """
    _check(config)
    quantizer = config.layer_quantizers()[0]
    return {
        "n_vocab": config.vocab_size,
        "n_layer": config.layers // 2,
        "d_model": config.width,
        "n_head": config.heads,
        "d_k": config.key_dim,
        "d_v": config.value_dim,
        "mem_len": config.window,
        "block_len": config.block_length or PAPER_BLOCK,
        "pe_lam": config.position_base,
        "pe_abs": config.absolute_positions,
        "agg_cache": config.cache,
        "grad_thru_cache": config.grad_through_cache,
        "e_tie": config.tied_embedding,
        "e_preln": config.final_norm,
        "e_scale": config.logit_scale,
        "p_dropemb": config.dropout_embedding,
        "p_dropsin": config.dropout_sinusoid,
        "p_dropres": config.dropout_residual,
        "p_droplyr": config.dropout_layer,
        "n_code": quantizer.size,
        "c_gamma": quantizer.ema,
        "c_beta": quantizer.commit,
    }


def state_to_reference(state: ModelState) -> Arrays:
    """A state whose rows have all read the same number of tokens, under the reference's names.

    "0/1/xlcache/z" is of the second unit of the first layer.  A window slot without a key has code S, and zeros.
    Document ids, which the reference carries and never reads, are 0.
    """
    arrays: Arrays = {}
    for i, layer in enumerate(state.layers):
        assert isinstance(layer, AttentionState)  # every model of the reference has a cache of codes
        unit, alive = f"{i // 2}/{i % 2}", layer.alive[:, None]
        B, M, S = *layer.alive.shape, layer.count.shape[-1]
        arrays[f"{unit}/pos_offset"] = np.array(int(state.position[0]), np.int32)
        arrays[f"{unit}/xlcache/z"] = _array(torch.where(alive, layer.codes, S).int())
        arrays[f"{unit}/xlcache/k_hat"] = _array(torch.where(alive[..., None], layer.k_hat, 0))
        arrays[f"{unit}/xlcache/v"] = _array(torch.where(alive[..., None], layer.v, 0))
        arrays[f"{unit}/xlcache/doc_ids"] = np.zeros((B, M), np.int32)
        arrays[f"{unit}/aggcache/latest_doc_id"] = np.zeros(B, np.int32)
        arrays[f"{unit}/aggcache/lower"] = _array(layer.count)
        arrays[f"{unit}/aggcache/upper_div_lower"] = _array(layer.mean)
    return arrays


def reference_names(config: TransformerVQConfig) -> dict[str, str]:
    """Every reference name of such a model -> the name of our parameter or buffer."""
    names = OUTER | (TIED if config.tied_embedding else UNTIED)
    names |= ABSOLUTE if config.absolute_positions else {}
    names |= FINAL_NORM if config.final_norm else {}
    for i in range(config.layers):
        names |= {_unit(i) + name: f"layers.{i}.{ours}" for name, ours in UNIT.items()}
    return names


def _unit(layer: int) -> str:
    """Prefix of the names of our layer's parameters in the reference."""
    return f"transformer_layers_{layer // 2}/scanned_attn{layer % 2 + 1}/"


def _tensor(model: TransformerVQ, name: str) -> Tensor:
    """Our parameter or buffer; the unused bias is made the first time."""
    unused = UNTIED[UNUSED]
    if name == unused and not hasattr(model, unused):
        model.register_buffer(unused, torch.zeros_like(model.head.bias), persistent=False)
    tensor: Tensor = attrgetter(name)(model)
    return tensor


def _turned(name: str, x: Tensor) -> Tensor:
    """Our orientation to the reference's, and back."""
    return x.T if name.endswith("kernel") else x


def _array(x: Tensor) -> NDArray[Any]:
    """A copy as numpy."""
    x = x.detach().cpu()
    return np.array((x.float() if x.dtype == torch.bfloat16 else x).numpy())


def _check(config: TransformerVQConfig) -> None:
    """Raise ValueError unless the reference can express such a model."""
    wrong = {
        f"block: {config.block}": config.block != "gau",
        f"position: {config.position}": config.position != "xl",
        f"conv: {config.conv}": config.conv > 0,
        f"norm_eps: {config.norm_eps}": config.norm_eps != EPSILON,
        "qk_norm: false": not config.qk_norm,
        "window_keys: exact": config.window_keys == "exact",
        f"kv_heads: {config.kv_heads}": config.key_value_heads != config.heads,
        f"an odd number of layers, {config.layers}": config.layers % 2 == 1,
        "a layer without kind: vq and codebook: ema": any(
            q.kind != "vq" or q.codebook != "ema" for q in config.layer_quantizers()
        ),
    }
    wrong["codes that differ from layer to layer"] = (
        len({q.size for q in config.layer_quantizers() if q.kind == "vq"}) > 1
    )
    found = [name for name, is_so in wrong.items() if is_so]
    if found:
        raise ValueError(f"the reference has no such model: {', '.join(found)}")


def _some(names: list[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
