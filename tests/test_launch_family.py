"""Variants of the blocks, and sequence to sequence, on two ranks, under DDP and ZeRO-2. As a module, one rank."""

import json
import os
import sys
from pathlib import Path

import pytest

from dataset_loading import Seq2SeqCollator
from inference.shutdown import end_process
from tests.processes import ROOT, run_ranks
from tests.test_family import VARIANTS, model_of
from tests.test_launch_muon import trained
from tests.test_trainer import build
from tests.tiny import BEGIN, END, PAD, tiny_ids
from tests.tiny_seq2seq import tiny_seq2seq

NAMES = (*VARIANTS, "seq2seq")


class Tokenizer:
    """What the collator asks of one."""

    pad_token_id, bos_token_id = PAD, BEGIN


def sorted_rows(count: int = 32) -> list[dict[str, list[int]]]:
    """Sources of two to five tokens, and the same tokens in their order as targets."""
    found = []
    for number, ids in enumerate(tiny_ids(count, 5, seed=3).tolist()):
        source = ids[: 2 + number % 4]
        target = [*sorted(source), END]
        found.append({"input_ids": [BEGIN, *source, *target], "labels": [-100] * (1 + len(source)) + target})
    return found


def trainer_of(name, folder, **options):
    """A trainer of a variant, or of sequence to sequence, of which depths are drawn in both parts."""
    if name in VARIANTS:
        return build(folder, model=model_of(name, scale=1.0), **options)
    trainer = build(folder, model=tiny_seq2seq(scale=1.0), dataset=sorted_rows(), **options)
    trainer.data_collator = Seq2SeqCollator(Tokenizer())
    return trainer


def rank(folder):
    """Three steps of each; rank 0 leaves the losses in losses.json."""
    found = {}
    for stage in ("", "zero2"):  # a process that has known DeepSpeed has it in its environment
        deepspeed = str(ROOT / f"configs/deepspeed/{stage}.json") if stage else None
        for name in NAMES:
            trainer = trainer_of(name, folder / f"{name}{stage}", max_steps=3, deepspeed=deepspeed)
            found[name + stage] = trained(trainer)
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_variant_learns_the_same_under_zero_2(tmp_path):
    ranks = run_ranks("-m", "tests.test_launch_family", tmp_path, count=2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-4000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    for name in NAMES:
        assert found[f"{name}zero2"] == pytest.approx(found[name], abs=1e-4), name
        assert len(set(found[name])) == 3, name


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
    end_process(0)
