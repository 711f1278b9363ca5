"""Names of files as others write them: a letter with an accent is one character (NFC) or two (NFD)."""

import os
from functools import lru_cache
from pathlib import PurePath
from unicodedata import normalize


def in_other_form(folder: str, name: str) -> str | None:
    """The path of the one file that has a name in another Unicode form; None: there is none, or more than one.

    Args:
        folder: that which the name is relative to.
    """
    path = folder
    for part in PurePath(name).parts:
        below = os.path.join(path, part)
        if not os.path.exists(below):
            found = _names(path).get(normalize("NFC", part), [])
            if len(found) != 1:
                return None
            below = os.path.join(path, found[0])
        path = below
    return path if os.path.isfile(path) else None


@lru_cache(maxsize=16)
def _names(folder: str) -> dict[str, list[str]]:
    """The names in a folder by their composed form."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder) if os.access(folder, os.R_OK) and os.path.isdir(folder) else ():
        names.setdefault(normalize("NFC", name), []).append(name)
    return names
