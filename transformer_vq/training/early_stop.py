"""When evaluations on the first split stop getting better: derived from the records alone, so that a resume knows."""

from __future__ import annotations

from transformer_vq.config import ConfigError


def check_patience(patience: int | None, every: int | None) -> None:
    """Raises ConfigError when nothing would be evaluated."""
    if patience is not None and every is None:
        raise ConfigError(f"train.patience = {patience}: counts evaluations; eval.every = null makes none")


class Patience:
    """Counts evaluations since the best; `spent` turns True when there were `patience` in a row without a better one.

    A value that is not a finite number, None in a record, is no improvement.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best: float | None = None
        self.best_step = self.last_step = 0
        self.waited = 0

    def add(self, step: int, value: float | None) -> None:
        """Take in an evaluation; a step that was evaluated again counts once."""
        if step == self.last_step:
            return
        self.last_step = step
        finite = value is not None and value - value == 0
        if finite and (self.best is None or value < self.best):  # type: ignore[operator]  # `finite` says it is no None
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def spent(self) -> bool:
        """True when the run is to end here."""
        return self.patience is not None and self.waited >= self.patience

    def report(self) -> dict[str, int | None]:
        """For the summary: where it stopped, why, and the step of the best evaluation."""
        return {"step": self.last_step, "best_step": self.best_step, "patience": self.patience}
