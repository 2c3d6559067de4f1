"""The model card of an exported run: what it was trained on, how, and how well it does."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from transformer_vq import __version__
from transformer_vq.files import read_text
from transformer_vq.training import LoadedRun

HEALTH = {
    "usage": "codes used",
    "perplexity": "perplexity",
    "relative_error": "relative error",
    "norm_ratio": "‖q‖/‖k‖",
}


def model_card(loaded: LoadedRun, run: Path, name: str) -> str:
    """Markdown with the metadata that the hub reads."""
    config, summary = loaded.config, summary_of(run)
    meta = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["transformer-vq"]}
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n# {name}",
        "A language model whose attention keys are vector-quantized: linear time, a state of constant size "
        "([Transformer-VQ](https://arxiv.org/abs/2309.16354)). The code in this folder is all that it needs "
        "beside torch and einops.",
        f'```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nname = "{name}"\n'
        "model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)\n```",
        f"## Training\nData: `{config.data.source}`; its licence is that of its authors and is not recorded here. "
        f"Tokenizer: {loaded.tokenizer.name}. Step {loaded.step} of {config.train.steps}, seed {config.seed}, "
        f"{config.train.batch_size} x {config.train.seq_len} tokens a step, {config.train.precision}.",
        scores(summary),
        health(summary, config.model.layers),
        f"## Settings\n```yaml\n{settings(loaded)}```",
        f"Made by transformer_vq {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}: `transformer-vq export {run.name} {name}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_of(run: Path) -> dict[str, Any]:
    """The run's numbers; empty while it has none."""
    path = run / "summary.json"
    return json.loads(read_text(path)) if path.is_file() else {}


def scores(summary: dict[str, Any]) -> str:
    """Bits per byte by split, of the run's last step."""
    rows = [
        f"| {split} | {summary[split]['bits_per_byte']:.4f} |"
        for split in ("valid", "test")
        if "bits_per_byte" in summary.get(split, {})
    ]
    head = f"## Scores\nAt the end of the run, step {summary.get('steps')}:\n\n| split | bits per byte |\n|---|---|\n"
    return head + "\n".join(rows) if rows else ""


def health(summary: dict[str, Any], layers: int) -> str:
    """Codebooks on the test split, a row a layer."""
    test = summary.get("test", {})
    known = [key for key in HEALTH if any(f"layer{i}/{key}" in test for i in range(layers))]
    if not known:
        return ""
    head = f"## Codebooks\nOn the test split:\n\n| layer | {' | '.join(HEALTH[key] for key in known)} |"
    rows = [f"| {i} | {' | '.join(_number(test.get(f'layer{i}/{key}')) for key in known)} |" for i in range(layers)]
    return "\n".join([head, "|---" * (len(known) + 1) + "|", *rows])


def settings(loaded: LoadedRun) -> str:
    """`model:` of the run's config."""
    return yaml.safe_dump(loaded.config.model_dump(mode="json")["model"], sort_keys=False)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"
