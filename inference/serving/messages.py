"""The messages between a server and its workers: plain data, which goes through a pipe."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..engine import Likelihood


@dataclass(frozen=True)
class AnswerJob:
    """One answer that a client asks for.

    Args:
        number: The number by which the server knows it.
        model: The name of the model.
        kind: What is made.
        prompt: Messages, as `apply_chat_template` takes them; or a text that goes on, or its token ids.
        max_new_tokens, num_steps, exit_criterion, exit_threshold, drafts: See `TextRequest` and `ExitOptions`; None is
            what the model has.
        seed: Seed of its draws; None: the likeliest tokens.
        temperature, top_p, top_k, repetition_penalty, stop, num_likely: See `TextRequest`.
        flow: Options of `generate` for media.
        num_parts: How often an image is shown before it is complete.
    """

    number: int
    model: str
    kind: Literal["text", "image", "audio"]
    prompt: list[dict[str, Any]] | str | list[int]
    max_new_tokens: int
    num_steps: int | None = None
    exit_criterion: str | None = None
    exit_threshold: float | None = None
    drafts: bool = True
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    num_likely: int | None = None
    flow: dict[str, Any] = field(default_factory=dict)
    num_parts: int = 0


@dataclass(frozen=True)
class Cancel:
    """A job whose client is gone."""

    number: int


@dataclass(frozen=True)
class TokenShown:
    """A token: its text, the steps it took, and what the model thinks of it, if that was asked for."""

    text: str
    steps: int
    likelihood: Likelihood | None = None
    likely: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextPiece:
    """A part of a text. `tokens` are those that it has come from, which a stop string may have cut."""

    number: int
    text: str
    tokens: tuple[TokenShown, ...]


@dataclass(frozen=True)
class ImagePiece:
    """An image whose end is missing, as the file of a PNG."""

    number: int
    media: bytes


@dataclass(frozen=True)
class End:
    """An answer is complete. `exit_steps` are those of the positions of media; texts have them in their pieces."""

    number: int
    finish_reason: str
    prompt_tokens: int
    new_tokens: int = 0
    core_steps: int = 0
    media: bytes | None = None
    exit_steps: tuple[int, ...] = ()


AnswerMessage = TextPiece | ImagePiece | End
"""The parts of an answer, of which the last is its end."""


@dataclass(frozen=True)
class Refusal:
    """A job that cannot be done, with the status of HTTP and what the client is told."""

    number: int
    status: int
    message: str


@dataclass(frozen=True)
class ModelCard:
    """The facts that the server tells of a model."""

    name: str
    modalities: tuple[str, ...]
    writes: tuple[str, ...]
    has_chat: bool
    num_parameters: int
    usual_steps: int | None
    context: int
    image_side: int | None = None
    exit_criteria: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its models."""

    models: tuple[ModelCard, ...]


@dataclass(frozen=True)
class Failed:
    """A worker cannot load its models."""

    message: str


@dataclass(frozen=True)
class Load:
    """The work of a worker since its last message of this kind: launches of the core, and tokens in them."""

    launches: int
    items: int
