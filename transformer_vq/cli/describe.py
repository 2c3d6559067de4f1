"""`transformer-vq describe CONFIG`: layer by layer what a model uses and costs, without building it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformer_vq.cli.arguments import Config, Json, Overrides
from transformer_vq.cli.console import console, print_json, print_lines, table

if TYPE_CHECKING:
    from transformer_vq.config import RunConfig, TransformerVQConfig

Layer = Mapping[str, Any]

BATCHES = (1, 8, 64)
"""Texts that are generated side by side."""
SHOWN = ("codes", "levels", "bits", "estimator", "lookup", "init", "codebook", "commit", "start_step")


def describe(config: Config, overrides: Overrides = None, json: Json = False) -> None:
    """Show layer by layer what a model uses and costs, without building it."""
    from transformer_vq.config import RunConfig, load_config

    found = facts(load_config(config, overrides or [], RunConfig))
    if json:
        print_json(found)
        return
    out = console()
    out.print(layers_table(found["layers"]))
    out.print()
    print_lines(out, summary(found))


def facts(settings: RunConfig) -> dict[str, Any]:
    """What `models.describe` finds at the training length, the backend and why, and the model's settings."""
    import torch

    from transformer_vq.models.describe import attention_backend
    from transformer_vq.models.describe import describe as describe_model
    from transformer_vq.models.names import check_names

    model = settings.model
    check_names(model)
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": vocabulary(settings.data.tokenizer)})
    found = describe_model(model, settings.train.seq_len)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = settings.train
    name, reason = attention_backend(model, device, train.seq_len, train.precision, train.context_parallel)
    found["backend"] = {"name": name, "reason": reason, "device": device}
    fresh = settings.data is None or settings.data.order != "streams"
    tokens = train.seq_len if fresh and train.context_parallel == 1 else None
    length, why = block_length(model, device, tokens, name)
    found["block_len"] = {"length": length, "reason": why}
    found["model"] = model.model_dump(mode="json", exclude={"quantizer", "per_layer"})
    found["memory"] = memory(settings.model_copy(update={"model": model}), device)
    return found


def block_length(model: TransformerVQConfig, device: str, tokens: int | None, backend: str) -> tuple[int, str]:
    """L of block-wise attention in training, and why; where codebooks differ in size, for the largest.

    tokens: of a call before which nothing was; None: a state is carried.
    """
    from transformer_vq.ops.attention.block_length import NATIVE, chosen

    if backend == "native" and model.gradients == "window":
        return NATIVE, "speed alone: the same for every model in backend native"
    if model.block_length is not None:
        by_rule = model.block_len == "auto"
        return model.block_length, "gradients depend on it: the paper's rule" if by_rule else "as set"
    codes = max(getattr(quantizer, "size", 0) for quantizer in model.layer_quantizers()) if model.cache else 0
    groups = model.heads // model.key_value_heads
    two_sided = model.position == "rotary" or model.window_keys == "exact"
    return chosen(device, codes, model.window, groups, model.key_dim, model.value_dim, two_sided, tokens)


def memory(settings: RunConfig, device: str) -> dict[str, Any]:
    """Bytes in training, as the config says, and of generating texts; `error` where they cannot be told."""
    from transformer_vq.evaluation.generation import PREFILL
    from transformer_vq.models.footprint import decoding
    from transformer_vq.training.memory import available, training_memory

    train, texts = settings.train, []
    try:
        step = training_memory(settings, device)
        for dtype in ("fp64",) if train.precision == "fp64" else ("fp32", "bf16"):
            for batch in BATCHES:
                text = decoding(settings.model, batch, train.seq_len, PREFILL, dtype=dtype, device=device)
                texts.append({"batch": batch, "length": train.seq_len, "dtype": dtype, **text.as_dict()})
    except Exception as error:  # somebody's own module may not run without numbers: describing goes on
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    shape = {"batch": train.micro_batch or train.batch_size, "length": train.seq_len, "precision": train.precision}
    return {
        "training": {**shape, **step.as_dict()},
        "decoding": texts[0],
        "decoding_by": texts,
        "available": available(device),
        "device": device,
    }


def vocabulary(tokenizer: str) -> int:
    """Number of tokens that `data.tokenizer` will have; of a BPE the most.  Raises ConfigError."""
    from transformer_vq.data.tokenizers import make_tokenizer, tokenizer_identity

    tokenizer_identity(tokenizer)
    return (
        int(tokenizer.removeprefix("bpe:"))
        if tokenizer.startswith("bpe:")
        else make_tokenizer(tokenizer, ()).vocab_size
    )


def layers_table(layers: Sequence[Layer]) -> Any:
    """One row a run of equal layers; only columns that some layer has."""
    columns = [name for name in SHOWN if any(_cell(layer, name) != "-" for layer in layers)]
    out = table("layers", "quantizer", *columns, "parameters", "state", "FLOPs/token")
    for first, last, layer in runs_of_equals(layers):
        number = str(first) if first == last else f"{first}-{last}"
        state = f"{layer['state_numbers']:,}{' and growing' if layer['state_grows'] else ''}"
        cells = [_cell(layer, name) for name in columns]
        out.add_row(number, layer["kind"], *cells, f"{layer['parameters']:,}", state, f"{layer['flops_per_token']:,}")
    return out


def runs_of_equals(layers: Sequence[Layer]) -> list[tuple[int, int, Layer]]:
    """(first, last, layer) for each run of neighbours that differ in nothing but their number."""
    runs: list[tuple[int, int, Layer]] = []
    for layer in layers:
        if runs and {**runs[-1][2], "layer": layer["layer"]} == layer:
            runs[-1] = (runs[-1][0], layer["layer"], runs[-1][2])
        else:
            runs.append((layer["layer"], layer["layer"], layer))
    return runs


def summary(found: Mapping[str, Any]) -> dict[str, str]:
    """The lines below the table: heading and text."""
    model, backend = found["model"], found["backend"]
    cache = "codes beyond it" if model["cache"] else "nothing beyond it"
    state = f"{found['state_numbers']:,} numbers, {found['state_bytes'] / 2**20:.2f} MiB per stream"
    if found["state_grows"]:
        state += f" after {found['length']:,} tokens; it grows with the text, by the layers that keep every key"
    else:
        state += ", whatever the length of the text"
    return {
        "model": f"{model['block']}, {model['layers']} layers, width {model['width']}, {_heads(model)}",
        "attention": f"position {model['position']}, window {model['window']}, {cache}",
        "parameters": f"{found['parameters']:,} ({_embeddings(found)})",
        "state": state,
        "FLOPs": f"{found['flops_per_token']:,} per token forward; about three times that in training",
        "backend": f"{backend['name']} on {backend['device']}: {backend['reason']}",
        "block length": f"{found['block_len']['length']}: {found['block_len']['reason']}",
        **memory_lines(found["memory"]),
    }


def memory_lines(found: Mapping[str, Any]) -> dict[str, str]:
    """What a step and a generated text take, in words."""
    from transformer_vq.training.memory import gib

    if "error" in found:
        return {"memory": f"cannot be told without running it: {found['error']}"}
    step, text = found["training"], found["decoding"]
    names = ("parameters", "optimizer", "state", "gradients", "activations", "working")
    parts = ", ".join(f"{name} {gib(step[name])}" for name in names if step[name])
    return {
        "memory": f"about {gib(step['total'])} at most in a step of {step['batch']} × {step['length']} tokens in "
        f"{step['precision']} ({step['peak']}: {parts}), beside Python and PyTorch; "
        f"{gib(found['available'])} {'on the GPU' if found['device'] == 'cuda' else 'free here'}",
        "generating": f"about {gib(text['total'])} for one text in {text['dtype']}: parameters "
        f"{gib(text['parameters'])}, state {gib(text['state'])}, a token {gib(text['token'])}, reading a prompt "
        f"{gib(text['prompt'])}",
        **texts_side_by_side(found["decoding_by"]),
    }


def texts_side_by_side(texts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A line for each type of weights: what so many texts take."""
    from transformer_vq.training.memory import gib

    lines: dict[str, list[str]] = {}
    for text in texts:
        said = lines.setdefault(f"  in {text['dtype']}", [])
        said.append(f"{gib(text['total'])} for {text['batch']}{'' if said else ' at a time'}")
    return {name: ", ".join(said) for name, said in lines.items()}


def _heads(model: Mapping[str, Any]) -> str:
    heads, kv_heads = model["heads"], model["kv_heads"] or model["heads"]
    of_keys = "" if heads == kv_heads else f" ({kv_heads} of keys and values)"
    return f"{heads} head{'s' if heads > 1 else ''}{of_keys}, keys {model['key_dim']}, values {model['value_dim']}"


def _embeddings(found: Mapping[str, Any]) -> str:
    head = f"{found['head_parameters']:,} in the head" if found["head_parameters"] else "head tied to them"
    return f"{found['embedding_parameters']:,} in the embeddings, {head}"


def _cell(layer: Layer, name: str) -> str:
    value = layer.get(name)
    if name == "codebook" and value == "ema":
        return f"ema {layer['ema']:g}"
    if name == "start_step" and value == 0:
        return "-"
    if isinstance(value, list):
        return "×".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
