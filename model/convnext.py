"""The block of the codecs: places next to each other mixed by a convolution, features by two linear layers."""

import torch
from torch import nn

from .configuration_codecs import CodecConfig


class ConvNeXtBlock(nn.Module):
    """x + W2 gelu(W1 norm(depthwise convolution of x)).

    Source: Liu et al. 2022, arXiv 2201.03545. Its factor on the branch is left out: the last layer begins small.

    Args:
        dimensions: 1 for sound, 2 for pictures.
        has_linear_path: Whether the convolution has a residual path of its own instead, m + W2 gelu(W1 norm(m)) with
            m = x + depthwise convolution of x. From the first to the last block there is a linear map then, which a
            norm does not deprive of how strong things are.
    """

    def __init__(self, config: CodecConfig, dimensions: int, has_linear_path: bool = False):
        super().__init__()
        self.has_linear_path = has_linear_path
        convolution = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
        width, side = config.hidden_size, config.kernel_size
        self.depthwise = convolution(width, width, side, padding=side // 2, groups=width)
        self.depthwise.is_zero_at_first = has_linear_path
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.down_proj.is_output_projection = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(media, hidden, *places) -> the same."""
        mixed = self.depthwise(hidden)
        if self.has_linear_path:
            hidden = mixed = hidden + mixed
        branch = self.norm(mixed.movedim(1, -1))  # (media, *places, hidden)
        branch = self.down_proj(nn.functional.gelu(self.up_proj(branch)))
        return hidden + branch.movedim(-1, 1)
