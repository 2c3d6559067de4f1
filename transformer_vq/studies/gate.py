"""A gate: a comparison that must hold before the other arms of a study run; where it does not, the study ends.

It asks whether the task can show anything: where full attention itself gains nothing over a window, no cache can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformer_vq.config.study import GateConfig
from transformer_vq.studies.folder import RESULTS
from transformer_vq.studies.numbers import decimals, signed
from transformer_vq.studies.outcomes import choose, metric_of, state_of
from transformer_vq.studies.plan import Study
from transformer_vq.studies.statistics import Paired, paired


@dataclass(frozen=True)
class Verdict:
    """What the gate's runs say."""

    gate: GateConfig
    metric: str
    """With its split."""
    gain: Paired
    """How much better the arm is, positive where it is, over the seeds that both arms finished."""
    missing: int
    """Seeds of the plan that make no pair."""
    waiting: int
    """Runs without a result; more than none: the gate is still open."""

    @property
    def held(self) -> bool | None:
        """None while it is open. It holds by the mean; two arms without a common seed do not pass."""
        if self.waiting:
            return None
        return self.gain.n > 0 and self.gain.mean >= self.gate.by

    def sentence(self) -> str:
        """The outcome in words."""
        gate, gain = self.gate, self.gain
        asked = f"{gate.better} better than {gate.than} by {gate.by:g} in {self.metric}"
        if self.waiting:
            return f"Gate: {asked} is not decided, {self.waiting} of its runs have no result yet."
        outcome = "holds" if self.held else "does not hold"
        if not gain.n:
            return f"Gate: {asked} {outcome}, no seed has a number in both."
        digits = decimals(max(abs(gain.mean), 0.0 if math.isnan(gain.high) else gain.high - gain.low))
        interval = f", 95 % interval {signed(gain.low, digits)} to {signed(gain.high, digits)}" if gain.n > 1 else ""
        pairs = f"{gain.n} paired seed{'s' if gain.n > 1 else ''}"
        lost = f", {self.missing} without a pair" if self.missing else ""
        return f"Gate: {asked} {outcome}, it is by {signed(gain.mean, digits)} ({pairs}{lost}{interval})."


def judge(study: Study) -> Verdict:
    """The gate from what there is; the study must have one."""
    settings, gate = study.settings, study.settings.gate
    assert gate is not None, "asked of studies with a gate only"
    metric = gate.metric or settings.main_metric
    arms = (gate.better, gate.than)
    tuning = study.tuning_runs()
    final = [run for run in study.final_runs(choose(study, tuning)) if run.arm in arms]
    waiting = sum(state_of(run) not in RESULTS for run in [*final, *(r for r in tuning if r.arm in arms)])
    values = [
        {
            run.seed: value
            for run in final
            if run.arm == arm and math.isfinite(value := metric_of(run, settings.split, metric))
        }
        for arm in arms
    ]
    both = sorted(values[0].keys() & values[1].keys())
    sign = -1 if settings.metrics[metric] == "min" else 1
    gain = paired(*([sign * of[seed] for seed in both] for of in values))
    return Verdict(gate, f"{settings.split} {metric}", gain, len(settings.seeds) - len(both), waiting)
