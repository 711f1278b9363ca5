"""The parts of a transformer: embeddings, norms, feed-forward layers (the GLU family: Shazeer 2020, arXiv 2002.05202),
the block, and stacks of blocks that run once.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention, AttentionInputs, CrossAttention, build_output_projection
from .cache import CacheSlot
from .peer import PeerFeedForward
from .token_pass import Function, is_plain, token_norm, token_product, token_sum


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


def sinusoids(positions: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """(..., sequence) -> (..., sequence, hidden), float32: sines in the first half of the features, cosines in the
    second; wavelengths from 2 pi to 10000 * 2 pi. Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5 (there
    interleaved).
    """
    exponents = torch.arange(0, hidden_size, 2, dtype=torch.float32, device=positions.device) / hidden_size
    angles = positions[..., None].float() * 10000**-exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def build_norm(config: PreTrainedConfig) -> nn.Module:
    """The norm that `config.norm` names, over the last dimension."""
    norm = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return norm(config.hidden_size, eps=config.norm_eps)


class GatedFeedForward(nn.Module):
    """down(act(gate x) * up x); act is SiLU for SwiGLU, GELU for GeGLU. (batch, sequence, hidden) -> the same."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        bias = config.mlp_bias
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = build_output_projection(config.intermediate_size, config.hidden_size, bias)
        self.activation = {"swiglu": nn.functional.silu, "geglu": nn.functional.gelu}[config.mlp]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)

    def token_function(self) -> Function:
        """A function for one token of each row, up to `down_proj`: (rows, hidden) -> (rows, intermediate)."""
        product, activation = token_product(self.gate_up_proj), self.activation

        def widen(x: torch.Tensor) -> torch.Tensor:
            gate, up = product(x).chunk(2, dim=-1)
            return activation(gate).mul_(up)

        return widen


class FeedForward(nn.Module):
    """down(GELU(up x)), the GELU exact or, as "mlp_tanh", approximated. (batch, sequence, hidden) -> the same."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        bias = config.mlp_bias
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = build_output_projection(config.intermediate_size, config.hidden_size, bias)
        self.activation = partial(nn.functional.gelu, approximate="tanh" if config.mlp == "mlp_tanh" else "none")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))

    def token_function(self) -> Function:
        """A function for one token of each row, up to `down_proj`: (rows, hidden) -> (rows, intermediate)."""
        product, activation = token_product(self.up_proj), self.activation
        return lambda x: activation(product(x))


def build_feedforward(config: PreTrainedConfig) -> nn.Module:
    """The layer that `config.mlp` names."""
    kinds = {"mlp": FeedForward, "mlp_tanh": FeedForward, "peer": PeerFeedForward}
    return kinds.get(config.mlp, GatedFeedForward)(config)


class AddResidual(nn.Module):
    """x + scale f."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + (branch if self.scale == 1 else self.scale * branch)


class RezeroResidual(nn.Module):
    """x + a f with one learned number a, 0 at first. Source: Bachlechner et al. 2020, arXiv 2003.04887."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + self.weight * branch


class AdminResidual(nn.Module):
    """w x + f with one number w, 1 until it has been measured, and fixed from then on. It is a buffer, so that it goes
    with the weights. Source: Liu et al. 2020 (Admin), arXiv 2004.08249, where w is a vector that is learned on.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(1))
        self.register_buffer("is_profiled", torch.zeros(1, dtype=torch.bool))

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return self.weight * x + branch


def build_residual(name: str, scale: float) -> nn.Module:
    """The rule of that name by which the output of a sub-layer joins the stream."""
    return AddResidual(scale) if name == "add" else {"rezero": RezeroResidual, "admin": AdminResidual}[name]()


class TransformerBlock(nn.Module):
    """x = N2(Attn(N1 x) + x); x = N4(MLP(N3 x) + x); in a decoder behind an encoder, a cross-attention between them,
    with norms of its own.

    Sandwich placement has all four norms, pre-norm N1 and N3, post-norm N2 and N4, "none" none; the others are the
    identity. The outer norms of the sandwich stand after the residual sum, so that each sub-layer hands on a normalised
    state (Geiping et al. 2025, section 3.2); placement "peri", Gemma's and Ouro's, norms the branch instead:
    x = x + N2(Attn(N1 x)).

    Args:
        residual: How the output of a sub-layer joins x: "add", "rezero" or "admin".
        branch_scale: Factor on that output, where it is added.
    """

    def __init__(self, config: PreTrainedConfig, residual: str = "add", branch_scale: float = 1.0):
        super().__init__()
        inner = config.norm_placement in ("sandwich", "pre", "peri")
        outer = config.norm_placement in ("sandwich", "post")
        of_branch = config.norm_placement == "peri"
        self.attention_norm_in = build_norm(config) if inner else nn.Identity()
        self.attention = Attention(config)
        self.attention_norm_branch = build_norm(config) if of_branch else nn.Identity()
        self.attention_residual = build_residual(residual, branch_scale)
        self.attention_norm_out = build_norm(config) if outer else nn.Identity()
        self.cross_attention = None
        if config.encoder_hidden_size is not None:
            self.cross_norm_in = build_norm(config) if inner else nn.Identity()
            self.cross_attention = CrossAttention(config)
            self.cross_norm_branch = build_norm(config) if of_branch else nn.Identity()
            self.cross_residual = build_residual(residual, branch_scale)
            self.cross_norm_out = build_norm(config) if outer else nn.Identity()
        self.mlp_norm_in = build_norm(config) if inner else nn.Identity()
        self.mlp = build_feedforward(config)
        self.mlp_norm_branch = build_norm(config) if of_branch else nn.Identity()
        self.mlp_residual = build_residual(residual, branch_scale)
        self.mlp_norm_out = build_norm(config) if outer else nn.Identity()
        if residual != "add" or branch_scale != 1:  # which keep branches small, so that weights need not do it
            for module in self.modules():
                module.is_output_projection = False
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: torch.Tensor, inputs: AttentionInputs, slot: CacheSlot | None = None) -> torch.Tensor:
        """x: (batch, sequence, hidden) -> the same. `slot`: this execution's place in the cache."""
        attended = self.attention_norm_branch(self.attention(self.attention_norm_in(x), inputs, slot))
        x = self.attention_norm_out(self.attention_residual(x, self.dropout(attended)))
        if self.cross_attention is not None:
            attended = self.cross_norm_branch(self.cross_attention(self.cross_norm_in(x), inputs))
            x = self.cross_norm_out(self.cross_residual(x, self.dropout(attended)))
        widened = self.mlp_norm_branch(self.mlp(self.mlp_norm_in(x)))
        return self.mlp_norm_out(self.mlp_residual(x, self.dropout(widened)))

    def token_function(self) -> Callable[[torch.Tensor, AttentionInputs, CacheSlot], torch.Tensor]:
        """A function that does what `forward` does, for one new token of each row: (rows, hidden) -> the same."""
        if self.cross_attention is not None or not is_plain(self.attention, Attention):
            return lambda x, inputs, slot: self.forward(x.unsqueeze(1), inputs, slot).squeeze(1)
        norms = (self.attention_norm_in, self.attention_norm_out, self.mlp_norm_in, self.mlp_norm_out)
        norm_before, norm_after, norm_between, norm_last = map(token_norm, norms)
        attend, add_attended = (
            self.attention.token_function(),
            add_product(self.attention_residual, self.attention.o_proj, self.attention_norm_branch),
        )
        if is_plain(self.mlp, GatedFeedForward, FeedForward):
            widen = self.mlp.token_function()
            add_widened = add_product(self.mlp_residual, self.mlp.down_proj, self.mlp_norm_branch)
        else:
            widen = lambda x: self.mlp_norm_branch(self.mlp(x.unsqueeze(1)).squeeze(1))  # noqa: E731
            add_widened = self.mlp_residual

        def pass_token(x: torch.Tensor, inputs: AttentionInputs, slot: CacheSlot) -> torch.Tensor:
            x = norm_after(add_attended(x, attend(norm_before(x), inputs, slot)))
            return norm_last(add_widened(x, widen(norm_between(x))))

        return pass_token


def add_product(
    residual: nn.Module, linear: nn.Module, norm: nn.Module
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(x, features) -> residual(x, norm(linear(features))), each (rows, ...)."""
    if not is_plain(norm, nn.Identity):
        product, norm_product = token_product(linear), token_norm(norm)
        return lambda x, features: residual(x, norm_product(product(features)))
    return token_sum(residual, linear, residual.scale if is_plain(residual, AddResidual) else None)


def layer_order(num_unique: int | None, num_executed: int, schedule: str) -> tuple[int, ...]:
    """Which of the unique layers is executed when, as indices; None: each is executed once.

    "sequence" is AABB, "cycle" ABAB, "cycle_rev" ABBA: a cycle whose last round, unless it is the first, runs
    backwards. Source: Takase and Kiyono 2021, arXiv 2104.06022, algorithm 1. Where `num_unique` does not divide
    `num_executed`, their "sequence" would make more layers than it is told to; ours lets some run once more than
    others.
    """
    unique = num_executed if num_unique is None else num_unique
    if schedule == "sequence":
        return tuple(place * unique // num_executed for place in range(num_executed))
    order = [place % unique for place in range(num_executed)]
    if schedule == "cycle_rev" and num_executed > unique:
        last = (num_executed - 1) // unique * unique  # where the last round begins
        order[last:] = [unique - 1 - index for index in order[last:]]
    return tuple(order)


class BlockStack(GradientCheckpointingLayer):
    """Blocks that run in the order of their indices in `order`, by whose largest there are as many: the prelude and the
    coda. The unit of compilation and of activation checkpointing.
    """

    def __init__(self, config: PreTrainedConfig, order: Sequence[int], residual: str = "add"):
        super().__init__()
        self.order = tuple(order)
        self.layers = nn.ModuleList(TransformerBlock(config, residual) for _ in set(self.order))

    def forward(self, x: torch.Tensor, inputs: AttentionInputs, slots: list[CacheSlot] | None = None) -> torch.Tensor:
        """x: (batch, sequence, hidden) -> the same. `slots`: each execution's place in the cache."""
        return run_layers([self.layers[index] for index in self.order], x, inputs, slots, inputs.hidden_states)


def run_layers(
    layers: Sequence[nn.Module],
    x: torch.Tensor,
    inputs: AttentionInputs,
    slots: list[CacheSlot] | None,
    outputs: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """One block after the other, one as often as it is listed, each time with a slot of the cache, if there is one.
    Their outputs are gathered in `outputs`, if that is given.
    """
    if inputs.token is not None and outputs is None:
        return pass_token(layers, x.squeeze(1), inputs, slots).unsqueeze(1)
    for index, layer in enumerate(layers):
        if inputs.engine is not None:
            layer.attention.layer_idx = inputs.first_place + index
        x = layer(x, inputs, None if slots is None else slots[index])
        if outputs is not None:
            outputs.append(x)
    return x


def pass_token(
    layers: Sequence[nn.Module], x: torch.Tensor, inputs: AttentionInputs, slots: list[CacheSlot]
) -> torch.Tensor:
    """`run_layers` for one new token of each row, (rows, hidden) -> the same."""
    for layer, slot in zip(layers, slots, strict=True):
        x = inputs.token.function_of(layer, token_function)(x, inputs, slot)
    return x


def token_function(layer: nn.Module) -> Callable[[torch.Tensor, AttentionInputs, CacheSlot], torch.Tensor]:
    """A block's, (rows, hidden) -> the same; one that does something else when it is called is called."""
    if is_plain(layer, TransformerBlock):
        return layer.token_function()
    return lambda x, inputs, slot: layer(x.unsqueeze(1), inputs, slot).squeeze(1)
