"""The recall task: a language model that must answer from what it has seen, with new sequences in every step.

accuracy             share of the questions whose most likely token is the answer
loss, bits           of the questions, in nats and in bits
distanceN/accuracy   the same over questions whose key lies N tokens back (needle); N to 2N - 1, N a power of 2 (mqar,
                     repeat). Likewise distanceN/bits
lengthN/...          all of this on sequences of N tokens (`recall.eval_lengths`), in the final evaluation
other_bits           of all other tokens that are learned (repeat), per token
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from transformer_vq.config import load_config
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.data import prepare, repeat
from transformer_vq.data.recall import IGNORED, Examples, make_examples
from transformer_vq.evaluation.crew import Turn
from transformer_vq.evaluation.health import SplitHealth
from transformer_vq.evaluation.mode import call_on_nothing, evaluating
from transformer_vq.evaluation.pieces import Pieces, pieces_of_rows, write_pieces
from transformer_vq.models import TransformerVQ
from transformer_vq.models.describe import TRAINING, attention_backend, describe
from transformer_vq.models.names import check_names
from transformer_vq.training.agreement import before_joining
from transformer_vq.training.checkpoints import load_tensors, verify
from transformer_vq.training.distributed import on_main
from transformer_vq.training.language import with_vocabulary
from transformer_vq.training.loop import train
from transformer_vq.training.origin import find_checkpoint, take_weights
from transformer_vq.training.task import Losses, MicroBatch, Player, Task

TRAIN = "train"
SPLITS = {"valid": 1, "test": 2}  # their sequences are the same in every run
EXAMPLES_SEED = 20231204


class RecallTask(Task):
    """Trains a `TransformerVQ` by a `RecallRunConfig`."""

    evaluates_together = True

    def __init__(self, config: RecallRunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.corpus = None if config.data is None else prepare(config.data)
        settled = config.settled_model
        model = settled if self.corpus is None else with_vocabulary(settled, self.corpus.tokenizer)
        self.model = TransformerVQ(model, seed=config.seed)
        self.flops_per_unit = TRAINING * describe(self.model.config, config.train.seq_len)["flops_per_token"]
        attention_backend(self.model.config, device, config.train.seq_len, config.train.precision)
        for split in SPLITS:
            for length in (config.train.seq_len, *config.recall.eval_lengths):
                self._examples(1, split, length=length)  # what is wrong with a text is heard of now
        starts_late = any(getattr(quantizer, "start_step", 0) for quantizer in config.model.layer_quantizers())
        self.players = {"model": Player(self.model, config.train, partly_used=starts_late)}
        self.pieces: dict[str, Pieces] = {}  # by split

    def fingerprint(self) -> dict[str, str]:
        """Of text and tokenizer, where there is one."""
        return {} if self.corpus is None else {"text": self.corpus.sha256, "tokenizer": self.corpus.tokenizer.sha256}

    def batch(self, step: int, rows: range, slot: int) -> MicroBatch:
        """New sequences; each row has a generator of its own, so that rows do not depend on how they are split."""
        parts = [self._examples(1, TRAIN, self.config.seed, 0, step, row) for row in rows]
        tokens, labels = (
            torch.as_tensor(np.concatenate([getattr(part, name) for part in parts]), device=self.device)
            for name in ("tokens", "labels")
        )
        counts = {"lm": int((labels >= 0).sum()), "quantizers": tokens.numel()}
        return MicroBatch((tokens, labels), counts, tokens.numel(), slot)

    def losses(self, player: str, module: nn.Module, batch: MicroBatch) -> Losses:
        """Cross-entropy where there is a label, and the quantizers' own."""
        tokens, labels = batch.inputs
        out = module(tokens, labels=labels, logits=False)
        return Losses({"lm": out.loss_lm, "quantizers": out.loss_quantizers}, out.metrics)

    def set_step(self, step: int) -> None:
        """Quantizers have schedules and warm-ups."""
        self.model.set_step(step)

    def set_rows(self, first_row: int) -> None:
        """Noise goes by row of the batch."""
        self.model.set_rows(first_row)

    def after_update(self, player: str) -> None:
        """Once per optimizer step."""
        self.model.apply_codebook_statistics()

    def report(self, player: str, losses: Mapping[str, float]) -> dict[str, float]:
        """The loss without the quantizers'."""
        return {"loss_lm": losses["lm"]}

    def evaluate(self, split: str, final: bool) -> dict[str, Any]:
        """Loss and accuracy over all questions of the split, both by distance too, and codebook health.

        At the end of the run the same of `recall.eval_lengths`, of sequences that are the same in every run.
        """
        with evaluating(self.model, self.crew.in_step):
            trained_on = self.config.train.seq_len
            health = SplitHealth(self.model)
            examples = self._examples(self.config.recall.examples, split, *_seed(split))
            numbers, pieces = self._score(examples, health)
            found = health.shared(self.crew).summary()
            for length in self.config.recall.eval_lengths if final else ():
                seed = _seed(split) if length == trained_on else (*_seed(split), length)
                scored, _ = self._score(self._examples(self.config.recall.examples, split, *seed, length=length))
                numbers |= {f"length{length}/{key}": value for key, value in scored.items()}
        if final:
            self.pieces[split] = pieces
        return {**numbers, **found}

    def _score(self, examples: Examples, health: SplitHealth | None = None) -> tuple[dict[str, Any], Pieces]:
        """What the model answers to all of the examples, and to each."""
        size, asked = self.config.eval.batch_size, examples.distance > 0
        found: dict[int, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}  # by batch

        def do(turn: Turn) -> int:
            batch = turn.course
            rows = slice(batch * size, (batch + 1) * size)
            tokens, labels = (torch.as_tensor(x[rows], device=self.device) for x in examples[:2])
            if health is not None:
                health.count_only(torch.ones_like(tokens, dtype=torch.bool), (batch,))
            with health or nullcontext():
                logits = self.model(tokens).logits
            found[batch] = _losses(logits, labels), (logits.argmax(-1) == labels).cpu().numpy()
            return len(tokens)

        count = len(examples.labels)
        idle = partial(call_on_nothing, self.model, self.device)
        self.crew.work([1] * -(-count // size), do, idle, count, self.check_stop)
        nats, right = (np.concatenate(parts) for parts in zip(*self.crew.together(found).values(), strict=True))
        far = examples.distance if self.config.recall.task == "needle" else _power_of_two(examples.distance)
        bits, others = nats / math.log(2), ~asked & (examples.labels != IGNORED)
        measured = {"loss": (nats, asked), "accuracy": (right, asked), "bits": (bits, asked)}
        measured |= {"other_bits": (bits, others)} if others.any() else {}
        for n in np.unique(far[asked]):
            at = asked & (far == n)
            measured |= {f"distance{n}/accuracy": (right, at), f"distance{n}/bits": (bits, at)}
        numbers = {name: float(values[counts].mean()) for name, (values, counts) in measured.items()}
        return {**numbers, "questions": int(asked.sum())}, pieces_of_rows(measured)

    def warm_start(self, weights: dict[str, Tensor], run: Path) -> list[str]:
        """As `take_weights` does it."""
        theirs = load_config(run, [], RecallRunConfig).model.layer_quantizers()
        ours, fresh = self.config.model.layer_quantizers(), self.config.train.init_quantizers == "fresh"
        tokenizer = None if self.corpus is None else self.corpus.tokenizer
        return take_weights(self.model, weights, ours, theirs, run, fresh, tokenizer)

    def describe(self) -> dict[str, str]:
        """What is about to be trained."""
        recall, model = self.config.recall, self.model.config
        kinds = f"tokens of {recall.vocab}" if self.corpus is None else f"tokens of {self.corpus.describe()}"
        return {
            "data": f"{recall.task}, sequences of {self.config.train.seq_len} {kinds}",
            "model": f"{model.layers} {model.block} layers of width {model.width}",
        }

    def begin(self, folder: Path) -> None:
        """A tokenizer belongs to the run."""
        if self.corpus is not None:
            self.corpus.tokenizer.save(folder)

    def finish(self, folder: Path) -> None:
        """What each example was answered."""
        write_pieces(folder, self.pieces)

    def _examples(self, rows: int, split: str, *seed: int, length: int | None = None) -> Examples:
        recall, length, draw = self.config.recall, length or self.config.train.seq_len, np.random.default_rng(seed)
        if self.corpus is None:
            return make_examples(recall, length, rows, draw)
        return repeat.make_examples(self.corpus.splits[split], recall.repeat, length, rows, split == TRAIN, draw)


def _seed(split: str) -> tuple[int, int]:
    return EXAMPLES_SEED, SPLITS[split]


def _power_of_two(distance: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest that is not above; 1 for 0."""
    return 2 ** np.floor(np.log2(np.maximum(distance, 1))).astype(np.int64)


def _losses(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Nats of each label (B, T), 0 where there is none."""
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape).double().cpu().numpy()


def load_task(name: str, overrides: Sequence[str] = ()) -> tuple[RecallTask, int]:
    """The task of `RUN[@best|@last|@STEP]` with its trained model on the CPU, and the step of the weights.

    Raises ConfigError, CheckpointError.
    """
    checkpoint = find_checkpoint(name)
    config = load_config(checkpoint.parents[1], overrides, RecallRunConfig)
    verify(checkpoint)
    task = RecallTask(config, torch.device("cpu"))
    if config.train.precision == "fp64":
        task.model.double()
    task.model.load_state_dict(load_tensors(checkpoint / "model.safetensors"))
    step = int(checkpoint.name.removeprefix("step-"))
    task.set_step(step)
    return task, step


def run(config: RecallRunConfig, resume: bool = False, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train the model that `config` describes and return its summary; see `training.train` for the rules and errors."""
    with before_joining():
        check_names(config.settled_model)

    def make(accelerator: Accelerator) -> RecallTask:
        if (data := config.data) is not None:  # one process tokenizes, the others find the tokens
            on_main(accelerator, lambda: prepare(data) and None, long=True)
        return RecallTask(config, accelerator.device)

    return train(config, make, resume, overwrite, quiet)
