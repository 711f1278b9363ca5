"""Conversations with media to rows.

Packed, documents stay whole: which of them share a row of `block_size` tokens is decided in advance, from the most
tokens that each may have. Otherwise each is a row of its own.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..augmentation import Augmenter, CFGDropout
from ..bad_rows import BadRows
from ..sources.messages import media_of, text_of
from .documents import MediaDocument, MediaDocuments
from .media_reader import MediaReader, UnreadableItem
from .mixture import RowDataset
from .texts import IGNORED


@dataclass
class Piece:
    """What a document adds to a row."""

    tokens: np.ndarray
    """(tokens,)"""
    is_label: np.ndarray
    """bool (tokens,): what is learned."""
    shown: np.ndarray
    """(tokens,): as the model sees them."""
    modality: int = 0
    """What the tokens are counted as."""
    media: tuple[tuple[str, torch.Tensor], ...] = ()
    """Modality and tensor of each item that is seen, in order."""


class MediaDataset(RowDataset):
    """Rows of conversations with random access: {"input_ids", "labels", "position_ids", "modality_ids"}, int64
    (length,) each, and "media": {modality: [tensor, ...]} in the order of the placeholders.

    Media are read when a row is asked for. A row with an item that cannot be read is replaced by the next one.

    Args:
        documents: Documents in the order in which they are laid out.
        reader: Reads their media.
        block_size: Tokens in a row.
        packing: Whether rows are filled with documents; else every document is a row.
        bad_rows: Counts documents whose media can be read no more, in each process that reads rows by itself.
        seed: Seed of the order in which documents are packed, and of all random changes.
        shuffle: Whether documents are packed in a random order; else in theirs.
        augmenter: Changes of media and texts.
        cfg_dropout: Hides prompts of generated targets.
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
        cfg_dropout: CFGDropout | None = None,
    ):
        super().__init__(seed)
        self.augmenter, self.cfg_dropout = augmenter, cfg_dropout
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
        rng = self.generator(index, occurrence) if self.augmenter or self.cfg_dropout else None
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
        pieces = read_pieces(documents, self.reader, augmenters, rng, self.cfg_dropout)
        for number, document, piece in zip(numbers, documents, pieces, strict=True):
            if isinstance(piece, UnreadableItem):
                self._unreadable.add(number)
                self.bad_rows.add(self.name, document.row["where"], str(piece))
        return pieces if self._unreadable.isdisjoint(numbers) else None


def pack_whole(lengths: np.ndarray, block_size: int, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Documents to rows of at most `block_size` tokens: each goes where it leaves the least capacity, or begins a row.

    Args:
        seed: Seed of the order in which they are laid out; None: they are laid out as they come.

    Returns:
        The numbers of the documents row by row, and where each row ends among them.
    """
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (capacity, number of the row), sorted
    for number in order.tolist():
        length = int(lengths[number])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            capacity, row = open_rows.pop(place)
        else:
            capacity, row = block_size, len(rows)
            rows.append([])
        rows[row].append(number)
        if capacity > length:
            insort(open_rows, (capacity - length, row))
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])


def read_pieces(
    documents: Sequence[MediaDocument],
    reader: MediaReader | None,
    augmenters: Sequence[Augmenter | None],
    rng: np.random.Generator | None,
    cfg_dropout: CFGDropout | None = None,
) -> list[Piece | UnreadableItem]:
    """Documents with their media; of one that cannot be read, why.

    A step is made for all of them before the next one, since a processor's caches do not hold the code of all steps.

    Args:
        reader: Reads their media; None: they have none.
        augmenters: The augmenter of each document.
        rng: Random numbers of the augmenters and of CFG dropout, if there are any.
        cfg_dropout: Hides prompts.
    """
    conversations = [json.loads(document.row["messages"] or "[]") for document in documents]
    if reader is not None:
        conversations = list(map(reader.with_modalities, conversations))
    loaded, unreadable = [], {}
    for number, (document, messages) in enumerate(zip(documents, conversations, strict=True)):
        try:
            loaded.append([(it["type"], reader.load(it, document.row)) for it in media_of(messages)])
        except UnreadableItem as error:
            loaded.append([])
            unreadable[number] = error
    media = []
    for found, messages, augmenter in zip(loaded, conversations, augmenters, strict=True):
        text, tensors = " ".join(map(text_of, messages)) if augmenter else "", []
        for kind, item in found:
            changed = augmenter.change(kind, item, text, rng) if augmenter else item
            tensor = reader.modalities[kind].preprocess(changed)
            tensors.append((kind, augmenter.mask(kind, tensor, text, rng) if augmenter else tensor))
        media.append(tensors)
    return [
        unreadable.get(number) or _piece(document, media[number], reader, augmenter, rng, cfg_dropout)
        for number, (document, augmenter) in enumerate(zip(documents, augmenters, strict=True))
    ]


def _piece(
    document: MediaDocument,
    media: list[tuple[str, torch.Tensor]],
    reader: MediaReader | None,
    augmenter: Augmenter | None,
    rng: np.random.Generator | None,
    cfg_dropout: CFGDropout | None,
) -> Piece | UnreadableItem:
    tokens, is_label = document.tokens, document.is_label
    if media:
        tokens, is_label = reader.encoder.expand(tokens, is_label, by_modality(media))
    if len(tokens) > document.length:
        return UnreadableItem(f"{len(tokens)} tokens, where headers promised at most {document.length}; replace it")
    shown, seen = tokens, tuple(media)
    if augmenter and augmenter.text.is_on:
        shown = augmenter.text(tokens, is_label, rng)
    if cfg_dropout and media:
        shown, seen = cfg_dropout(shown, media, rng)
    return Piece(tokens, is_label, shown, document.modality, seen)


def join_pieces(pieces: Sequence[Piece], row_length: int | None, pad_id: int) -> dict[str, Any]:
    """One row, filled up to `row_length` tokens when that is given."""
    ends = np.cumsum([len(piece.tokens) for piece in pieces]).tolist()
    length = ends[-1] if row_length is None else row_length
    ids, labels = np.full(length, pad_id), np.full(length, IGNORED)
    positions, modality_ids = np.arange(length), np.zeros(length, dtype=np.int64)
    for piece, end in zip(pieces, ends, strict=True):
        part = slice(end - len(piece.tokens), end)
        ids[part] = piece.shown
        labels[part][piece.is_label] = piece.tokens[piece.is_label]
        modality_ids[part] = piece.modality
        positions[end:] = np.arange(length - end)
    labels[0] = IGNORED  # a begin token, or the repeated token of a text that was cut
    values = {"input_ids": ids, "labels": labels, "position_ids": positions, "modality_ids": modality_ids}
    row: dict[str, Any] = {name: torch.from_numpy(it) for name, it in values.items()}
    row["media"] = by_modality([item for piece in pieces for item in piece.media])
    return row


def by_modality(media: Sequence[tuple[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Media by modality, each in order."""
    found: dict[str, list[torch.Tensor]] = {}
    for kind, tensor in media:
        found.setdefault(kind, []).append(tensor)
    return found
