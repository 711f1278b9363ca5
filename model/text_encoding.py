"""Texts to token ids, in which special tokens are text. Long ones are encoded in pieces, since a tokenizer takes a
hundred bytes and more for each byte that it reads at once.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

PIECE_LENGTH = 2**20
"""Characters in a piece, if it can be cut there."""

_SEAM = re.compile(r"(?<=\S)(?=\s)")
_TRIED_SEAMS = 100
_CONTEXT = 100  # characters on each side of a seam: more than a word


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids (int32) of texts by a fast tokenizer, whose backend takes half the time when it is called itself. ValueError
    if UTF-8 cannot hold one of them.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|end|>" written in a text is text
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    try:
        for group in _groups(texts, backend):
            encodings = backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (number, _), encoding in zip(group, encodings, strict=True):
                ids[number].append(np.array(encoding.ids, dtype=np.int32))
    except TypeError as error:
        raise _no_utf8(next(text for text in texts if re.search("[\ud800-\udfff]", text))) from error
    return [np.concatenate(pieces) for pieces in ids]


def _groups(texts: Sequence[str], backend: Any) -> Iterator[list[tuple[int, str]]]:
    """The pieces of all texts, each with the number of its text, as many as may be encoded at once."""
    group, length = [], 0
    for number, text in enumerate(texts):
        for piece in cut_text(text, backend):
            group.append((number, piece))
            length += len(piece)
            if length >= PIECE_LENGTH:
                yield group
                group, length = [], 0
    yield group


def normalized(tokenizer: Any, text: str) -> str:
    """A text as the model of the tokenizer reads it; ValueError if UTF-8 cannot hold it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    try:
        return text if normalizer is None else normalizer.normalize_str(text)
    except UnicodeEncodeError as error:
        raise _no_utf8(text) from error


def _no_utf8(text: str) -> ValueError:
    return ValueError(f"{text[:80]!r} cannot be written as UTF-8; remove lone surrogates")


def cut_text(text: str, tokenizer: Any = None) -> Iterator[str]:
    """Pieces of a text that give, one after another, the same tokens as the whole. Cuts are made where white space
    begins. Byte-level pretokenizers, such as that of our own vocabularies, split there whatever comes before and after:
    white space begins a piece of theirs or is one, and never follows anything else in it. So do most others, but not
    all: a backend, if given, is tried at each cut on the text around it, and one that encodes every beginning of a text
    in a way of its own gets the text whole.
    """
    start = 0
    while len(text) - start > PIECE_LENGTH:
        seams = (match.start() for match in islice(_SEAM.finditer(text, start + PIECE_LENGTH), _TRIED_SEAMS))
        cut = next((seam for seam in seams if tokenizer is None or _splits_at(tokenizer, text, seam)), None)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _splits_at(tokenizer: Any, text: str, seam: int) -> bool:
    before, after = text[max(0, seam - _CONTEXT) : seam], text[seam : seam + _CONTEXT]
    first, second, whole = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in (before, after, before + after)
    )
    return first + second == whole
