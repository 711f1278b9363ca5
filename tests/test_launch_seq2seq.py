"""Sequence to sequence on two ranks under ZeRO-2, against one rank without. As a module, this is one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_loading import Seq2SeqCollator
from tests.test_launch import free_port
from tests.test_launch_muon import trained
from tests.test_trainer import build
from tests.tiny import BEGIN, END, PAD, tiny_ids
from tests.tiny_seq2seq import tiny_seq2seq

ROOT = Path(__file__).parents[1]


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


def losses_of(folder: Path, world_size: int, deepspeed: str | None) -> list[float]:
    """Losses of four updates of eight rows each, however many ranks there are; depths are drawn in both parts."""
    model = tiny_seq2seq(scale=1.0)
    options = {"per_device_train_batch_size": 8 // world_size, "deepspeed": deepspeed, "max_steps": 4}
    trainer = build(folder, model=model, dataset=sorted_rows(), **options)
    trainer.data_collator = Seq2SeqCollator(Tokenizer())
    return trained(trainer)


def rank(folder: Path) -> None:
    """What each of two does; rank 0 leaves the losses in losses.json."""
    found = losses_of(folder, 2, str(ROOT / "configs/deepspeed/zero2.json"))
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_of_zero_2_learn_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "tests.test_launch_seq2seq", str(tmp_path)]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **settings, "PATH": path}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    alone = losses_of(tmp_path / "alone", 1, None)
    assert found == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == 4 and alone[-1] < alone[0]


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
