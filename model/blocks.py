"""The transformer block: norms, their placement, and stacks of blocks that run once."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention, AttentionInputs
from .cache import CacheSlot
from .feedforward import build_feedforward


def build_norm(config: PreTrainedConfig) -> nn.Module:
    """The norm that `config.norm` names, over the last dimension."""
    norm = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return norm(config.hidden_size, eps=config.norm_eps)


class TransformerBlock(nn.Module):
    """x = N2(Attn(N1 x) + x); x = N4(MLP(N3 x) + x).

    Sandwich placement has all four norms, pre-norm N1 and N3, post-norm N2 and N4; the others are the identity. The
    outer norms of the sandwich stand after the residual sum, so that each sub-layer hands on a normalised state
    (Geiping et al. 2025, section 3.2); Gemma's sandwich norms the branch instead.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        inner = config.norm_placement in ("sandwich", "pre")
        outer = config.norm_placement in ("sandwich", "post")
        self.attention_norm_in = build_norm(config) if inner else nn.Identity()
        self.attention = Attention(config)
        self.attention_norm_out = build_norm(config) if outer else nn.Identity()
        self.mlp_norm_in = build_norm(config) if inner else nn.Identity()
        self.mlp = build_feedforward(config)
        self.mlp_norm_out = build_norm(config) if outer else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: torch.Tensor, inputs: AttentionInputs, slot: CacheSlot | None = None) -> torch.Tensor:
        """x: (batch, sequence, hidden) -> the same. `slot`: this execution's place in the cache."""
        attended = self.attention(self.attention_norm_in(x), inputs, slot)
        x = self.attention_norm_out(x + self.dropout(attended))
        return self.mlp_norm_out(x + self.dropout(self.mlp(self.mlp_norm_in(x))))


class BlockStack(GradientCheckpointingLayer):
    """Blocks that run once: the prelude and the coda. The unit of compilation and of activation checkpointing."""

    def __init__(self, config: PreTrainedConfig, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(num_layers))

    def forward(self, x: torch.Tensor, inputs: AttentionInputs, slots: list[CacheSlot] | None = None) -> torch.Tensor:
        """x: (batch, sequence, hidden) -> the same. `slots`: each layer's place in the cache."""
        return run_layers(self.layers, x, inputs, slots, inputs.hidden_states)


def run_layers(
    layers: nn.ModuleList,
    x: torch.Tensor,
    inputs: AttentionInputs,
    slots: list[CacheSlot] | None,
    outputs: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """One block after the other, each with its slot of the cache, if there is one. Their outputs are gathered in
    `outputs`, if that is given.
    """
    for index, layer in enumerate(layers):
        x = layer(x, inputs, None if slots is None else slots[index])
        if outputs is not None:
            outputs.append(x)
    return x
