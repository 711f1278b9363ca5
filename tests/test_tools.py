"""`pretrain.py --debug` and `--profile`, and how modes are chosen."""

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import IterableDataset

import pretrain
from callbacks import StabilityConfig
from callbacks.non_finite import check_non_finite
from configs import load_config
from configs.modes import MODES
from tests.test_pretrain import write_config
from tests.test_trainer import build, rows
from tests.tiny import tiny_ids, tiny_model
from trainers.debugging import NotLearningError, finite_outputs, overfit_one_batch
from trainers.profiling import HEAD, Range, cost_table, costs_of, parts_of

# ---------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_a_switch(mode):
    """With dashes too, with and without a value; no file of a run names it."""
    for flags in ([f"--{mode}"], [f"--{mode.replace('_', '-')}"], [f"--{mode}=true"], [f"--{mode}", "true"]):
        run = load_config([*flags, "--training.use_cpu", "true"])
        assert run.mode == mode and [name for name in MODES if name in run.resolved] == [mode]
    run = load_config([f"--{mode}", "false", "--training.use_cpu", "true"])
    assert run.mode is None and not MODES.keys() & run.resolved.keys()


def test_two_modes_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--find-lr", "--profile"])
    assert stop.value.code == 2
    expected = "error: --find-lr and --profile are given, of which each ends the command; give one of them\n"
    assert capsys.readouterr().err == expected


def test_a_mode_changes_options_of_its_own_only(tmp_path):
    """What is measured and saved besides; not the data, the model, the batch."""
    options = ["--config", "configs/recurrent_lm.yaml", "--training.use_cpu", "true"]
    plain, found = (load_config([*options, *flags]) for flags in ([], ["--debug"]))
    changed = {
        key for key in plain.resolved["training"] if plain.resolved["training"][key] != found.resolved["training"][key]
    }
    assert changed <= {
        *("max_steps", "save_strategy", "eval_strategy", "report_to", "recurrence_logging_steps", "lr_scheduler_type"),
        *("warmup_steps", "logging_steps", "train_sampling_strategy", "resume_from_checkpoint"),
    }
    for section in ("model", "data", "tokenizer"):
        assert plain.resolved[section] == found.resolved[section]
    assert found.callbacks.samples.prompts == [] != plain.callbacks.samples.prompts


@pytest.mark.parametrize("mode", ["find_lr", "profile", "debug"])
def test_a_mode_has_no_alarms_of_the_run(mode):
    """Those that want checkpoints, which it has none of, or would end it before it has found anything."""
    alarms = ["--callbacks.non_finite", '{"action": "roll_back", "spike_deviations": 10}']
    alarms += ["--callbacks.stability", '{"action": "stop", "gradient_logs": 1, "core_steps": 1}']
    run = load_config([f"--{mode}", "--training.use_cpu", "true", *alarms])
    check_non_finite(run.callbacks.non_finite, run.training)
    assert not run.callbacks.non_finite.is_at_each_step
    assert run.callbacks.stability == StabilityConfig(action="warn", gradient_logs=0, core_steps=0)


# ---------------------------------------------------------------------------------------------------------------- debug


def batch(**options):
    ids = tiny_ids(2, 8)
    return {"input_ids": ids, "labels": ids, "num_steps": 2, **options}


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens", "model.prelude.layers.0.mlp.down_proj", "model.core.layers.0.attention.o_proj", "lm_head"],
)
def test_the_first_module_that_is_not_finite_is_named(name):
    """The one with the weight that is not; all behind it have such inputs only. No hook is left."""
    model = tiny_model(tie_word_embeddings=False).train()
    with torch.no_grad():
        dict(model.named_modules())[name].weight.fill_(float("inf"))
    with finite_outputs(model), pytest.raises(FloatingPointError) as error:
        model(**batch())
    assert f"the output of {name} (" in str(error.value) and "its own weight is not" in str(error.value)
    assert "input" not in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_masks_and_padding_are_no_fault():
    """Padded rows, with the backend whose masks are -inf; the same model with an infinite state from outside is."""
    model = tiny_model(attn_implementation="eager").train()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with finite_outputs(model):
        model(**batch(attention_mask=mask))
        with pytest.raises(FloatingPointError, match=r"its own weights are, and neither is its input$"):
            model(**batch(initial_state=torch.full((2, 8, 32), float("inf"))))


def test_one_batch_is_learned(tmp_path):
    """The same rows in each step, in the same order, as many as an update takes."""
    trainer, seen = (
        build(tmp_path, max_steps=8, gradient_accumulation_steps=2, train_sampling_strategy="sequential"),
        [],
    )
    trainer.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].tolist()), with_kwargs=True
    )
    text = overfit_one_batch(trainer)
    first = [row["input_ids"].tolist() for row in rows(8)]
    assert len(seen) == 16 and {str(it) for it in seen} == {str(first[:4]), str(first[4:])}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = sum(losses[-5:]) / 5
    assert text.startswith(f"the loss of 8 rows went from {losses[0]:.4g} to {last:.4g} in 8 updates")
    assert not torch.is_anomaly_enabled()


def test_one_batch_of_a_stream_is_learned(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows())

    trainer = build(tmp_path, max_steps=8, dataset=Stream())
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, given: seen.extend(given["input_ids"].tolist()), with_kwargs=True
    )
    assert overfit_one_batch(trainer).startswith("the loss of 4 rows went from ")
    assert {str(row) for row in seen} == {str(row["input_ids"].tolist()) for row in rows(4)}


def test_a_rate_of_zero_learns_nothing(tmp_path):
    trainer = build(tmp_path, max_steps=6, learning_rate=0.0)
    with pytest.raises(NotLearningError, match=r"should have fallen: .* training\.learning_rate, which is 0"):
        overfit_one_batch(trainer)


def test_the_command_says_it_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("configs.modes._OPTIONS", {"debug": {"training.max_steps": 3}})
    out = tmp_path / "out"
    training = {"output_dir": str(out), "save_strategy": "no", "report_to": "none"}
    flags = ["--config", str(write_config(tmp_path, training=training, callbacks={"samples": {}})), "--debug"]
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*flags, "--training.learning_rate", "0"])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the loss of 4 rows went from ") and "should have fallen" in line
    assert list(out.rglob("*")) == []


# -------------------------------------------------------------------------------------------------------------- profile


class Heavy(torch.autograd.Function):
    """The identity, with products of matrices in its forward or its backward pass."""

    @staticmethod
    def forward(context, x, forward, backward):
        context.backward_products = backward
        context.save_for_backward(x)
        products(forward)
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        assert context.saved_tensors
        products(context.backward_products)
        return gradient.clone(), None, None


def products(count):
    matrix = torch.ones(128, 128)
    for _ in range(count):
        matrix = matrix @ matrix.fill_(0.001)


class Part(nn.Module):
    def __init__(self, forward, backward):
        super().__init__()
        self.counts = forward, backward

    def forward(self, x):
        return Heavy.apply(x, *self.counts)


def products_of(model, run):
    """The products of each part of a call, in which the children of a model are parts: what no clock has to measure."""
    hooks = [hook for name, part in model.named_children() for hook in Range(name).register(part)]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    for hook in hooks:
        hook.remove()
    for event in found.events():
        event.products = 0
    for event in found.events():
        outer = event
        while outer is not None and event.name == "aten::mm":
            outer.products += 1
            outer = outer.cpu_parent
    return costs_of(found.events(), "products")


def test_a_backward_pass_belongs_to_the_part_that_made_it():
    model = nn.ModuleDict({"early": Part(0, 3), "late": Part(5, 0), "idle": Part(0, 0)})
    x = torch.ones(4, requires_grad=True)
    costs = products_of(model, lambda: model["idle"](model["late"](model["early"](x))).sum().backward())
    assert costs["early"] == (0, 3) and costs["late"] == (5, 0) and costs["idle"] == (0, 0)


def test_what_is_computed_again_belongs_to_the_backward_pass():
    model = nn.ModuleDict({"part": Part(3, 0)})
    x = torch.ones(4, requires_grad=True)

    def run():
        torch.utils.checkpoint.checkpoint(model["part"], x, use_reentrant=False).sum().backward()

    assert products_of(model, run)["part"] == (3, 3)


def test_the_parts_of_a_language_model():
    names = [name for name, _ in parts_of(tiny_model())]
    assert names == [HEAD, "embedding, norms and masks", "embed_tokens", "prelude", "core", "coda", "norm"]


def test_the_command_writes_a_trace_and_a_table(tmp_path, capsys):
    """The table's times of the core against the trace; they and the rest add up to the step."""
    out = tmp_path / "out"
    config = write_config(tmp_path, training={"output_dir": str(out)})
    assert pretrain.main(["--config", str(config), "--profile"]) == 0
    assert [path.name for path in out.rglob("*")] == ["profile", "trace.json"]
    events = json.loads((out / "profile/trace.json").read_text())["traceEvents"]
    assert len({event["name"] for event in events if event["name"].startswith("ProfilerStep#")}) == 10
    text = capsys.readouterr().out
    table = dict(read_row(line) for line in text.splitlines() if line.startswith("| ") and line.endswith("% |"))
    expected = sum(event["dur"] for event in events if event["name"] == "part: core") / 10 / 1e3
    assert expected > 0 and table["core"][0] == pytest.approx(expected, abs=0.01)
    assert {"core", "prelude", "coda", HEAD, "optimizer", "data", "the rest"} <= table.keys()
    assert sum(share for *_, share in table.values()) == pytest.approx(100, abs=0.6)
    assert all(table[name][1] > 0 for name in ("core", "prelude", "coda", HEAD))
    assert str(out / "profile/trace.json") in text


def read_row(line):
    name, *times, share = (cell.strip() for cell in line.strip("| ").split("|"))
    return name, (*(float(time or 0) for time in times), float(share.removesuffix("%")))


def test_a_step_without_parts_is_all_rest():
    with profile(activities=[ProfilerActivity.CPU]) as found, torch.profiler.record_function("ProfilerStep#0"):
        products(3)
    table = cost_table(found.events())
    assert table.splitlines()[2].startswith("| the rest |") and table.splitlines()[2].endswith("| 100.0% |")
