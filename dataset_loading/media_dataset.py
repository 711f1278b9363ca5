"""Conversations with media to rows.

Packed, documents stay whole: which of them share a row of `block_size` tokens is decided in advance, from the most
tokens that each may have. Otherwise each is a row of its own.
"""

from bisect import bisect_left, insort
from typing import Any

import numpy as np

from .augmentation import Augmenter
from .condition_drop import ConditionDrop
from .media_documents import MediaDocuments
from .media_reader import MediaReader, UnreadableMedium
from .media_rows import Piece, join_pieces, read_pieces
from .random_rows import RowDataset
from .validation import BadRows


class MediaDataset(RowDataset):
    """Rows of conversations with random access: {"input_ids", "labels", "position_ids", "modality_ids"}, int64
    (length,) each, and "media": {kind: [tensor, ...]} in the order of the placeholders.

    Media are read when a row is asked for. A row with a medium that cannot be read is replaced by the next one.

    Args:
        documents: in the order in which they are laid out.
        reader: reads their media.
        block_size: tokens in a row.
        packing: fill rows with documents; else every document is a row.
        bad_rows: counts documents whose media can be read no more; in each process that reads rows by itself.
        seed: of the order in which documents are packed, and of what is random about them.
        shuffle: pack documents in a random order; else in theirs.
        augmenter: changes media and texts.
        condition_drop: hides prompts of media that are written.
    """

    def __init__(
        self,
        documents: MediaDocuments,
        reader: MediaReader,
        block_size: int,
        packing: bool,
        bad_rows: BadRows,
        name: str,
        seed: int = 0,
        shuffle: bool = False,
        augmenter: Augmenter | None = None,
        condition_drop: ConditionDrop | None = None,
    ):
        super().__init__(seed)
        self.augmenter, self.condition_drop = augmenter, condition_drop
        self.documents, self.reader, self.bad_rows, self.name = documents, reader, bad_rows, name
        self.row_length = block_size if packing else None
        if packing:
            self.members, self.ends = pack_whole(documents.lengths, block_size, seed if shuffle else None)
        else:
            self.members, self.ends = np.arange(len(documents)), np.arange(1, len(documents) + 1)
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): the most tokens of each row, padding left out."""
        return np.add.reduceat(self.documents.lengths[self.members], np.concatenate([[0], self.ends[:-1]]))

    def draw(self, index: int, occurrence: int) -> dict[str, Any]:
        rng = self.generator(index, occurrence) if self.augmenter or self.condition_drop else None
        for shift in range(len(self)):
            pieces = self._pieces((index + shift) % len(self), rng)
            if pieces is not None:
                return join_pieces(pieces, self.row_length, self.reader.tokenizer.pad_token_id)
        raise ValueError(f"no row of {self.name!r} can be read any more; are its files gone?")

    def _pieces(self, index: int, rng: np.random.Generator | None) -> list[Piece] | None:
        numbers = self.members[self.ends[index - 1] if index else 0 : self.ends[index]].tolist()
        if not self._unreadable.isdisjoint(numbers):
            return None
        documents = [self.documents[number] for number in numbers]
        augmenters = [self.augmenter] * len(documents)
        pieces = read_pieces(documents, self.reader, augmenters, rng, self.condition_drop)
        for number, document, piece in zip(numbers, documents, pieces, strict=True):
            if isinstance(piece, UnreadableMedium):
                self._unreadable.add(number)
                self.bad_rows.add(self.name, document.row["where"], str(piece))
        return pieces if self._unreadable.isdisjoint(numbers) else None


def pack_whole(lengths: np.ndarray, block_size: int, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Documents to rows of at most `block_size` tokens: each goes where it leaves the least room, or begins a row.

    Args:
        seed: of the order in which they are laid out; None: as they come.

    Returns:
        The numbers of the documents row by row, and where each row ends among them.
    """
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, number of the row), sorted
    for number in order.tolist():
        length = int(lengths[number])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = block_size, len(rows)
            rows.append([])
        rows[row].append(number)
        if room > length:
            insort(open_rows, (room - length, row))
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])
