"""What commands write to standard output, and how it looks on a terminal."""

from __future__ import annotations

import os
import sys

from transformers import TextStreamer

from model.terminal import visible


def write_result(text: str) -> None:
    """Write to standard output at once: on a terminal without characters that command it, elsewhere as it is.

    Raises:
        ValueError: standard output takes no more, since its disk is full or its reader is gone.
    """
    try:
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nothing:  # else Python tries again at its end, and complains
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise ValueError(f"standard output cannot be written: {error.strerror}") from error


class TerminalStreamer(TextStreamer):
    """Writes text while it is generated, as `write_result` does."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece, and a line break after the last one."""
        write_result(text + "\n" * stream_end)
