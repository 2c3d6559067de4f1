"""The learning rate as a pure function of the step: nothing to save, nothing to step, the same on every process."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformer_vq.config.run import OptimizationConfig


def learning_rate(step: int, train: OptimizationConfig, restarts: Sequence[int] = ()) -> float:
    """The rate of optimizer step `step`, counted from 0.

    restarts: steps before which the schedule ended and began anew, in order; each stretch is a schedule of its own.

    Linear warmup over the first `warmup` steps, the first of which gets 1/warmup of the peak (the paper's first step
    has rate 0 and does nothing). Then
        cosine     half a cosine from the peak to final_lr × peak over the remaining steps  [Lingle 2309.16354]
        wsd        the peak, then a line to final_lr × peak over the last `decay_share` of all steps  [Hu 2404.06395]
        constant   the peak
    """
    begin = max((r for r in restarts if r <= step), default=0)
    steps = min((r for r in restarts if r > step), default=train.steps) - begin
    step -= begin
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    start = train.warmup if train.schedule == "cosine" else max(train.warmup, steps * (1 - train.decay_share))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    share = (1 + math.cos(math.pi * progress)) / 2 if train.schedule == "cosine" else 1 - progress
    return train.lr * (train.final_lr + (1 - train.final_lr) * share)
