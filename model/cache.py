"""Key/value cache of a recurrent-depth model: a slot per layer of prelude and coda, and per core layer and step."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_megatransformer import MegaTransformerTextConfig

BLOCK = 128  # tokens by which a slot grows


class CacheSlot(CacheLayerMixin):
    """Keys and values of one layer at one step: buffers (batch, key/value heads, capacity, head_dim), written in place.

    They grow by whole blocks, and what is read ends with the last token; or, of static size, never grow, and all of
    their capacity is read, so that one compiled graph serves every length. The mask hides what is not written yet.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self):
        super().__init__()
        self.length = 0
        self.is_static = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty buffers for the batch, heads and type of these states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states[:, :, :0].clone() for states in (key_states, value_states))
        self.is_initialized = True

    def make_static(self, buffer: torch.Tensor) -> None:
        """Buffers of the shape and type of this one, (batch, key/value heads, capacity, head_dim), for good."""
        self.dtype, self.device = buffer.dtype, buffer.device
        self.keys, self.values = torch.zeros_like(buffer), torch.zeros_like(buffer)
        self.is_initialized = self.is_static = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        where: slice | torch.LongTensor,
        rows: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values, (rows, key/value heads, new tokens, head_dim) each, over what is there.

        Args:
            where: The places of the new tokens: a slice, or, in buffers of static size, their indices.
            rows: Rows of the batch that the states belong to. Default: all.

        Returns:
            Keys and values of these rows, of all tokens.
        """
        if isinstance(where, slice):
            self.write(key_states, value_states, where, rows)
        else:
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                if rows is None:
                    buffer.index_copy_(2, where, states.to(buffer.dtype))
                else:
                    buffer[rows] = buffer[rows].index_copy(2, where, states.to(buffer.dtype))
        return self.read(rows)

    def write(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        where: slice,
        rows: torch.LongTensor | None = None,
    ) -> None:
        """Writes to a slice of tokens, over what is there. A buffer that is too short grows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length = where.stop
        self._reserve(self.length)
        which = slice(None) if rows is None else rows
        self.keys[which, :, where] = key_states
        self.values[which, :, where] = value_states

    def read(self, rows: torch.LongTensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, or of the whole capacity of static size, of some rows, or of all rows."""
        which = slice(None) if rows is None else rows
        last = None if self.is_static else self.length
        return self.keys[which, :, :last], self.values[which, :, :last]

    def _reserve(self, length: int) -> None:
        missing = length - self.keys.shape[-2]
        if missing > 0:
            blocks = -(-missing // BLOCK) * BLOCK
            self.keys, self.values = (nn.functional.pad(old, (0, 0, 0, blocks)) for old in (self.keys, self.values))

    def copy(self) -> "CacheSlot":
        """Another slot with the same content."""
        other = CacheSlot()
        other.lazy_initialization(self.keys, self.values)
        other.keys, other.values, other.length = self.keys.clone(), self.values.clone(), self.length
        return other

    def get_seq_length(self) -> int:
        """Number of tokens."""
        return self.length

    def get_max_length(self) -> int:
        """Capacity of static size; -1: there is no largest length."""
        return self.keys.shape[-2] if self.is_static else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `query_length` new tokens will see, and the position of the first."""
        return self.keys.shape[-2] if self.is_static else self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a number below 0, as everywhere in transformers."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            self.keys, self.values = (old.repeat_interleave(repeats, dim=0) for old in (self.keys, self.values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These rows only."""
        if self.is_initialized:
            indices = indices.to(self.device)
            self.keys, self.values = self.keys[indices], self.values[indices]


class RecurrentCache(Cache):
    """Keys and values by (layer, step).

    Slots: prelude layers, then coda layers, then core layers step by step, so that deeper steps are added at the end:
    `prelude + coda + step * core + layer`. The policy says which steps are kept:

    - "full": all of them. A read at step i finds, for each past token, its deepest entry not deeper than i.
    - "ring": the last `num_kept_steps`; step i is written over step i - num_kept_steps. A read at step i finds what
      stands in the place of step i, or, of a token that took too few steps to get there, its deepest entry.
    - "last": one, each step over the one before. A read finds the deepest entry, whatever the step.

    Within the chunk being processed every token sees the others at its own step. Every slot holds every token: where a
    token took fewer steps than others, its deepest entry stands again.

    Args:
        config: Config of the model whose keys and values are kept.
        policy: Default: that of the config.
        num_kept_steps: Steps that a ring keeps. Default: that of the config.
        max_length: For a cache of static size: the number of tokens that it has room for. Default: it grows.
        max_steps: For a cache of static size: the number of steps that it has room for. Default: those of the first
            chunk.

    Raises:
        ValueError: for an unknown policy, or a number of steps that the policy does not take.
    """

    def __init__(
        self,
        config: MegaTransformerTextConfig,
        policy: str | None = None,
        num_kept_steps: int | None = None,
        max_length: int | None = None,
        max_steps: int | None = None,
    ):
        super().__init__(layer_class_to_replicate=CacheSlot)
        policy = policy or config.recurrence.cache_policy
        if policy == "ring" and num_kept_steps is None:
            num_kept_steps = config.recurrence.num_kept_steps
        check_policy(policy, num_kept_steps)
        self.policy, self.num_kept_steps = policy, {"full": None, "ring": num_kept_steps, "last": 1}[policy]
        self.num_prelude_layers = config.num_prelude_layers
        self.num_core_layers = config.num_core_layers
        self.num_coda_layers = config.num_coda_layers
        self.num_key_value_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.max_length, self.max_steps = max_length, max_steps
        self.length = 0  # tokens of finished chunks
        self.last_state: torch.Tensor | None = None  # of the last token, (batch, 1, hidden)

    @property
    def prelude_slots(self) -> list[CacheSlot]:
        """A slot for each layer of the prelude."""
        return self._slots(0, self.num_prelude_layers)

    @property
    def coda_slots(self) -> list[CacheSlot]:
        """A slot for each layer of the coda."""
        return self._slots(self.num_prelude_layers, self.num_coda_layers)

    def core_slots(self, step: int) -> list[CacheSlot]:
        """A slot for each layer of the core at `step` (counted from 0)."""
        return self._slots(self._core_slot(step), self.num_core_layers)

    def _slots(self, first: int, count: int) -> list[CacheSlot]:
        if len(self.layers) < first + count:
            like = next((slot for slot in self.layers if slot.is_initialized), None)
            for _ in range(first + count - len(self.layers)):
                self.layers.append(CacheSlot())
                if like is not None:  # a slot that some rows only will write has room for all of them
                    self.layers[-1].lazy_initialization(like.keys, like.values)
        return self.layers[first : first + count]

    def _core_slot(self, step: int) -> int:
        place = step if self.num_kept_steps is None else step % self.num_kept_steps
        return self.num_prelude_layers + self.num_coda_layers + place * self.num_core_layers

    @property
    def num_steps(self) -> int:
        """Number of core steps that have slots."""
        return max(0, len(self.layers) - self._core_slot(0)) // self.num_core_layers if self.num_core_layers else 0

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers: 2 * slots * batch * key/value heads * capacity * head_dim * bytes of a number. The
        capacity is the number of tokens, rounded up to whole blocks; of static size, `max_length`.
        """
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in self.layers if slot.is_initialized)

    def begin(self, embeds: torch.Tensor, num_steps: int) -> None:
        """Before a chunk: a cache of static size makes sure that it has the room.

        Args:
            embeds: (batch, new tokens, hidden), for the batch, and the type of keys and values.
            num_steps: The most steps that a row will take.

        Raises:
            ValueError: for more tokens or steps than there is room for.
        """
        if self.max_length is None:
            return
        if self.length + embeds.shape[1] > self.max_length:
            raise ValueError(
                f"{self.length} + {embeds.shape[1]} tokens are more than the static cache has room for, "
                f"{self.max_length}; make it larger"
            )
        self.max_steps = num_steps if self.max_steps is None else self.max_steps
        if num_steps > self.max_steps:
            raise ValueError(
                f"num_steps ({num_steps}) is more than the static cache has room for, {self.max_steps}; make it larger"
            )
        if not self.layers:
            shape = (len(embeds), self.num_key_value_heads, self.max_length, self.head_dim)
            buffer = torch.empty(shape, dtype=embeds.dtype, device=embeds.device)
            places = self.max_steps if self.num_kept_steps is None else min(self.max_steps, self.num_kept_steps)
            for slot in self._slots(0, self._core_slot(0) + places * self.num_core_layers):
                slot.make_static(buffer)

    def places(self, num_new_tokens: int, device: torch.device) -> slice | torch.LongTensor:
        """Where the new tokens go: a slice, or, of static size, their indices."""
        new = (self.length, self.length + num_new_tokens)
        return slice(*new) if self.max_length is None else torch.arange(*new, device=device)

    def extend_steps(self, num_steps: int) -> None:
        """Before the core takes `num_steps`: slots of steps never taken so far start as those of the deepest taken."""
        past = self.num_steps
        if past == 0 or self.max_length is not None:
            return
        deepest = self.core_slots(past - 1)
        for _ in range(past, num_steps if self.num_kept_steps is None else min(num_steps, self.num_kept_steps)):
            self.layers.extend(slot.copy() for slot in deepest)

    def settle_steps(self, row_steps: torch.Tensor | int, num_new_tokens: int) -> None:
        """After the core: new tokens get their deepest entry in every slot deeper than the steps that their row took.

        Args:
            row_steps: Steps taken: one number, or (batch,).
        """
        if isinstance(row_steps, torch.Tensor) and (row_steps == row_steps[0]).all():
            row_steps = int(row_steps[0])
        shallowest = int(row_steps.min()) if isinstance(row_steps, torch.Tensor) else row_steps
        new = slice(self.length, self.length + num_new_tokens)
        for step in range(shallowest, self.num_steps):
            rows = (row_steps <= step).nonzero().squeeze(1) if isinstance(row_steps, torch.Tensor) else None
            which = slice(None) if rows is None else rows
            for source, target in zip(self.core_slots(step - 1), self.core_slots(step), strict=True):
                target.write(source.keys[which, :, new], source.values[which, :, new], new, rows)

    def advance(self, num_new_tokens: int) -> None:
        """The chunk is finished: what comes next goes behind it."""
        self.length += num_new_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens in the finished chunks."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that a chunk of `query_length` tokens sees, and the position of the first."""
        return self.length + query_length if self.max_length is None else self.max_length, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Tokens that there is room for; -1: there is no largest length."""
        return -1 if self.max_length is None else self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a number below 0, as everywhere in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        super().crop(tokens_to_remove)
        self.length = max(0, self.length + tokens_to_remove)
        self.last_state = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order, for beam search."""
        super().reorder_cache(beam_idx)
        self._select_states(lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._select_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These rows only."""
        super().batch_select_indices(indices)
        self._select_states(lambda state: state[indices])

    def _select_states(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.last_state = None if self.last_state is None else select(self.last_state)

    def reset(self) -> None:
        """Forgets all tokens, and gives the memory back."""
        self.layers.clear()
        self.length = 0
        self.last_state = None


def check_policy(policy: str, num_kept_steps: int | None) -> None:
    """Raises ValueError for an unknown policy, or a number of steps that the policy does not take."""
    if policy not in ("full", "ring", "last"):
        raise ValueError(f"cache policy {policy!r} is unknown; choose one of full, ring, last")
    if num_kept_steps is not None and num_kept_steps < 1:
        raise ValueError(f"num_kept_steps ({num_kept_steps}) must be at least 1")
    if policy != "ring" and num_kept_steps is not None:
        raise ValueError(f"num_kept_steps ({num_kept_steps}) is for cache policy 'ring'; {policy!r} does not read it")
