"""Feed-forward layers: the GLU family (Shazeer 2020, arXiv 2002.05202) and the plain two-layer perceptron."""

import torch
from torch import nn
from transformers import PreTrainedConfig


def build_output_projection(in_features: int, out_features: int) -> nn.Linear:
    """A linear map back onto the residual stream, marked because its initial scale falls with the depth. Not a class
    of its own: quantization replaces layers whose type is `nn.Linear`, and no others.
    """
    projection = nn.Linear(in_features, out_features, bias=False)
    projection.is_output_projection = True
    return projection


class GatedFeedForward(nn.Module):
    """down(act(gate x) * up x); act is SiLU for SwiGLU, GELU for GeGLU. (batch, sequence, hidden) -> the same."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = build_output_projection(config.intermediate_size, config.hidden_size)
        self.activation = {"swiglu": nn.functional.silu, "geglu": nn.functional.gelu}[config.mlp]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)


class FeedForward(nn.Module):
    """down(GELU(up x)). (batch, sequence, hidden) -> the same."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = build_output_projection(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden)))


def build_feedforward(config: PreTrainedConfig) -> nn.Module:
    """The layer that `config.mlp` names."""
    return FeedForward(config) if config.mlp == "mlp" else GatedFeedForward(config)
