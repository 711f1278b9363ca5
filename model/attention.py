"""Grouped-query attention with RoPE or ALiBi; the backends are those of transformers' attention registry."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, packed_sequence_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import CacheSlot, RecurrentCache
from .configuration_megatransformer_text import MegaTransformerTextConfig
from .paged_attention import EngineCall
from .token_pass import token_norm, token_product


@dataclass
class AttentionInputs:
    """What every layer of one forward pass shares: the mask, and where the tokens stand."""

    mask: torch.Tensor | None  # in the form that the backend wants; None: plain causal
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin: (batch, sequence, head_dim)
    position_bias: torch.Tensor | None = None  # (1 or batch, heads, query, key), where the mask does not hold it
    where: slice | torch.LongTensor | None = None  # the places of the tokens in the cache
    rows: torch.LongTensor | None = None  # the rows of the cache that the batch consists of; None: all of them
    build_of: Callable[[torch.LongTensor], "AttentionInputs"] | None = None  # for a block mask, which has no rows
    hidden_states: list[torch.Tensor] | None = None  # where what was asked for is gathered
    attentions: list[torch.Tensor] | None = None
    source: "SourceInputs | None" = None  # of a decoder behind an encoder
    token: "TokenInputs | None" = None  # where there is one new token of each row, and only its output is wanted
    window: int | None = None  # of steps after the first, where these share what it leaves; see `RecurrentCache`
    window_mask: torch.Tensor | None = None  # their mask
    engine: EngineCall | None = None  # in place of a cache
    first_place: int = 0  # of the layers that run now, among the places of an engine

    def to(self, device: torch.device, non_blocking: bool = False) -> "AttentionInputs":
        """The same on another device. accelerate calls it where the layers of a model are spread over several."""

        def move(part):
            return part if part is None else part.to(device, non_blocking=non_blocking)

        rotary = self.rotary and tuple(map(move, self.rotary))
        where = self.where if isinstance(self.where, slice) else move(self.where)
        moved = {"mask": move(self.mask), "position_bias": move(self.position_bias), "rows": move(self.rows)}
        moved["source"], moved["token"] = self.source and self.source.map(move), self.token and self.token.map(move)
        return replace(self, rotary=rotary, where=where, **moved)

    def of(self, rows: torch.LongTensor) -> "AttentionInputs":
        """The same of some rows of the whole batch."""
        if self.build_of is not None:
            return self.build_of(rows)
        rotary = self.rotary and tuple(select_rows(part, rows) for part in self.rotary)
        mask, bias = select_rows(self.mask, rows), select_rows(self.position_bias, rows)
        window_mask = select_rows(self.window_mask, rows)
        source, token = (
            part and part.map(lambda tensor: select_rows(tensor, rows)) for part in (self.source, self.token)
        )
        changed = {"rotary": rotary, "rows": rows, "source": source, "token": token, "window_mask": window_mask}
        return replace(self, mask=mask, position_bias=bias, **changed)

    def of_step(self, step: int) -> "AttentionInputs":
        """Inputs of the core's step behind `step` others."""
        if self.engine is not None:
            return replace(self, first_place=self.engine.first_place(step))
        return self if self.window is None or step == 0 else replace(self, mask=self.window_mask)

    def of_last(self) -> "AttentionInputs":
        """Inputs of the last token of each row alone; nothing of its layers is gathered."""
        mask, bias = (part if part is None else part[..., -1:, :] for part in (self.mask, self.position_bias))
        where = slice(self.where.stop - 1, self.where.stop) if isinstance(self.where, slice) else self.where[-1:]
        rotary = self.rotary and tuple(part[:, -1:] for part in self.rotary)
        gathered = {"hidden_states": None, "attentions": None}
        return replace(self, mask=mask, position_bias=bias, where=where, rotary=rotary, **gathered)

    def record(self, probabilities: torch.Tensor, attentions: list[torch.Tensor]) -> None:
        """Gathers attention probabilities, (rows, heads, query, key), with 0 in the rows that are not here. Those of a
        token that is seen at its first step in some queries, and at its own in others, are put together.
        """
        past = attentions[0].shape[-1] if attentions else probabilities.shape[-1]
        if probabilities.shape[-1] > past:
            shared, own = probabilities.tensor_split((past - self.window,), dim=-1)
            pad = nn.functional.pad
            probabilities = pad(shared, (0, self.window)) + pad(own, (past - own.shape[-1], 0))
        if self.rows is not None:
            whole = probabilities.new_zeros(len(attentions[0]), *probabilities.shape[1:])
            probabilities = whole.index_copy(0, self.rows, probabilities)
        attentions.append(probabilities)


@dataclass
class SourceInputs:
    """The source of a decoder, as its layers see it.

    Args:
        keys_values: Keys and values by the number of the layer, (batch, key/value heads, source, head_dim) each.
        mask: Which of the source is seen, in the form that the backend wants; None: all of it.
        attentions: Where the probabilities that are asked for are gathered, (batch, heads, query, source) each.
    """

    keys_values: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask: torch.Tensor | None
    attentions: list[torch.Tensor] | None = None

    def map(self, change: Callable[[torch.Tensor | None], torch.Tensor | None]) -> "SourceInputs":
        """A copy with all tensors changed."""
        changed = tuple(tuple(map(change, pair)) for pair in self.keys_values)
        return replace(self, keys_values=changed, mask=change(self.mask))


@dataclass
class TokenInputs:
    """Inputs of layers beside the rest, where there is one new token of each row.

    Args:
        rotary: cos and sin for queries, keys and values at once, (batch, heads, head_dim) each, by which those of
            values are not rotated; None without RoPE.
        functions: Functions of modules, made once for all steps, and in `generate` once for all tokens.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    functions: dict[nn.Module, Callable] = field(default_factory=dict)

    def function_of(self, module: nn.Module, build: Callable[[nn.Module], Callable]) -> Callable:
        """The module as a function, made by `build` where it is not there yet."""
        function = self.functions.get(module)
        if function is None:
            function = self.functions[module] = build(module)
        return function

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TokenInputs":
        """A copy with all tensors changed."""
        return replace(self, rotary=self.rotary and tuple(map(change, self.rotary)))


def select_rows(tensor: torch.Tensor | None, rows: torch.LongTensor) -> torch.Tensor | None:
    """Rows of a (batch, ...) tensor; a tensor that all rows share, (1, ...), and None stay as they are."""
    return tensor if tensor is None or len(tensor) == 1 else tensor.index_select(0, rows)


def rotary_angles(positions: torch.Tensor, num_features: int, theta: float) -> torch.Tensor:
    """Angles of RoPE in float32, one for each pair of features: (..., sequence) -> (..., sequence, features / 2)."""
    exponents = torch.arange(0, num_features, 2, dtype=torch.float32, device=positions.device) / num_features
    return positions[..., None].float() * theta**-exponents


def rotary_tables(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each (batch, sequence, head_dim), of angles (batch, sequence, head_dim / 2); the sine of the
    first half is negative, for `apply_rotary`.

    Source: Su et al. 2021, arXiv 2104.09864, in the half-split layout of transformers' Llama.
    """
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x_i, x_{i + d/2}). x: (batch, heads, sequence, d); cos, sin: (batch, sequence, d)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((x2, x1), dim=-1) * sin.unsqueeze(1)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes of ALiBi, (heads,): 2^(-8/n), 2^(-16/n), ... for n a power of two; otherwise those of the power below,
    filled up with every second slope of the power above. Source: Press et al. 2021, arXiv 2108.12409, released code.
    """

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(powers(below) + powers(2 * below)[0::2][: num_heads - below])


def alibi_bias(query_positions: torch.Tensor, key_positions: torch.Tensor, num_heads: int) -> torch.Tensor:
    """ALiBi bias slope * (key position - query position): (1 or batch, query), (1 or batch, key) -> float32 (1 or
    batch, heads, query, key).
    """
    distance = key_positions[:, None, None, :] - query_positions[:, None, :, None]  # (batch, 1, query, key)
    return alibi_slopes(num_heads).to(distance.device)[:, None, None] * distance.float()


def check_backend(config: PreTrainedConfig, backend: str | None) -> None:
    """Raises ValueError for a backend of transformers that would leave out a term of the attention logits, or, beside
    cross-attention, whose masks cannot be divided by rows.
    """
    if config.encoder_hidden_size is not None and backend == "flex_attention":
        raise ValueError("cross-attention is not possible with flex_attention; use sdpa or eager")
    if config.attn_logit_softcapping is not None and backend == "sdpa":
        raise ValueError("attn_logit_softcapping is not possible with sdpa; use eager or flex_attention")
    if config.is_causal and config.position_embedding == "alibi" and "flash" in (backend or ""):
        raise ValueError(f"position_embedding 'alibi' is not possible with {backend}; use sdpa")


def prepare_attention(
    config: MegaTransformerTextConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: RecurrentCache | None,
    may_restart: bool = True,
    rows: torch.LongTensor | None = None,
    attentions: list[torch.Tensor] | None = None,
) -> AttentionInputs:
    """Builds the mask and the positional terms once for all layers of a forward pass.

    Args:
        attention_mask: (batch, past + sequence) with 1 for real tokens, a 4-D mask which is taken as it is, or None.
        position_ids: (batch, sequence). A restart begins a new document, and none sees another; not behind a cache.
        may_restart: Whether restarts are looked for, for which the host waits for a GPU.
        rows: The rows of the cache that the batch consists of. Default: all.
        attentions: Where the attention probabilities of each layer are gathered, for which they are computed eagerly.
    """
    check_backend(config, config._attn_implementation)  # it may have been set without a check, on the config
    config = config if attentions is None else in_eager(config)
    window = window_of(config, cache)
    alibi = config.position_embedding == "alibi"
    past = cache.get_seq_length() if cache is not None else 0
    is_static = cache is not None and cache.max_length is not None
    documents = None
    if may_restart and past == 0 and (is_static or (attention_mask is not None and attention_mask.ndim == 2)):
        documents = documents_of(position_ids, attention_mask, len(inputs_embeds))
    if documents is not None:  # transformers looks for them only where there is neither a mask nor a cache
        if "flash" in config._attn_implementation:
            raise ValueError(
                f"packed rows beside padded ones are not possible with {config._attn_implementation}; use sdpa"
            )
        room = cache.max_length - documents.shape[1] if is_static else 0
        documents = packed_sequence_mask_function(nn.functional.pad(documents, (0, room), value=-1))
    if config.is_causal:
        mask = create_causal_mask(
            config,
            inputs_embeds,
            attention_mask,
            # With a cache, transformers does not look for restarts of the positions; an empty one has nothing to say.
            cache if past or is_static else None,
            position_ids=position_ids if may_restart else None,
            and_mask_function=documents,
            # ALiBi adds to the mask, and the room of a static cache that is not used yet must be hidden.
            allow_is_causal_skip=not (alibi or is_static),
        )
    else:
        mask = create_bidirectional_mask(
            config, inputs_embeds, attention_mask, allow_is_bidirectional_skip=not alibi, and_mask_function=documents
        )
    mask = _as_added(mask, config, inputs_embeds)
    where = cache.places(inputs_embeds.shape[1], inputs_embeds.device) if cache is not None else None
    inputs = AttentionInputs(mask, where=where, rows=rows, attentions=attentions, window=window)
    if not isinstance(mask, torch.Tensor | None):

        def build_of(rows: torch.LongTensor) -> AttentionInputs:
            given = (select_rows(each, rows) for each in (inputs_embeds, attention_mask, position_ids))
            return prepare_attention(config, *given, cache, may_restart, rows)

        inputs.build_of = build_of
    if config.position_embedding == "rope":
        angles = rotary_angles(position_ids, config.head_dim, config.rope_theta)
        inputs.rotary = rotary_tables(angles, inputs_embeds.dtype)
    if is_token_alone(config, inputs_embeds, inputs):
        inputs.token = TokenInputs(inputs.rotary and token_tables(config, *inputs.rotary))
    if alibi:
        _add_alibi(config, inputs, inputs_embeds, attention_mask, position_ids, cache)
    if inputs.window is not None:
        inputs.window_mask = _mask_in_window(inputs.mask, inputs.window, past, inputs_embeds)
    return inputs


def prepare_engine_attention(
    config: MegaTransformerTextConfig, hidden: torch.Tensor, position_ids: torch.Tensor, engine: EngineCall
) -> AttentionInputs:
    """What an engine's attention function does not know: the rotations. `hidden` is (1, tokens, hidden), of all texts
    one behind the other.
    """
    check_backend(config, config._attn_implementation)
    inputs = AttentionInputs(engine.mask, engine=engine)
    if config.position_embedding == "rope":
        angles = rotary_angles(position_ids, config.head_dim, config.rope_theta)
        inputs.rotary = rotary_tables(angles, hidden.dtype)
    return inputs


def window_of(config: MegaTransformerTextConfig, cache: RecurrentCache | None) -> int | None:
    """Tokens that steps after the first see at their own step, with cache policy "first": that of the cache, or, where
    there is none, of the config. None: all. ValueError for a backend whose masks have no such parts.
    """
    recurrence = config.recurrence
    is_asked = recurrence.cache_policy == "first" and config.num_core_layers
    window = recurrence.num_kept_tokens if is_asked else None
    window = window if cache is None else cache.num_kept_tokens
    if window is not None and config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"cache policy 'first' is not possible with {config._attn_implementation}; use sdpa or eager")
    if window is not None and not config.is_causal:
        raise ValueError("cache policy 'first' is not possible without a causal mask; use 'full'")
    return window


def _mask_in_window(mask: torch.Tensor | None, window: int, past: int, embeds: torch.Tensor) -> torch.Tensor | None:
    """The mask of what `WindowSlot` returns: tokens before the window of a query are seen in the first part, those in
    it in the second.
    """
    sequence = embeds.shape[1]
    length = past + sequence
    if sequence == 1 or window >= length:
        return mask
    places = torch.arange(length, device=embeds.device)
    distance = places[past:, None] - places  # (query, key)
    mask = (distance >= 0)[None, None] if mask is None else mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    shared, own = mask.masked_fill(distance < window, hidden), mask.masked_fill(distance >= window, hidden)
    return torch.cat((shared[..., : length - window], own[..., max(0, past - window + 1) :]), dim=-1)


def _add_alibi(
    config: MegaTransformerTextConfig,
    inputs: AttentionInputs,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: RecurrentCache | None,
) -> None:
    """Adds the bias of ALiBi to the mask, or puts it beside one that is not of numbers."""
    mask, past = inputs.mask, 0 if cache is None else cache.get_seq_length()
    keys = _key_positions(attention_mask, position_ids, past)
    if cache is not None and cache.max_length is not None:  # positions of what is hidden do not matter
        keys = nn.functional.pad(keys, (0, cache.max_length - keys.shape[-1]))
    bias = alibi_bias(position_ids, keys, config.num_attention_heads).to(inputs_embeds.dtype)
    bias = bias if config.is_causal else -bias.abs()
    if not isinstance(mask, torch.Tensor):  # FlexAttention's block mask says who is seen; the bias goes beside it
        # Its kernel indexes the batch, it does not broadcast.
        inputs.position_bias = bias.expand(inputs_embeds.shape[0], -1, -1, -1)
    elif mask.dtype == torch.bool:
        inputs.mask = torch.where(mask, bias, torch.finfo(bias.dtype).min)
    else:
        inputs.mask = mask + bias


def is_token_alone(config: PreTrainedConfig, embeds: torch.Tensor, inputs: AttentionInputs) -> bool:
    """Whether there is one new token of each row, behind a cache that grows, and only its output is wanted."""
    return (
        embeds.shape[1] == 1
        and isinstance(inputs.where, slice)
        and inputs.attentions is None
        and config._attn_implementation == "sdpa"
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and not torch.is_autocast_enabled(embeds.device.type)
    )


def token_tables(config: PreTrainedConfig, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of RoPE, (batch, 1, head_dim), as `TokenInputs` has them."""
    rotated, rest = config.num_attention_heads + config.num_key_value_heads, config.num_key_value_heads
    cos, sin = (table.expand(-1, rotated, -1) for table in (cos, sin))
    return torch.cat((cos, torch.ones_like(cos[:, :rest])), 1), torch.cat((sin, torch.zeros_like(sin[:, :rest])), 1)


def prepare_source(
    config: PreTrainedConfig,
    hidden: torch.Tensor,
    states: torch.Tensor,
    is_real: torch.Tensor | None,
    keys_values: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    attentions: list[torch.Tensor] | None = None,
) -> SourceInputs:
    """The source of a decoder with `hidden`, (batch, sequence, hidden): the `states` of an encoder, (batch, source,
    hidden); `is_real` is (batch, source) of bool or None, and None hides nothing. The list, if given, gathers attention
    probabilities, for which these are computed eagerly.
    """
    config = config if attentions is None else in_eager(config)
    mask = create_bidirectional_mask(config, hidden, is_real, encoder_hidden_states=states)
    return SourceInputs(keys_values, _as_added(mask, config, hidden), attentions)


def prepare_bidirectional_attention(
    config: PreTrainedConfig,
    hidden: torch.Tensor,
    is_real: torch.Tensor | None,
    angles: torch.Tensor,
    hidden_states: list[torch.Tensor] | None = None,
    attentions: list[torch.Tensor] | None = None,
) -> AttentionInputs:
    """Mask and rotations for an encoder, in which all tokens see each other, but none sees padding: `hidden` is (batch,
    sequence, hidden), `is_real` (batch, sequence) of bool or None, `angles` (1 or batch, sequence, head_dim / 2). The
    lists, if given, gather the outputs of the layers, behind `hidden`, and their attention probabilities, for which
    these are computed eagerly.
    """
    check_backend(config, config._attn_implementation)
    config = config if attentions is None else in_eager(config)
    if hidden_states is not None:
        hidden_states.append(hidden)
    mask = _as_added(create_bidirectional_mask(config, hidden, is_real), config, hidden)
    rotary = rotary_tables(angles, hidden.dtype)
    return AttentionInputs(mask, rotary, hidden_states=hidden_states, attentions=attentions)


def in_eager(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the one backend that gives attention probabilities."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config


def _as_added(mask: torch.Tensor | None, config: PreTrainedConfig, embeds: torch.Tensor):
    """The mask, with numbers in place of bools where the backend adds it."""
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and config._attn_implementation == "eager":
        return torch.where(mask, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
    return mask


def documents_of(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, batch: int
) -> torch.LongTensor | None:
    """The number of the document of each token, (batch, sequence): one begins where the position does not follow that
    of the token before, padding left out. None: each row is one.
    """
    positions = position_ids.expand(batch, -1)
    is_token = torch.ones_like(positions, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    seen = places.masked_fill(~is_token, -1).cummax(dim=1).values
    before = nn.functional.pad(seen[:, :-1], (1, 0), value=-1)  # the token before, -1: there is none
    follows = positions == positions.gather(1, before.clamp(min=0)) + 1
    begins = is_token & (before >= 0) & ~follows
    return begins.cumsum(dim=1) if begins.any() else None


def _key_positions(attention_mask: torch.Tensor | None, position_ids: torch.Tensor, past: int) -> torch.Tensor:
    """Positions of all keys, (1 or batch, past + sequence): counted over the real tokens if a padding mask is given."""
    if past == 0:
        return position_ids
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask.long().cumsum(-1) - 1
    return torch.arange(past + position_ids.shape[1], device=position_ids.device)[None]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: softmax(cap(q k^T) + mask) v. query: (batch, heads, query, head_dim)."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    logits = query @ key.transpose(2, 3) * scaling  # (batch, heads, query, key)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    probabilities = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def build_output_projection(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """A linear map back onto the residual stream, marked because its initial scale falls with the depth. Not a class
    of its own: quantization replaces layers whose type is `nn.Linear`, and no others.
    """
    projection = nn.Linear(in_features, out_features, bias=bias)
    projection.is_output_projection = True
    return projection


class Attention(nn.Module):
    """Self-attention with `num_attention_heads` query heads and `num_key_value_heads` key/value heads; causal in the
    language model, not in the encoders of what it reads.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.is_causal = config.is_causal
        self.head_dim = config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.layer_idx: int | None = None  # the place of this execution, where an engine calls
        self.build_projections(config)
        self.o_proj = build_output_projection(self.num_heads * self.head_dim, config.hidden_size, config.attention_bias)
        if config.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(self.num_heads + self.num_key_value_heads, self.head_dim))
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def build_projections(self, config: PreTrainedConfig) -> None:
        """Those of queries, keys and values, in one."""
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)

    def forward(
        self,
        hidden: torch.Tensor,
        inputs: AttentionInputs,
        slot: CacheSlot | None = None,
    ) -> torch.Tensor:
        """Attends, and writes keys and values to a slot of the cache. hidden: (batch, sequence, hidden) -> the same."""
        batch, sequence, _ = hidden.shape
        query, key, value = self._project(hidden)
        if inputs.rotary is not None:
            query, key = apply_rotary(query, *inputs.rotary), apply_rotary(key, *inputs.rotary)
        # Under autocast the product is half precise, and biases, norms and rotations are not; backends, and a cache,
        # want one type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if slot is not None:
            key, value = slot.update(key, value, inputs.where, inputs.rows)

        extra = {} if inputs.position_bias is None else {"position_bias": inputs.position_bias}
        if inputs.engine is not None:
            key, value, extra = inputs.engine.update(key, value, self.layer_idx)
        out, probabilities = self.attend(query, key, value, inputs.mask, inputs.attentions is not None, **extra)
        if inputs.attentions is not None:
            inputs.record(probabilities, inputs.attentions)
        return self.o_proj(out.reshape(batch, sequence, -1))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_recorded: bool,
        **extra: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output of the backend, (batch, sequence, heads, head_dim), and probabilities, where they are recorded."""
        backend = "eager" if is_recorded else self.config._attn_implementation.removeprefix("paged|")
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        if self.config.attn_logit_softcapping is not None:
            extra["softcap"] = self.config.attn_logit_softcapping
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **extra)

    def token_function(self) -> Callable[[torch.Tensor, AttentionInputs, CacheSlot], torch.Tensor]:
        """A function that does for one new token what `forward` does before the output projection: (rows, hidden) ->
        (rows, features).
        """
        heads, groups, head_dim, scale = self.num_heads, self.num_key_value_heads, self.head_dim, self.scaling
        product, bias = token_product(self.qkv_proj), self.qk_bias if self.config.qk_bias else None
        norms = [token_norm(norm) for norm in (self.q_norm, self.k_norm)] if self.config.qk_norm else None
        shape, attend = (-1, heads + 2 * groups, head_dim), nn.functional.scaled_dot_product_attention

        def attend_from_token(x: torch.Tensor, inputs: AttentionInputs, slot: CacheSlot) -> torch.Tensor:
            qkv = product(x).view(shape)
            if bias is not None:
                qkv = torch.cat((qkv[:, :-groups] + bias, qkv[:, -groups:]), dim=1)
            if norms is not None:
                query, key, value = qkv.split((heads, groups, groups), dim=1)
                qkv = torch.cat((norms[0](query), norms[1](key), value), dim=1)
            if inputs.token.rotary is not None:
                cos, sin = inputs.token.rotary
                qkv = torch.addcmul(qkv * cos, qkv.roll(head_dim // 2, -1), sin)
            query, both = qkv.split((heads, 2 * groups), dim=1)
            keys, values = slot.update_token(both.view(-1, 2, groups, head_dim), inputs.where, inputs.rows)
            out = attend(query.unsqueeze(2), keys, values, inputs.mask, scale=scale, enable_gqa=heads != groups)
            return out.view(-1, heads * head_dim)

        return attend_from_token

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (batch, heads, sequence, head_dim); keys and values (batch, key/value heads, sequence, head_dim)."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        query, key, value = qkv.split([self.num_heads, self.num_key_value_heads, self.num_key_value_heads], dim=-2)
        if self.config.qk_bias:
            query, key = query + self.qk_bias[: self.num_heads], key + self.qk_bias[self.num_heads :]
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class CrossAttention(Attention):
    """Attention of a decoder to the last states of an encoder, without positions. Keys and values are made once for all
    tokens and all steps, by `project_source`; only queries are made of what is attended from.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.is_causal = False
        self.number = 0  # of the layer among those of the model, which sets it

    def build_projections(self, config: PreTrainedConfig) -> None:
        """Those of queries from the decoder, of keys and values from the encoder."""
        bias, heads = config.attention_bias, 2 * self.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.kv_proj = nn.Linear(config.encoder_hidden_size, heads * self.head_dim, bias=bias)

    def project_source(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, source, encoder's hidden) -> keys and values, (batch, key/value heads, source, head_dim) each."""
        key, value = self.kv_proj(states).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        if self.config.qk_bias:
            key = key + self.qk_bias[self.num_heads :]
        if self.config.qk_norm:
            key = self.k_norm(key)
        return key.transpose(1, 2).to(value.dtype), value.transpose(1, 2)

    def forward(self, hidden: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        """hidden: (batch, sequence, hidden) -> the same."""
        query = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        if self.config.qk_bias:
            query = query + self.qk_bias[: self.num_heads]
        if self.config.qk_norm:
            query = self.q_norm(query)
        (key, value), source = inputs.source.keys_values[self.number], inputs.source
        query = query.transpose(1, 2).to(value.dtype)
        out, probabilities = self.attend(query, key, value, source.mask, source.attentions is not None)
        if source.attentions is not None:
            inputs.record(probabilities, source.attentions)
        return self.o_proj(out.reshape(*hidden.shape[:2], -1))
