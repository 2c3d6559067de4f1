"""The words of a report: the verdict in sentences, and every table, formatted. The templates only lay them out."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from transformer_vq.studies.design import label, short_names
from transformer_vq.studies.emergence import emergence
from transformer_vq.studies.folder import RESULTS, read_status
from transformer_vq.studies.numbers import decimals, duration, mean_text, p_text, signed
from transformer_vq.studies.outcomes import metric_of, state_of, unique
from transformer_vq.studies.plan import Study
from transformer_vq.studies.results import Comparison, Results, failures, row_names

SIGNIFICANT = 0.05


def describe(results: Results) -> dict[str, Any]:
    """All words and tables of a report, formatted."""
    study, settings = results.study, results.study.settings
    runs = unique([*results.bases, *results.tuning, *results.final])
    states = Counter(state_of(run) for run in runs)
    statuses = [read_status(run.folder) for run in runs]
    seconds = sum(status.get("seconds") or 0 for status in statuses)
    missing = sum(n for state, n in states.items() if state not in RESULTS)
    closed = results.gate is not None and results.gate.held is False
    return {
        "title": settings.question or f"Study {study.name}",
        "notes": settings.notes,
        "name": study.name,
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "states": states,
        "missing": 0 if closed else missing,
        "closed": missing if closed else None,
        "branch": _branch(study),
        "emergence": emergence_rows(results),
        "runs": len(runs),
        "computed": duration(seconds),
        "verdict": verdict(results),
        "design": _design(results),
        "metrics": list(settings.metrics),
        "split": settings.split,
        "tune_split": settings.tune_split,
        "delta": settings.equivalence,
        "arms": [_arm(results, arm) for arm in results.arms],
        "differences": {metric: _differences(results, metric) for metric in settings.metrics},
        "pieces": _pieces(results),
        "same": [(c.arm, c.reference) for c in results.compared(settings.main_metric) if c.same_runs],
        "primary": results.primary is not None,
        "exploratory": sum(not c.primary and not c.same_runs for c in results.comparisons),
        "tuning": _tuning(results),
        "failures": [
            {**row, "arm": row["run"].arm, "seed": row["run"].seed, "stage": row["run"].stage}
            for row in failures(results)
        ],
        "commands": {
            "study": f"transformer-vq study run {study.source}",
            "arms": {run.arm: run.command for run in reversed(results.final)},
        },
        "machines": _counted(_machine(s["hardware"]) for s in statuses if s.get("hardware")),
        "software": _counted(
            ", ".join(f"{k} {v}" for k, v in s["versions"].items()) for s in statuses if s.get("versions")
        ),
        "commits": _counted(s["commit"] for s in statuses if s.get("commit")),
    }


def verdict(results: Results) -> list[str]:
    """The answer to the primary comparison in sentences; what is missing for one where there is none.

    A gate's outcome comes first, and is all there is where it does not hold.
    """
    if results.gate is None:
        return _primary_verdict(results)
    said = [results.gate.sentence()]
    if results.gate.held:
        return [*said, *_primary_verdict(results)]
    return said if results.gate.held is None else [*said, "The study ends here; its other arms were not run."]


def _primary_verdict(results: Results) -> list[str]:
    c, settings = results.primary, results.study.settings
    if c is None:
        return ["No primary comparison was named beforehand: everything below is exploratory."]
    d, metric = c.difference, f"{settings.split} {c.metric}"
    if d.n < 2:
        return [f"{c.arm} against {c.reference}: {d.n} of {d.n + c.missing} seeds make a pair so far; two are needed."]
    digits = decimals(max(abs(d.mean), d.high - d.low))
    interval = f"95 % interval {signed(d.low, digits)} to {signed(d.high, digits)}"
    size = f"{signed(d.mean, digits)} ({interval}, {p_text(d.p)}, {d.n} paired seeds)"
    sentences = [f"{c.arm} − {c.reference} in {metric}: {size}."]
    if d.sd == 0 and d.p != 1:
        sentences.append(f"{c.arm} differs from {c.reference} by the same amount with every seed.")
    elif d.p < SIGNIFICANT:
        good = (d.mean < 0) == (settings.metrics[c.metric] == "min")
        sentences.append(f"{c.arm} is {'better' if good else 'worse'} than {c.reference}.")
    else:
        sentences.append("No difference was resolved.")
    if c.look is not None:
        low, high = signed(c.look.low, digits), signed(c.look.high, digits)
        sentences.append(
            f"With the chance of the {c.look.pieces} pieces of the {settings.split} split: {low} to {high}."
        )
    if d.sd == 0:
        sentences.append("The pairs do not spread, but for rounding: there is no noise to test against.")
    else:
        found = f"{c.detectable:.{decimals(c.detectable)}f}"
        sentences.append(f"With this spread, {d.n} seeds find a true difference of {found} four times in five.")
    if settings.equivalence is not None:
        inside = "lies inside" if c.equivalent else "does not lie inside"
        claim = "the two are equivalent in that sense" if c.equivalent else "equivalence is not shown"
        sentences.append(f"The interval {inside} ±{settings.equivalence:g}: {claim}.")
    if c.missing:
        sentences.append(f"{c.missing} of {d.n + c.missing} seeds make no pair (diverged, failed or not run yet).")
    return sentences


def _design(results: Results) -> list[tuple[str, str]]:
    study, settings = results.study, results.study.settings
    levels = {key: dict.fromkeys(arm.levels[key] for arm in study.design.arms) for key in study.design.arms[0].levels}
    design = settings.design if isinstance(settings.design, str) else f"random, {settings.design.n} of the grid"
    rows = [(f"factor {key}", ", ".join(names)) for key, names in levels.items()]
    rows += [("design", design.replace("_", " ")), ("seeds", ", ".join(map(str, settings.seeds)))]
    rows += [("base", settings.base)]
    rows += (
        [("overrides", ", ".join(f"{k}={label(v)}" for k, v in settings.overrides.items()))]
        if settings.overrides
        else []
    )
    if settings.budget is not None:
        tokens, flops = settings.budget.tokens, settings.budget.flops
        each = f"{tokens:,} training tokens a run" if tokens else f"training FLOPs of a run: {flops}"
        steps = sorted(set(study.steps.values()))
        rows.append(("budget", f"{each} ({' to '.join(f'{s:,}' for s in dict.fromkeys((steps[0], steps[-1])))} steps)"))
    rows.append(
        ("metrics", ", ".join(f"{k} ({v})" for k, v in settings.metrics.items()) + f", on the {settings.split} split")
    )
    c = study.design
    rows.append(("primary comparison", f"{c.primary} against {c.references[c.primary]}" if c.primary else "none named"))
    if settings.gate is not None:
        gate = settings.gate
        rows.append(
            ("gate", f"{gate.better} better than {gate.than} by {gate.by:g} in {gate.metric or settings.main_metric}")
        )
    if settings.branch is not None:
        changes = ", ".join(f"{k}={label(v)}" for k, v in settings.branch.settings.items())
        rows.append(
            ("branch", f"from a base a seed, {settings.branch.steps:,} steps{f' with {changes}' if changes else ''}")
        )
    rows += [("equivalence", f"δ = {settings.equivalence:g}")] if settings.equivalence else []
    for key, values in settings.tune.items():
        rows.append((f"tuned {key}", ", ".join(map(label, values))))
    if settings.tune:
        seeds = ", ".join(map(str, settings.tune_seeds))
        how = f"by mean {settings.tune_split} {settings.main_metric} over seeds {seeds}"
        rows.append(("tuning", f"each arm over the same grid, {how}"))
    return rows


def _branch(study: Study) -> str | None:
    """What a reader must know of a study whose arms do not start from scratch."""
    branch = study.settings.branch
    if branch is None:
        return None
    steps = sorted({run.settings.train.steps for run in study.final_runs({arm.name: {} for arm in study.design.arms})})  # type: ignore[attr-defined]
    span = " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))
    return (
        f"Late training: every arm goes on for {span} steps from one base a seed, trained for {branch.steps:,}, with "
        "the same batches and codebooks of its own. Arms are paired by base. How an arm would do from scratch, this "
        "does not say."
    )


def emergence_rows(results: Results) -> dict[str, Any] | None:
    """By arm: how many seeds emerged, when, how good those are, and the test against the reference; None without."""
    wanted = results.study.settings.emergence
    if wanted is None:
        return None
    found = emergence(results)
    rows = [
        {
            "arm": row.arm,
            "emerged": f"{row.emerged}/{len(row.arrivals)}",
            "median": "-" if math.isnan(row.survival.median) else f"{row.survival.median:,.0f}",
            "given": mean_text(row.given),
            "reference": row.reference or "-",
            "p": p_text(row.p).removeprefix("p ").removeprefix("= "),
            "corrected": p_text(row.p_corrected).removeprefix("p ").removeprefix("= "),
        }
        for row in found
    ]
    unit = found[0].unit if found else "step"
    return {"metric": wanted.metric, "at": f"{wanted.at:g}", "unit": unit.removesuffix("s") + "s", "rows": rows}


def _arm(results: Results, arm: str) -> dict[str, Any]:
    final = [run for run in results.final if run.arm == arm]
    states = Counter(state_of(run) for run in final)
    settings = results.study.settings
    seconds = [s for run in final if state_of(run) == "done" and (s := read_status(run.folder).get("seconds"))]
    return {
        "name": arm,
        "values": [mean_text(results.interval(arm, metric)) for metric in settings.metrics],
        "seeds": f"{len(results.values(arm, settings.main_metric))}/{len(settings.seeds)}",
        "seconds": f"{sum(seconds) / len(seconds):.0f}" if seconds else "-",
        "states": ", ".join(f"{n} {state}" for state, n in states.items() if state != "done"),
        "reference": arm in set(results.study.design.references.values()),
    }


def _differences(results: Results, metric: str) -> dict[str, Any]:
    """One metric's comparisons: what the difference is, and a row for each."""
    rows = [c for c in results.compared(metric) if not c.same_runs]
    names, what = row_names(results, rows) if rows else ([], "")
    return {
        "what": what,
        "picture": picture_name(metric),
        "pieces": max((c.look.pieces for c in rows if c.look is not None), default=None),
        "rows": [_comparison(c, name) for c, name in zip(rows, names, strict=True)],
    }


def _comparison(c: Comparison, name: str) -> dict[str, Any]:
    d = c.difference
    digits = decimals(max(abs(d.mean), d.high - d.low)) if d.n > 1 else 4
    return {
        "name": name,
        "primary": c.primary,
        "difference": signed(d.mean, digits) if d.n else "-",
        "interval": f"{signed(d.low, digits)} to {signed(d.high, digits)}" if d.n > 1 else "-",
        "look": "-" if c.look is None else f"{signed(c.look.low, digits)} to {signed(c.look.high, digits)}",
        "p": p_text(d.p).removeprefix("p ").removeprefix("= "),
        "corrected": "primary" if c.primary else p_text(c.p_corrected).removeprefix("p ").removeprefix("= "),
        "resolved": d.n > 1 and c.p_corrected < SIGNIFICANT,
        "equivalent": {None: "", True: "yes", False: "not shown"}[c.equivalent] if d.n > 1 else "-",
        "detectable": "-" if math.isnan(c.detectable) else f"{c.detectable:.{digits}f}",
        "needed": "-" if c.seeds_needed is None else f"{c.seeds_needed:,}",
        "pairs": f"{d.n}/{d.n + c.missing}",
    }


def _pieces(results: Results) -> str | None:
    """What the second interval is; None where no comparison has one."""
    counts = sorted({c.look.pieces for c in results.comparisons if c.look is not None})
    if not counts:
        return None
    how_many = " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"Over seeds and pieces: by bootstrap, the {how_many} pieces of the {results.study.settings.split} split "
        "(documents, windows of text, or examples) being a sample too. The t interval speaks for other seeds on the "
        "same pieces, this one for other seeds on other pieces of the same kind."
    )


def picture_name(metric: str) -> str:
    """The file name of the picture of a metric's differences; no two metrics share one."""
    plain = re.sub(r"[^\w.]+", "-", metric, flags=re.ASCII).strip("-.")
    if plain == metric.replace("/", "-") and len(plain) <= 60:
        return f"differences-{plain}"
    return f"differences-{plain[:60]}-{hashlib.sha256(metric.encode()).hexdigest()[:6]}"


def _tuning(results: Results) -> list[dict[str, Any]]:
    """By arm: what was chosen, how far the grid's values lie apart, and whether the choice sits at the grid's edge."""
    study, settings = results.study, results.study.settings
    short = short_names(settings.tune)
    rows = []
    for arm in study.design.arms if settings.tune else []:
        chosen = results.chosen[arm.name]
        tried = []
        for tuned in study.grids[arm.name]:
            mine = [run for run in results.tuning if run.arm == arm.name and run.tuned == tuned]
            values = [metric_of(run, settings.tune_split, settings.main_metric) for run in mine]
            mean = sum(values) / len(values)
            tried.append((", ".join(f"{short[k]}={label(v)}" for k, v in tuned.items()), mean, tuned == chosen))
        edge = [short[key] for key, value in (chosen or {}).items() if _at_the_edge(value, settings.tune[key])]
        rows.append(
            {
                "arm": arm.name,
                "chosen": next((name for name, _, best in tried if best), "none: no value has a number for every seed"),
                "edge": ", ".join(edge),
                "tried": "; ".join(f"{name}: {'-' if math.isnan(mean) else f'{mean:.4f}'}" for name, mean, _ in tried),
            }
        )
    return rows


def _at_the_edge(value: Any, tried: Sequence[Any]) -> bool:
    """Whether it is the least or the largest of three numbers or more, in whatever order they stand."""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in tried)
    return numbers and len(tried) > 2 and value in (min(tried), max(tried))


def _machine(hardware: dict[str, Any]) -> str:
    gpu = f", {hardware['gpu']}" if hardware.get("gpu") else ""
    threads = f", {hardware['threads']} threads" if hardware.get("threads") else ""
    return f"{hardware['cpu']}{gpu}, {hardware['cores']} cores a run{threads}"


def _packages(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _counted(texts: Iterable[str]) -> list[tuple[str, int]]:
    return Counter(texts).most_common()
