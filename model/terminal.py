"""Texts of others on a terminal, where some characters are commands."""

import functools
import os
import re
import sys

# Controls but for tab and line break; marks and overrides of direction; separators of lines; halves of characters.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_LINE = 2000
"""Characters of an error."""


def visible(text: str) -> str:
    """The text with escapes such as `\\x1b` in the place of characters that would move the cursor, change colours, the
    title or the clipboard, or the order in which the text is read.
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(message: object) -> str:
    """What is said of an error: one line, which shows what is in it, and ends."""
    line = visible(" ".join(str(message).split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 3]}..."


@functools.cache
def say_new_name(old: str, new: str) -> None:
    """Write on standard error, once, that an option has a new name. The first rank of a machine speaks for all."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{visible(old)} is now called {new}; the old name will not be known to the next version\n")
