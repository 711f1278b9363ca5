"""The block of the codecs: places next to each other mixed by a convolution, features by two linear layers."""

import torch
from torch import nn

from .configuration_codecs import CodecConfig


class ConvNeXtBlock(nn.Module):
    """x + W2 gelu(W1 norm(depthwise convolution of x)).

    Source: Liu et al. 2022, arXiv 2201.03545. Its factor on the branch is left out: the last layer begins small.

    Args:
        dimensions: 1 for sound, 2 for pictures.
    """

    def __init__(self, config: CodecConfig, dimensions: int):
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
        width, side = config.hidden_size, config.kernel_size
        self.depthwise = convolution(width, width, side, padding=side // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.down_proj.is_output_projection = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(media, hidden, *places) -> the same."""
        branch = self.norm(self.depthwise(hidden).movedim(1, -1))  # (media, *places, hidden)
        branch = self.down_proj(nn.functional.gelu(self.up_proj(branch)))
        return hidden + branch.movedim(-1, 1)
