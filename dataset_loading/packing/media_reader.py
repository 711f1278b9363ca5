"""References to tensors, through the run's processor; what is unreadable is told apart from what is wrong in code."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast, ProcessorMixin

from model import modality_names
from model.chat import CHAT_TEMPLATE, ConversationEncoder, EncodedConversation, modalities_of_role, said_content
from model.media import CUT_SECONDS
from model.message_keys import is_left_out

from ..sources.references import place_of, read_reference
from ..tasks.registry import get_task


class UnreadableItem(ValueError):
    """An item of media that cannot be used; the message is the reason."""


class MediaReader:
    """Sizes, tokens and tensors of media.

    Args:
        processor: The run's processor, or its tokenizer where the model reads text alone and so has no modalities.
        cut_long_audio: Whether audio that is longer than what is read is cut, and not refused.

    Raises:
        ValueError: The vocabulary lacks a token of media.
    """

    def __init__(self, processor: PreTrainedTokenizerFast | ProcessorMixin, cut_long_audio: bool = False):
        self.cut_long_audio = cut_long_audio
        if isinstance(processor, ProcessorMixin):
            self.tokenizer, self.modalities = processor.tokenizer, processor.modalities
        else:
            self.tokenizer, self.modalities = processor, {}
        self.encoder = ConversationEncoder(self.tokenizer, self.modalities, processor.chat_template or CHAT_TEMPLATE)
        self.written = [name for name, kind in self.modalities.items() if any(kind.learned)]
        self.modality_ids = {name: modality_names().index(name) for name in self.modalities}

    @property
    def max_samples(self) -> dict[str, int]:
        """Most samples that are read, by modality, of those that are audio."""
        return {name: int(self.modalities[name].max_seconds * rate) for name, rate in self.sampling_rates.items()}

    @property
    def sampling_rates(self) -> dict[str, int]:
        """Sampling rates in Hz by modality, of those that are audio."""
        return {name: it.sampling_rate for name, it in self.modalities.items() if name in ("audio", "written_audio")}

    def with_modalities(self, messages: list[dict]) -> list[dict]:
        """Messages in which media of the assistant have the type of the modality that is generated, if there is one.

        Media that are neither read nor generated keep their type, which names no modality of the model then.
        """
        return [
            {
                **message,
                "content": [part | {"type": kinds.get(part["type"], part["type"])} for part in message["content"]],
            }
            for message in messages
            for kinds in [modalities_of_role(message["role"], self.modalities)]
        ]

    def encode(self, conversations: Sequence[list[dict]]) -> list[EncodedConversation | ValueError]:
        """Conversations as tokens, each item as one placeholder; where this model cannot use one, the reason."""
        return [
            found if isinstance(found, ValueError) else self._problem_of(messages) or found
            for messages, found in zip(conversations, self.encoder.encode_all(conversations), strict=True)
        ]

    def _problem_of(self, messages: list[dict]) -> ValueError | None:
        """The reason against an answer of which nothing can be learned, or more than should be, if there is one."""
        for message in self.with_modalities(messages):
            shown = [part["type"] for part in said_content(message)]
            if message["role"] == "assistant" and set(shown).isdisjoint(("text", *self.written)):
                return ValueError(
                    f"the assistant shows type {shown[0]!r}, which the model does not write, and says nothing"
                )
            if is_left_out(message) and not set(shown).isdisjoint(self.written):
                return ValueError("an answer with weight 0 shows generated media, which are learned; remove either")
        return None

    def most_tokens(
        self, reference: Mapping, row: Mapping[str, object], decode: bool, stretch: float = 1.0, silence: float = 0.0
    ) -> int:
        """Most tokens of an item, with those that start and end it; see `read_conversations`. A generated one is never
        made for it; raises UnreadableItem for one that is damaged, as far as it was read.
        """
        name = reference["type"]
        kind = self.modalities[name]
        if "task" in reference:
            size = get_task(reference["task"]).item_size(reference["medium"])
        else:
            size = read_item(lambda source: self._size(name, source, decode), reference, row)
        stretch = stretch if name == "audio" else 1.0
        if name in self.sampling_rates and (stretch > 1 or silence > 0):
            size = size * stretch + silence + 0.01  # a changed rate is rounded to whole numbers of samples
        return kind.tokens_of_size(size) + 2

    def _size(self, name: str, source: Any, decode: bool) -> Any:
        """The size of an item, all of which is read: if audio is cut, its text says what is not in it."""
        kind = self.modalities[name]
        if name in self.sampling_rates:
            seconds = kind.size(source)
            if seconds > kind.max_seconds + CUT_SECONDS and not self.cut_long_audio:
                raise ValueError(
                    f"{seconds:.1f} seconds, of which {kind.max_seconds:g} are read, while its text would stay whole; "
                    "cut both, raise max_seconds of the model's audio, or set data.cut_long_audio"
                )
        return kind.size(kind.load(source) if decode else source)

    def load(self, reference: Mapping, row: Mapping[str, object]) -> Any:
        """An item decoded, an image or samples at the processor's rate; see `read_item` for errors."""
        return read_item(self.modalities[reference["type"]].load, reference, row)


def read_item(read: Callable[[Any], Any], reference: Mapping, row: Mapping[str, object]) -> Any:
    """What a function makes of the path, the bytes or the generated item that a reference leads to; raises
    UnreadableItem for one that is missing, damaged, or refused by the function.
    """
    try:
        return read(read_reference(reference, row))
    except (ValueError, OSError) as error:
        place = place_of(reference)
        raise UnreadableItem(str(error) if place in str(error) else f"{place}: {error}") from error
