"""References to tensors, through the run's processor; what is unreadable is told apart from what is wrong in code."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from .conversations import special_id
from .references import place_of, read_medium

MODALITIES = ("text", "image", "audio")
"""Their places are what `modality_ids` says; further kinds of media follow in the order of the processor."""


class UnreadableMedium(ValueError):
    """A medium that cannot be used; the message is the reason."""


class MediaReader:
    """Sizes, tokens and tensors of media.

    Args:
        processor: the run's; see `MegaTransformerProcessor`.

    Raises:
        ValueError: it is a tokenizer, or its vocabulary lacks a token of media.
    """

    def __init__(self, processor: ProcessorMixin):
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"a source has media, but the model reads text only ({type(processor).__name__}); "
                "use model_type: megatransformer, or remove the source"
            )
        self.processor = processor
        kinds = {name: kind.modality for name, kind in processor.kinds.items()}
        names = [*MODALITIES, *(name for name in kinds if name not in MODALITIES)]
        self.modality_ids = {name: names.index(name) for name in kinds}
        self.tokens = {
            name: [special_id(processor.tokenizer, token) for token in (kind.token, kind.start_token, kind.end_token)]
            for name, kind in kinds.items()
        }

    @property
    def placeholders(self) -> dict[str, int]:
        """Token ids by kind."""
        return {kind: ids[0] for kind, ids in self.tokens.items()}

    def most_tokens(self, reference: Mapping, row: Mapping[str, object], stretch: float = 1.0) -> int:
        """Tokens of a medium with those that start and end it, from its header.

        Args:
            stretch: how many times as long a recording may become.

        Raises:
            UnreadableMedium: as far as the header tells.
        """
        size = self._guarded(self.processor.medium_size, reference, row)
        if reference["type"] == "audio":
            size *= stretch
        return self.processor.num_media_tokens(reference["type"], size)

    def load(self, reference: Mapping, row: Mapping[str, object]) -> Any:
        """A medium decoded: a picture, or samples at the processor's rate.

        Raises:
            UnreadableMedium: missing, damaged, or outside of the processor's limits.
        """
        return self._guarded(self.processor.load_medium, reference, row)

    def _guarded(self, read: Callable[[str, Any], Any], reference: Mapping, row: Mapping[str, object]) -> Any:
        try:
            return read(reference["type"], read_medium(reference, row))
        except (ValueError, OSError) as error:
            place = place_of(reference)
            raise UnreadableMedium(str(error) if place in str(error) else f"{place}: {error}") from error

    def tensor(self, kind: str, medium: Any) -> torch.Tensor:
        """What `load` gave, as the model's input for one medium."""
        return self.processor.preprocess_medium(kind, medium)

    def expand(
        self, tokens: np.ndarray, is_label: np.ndarray, media: list[tuple[str, torch.Tensor]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and is_label with start, placeholders and end for each medium, in place of its one placeholder."""
        placeholders, kinds = list(self.placeholders.values()), self.processor.kinds
        places = np.flatnonzero(np.isin(tokens, placeholders))
        counts = np.ones(len(tokens), dtype=np.int64)
        counts[places] = [kinds[kind].num_tokens(tensor) + 2 for kind, tensor in media]
        ends = counts.cumsum()
        expanded = np.repeat(tokens, counts)
        for place, (kind, _) in zip(places, media, strict=True):
            _, start, end = self.tokens[kind]
            expanded[ends[place] - counts[place]], expanded[ends[place] - 1] = start, end
        return expanded, np.repeat(is_label, counts)
