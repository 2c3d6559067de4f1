"""A runner for tests of studies: writes a run folder as training does, in no time, with numbers known beforehand.

The estimator's name decides how a run ends; `bits_per_byte` on the test split is 2 + the estimator's offset + noise of
the seed, most of which all estimators share, + 100 (lr - 0.01)², so that the best learning rate is known too; on the
valid split it is 0.013.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from transformer_vq.config import RunConfig, save_config


class TrainingDiverged(RuntimeError):
    """Named as training's own."""


OFFSETS = {"ste": 0.0, "rotation": -0.05, "scale": 0.01, "random_rotation": 0.2}


def run(config: RunConfig, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """See the module's text."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls.txt").open("a") as calls:
        calls.write(f"{os.getpid()}\n")
    save_config(config, folder / "config.yaml")
    layers = config.model.layer_quantizers()
    names = [getattr(q, "estimator", q.kind) for q in layers]
    print("a toy run")
    match names[0]:
        case "diverges":
            raise TrainingDiverged("loss is nan at step 7")
        case "eats_memory":
            raise MemoryError("no more")
        case "is_broken":
            raise RuntimeError("a bug\nof two lines")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "dies_once" if not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleeps":
            time.sleep(float(os.environ.get("TOY_SLEEP", "30")))
    rng = np.random.default_rng(config.seed)
    shared, own = rng.normal(0, 0.03), np.random.default_rng([config.seed, *names[0].encode()]).normal(0, 0.01)
    offset = sum(OFFSETS.get(name, 0.0) for name in names) / len(names)
    final = 2 + offset + shared + own + 100 * (config.train.lr - 0.01) ** 2
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(0, config.train.steps + 1, max(1, config.train.steps // 10)):
            value = final + 3 * np.exp(-5 * step / config.train.steps) + rng.normal(0, 0.005)
            tokens = step * config.train.batch_size * config.train.seq_len
            out.write(json.dumps({"step": step, "tokens": tokens, "split": "valid", "bits_per_byte": value}) + "\n")
    health = {}
    for i, name in enumerate(names):
        if name != "none":
            perplexity = 100 * rng.uniform(0.5, 1) * (0.3 if name == "random_rotation" else 1)
            usage = {"usage": perplexity / 100, "perplexity": perplexity, "dead_codes": 128 - perplexity}
            values = {**usage, "norm_ratio": 0.6, "cosine": 0.7, "relative_error": rng.uniform(0.4, 0.6)}
            health |= {f"layer{i}/{key}": value for key, value in values.items()}
    split = {"bits_per_byte": final, "perplexity": 2**final, **health}
    other_best = 100 * ((config.train.lr - 0.013) ** 2 - (config.train.lr - 0.01) ** 2)  # valid prefers another rate
    valid = {**split, "bits_per_byte": final + 0.1 + other_best}
    summary = {"steps": config.train.steps, "valid": valid, "test": split}
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary
