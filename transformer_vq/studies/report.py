"""The report of a study, at any time from what is there: `report.html` (one file), its twin `report.md`, and all runs.

report.html        everything inlined, pictures as SVG
report.md          the same words and tables, pictures as plots/*.png
runs.parquet/.csv  one row a run, for the reader's own tools
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from transformer_vq.evaluation.plots import save_figure, svg
from transformer_vq.files import write, write_text, writing
from transformer_vq.studies import figures
from transformer_vq.studies.emergence import emergence, with_arrivals
from transformer_vq.studies.folder import check_identity
from transformer_vq.studies.markdown import Verbatim, clean, code, escape, fence
from transformer_vq.studies.plan import Study
from transformer_vq.studies.results import Results, collect, table
from transformer_vq.studies.words import describe, picture_name


def write_report(study: Study) -> list[Path]:
    """Write report and tables into the study's folder; returns the files.  Raises ConfigError when it is another's."""
    check_identity(study.settings, study.folder)
    results = collect(study)
    with writing(study.folder):
        study.folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(results)
    runs = with_arrivals(table(results), results)
    write(study.folder / "runs.parquet", lambda place: runs.to_parquet(place, index=False))
    write(study.folder / "runs.csv", lambda place: runs.to_csv(place, index=False))
    for old in (study.folder / "plots").glob("*.png"):
        old.unlink()
    for name, (_, figure) in pictures.items():
        save_figure(figure, study.folder / "plots" / f"{name}.png")
    content = describe(results)
    html = _template("report.html", autoescape=True, finalize=_clean).render(
        **content, pictures={name: (caption, svg(figure)) for name, (caption, figure) in pictures.items()}
    )
    markdown = _template("report.md", finalize=escape).render(
        **content, pictures={name: (caption, f"plots/{name}.png") for name, (caption, _) in pictures.items()}
    )
    write_text(study.folder / "report.html", html)
    write_text(study.folder / "report.md", markdown)
    return [study.folder / name for name in ("report.html", "report.md", "runs.parquet", "runs.csv")]


def _template(name: str, **options: Any) -> Template:
    environment = Environment(
        loader=PackageLoader("transformer_vq.studies"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters |= {"verbatim": Verbatim, "code": code, "fence": fence}
    return environment.get_template(name)


def _clean(value: Any) -> Any:
    return clean(value) if type(value) is str else value  # markup of ours stays


def draw(results: Results) -> dict[str, tuple[str, Figure]]:
    """name -> (caption, figure), those that have something to show."""
    settings = results.study.settings
    wanted = {
        picture_name(metric): (
            f"Paired differences in {settings.split} {metric}. The intervals are not corrected for how many there are; "
            "corrected p-values stand in the table.",
            figures.forest(results, metric),
        )
        for metric in settings.metrics
    }
    wanted |= {
        "layers": (
            "What a level does in which layer: put into one layer, against the baseline everywhere; taken out of one "
            "layer, against the level everywhere.",
            figures.layer_map(results),
        ),
        "grid": (
            f"Mean {settings.split} {settings.main_metric} over seeds; darker is better.",
            figures.grid_map(results),
        ),
    }
    for i, figure in enumerate(settings.figures):
        caption = f"{figure.y} against {figure.x}: means over seeds with 95 % t intervals, uncorrected."
        wanted[f"figure-{i}"] = (caption, figures.lines(results, figure))
    wanted["emergence"] = (
        f"Share of seeds that have emerged, {settings.emergence.metric} at {settings.emergence.at:g} on the "
        f"{settings.tune_split} split, Kaplan–Meier; known to the step of an evaluation. A tick: a seed that had not "
        "by the end. Lines are set a little apart."
        if settings.emergence
        else "",
        figures.emerged(emergence(results)),
    )
    most = f" The {figures.MOST_LINES} foremost arms." if len(results.arms) > figures.MOST_LINES else ""
    wanted |= {
        "curves": (
            f"Learning curves on the {settings.tune_split} split: mean over finished seeds; band: 95 % t interval of "
            f"the mean, uncorrected.{most}",
            figures.curves(results),
        ),
        "health": (
            f"Codebooks of the finished models on the whole {settings.split} split, mean over seeds.{most}",
            figures.health_map(results),
        ),
    }
    return {name: (caption, figure) for name, (caption, figure) in wanted.items() if figure is not None}
