"""The language-model task: Transformer-VQ on windows or streams of tokens.

Two loss terms: `lm`, cross-entropy in nats per label that counts, and `quantizers`, what the layers' quantizers add per
token.

Axes:  B rows  T tokens of a row
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from transformer_vq.config import ConfigError, RunConfig, TransformerVQConfig
from transformer_vq.config.recall import load_text_config
from transformer_vq.data import (
    Batch,
    TokenFile,
    check_sources,
    load_tokenizer,
    mixed_batch,
    prepare_sources,
    stream_batch,
)
from transformer_vq.data.tokenizers import FILE, Tokenizer
from transformer_vq.evaluation.pieces import MOST_TARGETS, Pieces, pieces_of_text, write_pieces
from transformer_vq.models import ModelState, TransformerVQ
from transformer_vq.models.attention import VQAttention
from transformer_vq.models.describe import TRAINING, attention_backend, describe
from transformer_vq.models.names import check_names
from transformer_vq.ops.attention import AttentionState, FullState
from transformer_vq.quantizers import Quantizer
from transformer_vq.quantizers.probe import KeyProbe
from transformer_vq.training.agreement import before_joining
from transformer_vq.training.checkpoints import load_tensors, verify
from transformer_vq.training.context import ProcessLine, check_context, make_line
from transformer_vq.training.distributed import asked_for, on_main
from transformer_vq.training.loop import train
from transformer_vq.training.memory import complaint
from transformer_vq.training.origin import find_checkpoint, take_weights, tokenizer_hash
from transformer_vq.training.sharding import check_scalars, is_sharded
from transformer_vq.training.task import Losses, MicroBatch, Player, Task
from transformer_vq.training.teacher import Teacher, check_same_tokens, teacher_name

TRAIN = "train"
PROBED_RECORDS = 10  # one training record in so many holds `task_share`, a second backward pass, and the ranks
ROWS = ("position", "segment", "draws")  # of a ModelState, one number a row
LAYER_STATES = {kind.__name__: kind for kind in (AttentionState, FullState)}


class LanguageTask(Task):
    """Trains a `TransformerVQ` by a `RunConfig`."""

    primary = "bits_per_byte"
    evaluates_together = True

    def __init__(
        self, config: RunConfig, device: torch.device, processes: int = 1, line: ProcessLine | None = None
    ) -> None:
        """Prepare the corpus and make the model.  Raises ConfigError when data and config do not fit together.

        line: the processes that share rows with this one, each a piece of every row.
        """
        self.config, self.device, self.processes, self.line = config, device, processes, line
        self.piece = slice(0, config.train.seq_len) if line is None else line.piece(config.train.seq_len)
        self.mixture = prepare_sources(config.data)
        if not self.mixture.knows_bytes:
            self.primary = "bits_per_token"
        self.streams = config.data.order == "streams"
        updates = config.train.updates_per_sequence
        resets = self.streams and config.data.document_boundaries == "reset"
        self.whole = (  # each document is a sequence: a picture is not cut
            resets
            and updates is not None
            and all(f.documents_have(updates * config.train.seq_len) for f in self.mixture.files(TRAIN).values())
        )
        rows = config.train.batch_size if self.streams else 1
        check_sources(self.mixture, config.train.seq_len, rows, updates if updates and self.whole else 1)
        self.model = TransformerVQ(with_vocabulary(config.model, self.mixture.tokenizer), seed=config.seed)
        starts_late = any(getattr(quantizer, "start_step", 0) for quantizer in config.model.layer_quantizers())
        self.players = {"model": Player(self.model, config.train, partly_used=starts_late)}
        self.described = describe(self.model.config, config.train.seq_len)
        look = config.train.seq_len, config.train.precision, config.train.context_parallel
        backend, reason = attention_backend(self.model.config, device, *look)  # one that cannot run is heard of now
        self.attention = f"{backend}: {reason}"
        self.flops_per_unit = TRAINING * self.described["flops_per_token"]
        self.teacher = self._teacher()
        self.pieces: dict[str, Pieces] = {}  # by split
        self.states: dict[int, ModelState] = {}  # by micro-batch, with streams
        self.states_before: dict[int, ModelState] = {}

    def _teacher(self) -> Teacher | None:
        """The run whose predictions are learned, on the device and in the precision of this one."""
        name = teacher_name(self.config)
        if name is None:
            return None
        try:
            loaded = load_run(name, self.device)
        except ConfigError as error:
            raise ConfigError(f"train.teacher = {error}") from None
        theirs, ours = loaded.model.config.vocab_size, self.model.config.vocab_size
        check_same_tokens(name, (loaded.tokenizer, theirs), (self.mixture.tokenizer, ours))
        return Teacher(name, loaded.model.double() if self.config.train.precision == "fp64" else loaded.model.float())

    def describe(self) -> dict[str, str]:
        """What is about to be trained."""
        model, length = self.model.config, self.config.train.seq_len
        found = self.described
        grows = (
            f" after {length:,} tokens; it grows with the text" if found["state_grows"] else ", however long the text"
        )
        taught = {"teacher": self.teacher.name} if self.teacher else {}
        settings = self.config.model_copy(update={"model": model})
        short = complaint(settings, self.device.type, self.processes)
        return {
            "data": self.mixture.describe(),
            "model": f"{model.layers} {model.block} layers of width {model.width}, {found['parameters']:,} parameters",
            "state": f"{found['state_numbers']:,} numbers per stream{grows}",
            "attention": self.attention,
            **taught,
            **({"warning": short} if short else {}),
        }

    def fingerprint(self) -> dict[str, str]:
        """Of text and tokenizer."""
        texts = {name or "text": corpus.sha256 for name, corpus in self.mixture.sources.items()}
        return {**texts, "tokenizer": self.mixture.tokenizer.sha256}

    def batch(self, step: int, rows: range, slot: int) -> MicroBatch:
        """Rows of the train split, or this process's pieces of them, on the device."""
        whole = self._read(step, rows)
        segments = None if whole.segments is None else whole.segments[:, self.piece]
        raw = Batch(whole.tokens[:, self.piece], whole.labels[:, self.piece], segments, whole.fresh)
        segments = None if segments is None else segments.to(self.device)
        batch = Batch(raw.tokens.to(self.device), raw.labels.to(self.device), segments, raw.fresh)
        labels = int((raw.labels >= 0).sum())
        counts = {"lm": labels, "teacher": labels, "quantizers": raw.tokens.numel()}
        return MicroBatch(batch, counts, raw.tokens.numel(), slot)

    def _read(self, step: int, rows: range) -> Batch:
        train, data = self.config.train, self.config.data
        files, reset = self.mixture.files(TRAIN), data.document_boundaries == "reset"
        shape = (rows, train.batch_size, train.seq_len)
        if self.streams:
            return stream_batch(
                files[""], self.config.seed, step, *shape, train.updates_per_sequence, reset, self.whole
            )
        return mixed_batch(files, self.mixture.shares, self.config.seed, step, *shape, reset=reset)

    def losses(self, player: str, module: nn.Module, batch: MicroBatch) -> Losses:
        """One forward pass, from the carried state with streams."""
        rows: Batch = batch.inputs
        state = self.states.get(batch.slot) if self.streams else None
        if state is not None:  # where all start anew, None is the same and the quicker way through attention
            state = None if bool(rows.fresh.all()) else state.reset_rows(rows.fresh)
        with self.probe if self.probing else nullcontext(), self.model.split_over(self.line):
            out = module(
                rows.tokens, state=state, labels=rows.labels, segments=rows.segments, logits=bool(self.teacher)
            )
        if self.streams:
            self.states[batch.slot] = out.state
        terms, taught = {"lm": out.loss_lm, "quantizers": out.loss_quantizers}, {}
        if self.teacher is not None:
            share = self.config.train.teacher_share
            taught = {"loss_lm": out.loss_lm.detach()}
            terms = {"teacher": share * self.teacher.divergence(rows, out.logits), "quantizers": out.loss_quantizers}
            terms |= {"lm": (1 - share) * out.loss_lm} if share < 1 else {}
        seen = self.probe.ranks() if self.probing else {}
        if self.probing and not self.model.checkpoint_activations:  # a second backward pass would keep what that saves
            seen |= self.probe.task_shares(out.loss_lm, out.loss_quantizers)
        return Losses(terms, {"loss_commit": out.loss_commit.detach(), **taught, **out.metrics, **seen})

    def compile(self, player: str) -> None:
        """The model whole, attention, quantizers and their notes included: one graph.

        Cut over processes a layer at a time, since parameters are gathered in between; with activation checkpointing
        what lies between graph breaks, for a compiled layer that runs again would count its keys again.
        """
        if is_sharded(self.model) and not self.model.checkpoint_activations:
            for layer in self.model.layers:
                layer.forward = torch.compile(layer.forward)
        else:
            self.model.compile()

    def set_step(self, step: int) -> None:
        """Quantizers have schedules and warm-ups; the gradients at the keys are looked at now and then."""
        self.model.set_step(step)
        self.states_before = dict(self.states)
        train, done = self.config.train, step + 1
        self.probing = (
            done in (1, train.steps) or done % (PROBED_RECORDS * train.log_every) == 0
        ) and not train.compile
        layers = enumerate(cast(Iterable[VQAttention], self.model.layers))
        self.probe = KeyProbe({i: layer.quantizer for i, layer in layers if layer.quantizes})

    def set_rows(self, first_row: int) -> None:
        """Noise goes by row of the batch."""
        self.model.set_rows(first_row, self.piece.start)

    def after_update(self, player: str) -> None:
        """Once per optimizer step, over all micro-batches and processes."""
        self.model.apply_codebook_statistics()

    def report(self, player: str, losses: Mapping[str, float]) -> dict[str, float]:
        """loss_lm, and what it is per byte of the train split, or per token where the text is not known.

        With a teacher, the divergence from it; `loss_lm` is then a metric.
        """
        if "teacher" in losses:
            return {"loss_teacher": losses["teacher"] / self.config.train.teacher_share}
        bits = losses["lm"] / math.log(2)
        if not self.mixture.knows_bytes:
            return {"loss_lm": losses["lm"], "bits_per_token": bits}
        return {"loss_lm": losses["lm"], "bits_per_byte": bits / self.mixture.bytes_per_token(TRAIN)}

    def evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """See `transformer_vq.evaluation.evaluate`; during training at most `eval.max_tokens`.

        At the end the losses of its pieces are kept, for comparisons with other runs.
        """
        from transformer_vq.evaluation import default_context, evaluate_sources

        settings = self.config.eval
        short = all(len(file) <= MOST_TARGETS for file in self.mixture.files(split).values())

        def keep(nats: NDArray[np.float64], read: TokenFile) -> None:
            self.pieces[split] = pieces_of_text(nats, read, self.config.train.seq_len)

        return evaluate_sources(
            self.model,
            self.mixture,
            split,
            context=settings.context or default_context(self.model, self.config.train.seq_len),
            batch_size=settings.batch_size,
            max_tokens=None if final else settings.max_tokens,
            reset_documents=self.config.data.document_boundaries == "reset",
            recurrence=settings.recurrence,
            progress=self.check_stop,
            crew=self.crew,
            keep=keep if final and short else None,
        )

    def quantizers(self) -> dict[str, Quantizer]:
        """Those of the layers."""
        layers = enumerate(cast(Iterable[VQAttention], self.model.layers))
        return {f"layer{i}": layer.quantizer for i, layer in layers if layer.quantizes}

    def identify(self, step: int, rows: range) -> str:
        """The rows, and the text that each begins with."""
        raw, decode = self._read(step, rows), self.mixture.tokenizer.decode
        texts = ", ".join(repr(decode(row[:16].tolist())) for row in raw.tokens[:4])
        return (
            f"rows {rows.start}-{rows.stop - 1} of {self.config.data.order} of {self.mixture.name}, beginning {texts}"
        )

    def carried(self) -> dict[str, Tensor]:
        """The attention state of each micro-batch's rows."""
        tensors: dict[str, Tensor] = {}
        for slot, state in self.states.items():
            tensors |= {f"{slot}.{name}": getattr(state, name) for name in ROWS}
            for i, layer in enumerate(state.layers):
                place = f"{slot}.{i}.{type(layer).__name__}"
                tensors |= {f"{place}.{field}": tensor for field, tensor in layer._asdict().items()}
            tensors |= {f"{slot}.inputs.{i}": tensor for i, tensor in enumerate(state.inputs)}
        return tensors

    def abandon(self) -> None:
        """The streams stand where they stood before the step."""
        super().abandon()
        self.states = self.states_before

    def restore(self, carried: Mapping[str, Tensor]) -> None:
        """What `carried` gave."""
        on_device = {name: tensor.to(self.device) for name, tensor in carried.items()}
        self.states = {}
        for slot in sorted(int(name.partition(".")[0]) for name in on_device if name.endswith(".position")):
            self.states[slot] = _state(on_device, f"{slot}.")

    def warm_start(self, weights: dict[str, Tensor], run: Path) -> list[str]:
        """As `take_weights` does it: embedding and head come along from a run of the same tokenizer."""
        theirs = load_text_config(run, []).model.layer_quantizers()
        ours, fresh = self.config.model.layer_quantizers(), self.config.train.init_quantizers == "fresh"
        return take_weights(self.model, weights, ours, theirs, run, fresh, self.mixture.tokenizer)

    def finish(self, folder: Path) -> None:
        """Pictures of the run, and what it scored on each piece."""
        from transformer_vq.evaluation.plots import write_plots

        write_pieces(folder, self.pieces)
        write_plots(folder)

    def check_resumes(self, folder: Path) -> None:
        """The same tokenizer by content: a file or a name on the hub may have become another since."""
        if tokenizer_hash(folder) not in (None, self.mixture.tokenizer.sha256):
            raise ConfigError(
                f"data.tokenizer = {self.config.data.tokenizer}: is no longer the tokenizer that {folder} was trained "
                f"with; data.tokenizer={folder / FILE} in a new run, or --overwrite"
            )

    def begin(self, folder: Path) -> None:
        """The tokenizer belongs to the run."""
        self.mixture.tokenizer.save(folder)


class LoadedRun(NamedTuple):
    """A trained language model."""

    config: RunConfig
    model: TransformerVQ
    """In evaluation mode."""
    tokenizer: Tokenizer
    step: int


def run(config: RunConfig, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train the language model that `config` describes and return its summary; see `train` for the rules and errors."""
    with before_joining():
        check_names(config.model)
        teacher_name(config)
        check_context(config, asked_for())
        check_scalars(config.model, config.train.shard, asked_for())
        config = config.written()

    streams = config.data.order == "streams"

    def make(accelerator: Accelerator) -> LanguageTask:
        # one process tokenizes, the others find the tokens
        on_main(accelerator, lambda: prepare_sources(config.data) and None, long=True)
        line = make_line(config.train.context_parallel, accelerator.device, accelerator.num_processes, streams)
        return LanguageTask(config, accelerator.device, accelerator.num_processes, line)

    return train(config, make, resume, overwrite, quiet)


def load_run(run: str, device: torch.device | str = "cpu") -> LoadedRun:
    """The model of `RUN[@best|@last|@STEP]`, by default the last.  Raises ConfigError, CheckpointError."""
    checkpoint = find_checkpoint(run)
    folder = checkpoint.parents[1]
    config, tokenizer = load_text_config(folder, []), load_tokenizer(folder)
    verify(checkpoint)
    model = TransformerVQ(with_vocabulary(config.model, tokenizer), seed=config.seed)
    if config.train.precision == "fp64":
        model = model.double()
    model.load_state_dict(load_tensors(checkpoint / "model.safetensors"))
    return LoadedRun(config, model.to(device).eval(), tokenizer, int(checkpoint.name.removeprefix("step-")))


def with_vocabulary(model: TransformerVQConfig, tokenizer: Tokenizer) -> TransformerVQConfig:
    """The model's settings with the tokenizer's vocabulary size.  Raises ConfigError when another was asked for."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {model.vocab_size}: must be at least {tokenizer.vocab_size}, the tokenizer's tokens"
        )
    return model.model_copy(update={"vocab_size": model.vocab_size or tokenizer.vocab_size})


def _state(tensors: Mapping[str, Tensor], slot: str) -> ModelState:
    """The state whose tensors are named `SLOT.LAYER.KIND.FIELD`."""
    layers: dict[int, dict[str, Tensor]] = {}
    kinds: dict[int, str] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(slot).split(".")
        if name.startswith(slot) and len(parts) == 3:  # "0.AttentionState.v", not "inputs.0"
            layers.setdefault(int(parts[0]), {})[parts[2]] = tensor
            kinds[int(parts[0])] = parts[1]
    states = tuple(LAYER_STATES[kinds[i]](**layers[i]) for i in sorted(layers))
    convolved = (f"{slot}inputs.{i}" for i in range(len(states)))
    inputs = tuple(tensors[name] for name in convolved if name in tensors)
    return ModelState(states, **{name: tensors[f"{slot}{name}"] for name in ROWS}, inputs=inputs)
