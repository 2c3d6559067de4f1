"""What speed is aimed at, by kind of device, and where among the sections of `page.py` the measured number stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Found = Mapping[str, Any]
"""A section's JSON."""
Target = tuple[str, str, str, Callable[[Found], float | None]]
"""What, the section, what is wanted, and where to find what was measured."""


def _at(size: str, value: float, key: str) -> Callable[[Found], float | None]:
    return lambda found: next((row[key] for row in found["rows"] if row[size] == value), None)


def _speedup(found: Found) -> float | None:
    return next((row["speedup"] for row in found["rows"] if row["implementation"] == "transformer_vq"), None)


def _others(value: float, name: str) -> Callable[[Found], float | None]:
    return lambda found: next(
        (r["others"].get(name, {}).get("ratio") for r in found["rows"] if r["tokens"] == value), None
    )


def _flat(found: Found) -> float | None:
    times = [row["milliseconds"] for row in found["rows"]]
    ratio: float = max(times) / min(times)
    return ratio


def _over_floor(found: Found) -> float | None:
    floor = found["rows"][0]["mib"] * 2**20 / found["ceilings"]["bandwidth"]
    return float(found["rows"][0]["milliseconds"] / 1e3 / floor)


TARGETS: dict[str, list[Target]] = {
    "cpu": [
        ("attention over SDPA, 2,048 tokens", "attention", "1.9", _at("tokens", 2048, "ratio")),
        ("attention over SDPA, 8,192 tokens", "attention", "7.0", _at("tokens", 8192, "ratio")),
        ("attention over SDPA, 16,384 tokens", "attention", "13.5", _at("tokens", 16_384, "ratio")),
        ("attention over SDPA, 32,768 tokens", "attention-long", "26", _at("tokens", 32_768, "ratio")),
        ("training over Llama, 512 tokens", "train", "1.0", _at("length", 512, "ratio")),
        ("training over Llama, 4,096 tokens", "train", "2.8", _at("length", 4096, "ratio")),
        ("training over Llama, 8,192 tokens", "train", "5.0", _at("length", 8192, "ratio")),
        ("decoding over Llama, position 1,024", "generation", "1.5", _at("position", 1024, "llama_ratio")),
        ("decoding over Llama, position 16,384", "generation", "3.5", _at("position", 16_384, "llama_ratio")),
        ("quantizer over vector-quantize-pytorch", "quantize", "4", _speedup),
    ],
    "cuda": [
        *(
            (f"attention over SDPA, {n:,} tokens", "attention", wanted, _at("tokens", n, "ratio"))
            for n, wanted in ((4096, "1.3"), (8192, "2.6"), (32_768, "10"), (131_072, "40"))
        ),
        *(
            (f"attention over cuDNN, {n:,} tokens", "attention", wanted, _others(n, "sdpa cudnn"))
            for n, wanted in ((4096, "0.65"), (8192, "1.3"), (32_768, "5"), (131_072, "20"))
        ),
        ("decoding, position 10⁶ over 10³", "generation", "≤ 1.02", _flat),
        ("decoding, over reading weights and state", "generation", "≤ 2", _over_floor),
        ("quantizer over vector-quantize-pytorch", "quantize", "4", _speedup),
    ],
}
