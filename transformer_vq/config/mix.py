"""Settings of one source among several."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import Field

from transformer_vq.config.base import Settings

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class MixSource(Settings):
    """One of several sources. What is null is as `data` says."""

    source: str = Field(min_length=1, description="as data.source")
    weight: float = Field(1.0, gt=0, description="share of the training windows, and of the numbers of an evaluation")
    field: str | None = Field(None, min_length=1, description="as data.field")
    document_separator: str | None = Field(None, min_length=1, description="as data.document_separator")
    image_size: int | None = Field(None, ge=1, description="as data.image_size")
    max_bytes: int | None = Field(None, ge=1, description="as data.max_bytes")
    max_eval_bytes: int | None = Field(None, ge=1, description="as data.max_eval_bytes")


def check_mix(mix: Mapping[str, MixSource], source: str, order: str) -> None:
    """Raise ValueError for what cannot be mixed, and for names that would be mistaken."""
    if not mix:
        raise ValueError("mix = {}: must name at least one source")
    if source != "builtin":
        raise ValueError(f"source = {source}: must be left out, or builtin, beside mix, which names the sources")
    if order == "streams":
        raise ValueError("order = streams: must be windows with mix, in which every row is of one source or another")
    for name in mix:
        if not _NAME.fullmatch(name) or re.fullmatch(r"layer\d+", name):
            raise ValueError(
                f"mix.{name}: a name begins with a letter and holds letters, digits, - and _; layer0 is taken"
            )
