"""Numbers as the reader of a report wants them."""

from __future__ import annotations

import math

from transformer_vq.studies.statistics import Interval


def decimals(size: float) -> int:
    """Decimals that show a number of this size with three significant digits."""
    return 3 if size == 0 or not math.isfinite(size) else max(0, min(8, 2 - math.floor(math.log10(size))))


def signed(x: float, digits: int) -> str:
    """+0.012 or −0.012, with a proper minus."""
    return f"{x:+.{digits}f}".replace("-", "−")


def p_text(p: float) -> str:
    """p = 0.012, or p < 0.001; - where there is none."""
    return "-" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def mean_text(interval: Interval) -> str:
    """1.873 ± 0.006: mean and half the 95 % interval."""
    if interval.n == 0:
        return "-"
    half = interval.high - interval.mean
    if math.isnan(half):
        return f"{interval.mean:.4g}"
    digits = max(decimals(half) - 1, 0) if half else decimals(interval.mean)
    return f"{interval.mean:.{digits}f} ± {half:.{digits}f}"


def duration(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
