"""Evaluation sees every row, whatever training leaves out; and options that the device would ignore are refused."""

import pytest
import torch

from configs import load_config
from tests.test_trainer import build, rows
from trainers import RecurrentTrainingArguments


def labels_seen(trainer, dataset) -> int:
    """Labels of which an evaluation takes the loss."""
    seen = []
    handle = trainer.model.register_forward_pre_hook(
        lambda module, inputs, given: seen.append(int((given["labels"] != -100).sum())), with_kwargs=True
    )
    trainer.evaluate(dataset)
    trainer.predict(dataset)
    handle.remove()
    assert sum(seen) % 2 == 0
    return sum(seen) // 2


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_last_batch_is_dropped_in_training_alone(tmp_path, strategy):
    """11 rows in batches of 4."""
    trainer = build(
        tmp_path,
        dataset=rows(11),
        per_device_eval_batch_size=4,
        dataloader_drop_last=True,
        train_sampling_strategy=strategy,
    )
    assert len(trainer.get_train_dataloader()) == 2
    expected = sum(int((row["labels"] != -100).sum()) for row in rows(11))
    assert labels_seen(trainer, rows(11)) == expected
    assert trainer.args.dataloader_drop_last


def test_float16_is_refused_on_a_cpu_and_bf16_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"\.fp16: it is on, but on a CPU .*; set bf16 to true"):
        RecurrentTrainingArguments(output_dir=str(tmp_path), fp16=True, use_cpu=True)
    trainer, types = build(tmp_path, bf16=True, max_steps=1), set()
    trainer.model.model.prelude.layers[0].attention.qkv_proj.register_forward_hook(
        lambda module, inputs, output: types.add(output.dtype)
    )
    trainer.train()
    trainer.evaluate()
    assert types == {torch.bfloat16}


def test_float16_on_a_cpu_is_one_line_that_names_the_key(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", "configs/recurrent_lm.yaml", "--training.use_cpu", "true", "--training.fp16", "true"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "fp16" in line and "bf16" in line
