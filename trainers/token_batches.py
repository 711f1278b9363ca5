"""Micro-batches by a budget of tokens instead of a number of rows."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler

from .arguments import RecurrentTrainingArguments


class EpochSampler(Sampler[int]):
    """Numbers from 0 to `count` - 1 in an order that follows from seed and epoch alone."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist())


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length that have at most `max_tokens` tokens each, padding included.

    Which rows are together follows from the lengths and the seed; only the order of the updates is another one in each
    epoch, so that all epochs have as many batches. The batches of an update, on all ranks, stand side by side, have
    rows of similar length, and are as many in each update: of the last one, batches are repeated, or it is left out.

    Args:
        lengths: Tokens of each row.
        max_tokens: Budget of a batch, at least the longest row.
        max_rows: Most rows of a batch.
        num_batches: Batches of an update, on all ranks.
        seed: Seed of the orders, at least 0.
        drop_last: Whether an update that lacks batches is left out.
    """

    def __init__(
        self, lengths: Sequence[int], max_tokens: int, max_rows: int, num_batches: int, seed: int, drop_last: bool
    ):
        batches = batches_of(np.asarray(lengths), max_tokens, max_rows, seed)
        count = (math.floor if drop_last else math.ceil)(len(batches) / num_batches)
        self.updates = [
            [batches[index % len(batches)] for index in range(first, first + num_batches)]
            for first in range(0, count * num_batches, num_batches)
        ]
        self.sampler = EpochSampler(count, seed)  # accelerate tells a sampler of this name which epoch begins
        self.num_batches = num_batches

    def __len__(self) -> int:
        return len(self.updates) * self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for update in self.sampler:
            yield from self.updates[update]


def batches_of(lengths: np.ndarray, max_tokens: int, max_rows: int, seed: int) -> list[list[int]]:
    """Rows, from short to long and in a random order among those of one length, cut into batches."""
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    batches: list[list[int]] = []
    for row in order.tolist():
        rows = len(batches[-1]) + 1 if batches else 0
        if not batches or rows > max_rows or rows * lengths[row] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def build_token_batches(dataset: Dataset, args: RecurrentTrainingArguments) -> TokenBatchSampler:
    """The batches of a run.

    Raises:
        ValueError: The lengths of the rows are not known in advance, a row has more tokens than a batch may have, or
            the rows make no update.
    """
    budget = args.max_tokens_per_batch
    if not hasattr(dataset, "lengths"):
        raise ValueError(
            f"training.max_tokens_per_batch is {budget}, but the lengths of rows that are read while training are not "
            "known in advance; leave it out, or set streaming: false"
        )
    if max(dataset.lengths) > budget:
        raise ValueError(
            f"training.max_tokens_per_batch is {budget}, but the longest row has {max(dataset.lengths)} tokens; give "
            "at least as many, or lower data.block_size"
        )
    num_batches = args.gradient_accumulation_steps * args.world_size
    found = TokenBatchSampler(
        dataset.lengths,
        budget,
        args.per_device_train_batch_size,
        num_batches,
        args.data_seed,
        args.dataloader_drop_last,
    )
    if not len(found):
        raise ValueError(
            f"training.max_tokens_per_batch is {budget}, of which the train data make fewer than the {num_batches} "
            "batches of one update; lower it, or set dataloader_drop_last to false"
        )
    return found
