"""Sampling whose randomness is keyed: what a text becomes depends on its prompt, its seed and its options alone, not on
what is generated beside it, nor on how.

A token is the largest of log-probability plus Gumbel noise, which draws from the distribution; the noise of a token
depends on the seed, the copy of the prompt, and the number of the new token. Source: Gumbel 1954; see Maddison et al.
2014, arXiv 1411.0030.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from .depth import keyed_generator


@dataclass
class KeyedSampling(LogitsProcessor):
    """Leaves of the scores of each row only the token that is drawn.

    Args:
        seeds: One of each row; or a single one.
        prompt_length: Tokens before the first new one.
        copies: Rows of each prompt, which come one after the other.
    """

    seeds: Sequence[int]
    prompt_length: int
    copies: int = 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(rows, tokens), (rows, vocab) -> (rows, vocab)."""
        index = input_ids.shape[1] - self.prompt_length
        noise = torch.stack([self.noise(row, index, scores.shape[-1]) for row in range(len(scores))])
        drawn = (scores + noise.to(scores)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)

    def noise(self, row: int, index: int, vocab_size: int) -> torch.Tensor:
        """Gumbel noise of new token number `index` of a row, (vocab,), float32 on the CPU."""
        seed = self.seeds[row // self.copies] if len(self.seeds) > 1 else self.seeds[0]
        generator = keyed_generator("token", seed, row % self.copies, index)
        return torch.empty(vocab_size).exponential_(generator=generator).log_().neg_()
