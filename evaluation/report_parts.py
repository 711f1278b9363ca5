"""The parts of a report, and how it is written: as one HTML file that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from .tables import Table, format_table

PAGE = "report.html.jinja"
MOST_BYTES = 3_500_000
"""Bytes of all pictures and sounds of a report; base64 makes them a third longer."""
MOST_PICTURE_BYTES, MOST_PICTURE_SIDE = 400_000, 1600
"""A picture with more bytes is made as small as this, in pixels, and a JPEG."""
FORMATS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif"}


class MissingError(ValueError):
    """Something that a report would show, but for a reason.

    Args:
        reason: Why it is not there.
        command: What would make it; empty for nothing.
    """

    def __init__(self, reason: str, command: str = ""):
        super().__init__(reason)
        self.reason, self.command = reason, command


@dataclass
class Words:
    """A paragraph, or text as it stands, which may be folded away under a title."""

    text: str
    is_verbatim: bool = False
    folded_under: str = ""


@dataclass
class Picture:
    """An image with the address of its content, `data:`, and the file that it is in, if it is in one."""

    address: str
    label: str
    file: Path | None = None
    is_small: bool = False


@dataclass
class Sound:
    """A waveform with the address of its content, `data:`."""

    address: str
    label: str


@dataclass
class Card:
    """Text and media of one sample."""

    title: str
    text: str = ""
    media: list[Picture | Sound] = field(default_factory=list)


@dataclass
class Cards:
    """Samples beside each other."""

    cards: list[Card]


Part = Table | Words | Picture | Sound | Cards


@dataclass
class Section:
    """Parts under a heading."""

    title: str
    parts: list[Part]

    @property
    def anchor(self) -> str:
        """The name that links lead to."""
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass
class Skipped:
    """Something that is not in the report."""

    what: str
    reason: str
    command: str = ""


@dataclass
class Report:
    """All of it."""

    title: str
    subtitle: str
    sections: list[Section]
    skipped: list[Skipped]


class MediaBudget:
    """Turns pictures and sounds into addresses, until there are too many bytes of them."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.left = most_bytes

    def picture(self, content: bytes, label: str, file: Path | None = None, is_small: bool = False) -> Picture:
        """A picture, made smaller if it is large.

        Raises:
            MissingError: It is no picture, or there is no room for it.
        """
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                kind = FORMATS.get(image.format or "")
                if kind is None or len(content) > MOST_PICTURE_BYTES:
                    content, kind = smaller(image), "jpeg"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise MissingError(f"it is no whole picture ({error})") from error
        return Picture(self.address(f"image/{kind}", content), label, file, is_small)

    def sound(self, content: bytes, label: str) -> Sound:
        """A player of a WAV file.

        Raises:
            MissingError: It is none, or there is no room for it.
        """
        if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
            raise MissingError("it is no WAV file")
        return Sound(self.address("audio/wav", content), label)

    def address(self, kind: str, content: bytes) -> str:
        """The content as an address."""
        if len(content) > self.left:
            raise MissingError(f"a report has room for {MOST_BYTES:,} bytes of media, and others came first")
        self.left -= len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def smaller(image: Image.Image) -> bytes:
    """The picture as a JPEG of few pixels, on white."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    ground.thumbnail((MOST_PICTURE_SIDE, MOST_PICTURE_SIDE))
    stream = io.BytesIO()
    ground.convert("RGB").save(stream, "JPEG", quality=85)
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------------------------- HTML


def report_html(report: Report) -> str:
    """The page; whatever a text holds, it is shown as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["a"] = is_a
    return environment.get_template(PAGE).render(report=report)


def is_a(part: Any, name: str) -> bool:
    """Whether a part is of a class of this name."""
    return type(part).__name__ == name


# ------------------------------------------------------------------------------------------------------------- Markdown


def report_markdown(report: Report, folder: Path) -> str:
    """The report as Markdown, with links to the pictures that are files; what is in the page alone is named.

    Args:
        report: The report.
        folder: Where the file will be, from which links lead.
    """
    parts = [f"# {plain(report.title)}", plain(report.subtitle)]
    for section in report.sections:
        parts += [f"## {section.title}", *(part_markdown(part, folder) for part in section.parts)]
    if report.skipped:
        body = [[it.what, it.reason, it.command] for it in report.skipped]
        parts += ["## Skipped", table_markdown(Table("", ["what", "why", "the command that makes it"], body))]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def part_markdown(part: Part, folder: Path) -> str:
    """A part as Markdown."""
    match part:
        case Table():
            return table_markdown(part)
        case Words():
            title = f"{plain(part.folded_under)}:\n\n" * bool(part.folded_under)
            return title + (code_block(part.text) if part.is_verbatim else plain(part.text))
        case Picture(file=file) if file is not None and file.is_relative_to(folder):
            return f"![{plain(part.label)}](<{file.relative_to(folder).as_posix()}>)"
        case Picture() | Sound():
            return f"{plain(part.label)}: in the page beside this file."
        case Cards():
            return "\n\n".join(card_markdown(card) for card in part.cards)


def card_markdown(card: Card) -> str:
    """A sample as Markdown."""
    return f"### {plain(card.title)}\n\n{code_block(card.text)}" if card.text else f"### {plain(card.title)}"


def table_markdown(table: Table) -> str:
    """A table as Markdown, in which nothing that a cell holds is more than text."""
    header, *body = ([*map(plain, line)] for line in (table.header, *table.body))
    return f"{plain(table.title)}:\n\n" * bool(table.title) + format_table(header, body)


def plain(text: str) -> str:
    """Text of one line that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def code_block(text: str) -> str:
    """Text as it stands, between fences that are longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
