"""Documents with their media to one row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .augmentation import Augmenter
from .condition_drop import ConditionDrop
from .conversations import media_of, text_of
from .media_documents import MediaDocument
from .media_reader import MediaReader, UnreadableMedium
from .packing import IGNORED


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
    """Kind and tensor of each medium that is seen, in order."""


def read_piece(
    document: MediaDocument, reader: MediaReader, augmenter: Augmenter | None, rng: np.random.Generator | None
) -> Piece:
    """A document with its media.

    Raises:
        UnreadableMedium: a medium is not what it was.
    """
    (piece,) = read_pieces([document], reader, [augmenter], rng)
    if isinstance(piece, UnreadableMedium):
        raise piece
    return piece


def read_pieces(
    documents: Sequence[MediaDocument],
    reader: MediaReader | None,
    augmenters: Sequence[Augmenter | None],
    rng: np.random.Generator | None,
    condition_drop: ConditionDrop | None = None,
) -> list[Piece | UnreadableMedium]:
    """Documents with their media; of one that cannot be read, why.

    A step is made for all of them before the next one, since a processor's caches do not hold the code of all steps.

    Args:
        reader: None: they have no media.
        augmenters: of each document.
        rng: for the augmenters and the condition drop, if there are any.
        condition_drop: hides prompts.
    """
    conversations = [json.loads(document.row["messages"] or "[]") for document in documents]
    if reader is not None:
        conversations = list(map(reader.with_kinds, conversations))
    loaded, unreadable = [], {}
    for number, (document, messages) in enumerate(zip(documents, conversations, strict=True)):
        try:
            loaded.append([(it["type"], reader.load(it, document.row)) for it in media_of(messages)])
        except UnreadableMedium as error:
            loaded.append([])
            unreadable[number] = error
    media = []
    for found, messages, augmenter in zip(loaded, conversations, augmenters, strict=True):
        text = " ".join(map(text_of, messages)) if augmenter else ""
        media.append([(kind, _tensor(kind, medium, text, reader, augmenter, rng)) for kind, medium in found])
    return [
        unreadable.get(number) or _piece(document, media[number], reader, augmenter, rng, condition_drop)
        for number, (document, augmenter) in enumerate(zip(documents, augmenters, strict=True))
    ]


def _tensor(
    kind: str,
    medium: Any,
    text: str,
    reader: MediaReader,
    augmenter: Augmenter | None,
    rng: np.random.Generator | None,
) -> torch.Tensor:
    if augmenter is None:
        return reader.tensor(kind, medium)
    tensor = reader.tensor(kind, augmenter.change(kind, medium, text, rng))
    return augmenter.mask(kind, tensor, text, rng)


def _piece(
    document: MediaDocument,
    media: list[tuple[str, torch.Tensor]],
    reader: MediaReader | None,
    augmenter: Augmenter | None,
    rng: np.random.Generator | None,
    condition_drop: ConditionDrop | None,
) -> Piece | UnreadableMedium:
    tokens, is_label = document.tokens, document.is_label
    if media:
        tokens, is_label = reader.encoder.expand(tokens, is_label, by_kind(media))
    if len(tokens) > document.length:
        return UnreadableMedium(f"{len(tokens)} tokens, where headers promised at most {document.length}; replace it")
    shown, seen = tokens, tuple(media)
    if augmenter and augmenter.text.is_on:
        shown = augmenter.text(tokens, is_label, rng)
    if condition_drop and media:
        shown, seen = condition_drop(shown, media, rng)
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
    row["media"] = by_kind([medium for piece in pieces for medium in piece.media])
    return row


def by_kind(media: Sequence[tuple[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Media by kind, each kind in order."""
    found: dict[str, list[torch.Tensor]] = {}
    for kind, tensor in media:
        found.setdefault(kind, []).append(tensor)
    return found
