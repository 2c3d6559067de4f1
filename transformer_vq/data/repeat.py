"""Windows of real text in which a string of random letters comes back, far enough away that only a memory can tell it.

    … def read(self, qhzkvmwtrpla n): … return self.qhzkvmwtrpla …        the letters overwrite the text
    text row       a string of some letters at a random place, and again at least `gap` tokens after it last ended
    periodic row   one longer string, repeated to the end: a curriculum, copying in its simplest form

Letters are drawn one by one, so without a memory each costs log2 26 = 4.7 bits; the first `cue` of a return say which
string it is and are not scored. A pure function of the text and a generator.

Axes:  B rows  T tokens of a row
"""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np
from numpy.typing import NDArray

from transformer_vq.config import ConfigError
from transformer_vq.config.recall import RepeatConfig
from transformer_vq.data.recall import Examples
from transformer_vq.data.store import TokenFile
from transformer_vq.data.tokenizers import Tokenizer

Row = tuple[NDArray[np.int64], NDArray[np.int64]]
"""T+1 tokens in a row, and for each how far back the one lies that it repeats; 0 where it is not scored."""


def text_row(
    text: NDArray[np.unsignedinteger],
    letters: NDArray[np.int64],
    config: RepeatConfig,
    length: int,
    most: int,
    draw: np.random.Generator,
) -> Row:
    """A window of `text` with a string that returns 1 … most times (as often as fits); `length` is T.

    Places are uniform over all that leave `gap` between. Needs 2·span + gap <= T+1 <= len(text).
    """
    start = int(draw.integers(len(text) - length))
    tokens = text[start : start + length + 1].astype(np.int64)
    size = int(draw.integers(config.span[0], config.span[1] + 1))
    fitting = (length + 1 - size) // (size + config.gap)
    returns = int(draw.integers(1, min(most, fitting) + 1))
    slack = length + 1 - size - returns * (size + config.gap)
    shifts = np.sort(draw.integers(slack + 1, size=returns + 1))
    starts = shifts + np.arange(returns + 1) * (size + config.gap)
    tokens[starts[:, None] + np.arange(size)] = draw.choice(letters, size)
    distance = np.zeros(length + 1, np.int64)
    scored = starts[1:, None] + np.arange(config.cue, size)
    distance[scored] = np.diff(starts)[:, None]
    return tokens, distance


def periodic_row(letters: NDArray[np.int64], config: RepeatConfig, length: int, draw: np.random.Generator) -> Row:
    """A string of random letters repeated to the end; its length is uniform in span[0] … (T+1)/2."""
    period = int(draw.integers(config.span[0], (length + 1) // 2 + 1))
    tokens = np.resize(draw.choice(letters, period), length + 1).astype(np.int64)
    distance = np.where(np.arange(length + 1) < period + config.cue, 0, period)
    return tokens, distance


def make_examples(
    file: TokenFile, config: RepeatConfig, length: int, rows: int, training: bool, draw: np.random.Generator
) -> Examples:
    """So many rows of a split. Training rows may be periodic or have several returns; the others have one each.

    Every token has a label, the next one; `distance` says which are scored.
    Raises ConfigError where the split is too short or its tokenizer has too few letters.
    """
    if len(file) <= length:
        raise ConfigError(f"data.source: {file.name} has {len(file)} tokens; at least {length + 1} for train.seq_len")
    letters = letters_of(file.tokenizer)
    found: list[Row] = []
    for _ in range(rows):
        periodic = training and draw.random() < config.periodic
        if periodic:
            found.append(periodic_row(letters, config, length, draw))
        else:
            found.append(text_row(file.tokens, letters, config, length, config.returns if training else 1, draw))
    tokens, distance = (np.stack(part) for part in zip(*found, strict=True))
    return Examples(tokens[:, :-1], tokens[:, 1:], distance[:, 1:])


def letters_of(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The ids of a … z that are one token each.  Raises ConfigError for fewer than two."""
    ids = {tuple(tokenizer.encode(letter)) for letter in ascii_lowercase}
    single = sorted(i[0] for i in ids if len(i) == 1 and i[0] != tokenizer.unknown_id)
    if len(single) < 2:
        raise ConfigError(f"data.tokenizer: {tokenizer.name} has {len(single)} of the letters a-z; recall needs two")
    return np.array(single, np.int64)
