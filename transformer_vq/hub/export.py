"""A run as a folder of the Hugging Face hub: it loads with `trust_remote_code` where this package is not installed.

config.json, generation_config.json, model.safetensors     the model
*.py                                                        its code, generated from our modules (flat.py)
tokenizer.json, tokenizer_config.json                       native, no code of ours
README.md                                                   the model card
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from transformer_vq.config import ConfigError
from transformer_vq.data.tokenizers import ByteTokenizer, IdTokenizer, JsonTokenizer, Tokenizer
from transformer_vq.files import writing
from transformer_vq.hub.card import model_card
from transformer_vq.hub.flat import flat_files, flat_name
from transformer_vq.hub.runs import from_model
from transformer_vq.training import LoadedRun

CLASSES = {
    "AutoConfig": "transformer_vq.hub.config.TransformerVQHubConfig",
    "AutoModel": "transformer_vq.hub.models.TransformerVQModel",
    "AutoModelForCausalLM": "transformer_vq.hub.models.TransformerVQForCausalLM",
}


def export(loaded: LoadedRun, run: Path, target: Path) -> list[str]:
    """Write `target`, whole or not at all; returns the names of its files.

    Raises ConfigError when it is there already, and for a run whose code or tokenizer would not come along.
    """
    if target.exists():
        raise ConfigError(f"{target}: is there already; name another")
    refuse_foreign_code(loaded)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with writing(target):
        place = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=".writing-"))
        try:
            folder = place / target.name
            write_model(loaded, folder)
            write_tokenizer(loaded.tokenizer, folder)
            (folder / "README.md").write_text(model_card(loaded, run, target.name), encoding="utf-8")
            os.replace(folder, target)
        finally:
            shutil.rmtree(place)
    return sorted(path.name for path in target.iterdir())


def refuse_foreign_code(loaded: LoadedRun) -> None:
    """Raise ConfigError for names that stand for code of the user's, and for a tokenizer that needs code of ours."""
    if not isinstance(loaded.tokenizer, ByteTokenizer | IdTokenizer | JsonTokenizer):
        raise ConfigError(
            f"data.tokenizer = {loaded.config.data.tokenizer}: cannot be written as a native tokenizer.json, which an "
            "exported folder needs"
        )
    model = loaded.config.model
    named = {"model.backend": model.backend}
    for i, quantizer in enumerate(model.layer_quantizers()):
        named[f"layer {i}: kind"] = quantizer.kind
        named[f"layer {i}: estimator"] = getattr(quantizer, "estimator", "")
    for key, value in named.items():
        if ":" in value:
            raise ConfigError(f"{key} = {value}: is code of your own, which an exported folder does not take along")


def write_model(loaded: LoadedRun, folder: Path) -> None:
    """Weights, settings and code."""
    model = from_model(loaded.model, seed=loaded.config.seed, step=loaded.step)
    ids = special_ids(loaded.tokenizer)
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.config.auto_map = {
        auto: f"{flat_name(path.rpartition('.')[0])}.{path.rpartition('.')[2]}" for auto, path in CLASSES.items()
    }
    resolved = loaded.model.config.resolved()  # every layer's quantizer is written out: plain.py merges nothing
    model.config.model = resolved.model_dump(mode="json", exclude={"vocab_size"})
    model.config.run = remembered(loaded)
    ends = ids["eos_token_id"] if has_end(loaded.tokenizer) else None
    model.generation_config = GenerationConfig(
        bos_token_id=ids["bos_token_id"], pad_token_id=ids["pad_token_id"], eos_token_id=ends
    )
    model.save_pretrained(folder)
    for name, source in flat_files().items():
        (folder / name).write_text(source, encoding="utf-8")


def remembered(loaded: LoadedRun) -> dict[str, Any]:
    """For `import`: the run's settings beside the model's, none of which name a place on this machine but the text's;
    and what tells its tokenizer, whose file Transformers writes with an added token and another post-processor.
    """
    tree = loaded.config.model_dump(mode="json", exclude={"run_dir": True, "model": True, "data": {"cache"}})
    own = JsonTokenizer(loaded.tokenizer.to_json())
    post_processor = json.loads(own.to_json())["post_processor"]
    return {"config": tree, "tokenizer": {"sha256": own.sha256, "post_processor": post_processor}}


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Padding, begin and end: all inside the vocabulary, the end-of-text token where there is one, else id 0."""
    end = end_token(tokenizer)
    number = 0 if end is None else end[1]
    return dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), number)


def has_end(tokenizer: Tokenizer) -> bool:
    """The tokenizer has a token of its own for the end of a text."""
    return end_token(tokenizer) is not None


def end_token(tokenizer: Tokenizer) -> tuple[str, int] | None:
    """The first special token that is named as an end, and its id."""
    for token in json.loads(tokenizer.to_json()).get("added_tokens", []):
        if token.get("special") and any(word in token["content"].lower() for word in ("end", "eos", "</s>")):
            return str(token["content"]), int(token["id"])
    return None


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """`tokenizer.json` and its settings, for a class that every installation of Transformers has.

    Programs want to know a token for padding: where the tokenizer has none of its own, the one of id 0 is named, of
    bytes the zero byte, whose symbol is written Ā; that letter itself is then read as it.
    """
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    end = end_token(tokenizer)
    name = end[0] if end else inner.id_to_token(0)
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=name,
        bos_token=name,
        eos_token=name,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    ).save_pretrained(folder)
