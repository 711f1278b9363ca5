"""The limits of the server. Each is an option of the command, and each has an answer of its own."""

import argparse
from dataclasses import dataclass, field, fields

from ..arguments import counted


def option(default: int, what: str) -> int:
    """A field that is an option of the command."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Limits:
    """The most of everything. What the engine has room for follows from the tokens, places and steps."""

    max_places: int = option(8, "requests that a worker answers at a time; the others wait")
    max_queue: int = option(256, "requests that wait for each worker; more are told to come back (status 429)")
    max_connections: int = option(1024, "connections at a time; more are closed with status 503")
    max_body_mib: int = option(32, "MiB of the body of a request (413)")
    max_prompt_tokens: int = option(1024, "tokens of a prompt with its media (400)")
    max_new_tokens: int = option(512, "tokens of an answer, and how many there are if a request names no number (400)")
    max_steps: int = option(32, "core steps of a token (400)")
    max_media: int = option(8, "images and sounds of a request (400)")
    max_megapixels: int = option(32, "millions of pixels of an image (400)")
    max_audio_seconds: int = option(60, "seconds of a sound (400)")
    max_seconds: int = option(300, "seconds until a request is answered as a whole (504)")
    read_seconds: int = option(20, "seconds within which a request has to come as a whole (408)")
    grace_seconds: int = option(30, "seconds for running requests when the server is told to end")

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.max_prompt_tokens + self.max_new_tokens


def add_limits(parser: argparse.ArgumentParser) -> None:
    """An option for each limit."""
    for limit in fields(Limits):
        flag, name = f"--{limit.name.replace('_', '-')}", limit.metadata["help"]
        parser.add_argument(flag, type=counted(limit.name.replace("_", " ")), default=limit.default, help=name)


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits that were asked for."""
    return Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
