"""Key/value cache of a recurrent-depth model: a slot per layer of prelude and coda, and per core layer and step."""

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_megatransformer import MegaTransformerTextConfig


class RecurrentCache(Cache):
    """Keys and values by (layer, step).

    Slots: prelude layers, then coda layers, then core layers step by step, so that deeper steps are added at the end:
    `prelude + coda + step * core + layer`. Each slot is a contiguous tensor (batch, key/value heads, tokens, head_dim).

    Every slot holds every token, also of tokens that took fewer steps than others: there, the deepest entry of the
    token stands again. So a read at step i finds, for each past token, its deepest entry not deeper than i.

    Args:
        config: Config of the model whose keys and values are kept.
    """

    def __init__(self, config: MegaTransformerTextConfig):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.num_prelude_layers = config.num_prelude_layers
        self.num_core_layers = config.num_core_layers
        self.num_coda_layers = config.num_coda_layers

    def core_slot(self, step: int) -> int:
        """Slot of the first core layer at `step` (counted from 0)."""
        return self.num_prelude_layers + self.num_coda_layers + step * self.num_core_layers

    @property
    def num_steps(self) -> int:
        """Number of core steps that have slots."""
        return max(0, len(self.layers) - self.core_slot(0)) // self.num_core_layers if self.num_core_layers else 0

    def extend_steps(self, num_steps: int) -> None:
        """Before a chunk of `num_steps`: slots of steps never taken so far start as those of the deepest taken."""
        past_steps = self.num_steps
        if not 0 < past_steps < num_steps:
            return
        deepest = self.layers[self.core_slot(past_steps - 1) : self.core_slot(past_steps)]
        for _ in range(past_steps, num_steps):
            for source in deepest:
                slot = DynamicLayer()
                slot.lazy_initialization(source.keys, source.values)
                slot.keys, slot.values = source.keys, source.values  # shared until the next update, which concatenates
                self.layers.append(slot)

    def settle_steps(self, row_steps: torch.Tensor | int, num_new_tokens: int) -> None:
        """After a chunk: its tokens get their deepest entry in every slot deeper than the steps that their row took.

        Args:
            row_steps: Steps taken: one number, or (batch,).
            num_new_tokens: Number of tokens in the chunk.
        """
        shallowest = int(row_steps.min()) if isinstance(row_steps, torch.Tensor) else row_steps
        for step in range(shallowest, self.num_steps):
            for slot in range(self.core_slot(step), self.core_slot(step + 1)):
                self._copy_new_entries(slot - self.num_core_layers, slot, row_steps, step, num_new_tokens)

    def _copy_new_entries(
        self, source: int, target: int, row_steps: torch.Tensor | int, step: int, num_new_tokens: int
    ) -> None:
        source, target = self.layers[source], self.layers[target]
        for name in ("keys", "values"):
            deeper = getattr(source, name)[:, :, -num_new_tokens:]
            old = getattr(target, name)
            if old.shape[-2] < getattr(source, name).shape[-2]:  # the chunk did not reach this step in any row
                setattr(target, name, torch.cat((old, deeper), dim=-2))
            else:
                stopped = (row_steps <= step).to(old.device)[:, None, None, None]
                new = torch.where(stopped, deeper, old[:, :, -num_new_tokens:])
                setattr(target, name, torch.cat((old[:, :, :-num_new_tokens], new), dim=-2))
