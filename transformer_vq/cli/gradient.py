"""`transformer-vq doctor RUN --gradient`: how near each estimator's gradient is to that of the smoothed loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_vq.cli.arguments import check_plot
from transformer_vq.cli.batches import model_and_batch
from transformer_vq.cli.console import console, number, print_json, progress_bar, table
from transformer_vq.cli.runs import folder_of

if TYPE_CHECKING:
    from transformer_vq.bench.agreement import Estimate
    from transformer_vq.bench.gradient import LayerGradients, Plan


def gradient(run: str, overrides: Sequence[str], chosen: Mapping[str, Any], plot: Path | None, json: bool) -> None:
    """Compare estimators at a checkpoint, and show it; `chosen` are fields of `Plan`.

    Raises ConfigError before any work.
    """
    from transformer_vq.config import ConfigError

    check_plot(plot)
    if not (folder_of(run) / "checkpoints").is_dir():
        raise ConfigError(f"{run}: --gradient looks at a trained model; name a run folder")
    if any(text.startswith("model.") for text in overrides):
        raise ConfigError(f"{run}: a trained model is examined as it is; only settings of data and train can change")

    from transformer_vq.bench.gradient import Plan, comparable, compare
    from transformer_vq.ops import estimators

    lists = {name: tuple(dict.fromkeys(value)) for name, value in chosen.items() if isinstance(value, list) and value}
    numbers = {name: value for name, value in chosen.items() if not isinstance(value, list)}
    plan = Plan(**{"estimators": tuple(estimators.names()), **lists, **numbers})
    plan.check()
    model, batch, described = model_and_batch(run, list(overrides), plan.keys)
    comparable(model)
    with progress_bar("calling the model") as progress:
        found = compare(model, batch, plan, progress)
    if plot is not None:
        from transformer_vq.bench.gradient_figure import draw
        from transformer_vq.evaluation.plots import save_figure

        save_figure(draw(found), plot)
    if json:
        print_json(
            {
                "looked_at": described,
                "draws": plan.draws,
                "through": plan.through,
                "layers": [asdict(layer) for layer in found],
            }
        )
    else:
        show(found, plan, described, plot)


def show(found: Sequence[LayerGradients], plan: Plan, described: str, plot: Path | None) -> None:
    """One table by layer and estimator, one by thirds of the keys, and what the numbers are."""
    out = console()
    counted = "" if plan.through == "everything" else ", keys in the window alone"
    out.print(f"looked at {described}; a key of each row, {plan.draws:,} draws{counted}", soft_wrap=True)
    middle = plan.sigmas[len(plan.sigmas) // 2]
    for layer in found:
        out.print()
        columns = [f"{what} at {sigma:g}" for what in ("cosine", "length") for sigma in plan.sigmas]
        grid = table(f"layer {layer.layer}", *columns, f"cosine less {plan.estimators[0]}'s at {middle:g}")
        for name in plan.estimators:
            mine = [a for a in layer.agreements if a.estimator == name and a.group == "all"]
            own = " (the run's)" if name == layer.estimator else ""
            cosines, lengths = ([text(getattr(a, what)) for a in mine] for what in ("cosine", "length"))
            nearer = next(text(a.nearer) for a in mine if a.sigma == middle)
            grid.add_row(name + own, *cosines, *lengths, "-" if name == plan.estimators[0] else nearer)
        out.print(grid)
        moved = ", ".join(f"{truth.moved:.0%} at {truth.sigma:g}" for truth in layer.truths)
        out.print(f"draws with another code: {moved}", soft_wrap=True)
    out.print()
    names = list(dict.fromkeys(a.group for a in found[0].agreements))[1:]
    grid = table(f"cosine at {middle:g}", "estimator", *names)
    for layer in found:
        for name in plan.estimators:
            parts = {a.group: a for a in layer.agreements if a.estimator == name and a.sigma == middle}
            grid.add_row(f"layer {layer.layer}", name, *(text(parts[group].cosine) for group in names))
    out.print(grid)
    out.print()
    out.print(
        "cosine: of an estimator's gradient at the keys with that of the loss smoothed by noise on them; length: the "
        "estimator's over the smoothed one's; [95 % interval over keys]; noise in units of the layer's rms |k - q|; "
        "thirds of the keys by angle between key and code, and by |q|/|k|. -: too few draws or keys to tell.",
        soft_wrap=True,
    )
    if plot is not None:
        out.print(f"drawn in {plot}", soft_wrap=True)


def text(x: Estimate) -> str:
    """0.42 [0.31, 0.50], or a dash."""
    if not x.resolved:
        return "-"
    value, low, high = (f"{part:.2f}" if abs(part) < 10 else number(part, 2) for part in (x.value, x.low, x.high))
    return f"{value} [{low}, {high}]"
