"""Who shows what: "text -> image" says that the user describes what the assistant shows."""

from dataclasses import dataclass

from model import MODALITIES


@dataclass(frozen=True)
class Direction:
    """What of a row the user gives, and what the assistant answers with."""

    given: tuple[str, ...]
    """Of "text" and the names of modalities, such as "image" and "audio"."""
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
    known = ["text", *MODALITIES]
    if not arrow or not set(names) <= set(known):
        raise ValueError(
            f"direction is {text!r}; name {', '.join(known[:-1])} or {known[-1]} on both sides of an arrow, e.g. "
            "'text -> image'"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"direction is {text!r}, with {twice[0]} twice; name it on one side, once")
    return Direction(*map(tuple, sides))
