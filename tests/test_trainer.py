"""The trainer: depth and state from keys, exact resume, spread over micro-batches, the watch over depth."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed
from transformers.integrations import integration_utils

from configs import load_config
from model.depth import sample_depth
from model.recurrence import draw_training_states
from tests.tiny import tiny_ids, tiny_model
from trainers import RecurrentTrainer, RecurrentTrainingArguments, find_resume_point
from trainers.recurrent import state_changes, token_correlation


def rows(count=32, length=12):
    """Training rows of random tokens; every fourth has fewer labels, so that means over batches and over tokens
    differ.
    """
    ids = tiny_ids(count, length)
    labels = ids.clone()
    labels[::4, 4:] = -100
    return [{"input_ids": row, "labels": target} for row, target in zip(ids, labels, strict=True)]


def build(folder, seed=0, model=None, dataset=None, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "recurrence_logging_steps": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": True,
    }
    args = RecurrentTrainingArguments(**{**settings, **overrides})
    set_seed(seed)
    model = model or tiny_model(seed=seed)
    return RecurrentTrainer(
        model=model,
        args=args,
        train_dataset=dataset or rows(),
        eval_dataset=rows(8),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def test_resumed_equals_uninterrupted_bitwise(tmp_path):
    """20 steps = 10 steps, a checkpoint, a new process' worth of new objects, 10 steps; also with accumulation and
    dropout.
    """
    settings = {"max_steps": 20, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    model = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    whole = build(tmp_path / "whole", model=tiny_model(**model), **settings)
    whole.train()
    first = build(tmp_path / "cut", model=tiny_model(**model), **settings)
    first.add_callback(Interrupt(10))
    first.train()
    assert first.state.global_step == 10
    second = build(tmp_path / "cut", model=tiny_model(seed=5, **model), resume_from_checkpoint="true", **settings)
    torch.manual_seed(123)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second)[10:] == losses(whole)[10:] and len(losses(second)) == 20
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_depth_is_drawn_per_micro_batch_and_logged(tmp_path):
    trainer = build(tmp_path, gradient_accumulation_steps=2, max_steps=3, seed=7)
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["num_steps"]), with_kwargs=True)
    trainer.train()
    expected = [
        sample_depth(trainer.model.config.recurrence, 7, step, micro) for step in range(3) for micro in range(2)
    ]
    assert seen == expected and len(set(seen)) > 1
    logged = [e for e in trainer.state.log_history if "steps_with_gradient" in e]
    assert [e["steps_without_gradient"] for e in logged] == [
        (expected[i][0] + expected[i + 1][0]) / 2 for i in (0, 2, 4)
    ]
    assert [e["steps_with_gradient"] for e in logged] == [(expected[i][1] + expected[i + 1][1]) / 2 for i in (0, 2, 4)]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_one_large_batch(tmp_path, accumulation):
    """With a fixed depth, 4 x 1 rows = 1 x 4 rows: states belong to rows, the loss to tokens."""
    results = []
    for per_device, steps in ((4, 1), (4 // accumulation, accumulation)):
        model = tiny_model(recurrence={"step_distribution": "fixed"})
        trainer = build(
            tmp_path,
            model=model,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=steps,
            max_steps=3,
        )
        trainer.train()
        results.append((losses(trainer), [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_step_equals_ten_lines_by_hand(tmp_path):
    """Two micro-batches, one SGD step: the gradient is that of the summed loss over all labels of both, divided
    once.
    """
    data = rows(8)
    trainer = build(
        tmp_path,
        dataset=data,
        max_steps=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        seed=3,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    model, total = tiny_model(seed=3).train(), 0
    for micro in range(2):
        batch = {name: torch.stack([row[name] for row in data[4 * micro : 4 * micro + 4]]) for name in data[0]}
        state = draw_training_states(model.config, 12, [(3, 0, 4 * micro + row) for row in range(4)])
        depth = sample_depth(model.config.recurrence, 3, 0, micro)
        logits = model(batch["input_ids"], num_steps=depth, initial_state=state).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
    (total / sum((row["labels"][1:] != -100).sum() for row in data)).backward()
    for ours, by_hand in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand - 0.5 * by_hand.grad, atol=1e-6, rtol=1e-4)


def test_activation_checkpointing_equals_none(tmp_path):
    runs = [build(tmp_path, gradient_checkpointing=on, max_steps=3) for on in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[0]) == losses(runs[1])


def test_plain_model_trains_without_depth(tmp_path):
    trainer = build(tmp_path, model=tiny_model(num_core_layers=0), recurrence_logging_steps=1)
    trainer.train()
    assert len(losses(trainer)) == 4
    assert not any("steps_with_gradient" in e or "depth_gap" in e for e in trainer.state.log_history)


def test_probe_compares_depths_on_the_next_batch(tmp_path):
    """Loss at one step and at the mean, state change per step, token correlation, all without dropout; and training
    is not disturbed.
    """
    data, dropout = rows(4), {"hidden_dropout": 0.5}
    model = tiny_model(**dropout).train()
    trainer = build(tmp_path, model=model, dataset=data, max_steps=1, recurrence_logging_steps=1)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "depth_gap" in e)
    model = tiny_model()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        shallow = model(**batch, num_steps=1).loss.item()
        deep = model(**batch, num_steps=4, output_states=True)
    assert entry["loss_at_1_step"] == pytest.approx(shallow, rel=1e-5)
    assert entry["loss_at_mean_steps"] == pytest.approx(deep.loss.item(), rel=1e-5)
    assert entry["depth_gap"] == pytest.approx(shallow - deep.loss.item(), abs=1e-5)
    change = ((deep.states[2] - deep.states[1]).norm(dim=-1) / deep.states[2].norm(dim=-1)).mean().item()
    assert entry["state_change_02"] == pytest.approx(change, rel=1e-4)
    norms = [deep.states[step].square().mean(dim=-1).sqrt().mean().item() for step in (1, 4)]
    assert entry["state_norm"] == pytest.approx(norms[1], rel=1e-4)
    assert entry["state_growth"] == pytest.approx(norms[1] / norms[0], rel=1e-4)
    correlations = torch.stack([between_tokens(row) for row in deep.state])  # rows of one length
    assert entry["token_correlation"] == pytest.approx(correlations.mean().item(), rel=1e-4)
    without = build(tmp_path, model=tiny_model(**dropout), dataset=data, max_steps=1)
    without.train()
    assert losses(without) == losses(trainer)


def test_probe_does_not_see_padding(tmp_path):
    """The same rows behind 24 places of padding, which have states of their own: the same figures."""

    def padded(row, filler):
        return torch.nn.functional.pad(row, (0, 24), value=filler)

    whole = rows(4)
    longer = [
        {
            "input_ids": padded(row["input_ids"], 0),
            "labels": padded(row["labels"], -100),
            "attention_mask": padded(torch.ones(12, dtype=torch.int64), 0),
        }
        for row in whole
    ]
    found = []
    for data in (whole, longer):
        trainer = build(tmp_path, dataset=data, max_steps=1, recurrence_logging_steps=1)
        trainer.train()
        entry = next(e for e in trainer.state.log_history if "depth_gap" in e)
        found.append({name: entry[name] for name in entry if name.startswith(("token", "state", "depth", "loss_at"))})
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 10


def test_probe_is_that_of_all_ranks(tmp_path, monkeypatch):
    """As if other ranks had found so much that the means are 100 above what this one has."""
    alone = build(tmp_path, max_steps=1, recurrence_logging_steps=1)
    together = build(tmp_path, max_steps=1, recurrence_logging_steps=1)
    monkeypatch.setattr(together.accelerator, "reduce", lambda values, reduction: {"mean": values + 100}[reduction])
    for run in (alone, together):
        run.train()
    entries = [next(e for e in run.state.log_history if "depth_gap" in e) for run in (alone, together)]
    for name in ("loss_at_1_step", "loss_at_mean_steps", "depth_gap", "token_correlation", "state_change_04"):
        assert entries[1][name] == pytest.approx(entries[0][name] + 100, abs=1e-4)


def between_tokens(state):
    """Correlations of all pairs of different tokens of a row. state: (tokens, hidden)."""
    return torch.corrcoef(state)[~torch.eye(len(state), dtype=torch.bool)]


def test_token_correlation_and_state_change_in_closed_form():
    """Of two rows, the second with two places of padding, whose states must not matter."""
    torch.manual_seed(0)
    state, is_real = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    is_real[1, :2] = False
    state[1, :2] = torch.nan
    pairs = torch.cat([between_tokens(state[0]), between_tokens(state[1, 2:])])
    torch.testing.assert_close(token_correlation(state, is_real), pairs.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(token_correlation(torch.randn(1, 1, 16).expand(2, 5, 16), is_real), torch.tensor(1.0))
    first, second = state_changes((state, 2 * state, 2 * state), is_real)
    assert first.item() == pytest.approx(0.5) and second.item() == 0


def test_evaluation_runs_at_the_mean_depth_without_a_cache(tmp_path):
    trainer = build(tmp_path)
    seen = []
    trainer.model.register_forward_hook(lambda m, a, out: seen.append(out.cache))
    loss = trainer.evaluate()["eval_loss"]
    batch = {name: torch.stack([row[name] for row in rows(8)]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert loss == pytest.approx(trainer.model(**batch, num_steps=4).loss.item(), rel=1e-5)
    assert seen[0] is None


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ({"num_coda_layers": 2}, r"missing none, unexpected (model\.coda\.layers\.1\.[^,]+, ){3}\.\.\., of"),
        ({"num_prelude_layers": 0}, r"missing model\.prelude\.layers\.0"),
        ({"hidden_size": 64}, r"of another shape .*o_proj\.weight \(\[64, 64\], not \[32, 32\]\)"),
    ],
)
def test_resuming_from_another_model_is_an_error(tmp_path, saved, problem):
    """Missing and unexpected weights, and those of another shape."""
    tiny_model(tie_word_embeddings=True, **saved).save_pretrained(tmp_path / "checkpoint-1")
    trainer = build(tmp_path, max_steps=2, model=tiny_model(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=rf"checkpoint-1 does not fit the model: .*{problem}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def resume_point(value, folder, **settings):
    return find_resume_point(
        RecurrentTrainingArguments(str(folder), resume_from_checkpoint=value, report_to="none", **settings)
    )


def save_whole(folder, step):
    """A checkpoint as far as it is looked at before training begins."""
    folder.mkdir()
    save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"numbers": torch.ones(100)}, folder / name)
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_where_to_resume(tmp_path):
    assert resume_point(None, tmp_path) is None and resume_point("false", tmp_path) is None
    assert resume_point("true", tmp_path) is None
    with pytest.raises(ValueError, match="no-such-folder is no folder"):
        resume_point("no-such-folder", tmp_path)
    for step in (5, 10):
        save_whole(tmp_path / f"checkpoint-{step}", step)
    save_whole(tmp_path / "checkpoint-20-kept", 20)
    for wanted in ("true", True):
        assert resume_point(wanted, tmp_path) == str(tmp_path / "checkpoint-10")
    assert resume_point(str(tmp_path / "checkpoint-5"), "elsewhere") == str(tmp_path / "checkpoint-5")
    for steps in (10, 11):  # the end of the run may be missing
        assert resume_point("true", tmp_path, max_steps=steps) == str(tmp_path / "checkpoint-10")
    for wanted, steps in (("true", 9), (str(tmp_path / "checkpoint-10"), 10)):
        with pytest.raises(
            ValueError, match=f"checkpoint-10 is of step 10, and training.max_steps is {steps}: nothing"
        ):
            resume_point(wanted, tmp_path, max_steps=steps)
    state = {"global_step": 10, "epoch": 2.0}
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"checkpoint-10 is of step 10, and training\.num_train_epochs is 2: nothing"):
        resume_point(str(tmp_path / "checkpoint-10"), tmp_path, num_train_epochs=2)
    for epochs in (2, 2.5):
        assert resume_point("true", tmp_path, num_train_epochs=epochs) == str(tmp_path / "checkpoint-10")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES = {
    "model.safetensors": (cut, "has a damaged model.safetensors"),
    "optimizer.pt": (cut, "has a damaged optimizer.pt"),
    "rng_state.pth": (cut, "has a damaged rng_state.pth"),
    "trainer_state.json": (cut, "has a damaged trainer_state.json"),
    "no model.safetensors": (lambda path: path.unlink(), "has no weights (model*.safetensors)"),
    "no optimizer.pt": (lambda path: path.unlink(), "has no state of an optimizer (optimizer*)"),
    "no trainer_state.json": (lambda path: path.unlink(), "has no trainer_state.json, the last file of a checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_no_resume_point(tmp_path, caplog, name):
    """The newest whole one is taken, and a warning says why; one that is named is refused."""
    for step in (9, 10):
        save_whole(tmp_path / f"checkpoint-{step}", step)
    damage, reason = DAMAGES[name]
    damage(tmp_path / "checkpoint-10" / name.removeprefix("no "))
    with caplog.at_level(logging.WARNING, logger="trainers.resuming"):
        assert resume_point("true", tmp_path) == str(tmp_path / "checkpoint-9")
    assert f"checkpoint-10 is passed over: it {reason}" in caplog.text
    with pytest.raises(ValueError) as error:
        resume_point(str(tmp_path / "checkpoint-10"), tmp_path)
    assert f"checkpoint-10 {reason}" in str(error.value) and "give a checkpoint-N folder" in str(error.value)
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert resume_point("true", tmp_path) is None


def test_deepspeed_keeps_weights_and_optimizer_in_files_of_its_own(tmp_path):
    """ZeRO-3 that does not gather the weights on saving leaves no model.safetensors."""
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    for name in ("rng_state_0.pth", "global_step3/mp_rank_00_model_states.pt"):
        torch.save({"numbers": torch.ones(100)}, folder / name)
    (folder / "latest").write_text("global_step3")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    assert resume_point("true", tmp_path) == str(tmp_path / "checkpoint-3")


REFUSED = {
    "scheduler arguments": ({"lr_scheduler_kwargs": {"bogus": 1}}, "lr_scheduler_kwargs: .*'bogus'"),
    "scheduler that needs arguments": ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs: .*min_lr"),
    "package of the optimizer": ({"optim": "galore_adamw"}, "training.optim or optim_args: .*install `galore_torch`"),
    "optimizer's arguments": ({"optim": "sgd", "optim_args": "momentum=big"}, "optim_args: .*'big'"),
    "package of the report": ({"report_to": "wandb"}, "report_to: 'wandb' needs a package that is not installed"),
    "accelerator": ({"accelerator_config": {"gradient_accumulation_kwargs": {"bogus": 1}}}, "training: .*'bogus'"),
    "compiler": ({"torch_compile_backend": "bogus"}, "torch_compile_mode: .*'bogus'"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_libraries_refuse_is_refused_before_anything_is_written(tmp_path, monkeypatch, settings, message):
    """They would only when training begins, as an error of any kind."""
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: False)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_trying_the_schedule_leaves_none_behind(tmp_path):
    """An epoch of eight steps has the schedule of eight steps, though nobody knew of them when it was tried."""
    trainer = build(tmp_path, max_steps=-1, num_train_epochs=1)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * (1 - step / 8) for step in range(8)])


METRICS = ("a", "b"), ("loss", "perplexity")


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, None),
        ({"load_best_model_at_end": True}, "eval_loss"),
        ({"save_strategy": "best"}, "eval_loss"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval_loss"),
        ({"metric_for_best_model": "eval_b_loss"}, "eval_b_loss"),
        ({"metric_for_best_model": "a_perplexity"}, "a_perplexity"),
    ],
)
def test_the_metric_of_the_best_model(tmp_path, settings, chosen):
    strategies = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    args = RecurrentTrainingArguments(str(tmp_path), **{**strategies, **settings})
    args.choose_best_metric(*METRICS)
    assert args.metric_for_best_model == chosen and args.greater_is_better is False


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path):
    args = RecurrentTrainingArguments(str(tmp_path), metric_for_best_model="accuracy")
    with pytest.raises(
        ValueError, match=r"'accuracy' is unknown; .* eval_loss, eval_a_loss, eval_a_perplexity, eval_b"
    ):
        args.choose_best_metric(*METRICS)


def test_deepspeed_needs_a_launcher(tmp_path, monkeypatch):
    """DeepSpeed itself then asks for mpi4py."""
    args = RecurrentTrainingArguments(str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args.check_launcher()
    args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match="RANK is not in the environment; start with `deepspeed` instead of `python`"):
        args.check_launcher()
    monkeypatch.setenv("RANK", "0")
    args.check_launcher()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; give at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; give at least 0"),
        ({"max_steps": 0}, "max_steps is 0; give at least 1, or -1"),
        ({"adam_beta2": 1.5}, "adam_beta2 is 1.5; give a number from 0 to below 1"),
        ({"recurrence_logging_steps": -1}, "recurrence_logging_steps is -1; give at least 0"),
        ({"token_correlation_alarm": 2.0}, "token_correlation_alarm is 2.0; a cosine lies from -1 to 1"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0; give at least 1"),
        ({"label_names": ["targets"]}, r"label_names is \['targets'\], but the metrics need .*; leave it out"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches is False, but the metrics need"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor is 1.0; give a number from 0 to below 1"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy is 'sorted'; give one of random, sequential"),
        ({"log_level": "loud"}, "log_level is 'loud'; give one of detail, debug"),
    ],
)
def test_training_arguments_out_of_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RecurrentTrainingArguments(str(tmp_path), **settings)


def test_unknown_trainer_is_an_error_that_lists_the_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        load_config(["--trainer", "pretain"])
    assert "'pretain' is unknown; did you mean pretrain? known: pretrain, reconstruction" in capsys.readouterr().err


def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    """Mixed precision; the optimizer's state and the weights stay in float32."""
    trainer = build(tmp_path, bf16=True, max_steps=3)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    full = build(tmp_path, max_steps=3)
    full.train()
    assert losses(trainer) == pytest.approx(losses(full), rel=2e-2)
    assert losses(trainer) != losses(full)


def test_saved_checkpoint_has_no_second_copy_of_tied_weights(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
