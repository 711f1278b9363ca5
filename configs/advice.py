"""Advice about names that are not known."""

import difflib
from collections.abc import Sequence
from typing import Any


def closest(name: Any, known: Sequence[str], else_where: str = "--help lists the known ones") -> str:
    """The known name that is most like an unknown one, and which are known, or where they are listed if they are many.

    Args:
        name: The unknown one.
        else_where: What is said of many.
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    listed = f"known: {', '.join(known)}" if len(known) <= 20 else else_where
    return f"did you mean {near[0]}? {listed}" if near else listed
