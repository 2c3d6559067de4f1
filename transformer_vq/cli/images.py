"""`transformer-vq images CONFIG`, `encode RUN FOLDER`, `decode RUN CODES`: the image benchmark and its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformer_vq.cli.arguments import Config, Json, Overrides, Run
from transformer_vq.cli.console import console, number, print_json, print_lines, table
from transformer_vq.cli.runs import one_line_for, told_to_all
from transformer_vq.cli.threads import settle_threads
from transformer_vq.cli.train import DryRun, Overwrite, Quiet, Resume

if TYPE_CHECKING:
    from transformer_vq.config.images import ImageRunConfig
    from transformer_vq.images.codes import LoadedImageRun

SHOWN = {  # metric -> heading
    "mse": "MSE",
    "l1": "L1",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "fid": "FID",
    "inception_score": "IS",
    "lpips": "LPIPS",
    "frechet_classifier": "Fréchet (classifier)",
    "usage": "usage",
    "perplexity": "perplexity",
    "quantization_error": "quantization error",
}


def images(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a VQ-VAE or VQ-GAN on pictures, measure it, and leave a run folder."""
    from transformer_vq.config import load_config
    from transformer_vq.config.images import ImageRunConfig, check_packages

    with told_to_all(joins=not dry_run):
        settings = load_config(config, overrides or [], ImageRunConfig)
        check_packages()
    if Path(config).is_dir() and not any(override.startswith("run_dir=") for override in overrides or []):
        settings = settings.model_copy(update={"run_dir": config})  # where that run goes on, wherever it was moved to
    if dry_run:
        _show_plan(settings, resume, overwrite, json)
        return
    settle_threads(quiet)
    from transformer_vq.images import run
    from transformer_vq.training import CheckpointError, TrainingDiverged, TrainingInterrupted

    with one_line_for(TrainingDiverged, TrainingInterrupted, CheckpointError):
        result = run(settings, resume=resume, overwrite=overwrite, quiet=quiet)
    if json:
        print_json(result)
        return
    _show_result(settings.run_dir, result, quiet)


def encode(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of pictures.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/codes/FOLDER.npz.")] = None,
    json: Json = False,
) -> None:
    """Write the code indices of a folder's pictures."""
    from transformer_vq.config.images import check_packages

    check_packages()
    from transformer_vq.images.codes import encode_folder

    loaded = _open(run)
    target = out or loaded.folder / "codes" / f"{folder.resolve().name}.npz"
    count, shape = encode_folder(loaded, folder, target)
    if json:
        print_json({"codes": str(target), "images": count, "shape": list(shape)})
        return
    grid = " x ".join(map(str, shape))
    console().print(
        f"{count:,} pictures as {grid} codes each (stages x parts x height x width): {target}", soft_wrap=True
    )


def decode(
    run: Run,
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="A file that `encode` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write to; by default beside CODES.")] = None,
    json: Json = False,
) -> None:
    """Turn code indices back into pictures."""
    from transformer_vq.config.images import check_packages

    check_packages()
    from transformer_vq.images.codes import decode_file

    target = out or codes.with_suffix("")
    count = decode_file(_open(run), codes, target)
    if json:
        print_json({"folder": str(target), "images": count})
        return
    console().print(f"{count:,} pictures: {target}", soft_wrap=True)


def _open(run: str) -> LoadedImageRun:
    import torch

    from transformer_vq.images.codes import load_image_run
    from transformer_vq.training import CheckpointError

    with one_line_for(CheckpointError):
        return load_image_run(run, "cuda" if torch.cuda.is_available() else "cpu")


def _show_plan(settings: ImageRunConfig, resume: bool, overwrite: bool, json: bool) -> None:
    """What a run would do; pictures are opened, nothing is written.  Raises ConfigError as the run would."""
    import torch

    from transformer_vq.images import ImageTask
    from transformer_vq.images.memory import complaint
    from transformer_vq.training.distributed import asked_for
    from transformer_vq.training.loop import check_settings
    from transformer_vq.training.run_folder import RunFolder

    check_settings(settings)
    finished = RunFolder(settings.run_dir).check(settings, resume, overwrite) is not None
    task = ImageTask(settings, torch.device("cpu"))
    lines, device = task.describe(), "cuda" if torch.cuda.is_available() else "cpu"
    short = complaint(settings, task.corpus.shape, device, asked_for(), task.perceptual)
    if json:
        plan = {"config": settings.model_dump(mode="json"), "describe": lines, "finished": finished}
        print_json({**plan, "short_of_memory": short})
        return
    train = settings.train
    lines["training"] = f"{train.steps:,} steps of {train.batch_size}, {train.optimizer}, {train.precision}"
    lines["writes to"] = settings.run_dir
    if finished:
        lines["but"] = "that folder holds a finished run of this config: nothing would be done"
    if short:
        lines["warning"] = short
    out = console()
    print_lines(out, lines)
    out.print("dry run: nothing was trained or written")


def _show_result(run_dir: str, result: dict[str, Any], quiet: bool) -> None:
    out = console(quiet=quiet)
    metrics = [name for name in SHOWN if result["test"].get(name) is not None]
    scores = table("", *(SHOWN[name] for name in metrics))
    for split in ("valid", "test"):
        scores.add_row(split, *(number(result[split].get(name)) for name in metrics))
    out.print(scores)
    test = result["test"]
    if "classifier_accuracy" in test:
        right = f"{test['classifier_accuracy']:.1%} of the test split"
        out.print(f"that classifier of {test['classifier_task']} is right on {right}")
    if "notes" in test:
        out.print(f"note: {test['notes']}")
    print_lines(
        out,
        {
            "numbers": f"{run_dir}/summary.json, metrics.jsonl; pictures in {run_dir}/plots",
            "next": f"transformer-vq encode {run_dir} FOLDER",
        },
    )
