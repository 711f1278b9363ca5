"""Conversations with media to rows.

Packed, documents stay whole: which of them share a row of `block_size` tokens is decided in advance, from the most
tokens that each may have. Otherwise each is a row of its own.
"""

import logging
from bisect import bisect_left, insort
from typing import Any

import numpy as np
import torch

from .augmentation import Augmenter
from .conversations import media_of, text_of
from .media_documents import MediaDocuments
from .media_reader import MediaReader, UnreadableMedium
from .packing import make_row
from .random_rows import RowDataset
from .validation import BadRows

logger = logging.getLogger(__name__)


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
    ):
        super().__init__(seed)
        self.augmenter = augmenter
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
        rng = self.generator(index, occurrence)
        for shift in range(len(self)):
            row = self._row((index + shift) % len(self), rng)
            if row is not None:
                return row
        raise ValueError(f"no row of {self.name!r} can be read any more; are its files gone?")

    def _row(self, index: int, rng: np.random.Generator) -> dict[str, Any] | None:
        members = self.members[self.ends[index - 1] if index else 0 : self.ends[index]]
        parts = []
        for number in members:
            if number in self._unreadable:
                return None
            try:
                parts.append(self._read(number, rng))
            except UnreadableMedium as error:
                self._unreadable.add(number)
                self.bad_rows.add(self.name, self.documents.place(number), str(error))
                return None
        row = join_documents(parts, self.documents.modality[members], self.row_length, self.reader)
        return self.augmenter.text(row, rng) if self.augmenter and self.augmenter.text.is_on else row

    def _read(
        self, number: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[str, torch.Tensor]]]:
        """Tokens, is_label and media of a document.

        Raises:
            UnreadableMedium: a medium is not what it was.
        """
        messages, row = self.documents.messages(number)
        text = " ".join(map(text_of, messages))
        media = []
        for reference in media_of(messages):
            kind, medium = reference["type"], self.reader.load(reference, row)
            if self.augmenter is None:
                tensor = self.reader.tensor(kind, medium)
            else:
                tensor = self.reader.tensor(kind, self.augmenter.change(kind, medium, text, rng))
                tensor = self.augmenter.mask(kind, tensor, text, rng)
            media.append((kind, tensor))
        tokens, is_label = self.reader.expand(*self.documents[number], media)
        if len(tokens) > self.documents.lengths[number]:
            planned = self.documents.lengths[number]
            raise UnreadableMedium(f"{len(tokens)} tokens, where its headers promised at most {planned}; replace it")
        return tokens, is_label, media


def join_documents(
    parts: list[tuple[np.ndarray, np.ndarray, list[tuple[str, torch.Tensor]]]],
    modality: np.ndarray,
    row_length: int | None,
    reader: MediaReader,
) -> dict[str, Any]:
    """One row of documents (tokens, is_label, media), filled up to `row_length` tokens when that is given.

    Args:
        modality: of each document, what its tokens are counted as.
    """
    lengths = [len(tokens) for tokens, _, _ in parts]
    is_start = np.zeros(sum(lengths), dtype=bool)
    is_start[np.cumsum([0, *lengths[:-1]])] = True
    tokens, is_label = (np.concatenate(values) for values in list(zip(*parts, strict=True))[:2])
    row = make_row(tokens, is_start, is_label, row_length, reader.tokenizer.pad_token_id)
    modality_ids = torch.zeros_like(row["input_ids"])
    modality_ids[: len(tokens)] = torch.from_numpy(np.repeat(modality, lengths))
    media: dict[str, list[torch.Tensor]] = {}
    for _, _, found in parts:
        for kind, tensor in found:
            media.setdefault(kind, []).append(tensor)
    return {**row, "modality_ids": modality_ids, "media": media}


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
