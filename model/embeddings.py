"""Embeddings of tokens and of positions."""

import torch
from torch import nn


class ScaledEmbedding(nn.Embedding):
    """Embedding whose output is multiplied by `embed_scale`: the weights have the head's scale, the residual stream its
    own. The attribute has the name that PEFT looks for.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class PositionEmbedding(nn.Embedding):
    """Table of learned positions: a class of its own because its initial scale is another than that of tokens."""


def sinusoidal_table(num_positions: int, hidden_size: int) -> torch.Tensor:
    """(num_positions, hidden): sines in the first half of the features, cosines in the second; wavelengths from 2 pi to
    10000 * 2 pi. Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5 (there interleaved).
    """
    frequencies = 10000 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float32) / hidden_size)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
