"""References to tensors, through the run's processor; what is unreadable is told apart from what is wrong in code."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from .conversations import ROLES, normalized, special_id, spelled_roles, text_of, tokenize_conversations
from .references import place_of, read_medium
from .synthetic import get_task

_CUT_SECONDS = 0.1
"""What may be cut off a recording: no word is as short."""


class UnreadableMedium(ValueError):
    """A medium that cannot be used; the message is the reason."""


class MediaReader:
    """Sizes, tokens and tensors of media.

    Args:
        processor: the run's; see `MegaTransformerProcessor`. A tokenizer, where the model reads text alone: there are
            no kinds of media then.

    Raises:
        ValueError: its vocabulary lacks a token of media, or its chat template is not ours.
    """

    def __init__(self, processor: PreTrainedTokenizerFast | ProcessorMixin):
        if isinstance(processor, ProcessorMixin):
            self.tokenizer, self.kinds = processor.tokenizer, processor.kinds
            self.kinds_of_role = {role: processor.kinds_of_role(role) for role in ROLES}
        else:
            self.tokenizer, self.kinds = processor, {}
            self.kinds_of_role = {role: {} for role in ROLES}
        self.written = [name for name, kind in self.kinds.items() if any(kind.learned)]
        self.modality_ids = {name: processor.modality_names.index(name) for name in self.kinds}
        self.tokens = {}
        for name, kind in self.kinds.items():
            tokens = kind.token, kind.start_token, kind.end_token
            self.tokens[name] = [special_id(self.tokenizer, token) for token in tokens]
        self._spelled_roles = spelled_roles(self.tokenizer)
        self._check_template(processor)
        self._is_placeholder = np.zeros(max(self.tokenizer.get_vocab().values()) + 1, dtype=bool)
        self._is_placeholder[list(self.placeholders.values())] = True

    def _check_template(self, processor: PreTrainedTokenizerFast | ProcessorMixin) -> None:
        """Rows are tokenised here, many at a time, and have to be what the chat template makes of the same messages."""
        if processor.chat_template is None:
            return
        probe = [{"role": role, "content": f"{role} says"} for role in ROLES]
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in probe]
        (tokenized,) = tokenize_conversations([parts], self.tokenizer, self.placeholders, "answer")
        try:
            rendered = processor.apply_chat_template(probe, tokenize=False)
        except Exception as error:  # whatever the operations of a template raise
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise ValueError(f"the chat template fails ({reason}); use the template of `model.chat`") from error
        ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        ours, theirs = self.tokenizer.decode(tokenized.tokens), self.tokenizer.decode(ids)
        if ours != theirs:
            raise ValueError(
                f"the chat template gives {theirs[:300]!r} where rows have {ours!r}; use the template of `model.chat`"
            )

    @property
    def placeholders(self) -> dict[str, int]:
        """Token ids by kind."""
        return {kind: ids[0] for kind, ids in self.tokens.items()}

    @property
    def max_samples(self) -> dict[str, int]:
        """Of the kinds that are recordings: how many samples are read."""
        return {name: int(self.kinds[name].max_seconds * rate) for name, rate in self.sampling_rates.items()}

    @property
    def sampling_rates(self) -> dict[str, int]:
        """Of the kinds that are recordings."""
        recordings = {name: kind for name, kind in self.kinds.items() if name in ("audio", "written_audio")}
        return {name: kind.sampling_rate for name, kind in recordings.items()}

    def with_kinds(self, messages: list[dict]) -> list[dict]:
        """Messages in which media that the assistant shows have the type of the kind that is written, if there is one.

        What is shown but neither read nor written keeps its type, which is no kind then.
        """
        if not self.written:
            return messages
        return [{**message, "content": self._with_kinds(**message)} for message in messages]

    def _with_kinds(self, role: str, content: list[dict]) -> list[dict]:
        kinds = self.kinds_of_role[role]
        return [{**part, "type": kinds.get(part["type"], part["type"])} for part in content]

    def problem_of(self, messages: list[dict]) -> str:
        """Why a conversation cannot be used by this model, or ""."""
        for message in messages:
            known = self.kinds_of_role[message["role"]]
            types = [part["type"] for part in message["content"]]
            unknown = [kind for kind in types if kind not in ("text", *known)]
            if unknown:
                return f"type {unknown[0]!r} is unknown; the model reads {', '.join(['text', *known])}"
            text = normalized(self.tokenizer, text_of(message)) if self._spelled_roles else ""
            spelled = next((token for token in self._spelled_roles if token in text), None)
            if spelled is not None:
                return f"a text contains {spelled!r}, which would begin a message, as the vocabulary has no such token"
            shown = {known.get(kind, kind) for kind in types}
            if message["role"] == "assistant" and shown.isdisjoint(("text", *self.written)):
                return f"the assistant shows type {types[0]!r}, which the model does not write, and says nothing"
        return ""

    def most_tokens(
        self, reference: Mapping, row: Mapping[str, object], decode: bool, stretch: float = 1.0, silence: float = 0.0
    ) -> int:
        """Tokens of a medium with those that start and end it.

        Args:
            decode: read it whole, not its header only; a generated one is not made.
            stretch: how many times as long a recording that is read may become.
            silence: how many seconds may be added to a recording then.

        Raises:
            UnreadableMedium: as far as it was read.
        """
        name = reference["type"]
        kind = self.kinds[name]
        if "task" in reference:
            size = get_task(reference["task"]).medium_size(reference["medium"])
        else:
            size = self._guarded(lambda source: self._size(name, source, decode), reference, row)
        stretch = stretch if name == "audio" else 1.0
        if name in self.sampling_rates and (stretch > 1 or silence > 0):
            size = size * stretch + silence + 0.01  # a changed rate is rounded to whole numbers of samples
        return kind.tokens_of_size(size) + 2

    def _size(self, name: str, source: Any, decode: bool) -> Any:
        """The size of a medium, all of which is read: of a recording that is cut, the text would say what is not in it.

        Raises:
            ValueError: it is longer than what is read, or as far as it was read.
        """
        kind = self.kinds[name]
        if name in self.sampling_rates:
            seconds = kind.size(source)
            if seconds > kind.max_seconds + _CUT_SECONDS:
                raise ValueError(
                    f"{seconds:.1f} seconds, of which {kind.max_seconds:g} are read, while its text would stay whole; "
                    "cut both, or raise max_seconds of the model's audio"
                )
        return kind.size(kind.load(source) if decode else source)

    def load(self, reference: Mapping, row: Mapping[str, object]) -> Any:
        """A medium decoded: a picture, or samples at the processor's rate.

        Raises:
            UnreadableMedium: missing, damaged, or outside of the processor's limits.
        """
        return self._guarded(self.kinds[reference["type"]].load, reference, row)

    def _guarded(self, read: Callable[[Any], Any], reference: Mapping, row: Mapping[str, object]) -> Any:
        try:
            return read(read_medium(reference, row))
        except (ValueError, OSError) as error:
            place = place_of(reference)
            raise UnreadableMedium(str(error) if place in str(error) else f"{place}: {error}") from error

    def tensor(self, kind: str, medium: Any) -> torch.Tensor:
        """What `load` gave, as the model's input for one medium."""
        return self.kinds[kind].preprocess(medium)

    def expand(
        self, tokens: np.ndarray, is_label: np.ndarray, media: list[tuple[str, torch.Tensor]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and is_label with start, placeholders and end for each medium, in place of its one placeholder; of
        media that are labels, what their kind says.
        """
        places = self._is_placeholder[tokens].nonzero()[0]
        assert len(places) == len(media)
        counts = np.ones(len(tokens), dtype=np.int64)
        counts[places] = [self.kinds[kind].num_tokens(tensor) + 2 for kind, tensor in media]
        expanded, ends = tokens.repeat(counts), counts.cumsum()[places]
        starts = ends - counts[places]
        expanded[starts] = [self.tokens[kind][1] for kind, _ in media]
        expanded[ends - 1] = [self.tokens[kind][2] for kind, _ in media]
        at_start, in_places, at_end = is_label[places] & np.array([self.kinds[kind].learned for kind, _ in media]).T
        learned = is_label.copy()
        learned[places] = in_places
        learned = learned.repeat(counts)
        learned[starts], learned[ends - 1] = at_start, at_end
        return expanded, learned
