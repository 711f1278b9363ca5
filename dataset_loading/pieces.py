"""Long texts in pieces: a tokenizer takes a hundred bytes and more for each byte that it reads at once."""

import re
from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer

PIECE_LENGTH = 2**20
"""Characters in a piece, if it can be cut there."""

_SEAM = re.compile(r"(?<=\S)(?=\s)")
_TRIED_SEAMS = 100
_LOOKED_AT = 100  # characters on each side of a seam: more than a word


def cut_text(text: str, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """Pieces of a text that give, one after another, the same tokens as the whole.

    Cuts are made where white space begins. Byte-level pretokenizers, such as that of our own vocabularies, split there
    whatever comes before and after: white space begins a piece of theirs or is one, and never follows anything else in
    it. So do most others, but not all.

    Args:
        tokenizer: tried at each cut on the text around it. One that encodes every beginning of a text in a way of its
            own gets the text whole.
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


def _splits_at(tokenizer: Tokenizer, text: str, seam: int) -> bool:
    before, after = text[max(0, seam - _LOOKED_AT) : seam], text[seam : seam + _LOOKED_AT]
    first, second, whole = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in (before, after, before + after)
    )
    return first + second == whole
