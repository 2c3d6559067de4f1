"""Settings of a run: one class per block of the config file, and the whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from transformer_vq.config.base import Settings
from transformer_vq.config.mix import MixSource, check_mix
from transformer_vq.config.model import TransformerVQConfig


class DataConfig(Settings):
    """Where tokens come from and in which order they are read."""

    source: str = Field(
        "builtin",
        min_length=1,
        description="builtin | enwik8, fetched | a text file, archive or folder | pictures as .npz | "
        "a folder of token files, train.bin and val.bin (uint16) | "
        "hf:NAME[/CONFIG][@REVISION] of the hub | hf:FOLDER of parquet, JSON or pictures",
    )
    mix: dict[str, MixSource] | None = Field(
        None,
        description="several sources in place of one, NAME: {source: ..., weight: ...}, each also with a field, "
        "document_separator and limits of its own; read in windows; evaluated by source, and together as their mean by "
        "weights",
    )
    field: str = Field(
        "text", min_length=1, description="column that holds the text of a dataset row; a row without text is skipped"
    )
    image_size: int | None = Field(
        None, ge=1, description="of pictures: their bytes at this size, RGB, none cut in two; null: at their own"
    )
    streaming: bool = Field(False, description="read a dataset row by row instead of downloading it whole")
    shuffle: int | None = Field(
        None,
        ge=2,
        description="with streaming: files in a random order, always the same, and the rows in each so many; null: as "
        "they lie",
    )
    max_bytes: int | None = Field(None, ge=1, description="keep only about this much text of each split")
    max_eval_bytes: int | None = Field(
        None, ge=1, description="keep only about this much of valid and of test; null: as max_bytes says"
    )
    tokenizer: str = Field(
        "bytes",
        min_length=1,
        description="bytes | bytes+3, as the paper's checkpoints count | bpe:SIZE, trained on the train split | a "
        "tokenizer.json, or a folder or run with one | hf:NAME[@REVISION] of the hub | tiktoken:NAME, a .tiktoken file "
        "or a SentencePiece .model, of the extra `tokenizers` | tokens:SIZE, ids of so large a vocabulary without text",
    )
    order: Literal["windows", "streams"] = Field(
        "windows", description="windows: random, independent | streams: contiguous, state carried (truncated BPTT)"
    )
    document_boundaries: Literal["ignore", "reset"] = Field(
        "ignore", description="reset: attention never crosses from one document into the next"
    )
    document_separator: str | None = Field(
        None,
        min_length=1,
        description="text between documents, in which escapes such as \\n, \\t, \\0 and \\x1e are understood; files "
        "and dataset rows are documents anyway",
    )
    cache: str | None = Field(None, description="folder of token files; null: the user's cache folder")

    @model_validator(mode="after")
    def _mix_fits(self) -> DataConfig:
        if self.mix is not None:
            check_mix(self.mix, self.source, self.order)
        if self.shuffle is not None and not self.streaming:
            raise ValueError(f"shuffle = {self.shuffle}: needs streaming = true")
        return self


class OptimizationConfig(Settings):
    """The optimization, whatever is trained."""

    init_from: str | None = Field(None, description="RUN[@best|@last|@STEP]: start from the weights of another run")
    init_quantizers: Literal["taken", "fresh"] = Field(
        "taken", description="with init_from: taken: a quantizer of the same kind comes along | fresh: all start anew"
    )
    steps: int = Field(400, ge=1, description="optimizer steps; may grow at --resume, of a finished run too")
    extend: Literal["continue", "restart"] = Field(
        "continue",
        description="steps grown at --resume: continue: the schedule as if it had been planned so | restart: a new "
        "warmup and decay over the added steps",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="end after so many evaluations in a row without a better valid number; null: never before steps",
    )
    batch_size: int = Field(
        16, ge=1, description="sequences or images per optimizer step, over all processes and micro-batches"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="sequences or images per forward pass and process; null: all at once"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "muon", "adafactor"] = Field(
        "adamw", description="adamw | muon: Muon for hidden matrices, AdamW for the rest | adafactor"
    )
    betas: tuple[float, float] = Field((0.9, 0.98), strict=False, description="AdamW's decay rates")
    eps: float = Field(1e-9, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of everything that is not one-dimensional")
    decay_scaled_by_lr: bool = Field(
        True, description="decay × learning rate, as in torch; false: decay alone, as in the paper"
    )
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warmup: cosine | wsd: stable, then linear decay | constant"
    )
    warmup: int = Field(40, ge=0, description="steps of linear warmup")
    final_lr: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    decay_share: float = Field(0.2, gt=0, le=1, description="wsd: last share of the steps, in which the rate falls")
    precision: Literal["fp32", "bf16", "fp64"] = Field("fp32", description="bf16: autocast; parameters stay fp32")
    compile: bool = Field(False, description="torch.compile the whole model: once, in the first step")
    log_every: int = Field(10, ge=1, description="steps between training records")
    timeout: float | None = Field(
        600.0,
        gt=0,
        description="seconds that a process may keep the others waiting, or a checkpoint may take, before the run ends "
        "and says which it was; compiling included; null: for ever",
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="beside metrics.jsonl, which is always written"
    )

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> OptimizationConfig:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch = {self.micro_batch}: must divide batch_size = {self.batch_size}")
        return self


class TrainConfig(OptimizationConfig):
    """The optimization of a language model."""

    shard: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="parameters, gradients and optimizer states: none: whole on every process | full: cut over all | "
        "hybrid: cut over the processes of each machine; codebooks are whole everywhere",
    )
    context_parallel: int = Field(
        1, ge=1, description="processes that share one sequence, each with a piece; divides seq_len and the processes"
    )
    seq_len: int = Field(512, ge=1, description="tokens per sequence and step (the update window of truncated BPTT)")
    average: float | None = Field(
        None,
        gt=0,
        le=1,
        description="last share of the steps whose weights are averaged: at the end their mean is evaluated and kept; "
        "parameters alone, an EMA codebook stays as it is; null: the last weights",
    )
    teacher: str | None = Field(
        None,
        description="RUN[@best|@last|@STEP] of the same tokenizer, looked for in run_dir first: its predictions are "
        "learned, as KL(teacher ‖ model); order: windows",
    )
    teacher_share: float = Field(
        1.0, gt=0, le=1, description="with a teacher, share of KL in the loss; the rest is cross-entropy with the text"
    )
    updates_per_sequence: int | None = Field(
        None,
        ge=1,
        description="order: streams; the state is dropped after this many updates; null: at the corpus's end",
    )

    @model_validator(mode="after")
    def _average_fits(self) -> TrainConfig:
        if self.average is not None and self.patience is not None:
            raise ValueError(
                f"average = {self.average}: with patience nobody knows which steps are the last; leave one out"
            )
        if self.average is not None and self.shard != "none":
            raise ValueError(f"average = {self.average}: not with shard = {self.shard}, which cuts the weights up")
        return self


class EvalConfig(Settings):
    """Evaluation during training and after it."""

    every: int | None = Field(
        100, ge=1, description="steps between evaluations on the valid split; null: only at the end"
    )
    context: Literal["full"] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="full: everything before, state carried | W: at most W tokens; null: full, or a sliding window of "
        "train.seq_len for a model with full-attention layers",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="during training, only this much of the split; null: all of it"
    )
    batch_size: int = Field(16, ge=1, description="streams or windows evaluated side by side")
    recurrence: int | None = Field(
        None,
        ge=2,
        le=8,
        description="score apart what the past could tell: targets whose preceding so many tokens "
        "occurred before, by how many windows ago; null: not",
    )


class CheckpointConfig(Settings):
    """What is kept of the weights."""

    every: int | None = Field(200, ge=1, description="steps between checkpoints; null: only at the end")
    keep: int = Field(2, ge=1, description="latest checkpoints that are kept, beside the best")


class RunConfig(Settings):
    """A language-model run, the whole config file."""

    seed: int = Field(0, ge=0, lt=2**63, description="of everything random: weights, batches, dropout, sampling")
    run_dir: str = Field("runs/run", min_length=1, description="the one folder that a run writes to")
    data: DataConfig = DataConfig()
    model: TransformerVQConfig = TransformerVQConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def written(self) -> RunConfig:
        """With every layer's quantizer written out."""
        return self.model_copy(update={"model": self.model.resolved()})
