"""Numbers of a model on several sources: of each, and together.

Together: the mean over sources, by their weights, of loss, bits per token, bits per byte and codebook health, what a
text of a source drawn as in training is expected to cost, whatever the sizes of the splits; perplexity is exp(loss).
`tokens` and `bytes` are sums. Numbers of a source are named SOURCE/bits_per_byte and the like. A group of recurrences
has numbers where every source has such targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformer_vq.data import Mixture, TokenFile
from transformer_vq.evaluation.crew import ALONE, Crew, Progress
from transformer_vq.evaluation.language import Context, Reading, read_together
from transformer_vq.evaluation.recurrence import PREFIX
from transformer_vq.models import TransformerVQ

OF_A_SOURCE = ("loss", "bits_per_token", "bits_per_byte", "perplexity", "word_perplexity", "tokens", "bytes")
SUMS = ("tokens", "bytes")
Keep = Callable[[NDArray[np.float64], TokenFile], object]


def evaluate_sources(
    model: TransformerVQ,
    mixture: Mixture,
    split: str,
    context: Context = "full",
    batch_size: int = 16,
    max_tokens: int | None = None,
    *,
    reset_documents: bool = False,
    recurrence: int | None = None,
    progress: Progress | None = None,
    crew: Crew = ALONE,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """`evaluate` on every source's split, of which `max_tokens` are scored each; on one alone, just that.

    crew: the processes that do this together, see `evaluate`.
    keep: with one source alone, is given the nats of all of its targets, and the text that they are of.
    """
    readings = {
        name: Reading(model, file, context, batch_size, max_tokens, reset_documents, recurrence, keep is not None)
        for name, file in mixture.files(split).items()
    }
    found = dict(zip(readings, read_together(model, list(readings.values()), crew, progress), strict=True))
    if mixture.alone is not None:
        reading = readings[""]
        if keep is not None and reading.nats is not None:
            keep(reading.nats, reading.split)
        return found[""]
    shares = mixture.shares
    first, *others = found.values()
    together: dict[str, Any] = {"context": context}
    for key in first:
        if all(isinstance(numbers.get(key), int | float) for numbers in (first, *others)):
            if key.rpartition("/")[2] in SUMS:
                together[key] = sum(numbers[key] for numbers in found.values())
            elif key not in ("context", "word_perplexity"):
                together[key] = math.fsum(shares[name] * numbers[key] for name, numbers in found.items())
    together["perplexity"] = math.exp(together["loss"]) if together["loss"] < 700 else math.inf
    by_source = {
        f"{name}/{key}": value
        for name, numbers in found.items()
        for key, value in numbers.items()
        if key in OF_A_SOURCE or key.startswith(f"{PREFIX}/")
    }
    return {**together, **by_source}
