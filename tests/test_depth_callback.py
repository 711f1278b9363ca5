"""Depth in trainers that know nothing of it: a warning where none is drawn, and a callback that draws it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from model import depth
from tests.processes import run_python
from tests.test_trainer import Interrupt, build, losses, rows
from tests.tiny import tiny_ids, tiny_model


def plain(folder, model, callbacks=None, **options) -> Trainer:
    """transformers' own trainer, as `build` sets up ours."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 0}
    args = TrainingArguments(output_dir=str(folder), data_seed=0, **{**settings, **options})
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(8), callbacks=callbacks)


def test_the_callback_gives_the_plain_trainer_the_run_of_ours(tmp_path):
    """Depths, states, and so losses; also in evaluation, and the model is as before afterwards."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    ours = build(tmp_path / "ours", **options)
    seen = {}
    for name, trainer in {
        "ours": ours,
        "plain": plain(tmp_path / "plain", model := tiny_model(), [model.depth_callback()], **options),
    }.items():
        depths = seen[name] = []
        handle = trainer.model.model.register_forward_pre_hook(
            lambda module, inputs, given, depths=depths: depths.append((module.training, given["num_steps"])),
            with_kwargs=True,
        )
        trainer.train()
        handle.remove()
        seen[name + " losses"] = losses(trainer)
        seen[name + " evaluations"] = [it["eval_loss"] for it in trainer.state.log_history if "eval_loss" in it]
    assert seen["plain"] == seen["ours"] and len({depth for training, depth in seen["plain"] if training}) > 1
    assert seen["plain losses"] == pytest.approx(seen["ours losses"], rel=1e-5)
    assert seen["plain evaluations"] == pytest.approx(seen["ours evaluations"], rel=1e-5)
    assert not model._forward_pre_hooks


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path):
    options = {"max_steps": 6, "gradient_accumulation_steps": 2}
    whole = plain(tmp_path / "whole", model := tiny_model(), [model.depth_callback()], **options)
    whole.train()
    first = plain(tmp_path / "cut", model := tiny_model(), [model.depth_callback(), Interrupt(3)], **options)
    first.train()
    second = plain(tmp_path / "cut", model := tiny_model(seed=5), [model.depth_callback()], **options)
    second.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-3"))
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_of_peft_is_trained_at_drawn_depths(tmp_path):
    base = tiny_model()
    model = get_peft_model(base, LoraConfig(target_modules=["qkv_proj"]))
    trainer = plain(tmp_path, model, [model.depth_callback()], max_steps=3)
    seen = []
    base.register_forward_pre_hook(lambda module, inputs, given: seen.append(given["num_steps"]), with_kwargs=True)
    trainer.train()
    expected = [depth.sample_depth(base.config.recurrence, 0, step, 0) for step in range(3)]
    assert seen == expected


def test_a_model_without_core_has_no_depth_to_draw(tmp_path):
    model = tiny_model(num_core_layers=0)
    with pytest.raises(ValueError, match="this model has no core"):
        plain(tmp_path, model, [model.depth_callback()]).train()


def test_training_at_one_depth_is_said_once_and_nothing_else_is(monkeypatch):
    said = []
    monkeypatch.setattr(depth.logger, "warning_once", said.append)
    model, ids = tiny_model(), tiny_ids(1, 4)
    model(ids)
    model(ids, labels=ids)
    model.generate(ids, max_new_tokens=1)
    model.train()
    with torch.no_grad():
        model(ids)
    model(ids, labels=ids, num_steps=4)
    model(ids, labels=ids, num_steps=(1, 2))
    tiny_model(num_core_layers=0).train()(ids, labels=ids)
    tiny_model(recurrence={"step_distribution": "fixed"}).train()(ids, labels=ids)
    assert not said
    model(ids, labels=ids)
    assert len(said) == 1 and "trains at 4 core steps" in said[0] and "model.depth_callback()" in said[0]
    assert logging.get_logger(depth.__name__) is depth.logger


STRANGER = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
callback = model.depth_callback()
print(type(callback).__name__, type(callback).__module__.split(".")[0])
"""


@pytest.mark.slow
def test_who_has_the_checkpoint_alone_has_the_callback(tmp_path):
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint/depth_callback.py").is_file()
    run = run_python("-c", STRANGER, tmp_path / "checkpoint", cwd=tmp_path)
    assert run.stdout.split() == ["RecurrentDepthCallback", "transformers_modules"]
