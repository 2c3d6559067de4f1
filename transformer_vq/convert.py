"""The paper's JAX parameters, in and out  [Lingle 2309.16354].

Names, shapes and meaning are the reference implementation's: kernels multiply from the right, so a kernel is the
transpose of `nn.Linear.weight`; a reference layer is two units ("scanned_attn1", "scanned_attn2"), two layers of ours.
The "gradient" of `c_sum` and `c_count` is old value − EMA target: what an SGD step with learning rate 1 subtracts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer_vq.config import TransformerVQConfig
from transformer_vq.models import ModelState, TransformerVQ
from transformer_vq.ops.attention import AttentionState

Arrays = dict[str, NDArray[Any]]

# names of one unit: reference -> ours
KERNELS = {"q_proj": "q_proj", "kvg_proj": "kvg_proj", "r_proj": "position.r_proj", "res_proj": "out_proj"}
VECTORS = {"input_ln/g": "norm.weight", "input_ln/b": "norm.bias", "u": "position.u", "v": "position.v"}
STATISTICS = {"quantizer/c_sum": "quantizer.ema_sum", "quantizer/c_count": "quantizer.ema_count"}
UNUSED_BIAS = "reference_bias_out"


def from_reference(params: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> TransformerVQ:
    """A model with the reference's parameters and settings, in the dtype of the arrays, in training mode.

    params: every array under its reference name ("transformer_layers_0/scanned_attn1/u"); config: the reference's
    fields (`n_layer`, `d_model`, …; those that do nothing in the model may be missing).  Gradients are the paper's.
    Raises ValueError naming a parameter that is missing, unknown, or of another shape.
    """
    model = TransformerVQ(reference_config(config))
    if not model.config.tied_embedding:  # kept so that what comes in goes out again; the model does not read it
        model.register_buffer(UNUSED_BIAS, torch.zeros(model.config.vocab_size or 0), persistent=False)
    model.to(torch.from_numpy(params["token_embedder/embs"]).dtype)
    places = _places(model)
    if places.keys() != params.keys():
        missing, unknown = sorted(places.keys() - params.keys()), sorted(params.keys() - places.keys())
        raise ValueError(f"parameters missing: {missing}; unknown with this config: {unknown}")
    with torch.no_grad():
        for name, (target, transposed) in places.items():
            source = torch.from_numpy(np.array(params[name]))
            source = source.T if transposed else source
            if source.shape != target.shape:
                raise ValueError(f"{name} has shape {params[name].shape}, {tuple(target.shape)} is expected")
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
            quantizer={
                "kind": "vq",
                "codes": config["n_code"],
                "ema": float(config["c_gamma"]),
                "commit": float(config["c_beta"]),
            },
        )
    except KeyError as error:
        raise ValueError(f"the reference's settings lack {error}") from None


def to_reference(model: TransformerVQ, what: Literal["params", "grads"] = "params") -> Arrays:
    """Every parameter, or its gradient, under the reference's name; a parameter that got none has gradient 0.

    Gradients of `c_sum` and `c_count` come from the statistics pending in this process; without any they are 0.
    bf16 comes out as float32, which numpy has.  Raises ValueError when the reference has no form of this model.
    """
    if what == "params":
        return {name: _array(t.T if transposed else t) for name, (t, transposed) in _places(model).items()}
    arrays: Arrays = {}
    for name, (parameter, transposed) in _places(model).items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        arrays[name] = _array(gradient.T if transposed else gradient)
    for i, layer in enumerate(model.layers):
        total, count = layer.quantizer.pending()
        if count.any():
            targets = layer.quantizer.ema_target(total, count)
            for (name, ours), target in zip(STATISTICS.items(), targets, strict=True):
                arrays[_unit(i) + name] = _array(layer.get_buffer(ours) - target)
    return arrays


def state_to_reference(state: ModelState) -> Arrays:
    """A state whose rows have all read the same number of tokens, under the reference's names.

    "0/1/xlcache/z" is of the second unit of the first layer.  A window slot without a key has code S, and zeros.
    Document ids, which the reference carries and never reads, are 0.
    """
    arrays: Arrays = {}
    for i, layer in enumerate(state.layers):
        assert isinstance(layer, AttentionState)
        unit, alive = f"{i // 2}/{i % 2}", layer.alive[:, None]
        B, M, S = *layer.alive.shape, layer.count.shape[-1]
        arrays[f"{unit}/pos_offset"] = np.int32(state.position[0])
        arrays[f"{unit}/xlcache/z"] = _array(torch.where(alive, layer.codes, S).int())
        arrays[f"{unit}/xlcache/k_hat"] = _array(torch.where(alive[..., None], layer.k_hat, 0))
        arrays[f"{unit}/xlcache/v"] = _array(torch.where(alive[..., None], layer.v, 0))
        arrays[f"{unit}/xlcache/doc_ids"] = np.zeros((B, M), np.int32)
        arrays[f"{unit}/aggcache/latest_doc_id"] = np.zeros(B, np.int32)
        arrays[f"{unit}/aggcache/lower"] = _array(layer.count)
        arrays[f"{unit}/aggcache/upper_div_lower"] = _array(layer.mean)
    return arrays


def _unit(layer: int) -> str:
    """Prefix of the names of our layer's parameters in the reference."""
    return f"transformer_layers_{layer // 2}/scanned_attn{layer % 2 + 1}/"


def _array(x: Tensor) -> NDArray[Any]:
    """A copy as numpy."""
    x = x.detach().cpu()
    return np.array((x.float() if x.dtype == torch.bfloat16 else x).numpy())


def _places(model: TransformerVQ) -> dict[str, tuple[Tensor, bool]]:
    """Reference name -> (our tensor, whether it is the transpose).  Raises ValueError as `to_reference` does."""
    _check(model.config)
    places: dict[str, tuple[Tensor, bool]] = {"token_embedder/embs": (model.embedding.weight, False)}
    if model.config.tied_embedding:
        places["token_embedder/bias_out"] = (model.head_bias, False)
    else:
        unused = getattr(model, UNUSED_BIAS, torch.zeros(model.config.vocab_size or 0))
        places["token_embedder/bias_out"] = (unused, False)
        places["out_proj/kernel"] = (model.head.weight, True)
        places["out_proj/bias"] = (model.head.bias, False)
    if model.absolute_scale is not None:
        places["position_embedder/scale"] = (model.absolute_scale, False)
    if model.config.final_norm:
        places["out_ln/g"], places["out_ln/b"] = (model.norm.weight, False), (model.norm.bias, False)
    for i, layer in enumerate(model.layers):
        for name, ours in KERNELS.items():
            places[f"{_unit(i)}{name}/kernel"] = (layer.get_submodule(ours).weight, True)
        for name, ours in VECTORS.items():
            places[_unit(i) + name] = (layer.get_parameter(ours), False)
        for name, ours in STATISTICS.items():
            places[_unit(i) + name] = (layer.get_buffer(ours), False)
    return places


def _check(config: TransformerVQConfig) -> None:
    """Raise ValueError unless the reference can express such a model."""
    wrong = {
        f"block: {config.block}": config.block != "gau",
        f"position: {config.position}": config.position != "xl",
        f"kv_heads: {config.kv_heads}": config.key_value_heads != config.heads,
        f"an odd number of layers, {config.layers}": config.layers % 2 == 1,
        "a layer without kind: vq and codebook: ema": any(
            q.kind != "vq" or q.codebook != "ema" for q in config.layer_quantizers()
        ),
    }
    found = [name for name, is_so in wrong.items() if is_so]
    if found:
        raise ValueError(f"the reference has no such model: {', '.join(found)}")
