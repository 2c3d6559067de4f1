"""Several sources with weights, one tokenizer: `data.mix`.

A training window is of source i with probability p_i = weight_i / Σ weight; documents never cross from one source into
another, for no window does. Each source is tokenized and kept by itself, as if it were alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from filelock import FileLock

from transformer_vq.config import ConfigError, DataConfig
from transformer_vq.data.cache import cache_of
from transformer_vq.data.corpora import open_source
from transformer_vq.data.documents import Piece, border_of
from transformer_vq.data.sources import Source
from transformer_vq.data.store import Corpus, TokenFile, check_lengths, prepare
from transformer_vq.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_identity
from transformer_vq.data.tokenizing import Progress, read_split

SAMPLE = 200_000_000
"""Bytes that a BPE is trained on, at most."""


@dataclass(frozen=True)
class Mixture:
    """The sources of a run. One that is alone, `data.source`, has the name ''."""

    sources: Mapping[str, Corpus]
    weights: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """p_i, which sum to 1."""
        return {name: weight / math.fsum(self.weights.values()) for name, weight in self.weights.items()}

    @property
    def tokenizer(self) -> Tokenizer:
        """The one of all."""
        return next(iter(self.sources.values())).tokenizer

    @property
    def alone(self) -> Corpus | None:
        """The corpus of a run with one `data.source`."""
        return self.sources.get("")

    @property
    def name(self) -> str:
        """A phrase that says what it is."""
        if self.alone is not None:
            return self.alone.name
        return " + ".join(f"{name} ({share:.3g})" for name, share in self.shares.items())

    def describe(self) -> str:
        """A paragraph, or one a source."""
        if self.alone is not None:
            return self.alone.describe()
        shares = self.shares
        return "\n".join(f"{shares[n]:.3g} of {n}: {corpus.describe()}" for n, corpus in self.sources.items())

    def files(self, split: str) -> dict[str, TokenFile]:
        """A split of every source."""
        return {name: corpus.splits[split] for name, corpus in self.sources.items()}

    @property
    def knows_bytes(self) -> bool:
        """Tokens came with their text, so that bits per byte are known."""
        return all(file.bytes is not None for corpus in self.sources.values() for file in corpus.splits.values())

    def bytes_per_token(self, split: str) -> float:
        """Of the text that is drawn from the split: Σ p_i bytes_i / tokens_i."""
        shares = self.shares
        return math.fsum(shares[name] * (file.bytes or 0) / len(file) for name, file in self.files(split).items())


def prepare_sources(config: DataConfig, progress: Progress | None = None) -> Mixture:
    """Tokenize every source, or find it tokenized.  Raises ConfigError, one line that names the source."""
    if config.mix is None:
        return Mixture({"": prepare(config, progress)}, {"": 1.0})
    weights = {name: source.weight for name, source in config.mix.items()}
    apart = {name: alone(config, name) for name in config.mix}
    if config.tokenizer.startswith("bpe:"):
        trained = shared_tokenizer(config, apart, weights)
        apart = {name: one.model_copy(update={"tokenizer": str(trained)}) for name, one in apart.items()}
    corpora = {}
    for name, one in apart.items():
        with_source = None if progress is None else (lambda split, size, name=name: progress(f"{name} {split}", size))
        try:
            corpora[name] = prepare(one, with_source)
        except ConfigError as error:
            raise ConfigError(f"data.mix.{name}: {error}") from None
    return Mixture(corpora, weights)


def check_sources(mixture: Mixture, seq_len: int, streams: int = 1, updates: int = 1) -> None:
    """`check_lengths` of every source."""
    for corpus in mixture.sources.values():
        check_lengths(corpus, seq_len, streams, updates)


def alone(config: DataConfig, name: str) -> DataConfig:
    """The settings of one source of the mix, as if it were the only one."""
    assert config.mix is not None, "callers ask for a source of a mix"
    own = config.mix[name].model_dump(exclude={"weight"}, exclude_none=True)
    return config.model_copy(update={"mix": None, **own})


def shared_tokenizer(config: DataConfig, apart: Mapping[str, DataConfig], weights: Mapping[str, float]) -> Path:
    """The file of a BPE trained on the train splits of all sources, in proportion to their weights."""
    identity = tokenizer_identity(config.tokenizer)
    sources = {}
    for name, one in apart.items():
        try:
            sources[name] = open_source(one, border_of(one, reads_text=True))
        except ConfigError as error:
            raise ConfigError(f"data.mix.{name}: {error}") from None
    limits = {name: [one.max_bytes, one.document_separator] for name, one in apart.items()}
    made_from = [
        identity,
        {name: source.fingerprint for name, source in sources.items()},
        limits,
        dict(weights),
        SAMPLE,
    ]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    folder = cache_of(config) / "mixtures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.json"
    with FileLock(folder / f"{key}.lock"):
        if not path.is_file():
            tokenizer = make_tokenizer(config.tokenizer, sample(sources, apart, weights))
            part = path.with_suffix(".part")
            part.write_text(tokenizer.to_json(), encoding="utf-8")
            part.replace(path)
    return path


def sample(
    sources: Mapping[str, Source], apart: Mapping[str, DataConfig], weights: Mapping[str, float]
) -> Iterator[Piece]:
    """As much train text as there is, SAMPLE bytes at most, p_i of it of source i: a short one is read again."""

    def read(name: str) -> Iterator[Piece]:
        return read_split(sources[name], "train", apart[name], border_of(apart[name], reads_text=True))

    there = 0
    for piece in chain.from_iterable(map(read, sources)):
        there += len(piece.text)
        if there >= SAMPLE:  # the rest, which may be terabytes, need not be looked at
            break
    for name in sources:
        left = min(there, SAMPLE) * weights[name] / math.fsum(weights.values())
        while left > 0:
            before = left
            for piece in read(name):
                if left <= 0:
                    break
                left -= len(piece.text)
                yield piece
            if left == before:
                break  # no text: what is wrong is said when the source is tokenized
