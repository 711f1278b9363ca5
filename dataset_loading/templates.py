"""Prompts with {column} in the places of a row's values."""

import re
from collections.abc import Mapping

from .references import UnusableRow

_COLUMN = re.compile(r"\{(\w+)\}")


def template_columns(template: str | None) -> list[str]:
    """The names in the braces of a template."""
    return _COLUMN.findall(template or "")


def fill_template(template: str, row: Mapping[str, object]) -> str:
    """A template with the row's values in place of {column}.

    Raises:
        UnusableRow: the row lacks one, or it is neither text nor a number.
    """
    for column in template_columns(template):
        if not isinstance(row.get(column), (str, int, float)):
            raise UnusableRow(f"column {column!r} of the prompt is {type(row.get(column)).__name__}, not text")
    return _COLUMN.sub(lambda match: str(row[match[1]]), template)
