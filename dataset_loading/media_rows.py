"""Documents with their media to one row."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .augmentation import Augmenter
from .conversations import media_of, text_of
from .media_documents import MediaDocument
from .media_reader import MediaReader, UnreadableMedium
from .packing import make_row


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
    """Kind and tensor of each medium, in order."""


def read_piece(
    document: MediaDocument, reader: MediaReader, augmenter: Augmenter | None, rng: np.random.Generator
) -> Piece:
    """A document with its media.

    Raises:
        UnreadableMedium: a medium is not what it was.
    """
    messages = json.loads(document.row["messages"])
    text = " ".join(map(text_of, messages))
    media = []
    for reference in media_of(messages):
        kind, medium = reference["type"], reader.load(reference, document.row)
        if augmenter is None:
            tensor = reader.tensor(kind, medium)
        else:
            tensor = reader.tensor(kind, augmenter.change(kind, medium, text, rng))
            tensor = augmenter.mask(kind, tensor, text, rng)
        media.append((kind, tensor))
    tokens, is_label = reader.expand(document.tokens, document.is_label, media)
    if len(tokens) > document.length:
        raise UnreadableMedium(f"{len(tokens)} tokens, where headers promised at most {document.length}; replace it")
    shown = augmenter.text(tokens, is_label, rng) if augmenter and augmenter.text.is_on else tokens
    return Piece(tokens, is_label, shown, document.modality, tuple(media))


def join_pieces(pieces: Sequence[Piece], row_length: int | None, pad_id: int) -> dict[str, Any]:
    """One row, filled up to `row_length` tokens when that is given."""
    lengths = [len(piece.tokens) for piece in pieces]
    tokens, is_label, shown = (
        np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("tokens", "is_label", "shown")
    )
    is_start = np.zeros(len(tokens), dtype=bool)
    is_start[np.cumsum([0, *lengths[:-1]])] = True
    row: dict[str, Any] = make_row(tokens, is_start, is_label, row_length, pad_id, shown)
    row["modality_ids"] = torch.zeros_like(row["input_ids"])
    row["modality_ids"][: len(tokens)] = torch.from_numpy(np.repeat([piece.modality for piece in pieces], lengths))
    row["media"] = {}
    for kind, tensor in (medium for piece in pieces for medium in piece.media):
        row["media"].setdefault(kind, []).append(tensor)
    return row
