"""Tokens to text, as they come: characters whole, stop strings left out."""

from collections.abc import Sequence
from itertools import zip_longest

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ..engine import Likelihood
from .messages import TokenShown


class TextWriter:
    """The text of one answer.

    Text that may be the beginning of a stop string, and bytes of a character that is not complete, are held back.

    Args:
        tokenizer: That of the model.
        stop: Strings that end the text; neither they nor what follows them are part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.text, self.num_given, self.is_stopped = "", 0, False
        self.tokens: list[TokenShown] = []

    def push(
        self, ids: Sequence[int], steps: Sequence[int], likelihoods: Sequence[Likelihood] = ()
    ) -> tuple[str, tuple[TokenShown, ...]]:
        """New tokens with their steps; gives the text that is certain now, and the tokens of it."""
        for token, taken, likelihood in zip_longest(ids, steps, likelihoods):
            text = self.decoder.step(self.tokenizer.backend_tokenizer, token) or ""
            likely = () if likelihood is None else self._named(likelihood)
            shown = text if likelihood is None else self.tokenizer.decode([token])
            self.tokens.append(TokenShown(shown, taken, likelihood, likely))
            self.text += text
        found = [at for string in self.stop if (at := self.text.find(string, self.num_given)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        return self._given(len(self.text) if self.is_stopped else len(self.text) - self._held())

    def end(self) -> tuple[str, tuple[TokenShown, ...]]:
        """The text that was held back, as no token follows."""
        return self._given(len(self.text))

    def _given(self, end: int) -> tuple[str, tuple[TokenShown, ...]]:
        text = self.text[self.num_given : end]
        if not text and self.num_given < len(self.text):
            return "", ()
        tokens, self.tokens = tuple(self.tokens), []
        self.num_given = max(self.num_given, end)
        return text, tokens

    def _held(self) -> int:
        """Characters at the end with which a stop string may begin."""
        longest = 0
        for string in self.stop:
            for count in range(min(len(string) - 1, len(self.text) - self.num_given), 0, -1):
                if self.text.endswith(string[:count]):
                    longest = max(longest, count)
                    break
        return longest

    def _named(self, likelihood: Likelihood) -> tuple[tuple[str, float], ...]:
        return tuple((self.tokenizer.decode([token]), value) for token, value in likelihood.likely)
