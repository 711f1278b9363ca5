"""Rows by number, which may differ from epoch to epoch, and several datasets of them as one, in given proportions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

LONGEST_EPOCH = 100
"""Rows of an epoch, which are all drawn in advance, for each row that there is."""


class RowDataset(Dataset):
    """Rows by number. One that comes more than once in an epoch may differ each time (`draw`).

    Args:
        seed: Seed of what is random about the rows.
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


class MixtureDataset(Dataset):
    """A weighted mixture with random access: which row stands at i is a function of (seed, i) and of nothing else.

    An epoch is as short as it can be while every dataset is read whole at least once in the given proportions: with
    equal weights and 1000 and 10 rows, 2000 rows, each of the 10 a hundred times. Within a dataset no row comes again
    before all have come. Ranks and workers need not know of each other, since the sampler deals out the indices.

    Args:
        parts: Datasets with at least one row each.
        weights: Their shares, on any positive scale.
        seed: Seed of the order.

    Raises:
        ValueError: An epoch would have more than LONGEST_EPOCH times the rows of all datasets.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float], seed: int):
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        sizes = [len(part) for part in parts]
        total, size, weight = max(zip(sizes / shares, sizes, weights, strict=True))
        if total > LONGEST_EPOCH * sum(sizes):
            raise ValueError(
                f"weight {weight} of a source of {size} rows makes an epoch of {total:.0f} rows, more than "
                f"{LONGEST_EPOCH} times the {sum(sizes)} rows there are; raise the weight, or read less of the source"
            )
        self.parts = list(parts)
        self.counts = [math.ceil(total * share - 1e-6) for share in shares]  # 1e-6: 10 rows stay 10 rows after rounding
        generator = np.random.default_rng(seed)
        orders = [np.resize(generator.permutation(size), count) for size, count in zip(sizes, self.counts, strict=True)]
        times = [np.arange(count) // size for size, count in zip(sizes, self.counts, strict=True)]
        mixed = generator.permutation(sum(self.counts))
        self.part_of = np.repeat(np.arange(len(parts)), self.counts)[mixed]
        self.row_of = np.concatenate(orders)[mixed]
        self.occurrence_of = np.concatenate(times)[mixed]

    def __len__(self) -> int:
        return len(self.part_of)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): tokens of each row, padding left out."""
        lengths = [part.lengths for part in self.parts]
        firsts = np.cumsum([0, *map(len, lengths)])[:-1]
        return np.concatenate(lengths)[firsts[self.part_of] + self.row_of]

    def set_epoch(self, epoch: int) -> None:
        """Let the rows be those of another epoch."""
        for part in self.parts:
            part.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self.parts[self.part_of[index]], int(self.row_of[index])
        return part.draw(row, int(self.occurrence_of[index])) if isinstance(part, RowDataset) else part[row]
