"""Rows that may differ from epoch to epoch, and still are functions of (seed, epoch, index)."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class RowDataset(Dataset):
    """Rows by number. One that comes more than once in an epoch may differ each time (`draw`).

    Args:
        seed: of what is random about the rows.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change

    def set_epoch(self, epoch: int) -> None:
        """Let the rows be those of another epoch."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(range(len(self))[index], 0)  # negative ones too; IndexError behind the end

    def draw(self, index: int, occurrence: int) -> dict[str, Any]:
        """Row `index` as it is when it comes for the time `occurrence` (from 0) in this epoch."""
        raise NotImplementedError

    def generator(self, index: int, occurrence: int) -> np.random.Generator:
        """Random numbers for a row."""
        return np.random.default_rng([self.seed, int(self.epoch), index, occurrence])
