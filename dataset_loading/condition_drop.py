"""Prompts left out at random, so that a model also learns to write media without being asked for anything.

Guidance goes from what it would write then to what it writes for a prompt. Source: Ho and Salimans 2022, arXiv
2207.12598.
"""

from collections.abc import Sequence

import numpy as np
import torch

from model.chat import NULL_TOKEN, special_id

from .media_reader import MediaReader


class ConditionDrop:
    """Puts a token that says nothing in the place of each token of a prompt, so that all others keep their positions.

    Special tokens stay, such as those of roles, and of the start and end of media. So do media that the user shows
    beside a text; a prompt of media alone loses them, and their placeholders are hidden like text.

    Args:
        probability: with which a conversation that shows written media loses what stands before the first of them.
        reader: of their media.
    """

    def __init__(self, probability: float, reader: MediaReader):
        self.probability, tokenizer = probability, reader.tokenizer
        self.null, self.written = special_id(tokenizer, NULL_TOKEN), reader.written
        self.is_special, self.is_place, self.is_written = np.zeros(
            (3, max(tokenizer.get_vocab().values()) + 1), dtype=bool
        )
        self.is_special[[*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]] = True
        self.is_place[list(reader.encoder.placeholders.values())] = True
        self.is_written[[reader.encoder.placeholders[name] for name in reader.written]] = True

    def __call__(
        self, tokens: np.ndarray, media: Sequence[tuple[str, torch.Tensor]], rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[tuple[str, torch.Tensor], ...]]:
        """Tokens (tokens,) and media of a conversation, as they are or without their prompt."""
        first = next((number for number, (kind, _) in enumerate(media) if kind in self.written), None)
        if first is None or rng.random() >= self.probability:
            return tokens, tuple(media)
        is_prompt = np.arange(len(tokens)) < self.is_written[tokens].argmax()
        is_text = is_prompt & ~self.is_special[tokens]
        if is_text.any():
            return np.where(is_text, self.null, tokens), tuple(media)
        return np.where(is_prompt & self.is_place[tokens], self.null, tokens), tuple(media[first:])
