"""Numbers of several sources: sums of counts, means by weight, and each source's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from models_for_evaluation import tiny_model, tiny_split

from transformer_vq.evaluation import evaluate, evaluate_sources


def test_recurrences_of_several_sources():
    """Counts add up, bits are means by weight, and what one source alone has is that source's."""
    files = {"a": tiny_split(60), "b": tiny_split(90).head(20)}
    mixture = SimpleNamespace(files=lambda split: files, alone=None, shares={"a": 0.25, "b": 0.75})
    model = tiny_model()
    a, b = (evaluate(model, file, recurrence=2) for file in files.values())
    found = evaluate_sources(model, mixture, "valid", recurrence=2)  # type: ignore[arg-type]
    key = "recurrence/all/"
    assert found[key + "tokens"] == a[key + "tokens"] + b[key + "tokens"] > 0
    assert found[key + "bits_per_byte"] == pytest.approx(
        0.25 * a[key + "bits_per_byte"] + 0.75 * b[key + "bits_per_byte"]
    )
    assert found["b/recurrence/none/bits_per_byte"] == b["recurrence/none/bits_per_byte"]
    far = "recurrence/16_windows/bits_per_byte"
    assert far in a and far not in b and far not in found and found["a/" + far] == a[far]
