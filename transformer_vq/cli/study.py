"""`transformer-vq study plan|run|report STUDY.yaml`: many runs, and what they say about one question."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from transformer_vq.cli.arguments import Json, Overrides
from transformer_vq.cli.console import console, print_json, print_lines, table

if TYPE_CHECKING:
    from transformer_vq.studies.plan import Study

study = typer.Typer(
    help="Many runs that differ in a few settings: plan them, run them, report with intervals.", no_args_is_help=True
)
Source = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study's YAML file, or a recipe's name such as studies/estimators.")
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Runs at once; they share the cores and take GPUs in turn.")]
Engine = Annotated[
    Literal["local", "submitit", "ray"], typer.Option(help="Where runs go: this machine, Slurm, a Ray cluster.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="More than 1,000 runs are meant.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")]
NoTrial = Annotated[bool, typer.Option("--no-trial", help="Do not measure how long a run takes.")]


@study.command()
def plan(
    source: Source,
    overrides: Overrides = None,
    jobs: Jobs = 1,
    yes: Yes = False,
    no_trial: NoTrial = False,
    json: Json = False,
) -> None:
    """Show the runs, and how long they will take: measured by short trials that leave nothing behind."""
    from transformer_vq.studies.plan import load_study

    loaded = load_study(source, overrides or [], many=yes)
    if no_trial:
        _show(loaded, None, jobs, json)
        return
    from transformer_vq.studies.trial import estimate

    _show(loaded, estimate(loaded).seconds, jobs, json)


@study.command()
def run(
    source: Source,
    overrides: Overrides = None,
    jobs: Jobs = 1,
    engine: Engine = "local",
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run what is not finished, then write the report. May be killed and started again at any time."""
    from transformer_vq.studies.plan import load_study

    loaded = load_study(source, overrides or [], many=yes)
    if dry_run:
        _show(loaded, None, jobs, json, _short_of_memory(loaded, jobs) if engine == "local" else None)
        return
    from transformer_vq.studies.run import run_study

    out = console(to_stderr=json)
    states = run_study(loaded, jobs, engine, say=lambda text: out.print(text, soft_wrap=True))
    _report(loaded, out, {"states": states} if json else None)


@study.command()
def report(source: Source, overrides: Overrides = None, json: Json = False) -> None:
    """Write the report from what is there: report.html, report.md, and a table of all runs. Runs nothing."""
    from transformer_vq.studies.plan import load_study

    _report(load_study(source, overrides or [], many=True), console(), {} if json else None)


def _short_of_memory(loaded: Study, jobs: int) -> str | None:
    """One line when this machine, or its GPUs, have less memory than the largest runs take at once."""
    import torch

    from transformer_vq.cli.describe import vocabulary
    from transformer_vq.studies.memory import complaint

    return complaint(loaded, "cuda" if torch.cuda.is_available() else "cpu", jobs, vocabulary)


def _show(loaded: Study, seconds: float | None, jobs: int, json: bool, short: str | None = None) -> None:
    from transformer_vq.studies.numbers import duration
    from transformer_vq.studies.run import check_jobs, outline

    check_jobs(jobs)
    found = outline(loaded)
    if json:
        print_json({**found, "seconds": seconds, "jobs": jobs, "short_of_memory": short})
        return
    out = console()
    rows = table("arm", "runs", "finished", "compared with")
    for arm in found["arms"]:
        name = arm["name"] + (" (primary)" if arm["primary"] else "")
        rows.add_row(name, str(arm["runs"]), str(arm["finished"]), arm["reference"] or "-")
    out.print(rows)
    out.print()
    lines = {"question": found["question"]} if found["question"] else {}
    lines |= {"runs": f"{found['runs']}, of which {found['finished']} are finished"}
    if found["bases"]:
        lines["bases"] = f"{found['bases']} of them come first, and all others go on from those"
    if gate := found["gate"]:
        lines["gate"] = (
            f"{gate['better']} must be better than {gate['than']} by {gate['by']:g}, or the study ends there"
        )
    if found["tuning"]:
        lines["tuning"] = f"{found['tuning']} of them come first, and choose the settings of the others"
    if seconds is not None:
        lines["time left"] = f"about {duration(seconds / jobs)} with {jobs} at once, measured on short trials"
    lines["writes to"] = found["folder"]
    if short:
        lines["warning"] = short
    print_lines(out, lines)


def _report(loaded: Study, out: Console, answer: dict[str, object] | None) -> None:
    """Write it; then say the verdict and where it lies, or print `answer` with the files as JSON."""
    from transformer_vq.studies.report import write_report
    from transformer_vq.studies.results import collect
    from transformer_vq.studies.words import verdict

    files = write_report(loaded)
    results = collect(loaded)
    sentences = verdict(results)
    if answer is not None:
        gate = results.gate
        judged = {} if gate is None else {"gate": {"held": gate.held, "difference": asdict(gate.gain)}}
        print_json({**answer, **judged, "verdict": sentences, "files": [str(path) for path in files]})
        return
    for sentence in sentences:
        out.print(sentence, soft_wrap=True)
    page: Path = files[0]
    print_lines(out, {"report": f"{page}, {page.with_suffix('.md').name}, runs.parquet, runs.csv"})
