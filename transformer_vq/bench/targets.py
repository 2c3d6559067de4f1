"""What speed is aimed at, by kind of device, and where among the sections of `page.py` the measured number stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Found = Mapping[str, Any]
"""A section's JSON."""
Target = tuple[str, str, str, Callable[[Found], float | None]]
"""What, the section, what is wanted, and where to find what was measured."""


def _over(axis: str, size: int, name: str) -> Callable[[Found], float | None]:
    """How many times as long as ours that side takes at a size."""

    def find(found: Found) -> float | None:
        for row in found["rows"]:
            if row[axis] == size:
                ratio: float | None = row["others"].get(name, {}).get("ratio")
                return ratio
        return None

    return find


def _evenness(found: Found) -> float | None:
    """The fewest tokens a second over the most, over all lengths."""
    rates = [row["tokens_per_s"] for row in found["rows"]]
    ratio: float = min(rates) / max(rates)
    return ratio


def _longest_over_shortest(found: Found) -> float | None:
    times = [row["milliseconds"] for row in found["rows"]]
    ratio: float = times[-1] / times[0]
    return ratio


def _over_floor(found: Found) -> float | None:
    floor = found["rows"][0]["mib"] * 2**20 / found["ceilings"]["bandwidth"]
    return float(found["rows"][0]["milliseconds"] / 1e3 / floor)


QUANTIZER = (
    "quantizer over vector-quantize-pytorch, 65,536 keys", "quantize", "4",
    _over("vectors", 65_536, "vector-quantize-pytorch"),
)  # fmt: skip
TARGETS: dict[str, list[Target]] = {
    "cpu": [
        *(
            (f"attention over SDPA, {n:,} tokens", section, wanted, _over("tokens", n, "SDPA"))
            for n, section, wanted in (
                (2048, "attention", "1.9"),
                (8192, "attention", "7.0"),
                (16_384, "attention", "13.5"),
                (32_768, "attention-long", "26"),
            )
        ),
        *(
            (f"training over Llama, {n:,} tokens", "train", wanted, _over("length", n, "Llama"))
            for n, wanted in ((512, "1.0"), (4096, "2.8"), (8192, "5.0"))
        ),
        *(
            (f"decoding over Llama, position {n:,}", "generation", wanted, _over("position", n, "Llama"))
            for n, wanted in ((1024, "1.5"), (16_384, "3.5"))
        ),
        QUANTIZER,
    ],
    "cuda": [
        *(
            (f"attention over SDPA, {n:,} tokens", "attention", wanted, _over("tokens", n, "SDPA"))
            for n, wanted in ((4096, "1.3"), (8192, "2.6"), (32_768, "10"), (131_072, "40"))
        ),
        *(
            (f"attention over cuDNN, {n:,} tokens", "attention", wanted, _over("tokens", n, "SDPA, cuDNN"))
            for n, wanted in ((4096, "0.65"), (8192, "1.3"), (32_768, "5"), (131_072, "20"))
        ),
        (
            "125 M model: fewest over most tokens/s, 2,048 to 131,072 tokens", "train", "≥ 0.90",
            _evenness,
        ),
        ("125 M model, decoding: position 10⁶ over 10³", "generation", "≤ 1.02", _longest_over_shortest),
        ("125 M model, decoding: over reading weights and state", "generation", "≤ 2", _over_floor),
        QUANTIZER,
    ],
}  # fmt: skip
