"""The order in which rows are read."""

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthSampler(LengthGroupedSampler):
    """Rows of similar length side by side, in an order that follows from seed and epoch alone, so that a resumed run
    goes on with it; transformers draws it from wherever the global generator stands.

    Args:
        batch_size: Rows that should be of similar length.
        lengths: Of all rows, known in advance.
        seed: At least 0.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
