"""Documents to rows of tokens.

Packed, documents lie one after another and are cut into rows of `block_size` tokens. With b for begin, e for end and
block_size 8:

    documents    b A A A A e   b P Q R S T U e
    row 0        b A A A A e b P     positions 0 1 2 3 4 5 0 1     labels - A A A A e - P
    row 1        P Q R S T U e .     positions 0 1 2 3 4 5 6 0     labels - Q R S T U e -

A document that is cut goes on in the next row with its last token repeated: it is context there, no label. So every
token but begin is a label exactly once. Positions restart at 0 at every begin, at every row and at the padding (.) of
the last row.
"""

from collections.abc import Callable

import numpy as np
import torch

from .documents import Documents
from .mixture import RowDataset

IGNORED = -100  # label that the loss leaves out


class PackedDataset(RowDataset):
    """Rows of documents with random access: {"input_ids", "labels", "position_ids"}, int64 (length,) each.

    Labels are not shifted. Rows are cut when they are asked for, from 6 bytes of memory a token.

    Args:
        documents: Documents in the order in which they are laid out.
        block_size: Tokens in a row.
        pad_id: Id of the token that fills the last row.
        packing: Whether rows are filled with documents; else every document starts a row of its own.
        noise: Gives the input of the model for tokens of which some are labels; see `TextNoise`.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        documents: Documents,
        block_size: int,
        pad_id: int,
        packing: bool = True,
        noise: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray] | None = None,
        seed: int = 0,
    ):
        super().__init__(seed)
        self.noise = noise
        self.tokens, self.is_start, self.is_label = documents.tokens, documents.is_start, documents.is_label
        self.labels = documents.labels
        self.row_length, self.pad_id = (block_size if packing else None), pad_id
        self.starts, self.stops = (
            _cut_packed(self.is_start, block_size) if packing else _cut_apart(documents.lengths, block_size)
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): tokens of each row, padding left out."""
        return self.stops - self.starts

    def draw(self, index: int, occurrence: int) -> dict[str, torch.Tensor]:
        part = slice(self.starts[index], self.stops[index])
        tokens, is_label = self.tokens[part], self.is_label[part]
        shown = tokens if self.noise is None else self.noise(tokens, is_label, self.generator(index, occurrence))
        labels = np.where(is_label, self.labels[part], IGNORED)
        labels[0] = IGNORED  # a begin token, or the repeated token of a document that was cut
        missing = 0 if self.row_length is None else self.row_length - len(tokens)
        restarts = np.pad(self.is_start[part], (0, missing))
        restarts[len(tokens) : len(tokens) + 1] = True  # the padding, if there is any
        places = np.arange(len(restarts))
        row = {
            "input_ids": np.pad(shown, (0, missing), constant_values=self.pad_id),
            "labels": np.pad(labels, (0, missing), constant_values=IGNORED),
            "position_ids": places - np.maximum.accumulate(np.where(restarts, places, 0)),
        }
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in row.items()}


def _cut_packed(is_start: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    starts, total, start = [], len(is_start), 0
    while start < total:
        starts.append(start)
        start += block_size
        if start < total and not is_start[start]:
            start -= 1
    starts = np.array(starts)
    return starts, np.minimum(starts + block_size, total)


def _cut_apart(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    starts, stops = [], []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        # the last cut leaves at least one token besides the repeated one
        fragments = range(end - length, end - 1, block_size - 1)
        starts += fragments
        stops += [min(start + block_size, end) for start in fragments]
    return np.array(starts), np.array(stops)
