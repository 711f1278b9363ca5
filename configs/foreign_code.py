"""Code of others that a configuration file names: it runs only where the command line allows it."""

from collections.abc import Sequence
from typing import Any

KEYS = ("optimizer", "rewards")
"""Options of training that name functions, as module:function."""
OWN = ("evaluation", "trainers")
"""Packages of this project whose functions any file may name."""


def check_code(given: Sequence[tuple[str, dict[str, Any], list[str]]]) -> None:
    """Look at the functions that the last one to name them names, in what `read_arguments` gives.

    Raises:
        ValueError: for one that is not this project's and is named by a file.
    """
    for key in KEYS:
        sections = [(origin, tree["training"]) for origin, tree, _ in given if isinstance(tree.get("training"), dict)]
        named = [(origin, section[key]) for origin, section in sections if key in section]
        origin, value = named[-1] if named else ("", None)
        for name in value if isinstance(value, list) else [value]:
            is_function = isinstance(name, str) and ":" in name
            if origin and is_function and name.partition(":")[0].partition(".")[0] not in OWN:
                raise ValueError(
                    f"{origin}training.{key}: {name!r} is code from outside this project, which a file may not run; "
                    "read that code and add --allow-code, or name it on the command line"
                )
