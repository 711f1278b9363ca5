"""What the latents of written media contribute to the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from model import WRITTEN


class WrittenLosses:
    """Counts the latents of an accumulation window, and sums up their losses between two logs.

    Args:
        config: Of the model; its writers' placeholders are `written_NAME_token_id`.
    """

    def __init__(self, config: Any):
        ids = {name: getattr(config, f"written_{name}_token_id", None) for name in WRITTEN}
        self.token_ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
        self.num_in_window: dict[str, torch.Tensor] = {}
        self._sums = torch.zeros(len(self.token_ids), 2, dtype=torch.float64)

    def count(
        self, batches: Sequence[Mapping[str, torch.Tensor]], add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Count the latents of a window: the places of its batches.

        Args:
            add_up: Sum of a tensor over the ranks.
        """
        counts = [sum((batch["input_ids"] == it).sum() for batch in batches) for it in self.token_ids.values()]
        counts = add_up(torch.stack(counts)).clamp(min=1)
        self.num_in_window = dict(zip(self.token_ids, counts, strict=True))

    def add(self, losses: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        """Count the sums of losses, and numbers of latents, of a batch."""
        for number, name in enumerate(self.token_ids):
            if name in losses:
                total, count = losses[name]
                self._sums = self._sums.to(total.device)
                self._sums[number] += torch.stack((total.double(), total.new_tensor(count, dtype=torch.float64)))

    def flush(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`flow_loss_NAME` of each modality that occurred since the last call, the mean over its latents."""
        sums = add_up(self._sums).cpu()
        self._sums = torch.zeros_like(self._sums)
        means = zip(self.token_ids, sums.tolist(), strict=True)
        return {f"flow_loss_{name}": total / count for name, (total, count) in means if count}


def flow_seeds(keys: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Seeds of the noise of each row, int64 (rows,), from its key alone."""
    return torch.tensor([int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 2) for key in keys])
