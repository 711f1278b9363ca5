"""Key/value cache of a recurrent-depth model: a slot per layer of prelude and coda, and per core layer and step."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_megatransformer import MegaTransformerTextConfig

BLOCK = 128  # tokens by which a slot grows


class CacheSlot(CacheLayerMixin):
    """Keys and values of one layer at one step: buffers (batch, key/value heads, capacity, head_dim), written in place,
    that grow by whole blocks.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self):
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty buffers for the batch, heads and type of these states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states[:, :, :0].clone() for states in (key_states, value_states))
        self.is_initialized = True

    def write(
        self, key_states: torch.Tensor, value_states: torch.Tensor, start: int, rows: torch.LongTensor | None = None
    ) -> None:
        """Writes (rows, key/value heads, new tokens, head_dim) from token `start` on, over what is there.

        Args:
            rows: Rows of the batch that the states belong to. Default: all.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length = start + key_states.shape[-2]
        self._reserve(self.length)
        which = slice(None) if rows is None else rows
        self.keys[which, :, start : self.length] = key_states
        self.values[which, :, start : self.length] = value_states

    def read(self, rows: torch.LongTensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens of some rows, or of all rows."""
        which = slice(None) if rows is None else rows
        return self.keys[which, :, : self.length], self.values[which, :, : self.length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes behind the tokens that are there, and reads all."""
        self.write(key_states, value_states, self.length)
        return self.read()

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
        """-1: there is no largest length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `query_length` new tokens will see, and the position of the first."""
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a number below 0, as everywhere in transformers."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            self.keys, self.values = (old.repeat_interleave(repeats, dim=0) for old in (self.keys, self.values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """These rows only."""
        if self.is_initialized:
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

    Raises:
        ValueError: for an unknown policy, or a number of steps that the policy does not take.
    """

    def __init__(self, config: MegaTransformerTextConfig, policy: str | None = None, num_kept_steps: int | None = None):
        super().__init__(layer_class_to_replicate=CacheSlot)
        policy = policy or config.recurrence.cache_policy
        if policy == "ring" and num_kept_steps is None:
            num_kept_steps = config.recurrence.num_kept_steps
        check_policy(policy, num_kept_steps)
        self.policy, self.num_kept_steps = policy, {"full": None, "ring": num_kept_steps, "last": 1}[policy]
        self.num_prelude_layers = config.num_prelude_layers
        self.num_core_layers = config.num_core_layers
        self.num_coda_layers = config.num_coda_layers
        self.length = 0  # tokens of finished chunks
        self.last_state: torch.Tensor | None = None  # of the last token, (batch, 1, hidden)

    def core_slot(self, step: int) -> int:
        """Slot of the first core layer at `step` (counted from 0)."""
        place = step if self.num_kept_steps is None else step % self.num_kept_steps
        return self.num_prelude_layers + self.num_coda_layers + place * self.num_core_layers

    @property
    def num_steps(self) -> int:
        """Number of core steps that have slots."""
        return max(0, len(self.layers) - self.core_slot(0)) // self.num_core_layers if self.num_core_layers else 0

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers: 2 * slots * batch * key/value heads * capacity * head_dim * bytes of a number. The
        capacity is the number of tokens, rounded up to whole blocks.
        """
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in self.layers if slot.is_initialized)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, slot: int, rows: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the chunk's keys and values, (rows, key/value heads, new tokens, head_dim) each, behind the finished
        chunks, over what an earlier step of this chunk wrote there.

        Returns:
            Keys and values of these rows, of all tokens.
        """
        self.layers.extend(CacheSlot() for _ in range(slot + 1 - len(self.layers)))
        target = self.layers[slot]
        if rows is not None and not target.is_initialized:  # the rows that have left need their place too
            target.lazy_initialization(self.layers[self.core_slot(0)].keys, self.layers[self.core_slot(0)].values)
        target.write(key_states, value_states, self.length, rows)
        return target.read(rows)

    def extend_steps(self, num_steps: int) -> None:
        """Before a chunk of `num_steps`: slots of steps never taken so far start as those of the deepest taken."""
        past = self.num_steps
        if past == 0:
            return
        deepest = self.layers[self.core_slot(past - 1) : self.core_slot(past - 1) + self.num_core_layers]
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
            for slot in range(self.core_slot(step), self.core_slot(step) + self.num_core_layers):
                source = self.layers[slot - self.num_core_layers]
                target = self.layers[slot]
                target.write(source.keys[which, :, new], source.values[which, :, new], self.length, rows)

    def advance(self, num_new_tokens: int) -> None:
        """The chunk is finished: what comes next goes behind it."""
        self.length += num_new_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens in the finished chunks."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that a chunk of `query_length` tokens sees, and the position of the first."""
        return self.length + query_length, 0

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
