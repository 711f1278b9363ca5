"""Batches by a budget of tokens: what is in them, on which rank, in which epoch, and the same update on more ranks."""

import json
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import IterableDataset

from dataset_loading import Collator
from tests.test_trainer import Interrupt, build, losses
from tests.test_trainer_ranks import launch
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_language_model import tiny_tokenizer
from trainers import RecurrentTrainingArguments, find_resume_point
from trainers.base import BaseTrainer
from trainers.token_batches import TokenBatchSampler

LENGTHS = np.random.default_rng(5).integers(2, 30, 101)


class Rows(list):
    """Rows of random tokens that know their lengths."""

    def __init__(self, lengths=LENGTHS[:40]):
        super().__init__(
            {"input_ids": ids, "labels": ids} for ids in (tiny_ids(int(size), seed=int(size)) for size in lengths)
        )
        self.lengths = lengths


def sampler(epoch=0, drop_last=False, num_batches=4, **options):
    found = TokenBatchSampler(
        LENGTHS, **{"max_tokens": 63, "max_rows": 8, "seed": 3, **options}, num_batches=num_batches, drop_last=drop_last
    )
    found.sampler.set_epoch(epoch)
    return found


def in_fours(items):
    return [list(items[start : start + 4]) for start in range(0, len(items), 4)]


def padded(batch):
    return len(batch) * LENGTHS[batch].max()


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_row_comes_within_the_budget(drop_last):
    """Rows that come twice, or not at all, fill up the last update, or are left out of it."""
    batches = list(sampler(drop_last=drop_last))
    assert len(batches) == len(sampler(drop_last=drop_last)) and len(batches) % 4 == 0
    assert max(map(padded, batches)) == 63 and max(map(len, batches)) == 8
    counts = Counter(chain.from_iterable(batches))
    extra = sum(counts.values()) - len(LENGTHS)
    assert (extra < 0) if drop_last else (set(counts) == set(range(len(LENGTHS))))
    assert abs(extra) < 4 * 8


def test_the_batches_are_full():
    """None of the batches in a row, from short to long, has room for the first of the next."""
    ordered = sorted(sampler(num_batches=1), key=lambda batch: (LENGTHS[batch].max(), LENGTHS[batch].min()))
    for batch, after in pairwise(ordered):
        assert len(batch) == 8 or (len(batch) + 1) * LENGTHS[after].min() > 63
    waste = 1 - sum(LENGTHS) / sum(map(padded, ordered))
    in_order = 1 - sum(LENGTHS) / sum(map(padded, in_fours(range(101))))
    assert waste < 0.05 < in_order


def test_an_epoch_has_an_order_of_its_own_and_the_same_updates():
    first, again, second = (list(map(tuple, sampler(epoch))) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(in_fours(first)) == sorted(in_fours(second))
    assert list(map(tuple, sampler(seed=4))) != first


def test_ranks_share_each_update():
    """What accelerate deals out to two ranks of two micro-batches are the four batches of one rank."""
    shards = [list(BatchSamplerShard(sampler(), 2, rank)) for rank in (0, 1)]
    assert list(chain.from_iterable(zip(*shards, strict=True))) == list(sampler())


def trainer_of(folder, **options):
    """A trainer with batches of at most 48 tokens, and a list of the shapes that its model will see."""
    settings = {"per_device_train_batch_size": 6, "max_tokens_per_batch": 48, "gradient_accumulation_steps": 2}
    trainer = build(folder, dataset=Rows(), **{**settings, "max_steps": 12, **options})
    trainer.data_collator = Collator(tiny_tokenizer())
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return trainer, shapes


def test_a_run_has_such_batches_and_resumes_with_them(tmp_path):
    """More than an epoch; bitwise as uninterrupted, cut in the second one."""
    options = {"save_strategy": "no", "num_train_epochs": 3}
    whole, shapes = trainer_of(tmp_path / "whole", **options)
    whole.train()
    assert max(rows * length for rows, length in shapes) <= 48 and max(rows for rows, _ in shapes) <= 6
    assert len(set(shapes)) > 5 and whole.state.epoch > 1
    cut, _ = trainer_of(tmp_path / "cut", **options)
    cut.add_callback(Interrupt(10))
    cut.train()
    again, _ = trainer_of(tmp_path / "cut", resume_from_checkpoint="true", **options)
    again.train(resume_from_checkpoint=find_resume_point(again.args))
    assert losses(again) == losses(whole) and len(losses(whole)) == 12
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_two_rows_of_an_update_begin_alike(tmp_path):
    """The keys of initial states, in micro-batches of different numbers of rows."""
    trainer, shapes = trainer_of(tmp_path, max_steps=3)
    keys, original = [], trainer._keys
    trainer._keys = lambda batch: keys.extend(original(batch)) or original(batch)
    trainer.train()
    assert len(keys) == len(set(keys)) == sum(rows for rows, _ in shapes)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Rows())


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Rows(), {"max_tokens_per_batch": 20}, "is 20, but the longest row has 29 tokens; give at least as many"),
        (Stream(), {"max_tokens_per_batch": 48}, "is 48, but the lengths of rows that are read while training"),
        (Rows(), {"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0; give at least 1"),
        (
            Rows(),
            {"max_tokens_per_batch": 48, "gradient_accumulation_steps": 99, "dataloader_drop_last": True},
            "make fewer than the 99 batches of one update",
        ),
        (
            Rows(),
            {"max_tokens_per_batch": 48, "train_sampling_strategy": "group_by_length"},
            "is 48 and train_sampling_strategy 'group_by_length', but batches by tokens have an order of their own",
        ),
    ],
)
def test_what_is_refused(tmp_path, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", dataset=dataset, **options)
    assert not (tmp_path / "out").exists()


def test_trainers_that_count_rows_refuse_it(tmp_path):
    args = RecurrentTrainingArguments(output_dir=str(tmp_path / "out"), max_tokens_per_batch=48, use_cpu=True)
    with pytest.raises(ValueError, match="max_tokens_per_batch is 48, but this trainer counts rows, not tokens"):
        BaseTrainer(model=tiny_model(), args=args, train_dataset=Rows())
    assert not (tmp_path / "out").exists()


SCRIPT = """
import json, sys
from inference.shutdown import end_process
from tests.test_token_batches import trainer_of
from tests.tiny import tiny_model

model = tiny_model(recurrence={"step_distribution": "fixed"})
trainer, shapes = trainer_of(sys.argv[1], model=model, max_steps=6, **json.loads(sys.argv[2]))
trainer.train()
if trainer.state.is_world_process_zero:
    print("FOUND", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
end_process(0)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_equal_one(tmp_path):
    """Twice as many micro-batches on one rank."""
    found = []
    for ranks, accumulation in ((1, 4), (2, 2)):
        options = json.dumps({"gradient_accumulation_steps": accumulation})
        found.append(launch(ranks, SCRIPT, str(tmp_path / str(ranks)), options))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
