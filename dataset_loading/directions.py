"""Who shows what: "text -> image" says that the user describes what the assistant shows."""

from dataclasses import dataclass

MEDIA = ("image", "audio")
"""What can be shown beside text, in the order in which it is shown."""


@dataclass(frozen=True)
class Direction:
    """What of a row the user gives, and what the assistant answers with."""

    given: tuple[str, ...]
    """Of "text", "image" and "audio"."""
    answered: tuple[str, ...]
    """The same; nothing is in both."""

    def __str__(self) -> str:
        return f"{', '.join(self.given)} -> {', '.join(self.answered)}"

    @property
    def media(self) -> set[str]:
        """The kinds of media that take part."""
        return {*self.given, *self.answered} - {"text"}


def parse_direction(text: str) -> Direction:
    """What a config says, such as "text, image -> audio".

    Raises:
        ValueError: it has another form, names something unknown, or something twice.
    """
    given, arrow, answered = text.partition("->")
    sides = [[name.strip() for name in side.split(",")] for side in (given, answered)]
    names = sides[0] + sides[1]
    unknown = [name for name in names if name not in ("text", *MEDIA)]
    if not arrow or unknown:
        raise ValueError(
            f"direction is {text!r}; name text, image or audio on both sides of an arrow, e.g. 'text -> image'"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"direction is {text!r}, with {twice[0]} twice; name it on one side, once")
    return Direction(*map(tuple, sides))
