"""Key/value cache of a recurrent-depth model: a buffer per layer, and in those of the core a slot per step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_megatransformer_text import MegaTransformerTextConfig

BLOCK = 128  # tokens by which a buffer grows


class CacheSlot:
    """Keys and values of one layer at one step: a view of its layer's buffer, (2, batch, key/value heads, capacity,
    head_dim), written in place.

    It is made for one forward pass. A layer that kept its slots would be part of a cycle, since they know their layer,
    and the memory of a cache that is dropped would wait for Python's collector.
    """

    def __init__(self, layer: "CacheLayer", step: int):
        self.layer, self.step = layer, step
        self._show()

    def _show(self) -> None:
        self.both, self.keys, self.values = self.layer.views[self.step] if self.layer.views else (None, None, None)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        where: slice | torch.LongTensor,
        rows: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values of `rows` (None: all), (rows, key/value heads, new tokens, head_dim) each, to places
        `where`, and returns theirs up to the new tokens. Of static size places are indices, and it returns the whole
        capacity, so that one compiled graph serves every length; the mask hides what is not written yet.
        """
        if self.both is None:
            if not self.layer.is_initialized:
                self.layer.lazy_initialization(key_states, value_states)
            self._show()
        self._write(self.keys, key_states.detach(), where, rows)
        self._write(self.values, value_states.detach(), where, rows)
        keys, values = (part.to(key_states.dtype) for part in self._read(where, rows))
        if torch.is_grad_enabled() and (key_states.requires_grad or keys.requires_grad):
            # What backpropagation needs must not be written over by later steps.
            keys, values = _instead(keys, key_states, where), _instead(values, value_states, where)
        return keys, values

    def update_token(
        self, both: torch.Tensor, where: slice, rows: torch.LongTensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` for one new token of each row, without gradient, by keys and values together, (rows, 2, key/value
        heads, head_dim).
        """
        both = both.transpose(0, 1)
        if rows is not None or self.both is None or both.dtype != self.both.dtype:
            return self.update(*both.unsqueeze(3), where, rows)
        self.both.select(3, where.start).copy_(both)
        return self.keys.narrow(2, 0, where.stop), self.values.narrow(2, 0, where.stop)

    def _write(self, buffer: torch.Tensor, states: torch.Tensor, where, rows: torch.LongTensor | None) -> None:
        states = states.to(buffer.dtype)  # autocast may have changed since the buffer was made
        if isinstance(where, slice):
            buffer[slice(None) if rows is None else rows, :, where] = states
        elif rows is None:
            buffer.index_copy_(2, where, states)
        else:
            buffer[rows] = buffer[rows].index_copy(2, where, states)

    def _read(self, where: slice | torch.LongTensor, rows: torch.LongTensor | None) -> tuple[torch.Tensor, ...]:
        last = where.stop if isinstance(where, slice) else None
        if rows is None:
            return self.keys[:, :, :last], self.values[:, :, :last]
        return self.both[..., :last, :].index_select(1, rows).unbind(0)


def _instead(read: torch.Tensor, states: torch.Tensor, where: slice | torch.LongTensor) -> torch.Tensor:
    """What was read, in another tensor, with the new tokens' own states, through which gradients flow."""
    if isinstance(where, slice):
        return torch.cat((read[:, :, : where.start], states), dim=2)
    return read.index_copy(2, where, states.to(read.dtype))


class CacheLayer(CacheLayerMixin):
    """Keys and values of one layer: a buffer (steps, 2, batch, key/value heads, capacity, head_dim), a slot per step.
    The keys of a step lie together, and so do the values: of tensors that share memory torch.compile has to see that
    none is written through another.

    It is made by the first keys, on their device and of their type, with the room that was reserved. A buffer that is
    too short grows: by whole blocks of tokens, and step by step. Of static size, it is made at once, for good.

    `views` are the buffer of each step, and its keys and values, for the slots.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self):
        super().__init__()
        self.length = 0
        self.num_steps, self.batch, self.capacity = 0, 0, 0  # reserved
        self.buffer: torch.Tensor | None = None
        self.views: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.is_static = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which a copy would hold as buffers of their own."""
        return self.__dict__ | {"views": [], "keys": None, "values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_initialized:
            self._set_buffer(self.buffer)

    def reserve(self, num_steps: int, batch: int, length: int) -> None:
        """Room for so many steps, rows and tokens. A step not taken before begins with what the deepest one holds."""
        before = self.num_steps, self.capacity
        self.num_steps, self.batch = max(num_steps, self.num_steps), batch
        self.capacity = max(-(-length // BLOCK) * BLOCK, self.capacity)
        if self.is_initialized and (self.num_steps, self.capacity) != before:
            self._grow()

    def _grow(self) -> None:
        old = self.buffer
        steps, *others, capacity, head_dim = old.shape
        grown = old.new_zeros(self.num_steps, *others, self.capacity, head_dim)
        grown[:steps, ..., :capacity, :] = old
        grown[steps:, ..., :capacity, :] = old[-1]
        self._set_buffer(grown)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """A buffer for the heads, type and device of these states, (rows, heads, new tokens, head_dim)."""
        shape = (self.num_steps, 2, self.batch, key_states.shape[1], self.capacity, key_states.shape[-1])
        self._set_buffer(key_states.new_zeros(shape))

    def fill(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begins with these, (batch, heads, tokens, head_dim) each, through which gradients flow, at every step."""
        self.num_steps, self.batch, self.capacity = 1, len(key_states), key_states.shape[2]
        self.length = key_states.shape[2]
        self._set_buffer(torch.stack((key_states, value_states))[None])

    def make_static(self, like: torch.Tensor, num_steps: int, capacity: int) -> None:
        """A buffer of this size for the batch, heads, type and device of `like`, (batch, heads, 0, head_dim)."""
        self.num_steps, self.batch, self.capacity, self.is_static = num_steps, len(like), capacity, True
        self.lazy_initialization(like, like)
        for _, keys, values in self.views:  # so that a CUDA graph may write to them; not a graph for each address
            torch._dynamo.mark_static_address(keys, guard=False)
            torch._dynamo.mark_static_address(values, guard=False)

    def _set_buffer(self, buffer: torch.Tensor) -> None:
        self.buffer, self.keys, self.values = buffer, buffer[:, 0], buffer[:, 1]
        self.dtype, self.device, self.is_initialized = buffer.dtype, buffer.device, True
        steps = (buffer[step] for step in range(len(buffer)))
        self.views = [(both, both[0], both[1]) for both in steps]

    def slot(self, step: int) -> CacheSlot:
        """A slot of a step, for one forward pass."""
        return CacheSlot(self, step)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return self.buffer.nbytes if self.is_initialized else 0

    def fill_skipped_steps(self, first: int, entries: torch.LongTensor | None, new: slice) -> None:
        """Writes the new tokens' entries at step `first` and deeper: for each of these steps and rows that of number
        step * batch + row in `entries`. None: all rows and steps what they have at step `first - 1`.
        """
        _fill_steps(self.buffer[..., new, :], first, entries)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> None:
        """Not by layer: a step writes to its own slot."""
        raise NotImplementedError("keys and values of a RecurrentCache are written to the slot of their step")

    def get_seq_length(self) -> int:
        """Number of tokens."""
        return self.length

    def get_max_length(self) -> int:
        """Capacity of static size; -1: there is no largest length."""
        return self.capacity if self.is_static else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `query_length` new tokens will see, and the position of the first."""
        return self.capacity if self.is_static else self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a number below 0, as everywhere in transformers."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            self._change_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=2))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These rows only."""
        if self.is_initialized:
            self._change_rows(lambda buffer: buffer[:, :, indices.to(self.device)])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._set_buffer(change(self.buffer))


def _fill_steps(found: torch.Tensor, first: int, entries: torch.LongTensor | None) -> None:
    """Fills skipped steps of tokens, (steps, 2, batch, key/value heads, tokens, head_dim), in place; see
    `CacheLayer.fill_skipped_steps`.
    """
    if entries is None:
        found[first:] = found[first - 1]
    else:  # where a row did get there, its entry is written over itself
        by_row = found.transpose(1, 2)  # (steps, batch, 2, key/value heads, tokens, head_dim)
        deeper = by_row[first:]
        deeper.copy_(by_row.flatten(0, 1).index_select(0, entries).view(deeper.shape))


class WindowLayer(CacheLayer):
    """Keys and values of a layer of the core with policy "first": of the first step those of all tokens, and of each
    deeper step those of the last `window` tokens, in a ring, where a token stands at its number modulo `window`. The
    rings lie behind the tokens: (1, 2, batch, key/value heads, capacity + (steps - 1) * window, head_dim).

    A forward pass without a cache has one of its own for each layer, which holds `first` alone: keys and values that
    the first step of the pass has returned, through which gradients flow.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.first: tuple[torch.Tensor, torch.Tensor] | None = None

    def slot(self, step: int) -> "WindowSlot":
        """A slot of a step, for one forward pass."""
        return WindowSlot(self, step)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """A buffer for the heads, type and device of these states, (rows, heads, new tokens, head_dim)."""
        places = self.capacity + (self.num_steps - 1) * self.window
        shape = (1, 2, self.batch, key_states.shape[1], places, key_states.shape[-1])
        self._set_buffer(key_states.new_zeros(shape))

    def _set_buffer(self, buffer: torch.Tensor) -> None:
        super()._set_buffer(buffer)
        parts = buffer[0].split([self.capacity, *[self.window] * (self.num_steps - 1)], dim=3)
        self.views = [(both, both[0], both[1]) for both in parts]

    def _grow(self) -> None:
        old = [both for both, *_ in self.views]
        _, _, batch, heads, _, head_dim = self.buffer.shape
        places = self.capacity + (self.num_steps - 1) * self.window
        self._set_buffer(self.buffer.new_zeros(1, 2, batch, heads, places, head_dim))
        self.views[0][0][..., : old[0].shape[3], :] = old[0]
        for step in range(1, self.num_steps):
            if len(old) > 1:
                self.views[step][0].copy_(old[min(step, len(old) - 1)])
            else:
                tokens = torch.arange(max(0, self.length - self.window), self.length, device=self.device)
                self.views[step][0][..., tokens % self.window, :] = old[0][..., tokens, :]

    def fill_skipped_steps(self, first: int, entries: torch.LongTensor | None, new: slice) -> None:
        """Skipped steps are filled for the new tokens that are in the window still; see `CacheLayer`."""
        tokens = torch.arange(max(new.start, new.stop - self.window), new.stop, device=self.device)
        places = [tokens if step == 0 else tokens % self.window for step in range(self.num_steps)]
        found = torch.stack([self.views[step][0][..., at, :] for step, at in enumerate(places)])
        _fill_steps(found, first, entries)
        for step in range(first, self.num_steps):
            self.views[step][0][..., places[step], :] = found[step]

    def in_ring(self, start: int, stop: int) -> list[slice]:
        """Where tokens from `start` to `stop`, at most `window`, stand: in one part of a ring, or in two."""
        if start == stop:
            return []
        begin, end = start % self.window, (stop - 1) % self.window + 1
        return [slice(begin, end)] if begin < end else [slice(begin, self.window), slice(0, end)]


class WindowSlot(CacheSlot):
    """Keys and values of one layer at one step with policy "first"."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        where: slice | None,
        rows: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values are written. At the first step all are returned; at deeper ones what the first has left of
        tokens before the window of the last new one, and behind them those of this step, from the window of the first
        new one on.

        `where` is None without a cache: then all tokens are new.
        """
        layer, new = self.layer, (key_states, value_states)
        if self.step == 0:
            layer.first = new if where is None else super().update(*new, where, rows)
            return layer.first
        num_shared = max(0, layer.first[0].shape[2] - layer.window)
        past = [[part[:, :, :num_shared] for part in layer.first]] if num_shared else []
        if where is not None:
            in_window = layer.in_ring(max(0, where.start - layer.window + 1), where.start)
            past += [[part[:, :, at].to(key_states.dtype) for part in (self.keys, self.values)] for at in in_window]
        if rows is not None:
            past = [[part.index_select(0, rows) for part in both] for both in past]
        read = tuple(torch.cat(parts, dim=2) for parts in zip(*past, new, strict=True))
        if where is not None:
            self._keep(key_states, value_states, where, rows)
        return read

    def update_token(
        self, both: torch.Tensor, where: slice, rows: torch.LongTensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` for one new token of each row, by keys and values together."""
        if self.step == 0:
            self.layer.first = super().update_token(both, where, rows)
            return self.layer.first
        return self.update(*both.transpose(0, 1).unsqueeze(3), where, rows)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, where: slice, rows: torch.LongTensor | None) -> None:
        """Writes those of the last tokens to the ring."""
        first = max(where.start, where.stop - self.layer.window)
        done = first - where.start
        for at in self.layer.in_ring(first, where.stop):
            taken, done = slice(done, done + at.stop - at.start), done + at.stop - at.start
            self._write(self.keys, keys[:, :, taken].detach(), at, rows)
            self._write(self.values, values[:, :, taken].detach(), at, rows)


LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)
"""The four levels of least mean square error for a normal distribution of deviation 1 (Max 1960)."""
THRESHOLDS = (-0.9816, 0.0, 0.9816)


def pack_residuals(residuals: torch.Tensor) -> torch.Tensor:
    """(..., features), four at least, to bytes (..., features / 4 + 2): two bits for each feature, by the levels of
    `LEVELS` times the root mean square of the group, which stands behind them as a float16.
    """
    residuals = residuals.float()
    scale = residuals.square().mean(-1, keepdim=True).sqrt().half()
    codes = sum((residuals > threshold * scale.float()).byte() for threshold in THRESHOLDS)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    packed = (codes.unflatten(-1, (-1, 4)) << shifts).sum(-1, dtype=torch.uint8)
    return torch.cat((packed, scale.view(torch.uint8)), dim=-1)


def unpack_residuals(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Residuals that `pack_residuals` has packed, within the error of two bits."""
    scale = packed[..., -2:].contiguous().view(torch.float16).to(dtype)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., :-2, None] >> shifts).flatten(-2) & 3
    return torch.tensor(LEVELS, dtype=dtype, device=packed.device)[codes.int()] * scale


class ResidualLayer(CacheLayer):
    """Keys and values of a layer of the core with policy "residual": those of the deepest step of each token, (1, 2,
    batch, key/value heads, capacity, head_dim), and `packed` what each shallower step differs by, (steps - 1, 2, batch,
    key/value heads, capacity, head_dim / 4 + 2) bytes. At the deepest step of a token, and below, that is 0.

    `exact` are those of the tokens of a pass, (steps, 2, batch, key/value heads, new tokens, head_dim), until its end.
    """

    def __init__(self):
        super().__init__()
        self.packed: torch.Tensor | None = None
        self.exact: torch.Tensor | None = None

    def slot(self, step: int) -> "ResidualSlot":
        """A slot of a step, for one forward pass."""
        return ResidualSlot(self, step)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers, between passes."""
        return self.buffer.nbytes + self.packed.nbytes if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers for the heads, type and device of these states, (rows, heads, new tokens, head_dim)."""
        shape, head_dim = (2, self.batch, key_states.shape[1], self.capacity), key_states.shape[-1]
        self._set_buffer(key_states.new_zeros(1, *shape, head_dim))
        self.packed = key_states.new_zeros(self.num_steps - 1, *shape, head_dim // 4 + 2, dtype=torch.uint8)

    def _grow(self) -> None:
        tokens, steps = self.capacity - self.buffer.shape[-2], self.num_steps - 1 - len(self.packed)
        self._set_buffer(nn.functional.pad(self.buffer, (0, 0, 0, tokens)))
        self.packed = nn.functional.pad(self.packed, (0, 0, 0, tokens, *[0] * 7, steps))

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._change_rows(change)
        self.packed = change(self.packed)

    def read(self, step: int, length: int) -> torch.Tensor:
        """Keys and values of the first tokens as a step finds them, (2, batch, key/value heads, length, head_dim)."""
        deepest = self.buffer[0, ..., :length, :]
        if step >= len(self.packed):
            return deepest
        return deepest + unpack_residuals(self.packed[step, ..., :length, :], deepest.dtype)

    def pack(self, row_steps: torch.LongTensor, new: slice) -> None:
        """The pass is finished, in which rows took so many steps, (batch,)."""
        last = (row_steps - 1).to(self.device)
        deepest = self.exact[last, :, torch.arange(len(last), device=self.device)].transpose(0, 1)
        self.buffer[0, ..., new, :] = deepest
        residuals = self.exact[:-1] - deepest
        is_deeper = torch.arange(len(residuals), device=self.device)[:, None] >= last
        self.packed[..., new, :] = pack_residuals(residuals.masked_fill_(is_deeper[:, None, :, None, None, None], 0))
        self.exact = None


class ResidualSlot:
    """Keys and values of one layer at one step with policy "residual", in the place of a `CacheSlot`."""

    def __init__(self, layer: ResidualLayer, step: int):
        self.layer, self.step = layer, step

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        where: slice,
        rows: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values are written and returned, as in a `CacheSlot`; those written are packed after the pass."""
        layer, new = self.layer, torch.stack((key_states, value_states))
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if self.step == 0:
            layer.exact = layer.buffer.new_zeros(layer.num_steps, *new.shape)
        past = layer.read(self.step, where.start)
        if rows is None:
            layer.exact[self.step] = new.detach()
        else:
            layer.exact[self.step, :, rows] = new.detach().to(past.dtype)
            past = past.index_select(1, rows)
        return torch.cat((past.to(new.dtype), new), dim=3).unbind()

    def update_token(
        self, both: torch.Tensor, where: slice, rows: torch.LongTensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` for one new token of each row, by keys and values together."""
        return self.update(*both.transpose(0, 1).unsqueeze(3), where, rows)


def slots_by_step(
    cache: "RecurrentCache | None", window: int | None, num_layers: int
) -> Callable[[int], list[CacheSlot] | None]:
    """A function that gives the slots of the core's layers at a step. Without a cache there are some only where steps
    after the first share what that has left.
    """
    if cache is not None:
        return cache.core_slots
    layers = [] if window is None else [WindowLayer(window) for _ in range(num_layers)]
    return lambda step: [layer.slot(step) for layer in layers] or None


class RecurrentCache(Cache):
    """Keys and values by (layer, step); ValueError for an unknown policy, or a number of steps that it does not take.

    Layers of prelude and coda have one slot, layers of the core one for each step that is kept. The policy says which:

    - "full": all of them. A read at step i finds, for each past token, its deepest entry not deeper than i.
    - "ring": the last `num_kept_steps`; step i is written over step i - num_kept_steps. A read at step i finds what
      stands in the place of step i, or, of a token that took too few steps to get there, its deepest entry.
    - "last": one, each step over the one before. A read finds the deepest entry, whatever the step.
    - "first": the first of all tokens, the others of the last `num_kept_tokens`. A read at a step after the first finds
      of these, the reader's own token counted, what "full" finds, and of tokens before them what the first step left.
      So does a read within a chunk, and, with a config that names this policy, in a pass without a cache.
    - "residual": the deepest of each token, and what the others differ from it by, in 2 bits for each number. A read
      finds what "full" finds, within that error. Entries are packed at the end of their chunk. For inference only.

    Within the chunk being processed every token sees the others at its own step, but with "first". Every slot holds
    every token: where a token took fewer steps than others, its deepest entry stands again.

    Args:
        config: Config of the model whose keys and values are kept.
        policy: Default: that of the config.
        num_kept_steps: Steps that a ring keeps. Default: that of the config.
        max_length: Number of tokens that a cache of static size has room for. Default: it grows.
        max_steps: Number of steps that a cache of static size has room for. Default: those of the first
            chunk.
        num_kept_tokens: Tokens of which "first" keeps all steps. Default: that of the config.
    """

    def __init__(
        self,
        config: MegaTransformerTextConfig,
        policy: str | None = None,
        num_kept_steps: int | None = None,
        max_length: int | None = None,
        max_steps: int | None = None,
        num_kept_tokens: int | None = None,
    ):
        policy = policy or config.recurrence.cache_policy
        if policy == "ring" and num_kept_steps is None:
            num_kept_steps = config.recurrence.num_kept_steps
        if policy == "first" and num_kept_tokens is None:
            num_kept_tokens = config.recurrence.num_kept_tokens
        check_policy(policy, num_kept_steps, num_kept_tokens)
        if policy == "residual" and config.head_dim % 4:
            raise ValueError(
                f"cache policy 'residual' packs four numbers in a byte, and head_dim is {config.head_dim}; use 'full'"
            )
        if policy in ("first", "residual") and max_length is not None:
            raise ValueError(
                f"a static cache is not possible with cache policy {policy!r}; use 'full', 'ring' or 'last'"
            )
        self.policy, self.num_kept_steps = policy, 1 if policy == "last" else num_kept_steps
        self.num_kept_tokens = num_kept_tokens
        self.first_kept = 0  # the first token of which "first" has all steps
        self.num_prelude_layers, self.num_core_layers = config.num_prelude_layers, config.num_core_layers
        super().__init__(layers=self._make_layers(config.num_layers_of_one_step))
        self.num_key_value_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.max_length, self.max_steps = max_length, max_steps
        self.length = 0  # tokens of finished chunks
        self.last_state: torch.Tensor | None = None  # of the last token, (batch, 1, hidden)
        # Of the source of a decoder: keys and values of each layer, (batch, key/value heads, source, head_dim) each.
        self.source: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
        # (batch, capacity) on the CPU: the steps that each row took when it read a token, rows as they stood then.
        self.row_steps: torch.LongTensor | None = None
        self.prompt_length: int | None = None  # tokens read before the first new one; `generate` counts from there
        # Those of `TokenInputs` while `generate` runs, in which modules stay as they are. None: each pass has its own.
        self.token_functions: dict[nn.Module, Callable] | None = None

    def _make_layers(self, number: int) -> list[CacheLayer]:
        layers = [CacheLayer() for _ in range(number)]
        for index in range(self.num_prelude_layers, self.num_prelude_layers + self.num_core_layers):
            if self.policy == "first":
                layers[index] = WindowLayer(self.num_kept_tokens)
            elif self.policy == "residual":
                layers[index] = ResidualLayer()
        return layers

    @classmethod
    def of_prefix(cls, config: MegaTransformerTextConfig, prefix: Cache) -> "RecurrentCache":
        """A cache that begins with keys and values of each layer, as prefix tuning learns them; those of a layer of the
        core are read at every step. ValueError if they are those of other layers or heads, or the policy has no such
        layers.
        """
        cache = cls(config)
        if cache.policy in ("first", "residual"):
            raise ValueError(
                f"a prefix of keys and values is not possible with cache policy {cache.policy!r}; use 'full'"
            )
        wanted = (config.num_key_value_heads, config.head_dim)
        shapes = [layer.keys.shape for layer in prefix.layers if layer.is_initialized]
        if len(shapes) != len(cache.layers) or any((shape[1], shape[3]) != wanted for shape in shapes):
            raise ValueError(
                f"cache is a {type(prefix).__name__} with keys of shapes {sorted(set(map(tuple, shapes)))} in "
                f"{len(shapes)} layers; this model needs a RecurrentCache, or a prefix of (batch, {wanted[0]}, tokens, "
                f"{wanted[1]}) in each of {len(cache.layers)} layers"
            )
        for layer, given in zip(cache.layers, prefix.layers, strict=True):
            layer.fill(given.keys, given.values)
        cache.length = prefix.get_seq_length()
        return cache

    @property
    def max_cache_len(self) -> int:
        """Tokens that a cache of static size has room for; -1: there is no largest length. PEFT asks for it."""
        return -1 if self.max_length is None else self.max_length

    @property
    def core_layers(self) -> list[CacheLayer]:
        """Those that are written at every step."""
        return self.layers[self.num_prelude_layers :][: self.num_core_layers]

    @property
    def prelude_slots(self) -> list[CacheSlot]:
        """A slot for each layer of the prelude."""
        return [CacheSlot(layer, 0) for layer in self.layers[: self.num_prelude_layers]]

    @property
    def coda_slots(self) -> list[CacheSlot]:
        """A slot for each layer of the coda."""
        return [CacheSlot(layer, 0) for layer in self.layers[self.num_prelude_layers + self.num_core_layers :]]

    def core_slots(self, step: int) -> list[CacheSlot]:
        """A slot for each layer of the core at `step` (counted from 0)."""
        place = step if self.num_kept_steps is None else step % self.num_kept_steps
        return [layer.slot(place) for layer in self.core_layers]

    def is_full(self, num_steps: int) -> bool:
        """Whether tokens that take so many steps are read as with "full"."""
        return self.policy in ("full", "ring", "last") and num_steps <= (self.num_kept_steps or num_steps)

    @property
    def num_steps(self) -> int:
        """Number of core steps that have slots."""
        return max((layer.num_steps for layer in self.core_layers), default=0)

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers: 2 * slots * batch * key/value heads * capacity * head_dim * bytes of a number. The
        capacity is the number of tokens, rounded up to whole blocks; of static size, `max_length`.

        A layer of the core has, with "first", 2 * batch * key/value heads * head_dim * bytes of a number * (capacity +
        (steps - 1) * num_kept_tokens); with "residual" 2 * batch * key/value heads * capacity * (head_dim * bytes of a
        number + (steps - 1) * (head_dim / 4 + 2)), and, while a chunk is processed, its entries at all steps.
        """
        return sum(layer.num_bytes for layer in self.layers)

    def begin(self, embeds: torch.Tensor, num_steps: int) -> None:
        """Before a chunk of embeddings (batch, new tokens, hidden): makes room for it and for `num_steps` steps, the
        most of a row. ValueError if a cache of static size, which also takes its type from them, has no such room.
        """
        length = self.length + embeds.shape[1]
        if self.max_length is not None:
            self._begin_static(embeds, length, num_steps)
            return
        for layer, slots in zip(self.layers, self._slots_by_layer(num_steps), strict=True):
            layer.reserve(slots, len(embeds), length)

    def reserve(self, length: int, num_steps: int) -> None:
        """Room for so many tokens and steps; of what is there already, nothing changes."""
        for layer, slots in zip(self.layers, self._slots_by_layer(num_steps), strict=True):
            layer.reserve(slots, layer.batch, length)

    def allocate(self, like: torch.Tensor, length: int, num_steps: int) -> None:
        """All room at once, for so many tokens and steps of each row; rows, type and device are those of `like`, (rows,
        key/value heads, 0, head_dim).
        """
        for layer, slots in zip(self.layers, self._slots_by_layer(num_steps), strict=True):
            layer.reserve(slots, len(like), length)
            layer.lazy_initialization(like, like)

    def _begin_static(self, embeds: torch.Tensor, length: int, num_steps: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"{self.length} + {embeds.shape[1]} tokens are more than the static cache has room for, "
                f"{self.max_length}; make it larger"
            )
        self.max_steps = num_steps if self.max_steps is None else self.max_steps
        if num_steps > self.max_steps:
            raise ValueError(
                f"num_steps ({num_steps}) is more than the static cache has room for, {self.max_steps}; make it larger"
            )
        device = embeds.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
        like = embeds.new_empty(len(embeds), self.num_key_value_heads, 0, self.head_dim, dtype=dtype)
        for layer, slots in zip(self.layers, self._slots_by_layer(self.max_steps), strict=True):
            if not layer.is_initialized:
                layer.make_static(like, slots, self.max_length)

    def _slots_by_layer(self, num_steps: int) -> list[int]:
        """How many slots each layer needs for so many steps."""
        core = num_steps if self.num_kept_steps is None else min(num_steps, self.num_kept_steps)
        coda = len(self.layers) - self.num_prelude_layers - self.num_core_layers
        return [1] * self.num_prelude_layers + [core] * self.num_core_layers + [1] * coda

    def places(self, num_new_tokens: int, device: torch.device) -> slice | torch.LongTensor:
        """Where the new tokens go: a slice, or, of static size, their indices."""
        new = (self.length, self.length + num_new_tokens)
        return slice(*new) if self.max_length is None else torch.arange(*new, device=device)

    def fill_skipped_steps(self, row_steps: torch.LongTensor, num_new_tokens: int) -> None:
        """After the core: new tokens get their deepest entry in every slot deeper than the steps that their row took,
        (batch,) on the CPU.
        """
        self.keep_steps(row_steps, num_new_tokens)
        new = slice(self.length, self.length + num_new_tokens)
        if self.policy == "residual":
            for layer in self.core_layers:
                layer.pack(row_steps, new)
            return
        steps = row_steps.tolist()
        first, places = min(steps), self.num_steps
        if first >= places:
            return
        entries = None
        if max(steps) > first:
            deepest = torch.minimum(torch.arange(first, places)[:, None], row_steps - 1)
            entries = (deepest * len(steps) + torch.arange(len(steps))).flatten()
        for layer in self.core_layers:
            here = None if entries is None else entries.to(layer.device)
            layer.fill_skipped_steps(first, here, new)

    def fill_deeper(self, row_steps: list[int]) -> None:
        """Rows of which no token took more than so many steps get what they left last in every deeper slot."""
        for layer in self.core_layers:
            for row, steps in enumerate(row_steps):
                layer.buffer[steps:, :, row] = layer.buffer[steps - 1, :, row]

    def keep_steps(self, row_steps: torch.LongTensor, num_new_tokens: int) -> None:
        """Notes the steps that each row has taken, (batch,) on the CPU, for new tokens."""
        length = self.length + num_new_tokens
        if self.row_steps is None or length > self.row_steps.shape[1]:
            grown = row_steps.new_zeros(len(row_steps), -(-length // BLOCK) * BLOCK)
            if self.row_steps is not None:
                grown[:, : self.length] = self.row_steps[:, : self.length]
            self.row_steps = grown
        self.row_steps[:, self.length : length] = row_steps[:, None]

    def advance(self, num_new_tokens: int) -> None:
        """The chunk is finished: what comes next goes behind it."""
        self.length += num_new_tokens
        for layer in self.layers:
            layer.length = self.length
        if self.policy == "first":
            self.first_kept = max(self.first_kept, self.length - self.num_kept_tokens)
            for layer in self.core_layers:
                layer.first = None

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that a chunk of `query_length` tokens sees, and the position of the first."""
        return self.length + query_length if self.max_length is None else self.max_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Tokens that there is room for; -1: there is no largest length."""
        return -1 if self.max_length is None else self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a number below 0, as everywhere in transformers. ValueError with "first" if steps of
        tokens that come into the window again are gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        length = max(0, self.length + tokens_to_remove)
        if self.policy == "first":
            first = max(0, length - self.num_kept_tokens + 1)
            if first < min(length, self.first_kept):
                raise ValueError(
                    f"crop of {-tokens_to_remove} tokens is not possible with cache policy 'first': of token {first} "
                    "only the first step is kept; read the tokens again, or use 'full'"
                )
            self.first_kept = min(length, self.first_kept)
        super().crop(tokens_to_remove)
        self.length = length
        self.last_state = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order, for beam search."""
        super().reorder_cache(beam_idx)
        self._select_states(lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._select_states(lambda state: state.repeat_interleave(repeats, dim=0))
        self.row_steps = None if self.row_steps is None else self.row_steps.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These rows only."""
        super().batch_select_indices(indices)
        self._select_states(lambda state: state[indices])
        self.row_steps = None if self.row_steps is None else self.row_steps[indices.cpu()]

    def _select_states(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.last_state = None if self.last_state is None else select(self.last_state)
        if self.source is not None:
            self.source = tuple((select(keys), select(values)) for keys, values in self.source)

    def reset(self) -> None:
        """Forgets all tokens, and gives the memory back."""
        self.layers = self._make_layers(len(self.layers))
        self.length = self.first_kept = 0
        self.last_state = self.row_steps = self.prompt_length = self.source = None


def check_policy(policy: str, num_kept_steps: int | None, num_kept_tokens: int | None = None) -> None:
    """Raises ValueError for an unknown policy, or a number of steps or tokens that the policy does not take."""
    if policy not in ("full", "ring", "last", "first", "residual"):
        raise ValueError(f"cache policy {policy!r} is unknown; choose one of full, ring, last, first, residual")
    for name, number, reader in (
        ("num_kept_steps", num_kept_steps, "ring"),
        ("num_kept_tokens", num_kept_tokens, "first"),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
        if number is not None and policy != reader:
            raise ValueError(f"{name} ({number}) is for cache policy {reader!r}; {policy!r} does not read it")
