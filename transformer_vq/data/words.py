"""Words of a text, for the perplexity per word."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transformer_vq.data.documents import Piece


class WordCounter:
    """Counts words, separated by ASCII white space, over pieces: a word may go on in the next piece."""

    SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))

    def __init__(self, words: int = 0, after_space: bool = True) -> None:
        """Go on after so many words."""
        self.words = words
        self.after_space = after_space

    def read(self, piece: Piece) -> NDArray[np.int64]:
        """Count the words that begin in this piece; the places of their first bytes are returned."""
        if not piece.text:
            return np.empty(0, np.int64)
        space = self.SPACE[np.frombuffer(piece.text, np.uint8)]
        before = self.after_space or piece.begins
        places = np.flatnonzero(~space & np.concatenate([[before], space[:-1]]))
        self.words += len(places)
        self.after_space = bool(space[-1])
        return places
