"""A model, trained where there is a run, with batches that it is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformer_vq.cli.runs import folder_of, one_line_for

if TYPE_CHECKING:
    from transformer_vq.bench.doctor import Batch
    from transformer_vq.config import RunConfig
    from transformer_vq.models import TransformerVQ


def model_and_batches(run: str | None, settings: RunConfig, count: int) -> tuple[TransformerVQ, list[Batch], str]:
    """The model, trained where there is a run; its first training batches; words for both."""
    from transformer_vq.bench.doctor import Batch
    from transformer_vq.data import check_sources, mixed_batch, prepare_sources
    from transformer_vq.models import TransformerVQ
    from transformer_vq.training import CheckpointError, load_run
    from transformer_vq.training.language import with_vocabulary

    mixture = prepare_sources(settings.data)
    train = settings.train
    check_sources(mixture, train.seq_len, 1)
    if run is not None:
        with one_line_for(CheckpointError):
            loaded = load_run(run)
        model, weights = loaded.model, f"the weights of step {loaded.step}"
        model.set_step(loaded.step)
    else:
        model = TransformerVQ(with_vocabulary(settings.model, mixture.tokenizer), seed=settings.seed)
        weights = "untrained weights"
    reset = settings.data.document_boundaries == "reset"
    rows = range(train.micro_batch or train.batch_size)
    files = mixture.files("train")
    raw = [
        mixed_batch(files, mixture.shares, settings.seed, step, rows, train.batch_size, train.seq_len, reset=reset)
        for step in range(count)
    ]
    batches = [Batch(b.tokens, b.labels, b.segments) for b in raw]
    return model, batches, f"{weights}, {count} batches of {len(rows)} x {train.seq_len} tokens of {mixture.name}"


def model_and_batch(run: str, overrides: list[str], rows: int) -> tuple[TransformerVQ, Batch, str]:
    """The trained model of a language-model or recall run, so many rows as it was trained on, words for both."""
    import torch

    from transformer_vq.bench.doctor import Batch
    from transformer_vq.config import RunConfig, load_config
    from transformer_vq.config.load import read_yaml
    from transformer_vq.training import CheckpointError

    if "recall" in read_yaml(folder_of(run) / "config.yaml"):
        from transformer_vq.training.recall import load_task

        with one_line_for(CheckpointError):
            task, step = load_task(run, overrides)
        tokens, labels = task.batch(0, range(rows), 0).inputs
        return task.model, Batch(tokens, labels), f"the weights of step {step}, {rows} x {tokens.shape[1]} tokens"
    settings = load_config(folder_of(run), overrides, RunConfig)
    count = -(-rows // (settings.train.micro_batch or settings.train.batch_size))
    model, batches, described = model_and_batches(run, settings, count)
    tokens, labels = (torch.cat([getattr(b, name) for b in batches])[:rows] for name in ("tokens", "labels"))
    segments = (
        None if batches[0].segments is None else torch.cat([b.segments for b in batches if b.segments is not None])
    )
    which = f"{described.partition(',')[0]}, {rows} x {tokens.shape[1]} tokens of {settings.data.source}"
    return model, Batch(tokens, labels, None if segments is None else segments[:rows]), which
