"""What is measured of a run's stability, against closed forms; and when that is an alarm."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

import pretrain
from callbacks import CallbacksConfig, NonFiniteConfig, StabilityConfig, StabilityError
from callbacks.stability import StabilityCallback, intervals_of
from model.core_step import CoreStep
from tests.test_callbacks import build_trainer
from tests.test_pretrain import write_config
from tests.tiny import tiny_ids, tiny_model


def last_core_call(model, ids, **kwargs):
    """The arguments of the core in its last step."""
    seen = []
    hook = model.model.core.register_forward_pre_hook(lambda core, *given: seen.append(given), with_kwargs=True)
    with torch.no_grad():
        model(ids, num_steps=4, use_cache=False, **kwargs)
    hook.remove()
    (state, embeds), given = seen[-1]
    return state, embeds, given


@pytest.mark.parametrize(
    "options",
    [{}, {"position_embedding": "alibi"}, {"recurrence": {"step_embedding": "sinusoidal"}}],
    ids=["rope", "alibi", "step embedding"],
)
def test_the_spectral_radius_is_the_largest_eigenvalue(options):
    """Of the whole derivative, by torch's own eigenvalues; with padding in a row."""
    model = tiny_model(scale=3.0, **options)
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[1, :1] = 0
    state, embeds, given = last_core_call(model, tiny_ids(2, 4), attention_mask=mask)
    step = CoreStep.of(model.model.core, state, embeds, **given)
    is_real, ours, theirs = mask.bool(), step.take(state), model.model.core(state, embeds, **given)
    torch.testing.assert_close(ours[is_real], theirs[is_real], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        derivative = torch.func.jacfwd(step.take)(state).reshape(state.numel(), -1)
    largest = torch.linalg.eigvals(derivative).abs().max()
    assert largest > 1.5
    torch.testing.assert_close(step.spectral_radius(400), largest, rtol=0.05, atol=0)


def test_a_few_tokens_are_those_of_the_whole_batch():
    """Attention is causal: the first tokens of the first rows have the states that they have in the batch."""
    model = tiny_model(scale=3.0)
    ids = tiny_ids(3, 70, low=3)
    state, embeds, given = last_core_call(model, ids)
    step = CoreStep.of(model.model.core, state, embeds, **given)
    assert step.state.shape == (2, 64, 32)
    whole = model.model.core(state, embeds, **given)
    torch.testing.assert_close(step.take(step.state), whole[:2, :64], atol=1e-5, rtol=1e-4)


def test_the_entropy_of_attention_in_closed_form():
    """Attention at random keys of no length looks at all alike; a token that sees itself alone does not count."""
    model = tiny_model()
    torch.nn.init.zeros_(model.model.core.layers[0].attention.qkv_proj.weight)
    torch.nn.init.zeros_(model.model.core.layers[1].attention.qkv_proj.weight)
    state, embeds, given = last_core_call(model, tiny_ids(2, 6))
    step = CoreStep.of(model.model.core, state, embeds, **given)
    torch.testing.assert_close(step.attention_entropy(), torch.tensor(1.0))
    # Token t of two looks at itself and the one before with probabilities p and 1 - p.
    step.inputs.mask = torch.tensor([[0.0, torch.finfo(torch.float32).min], [math.log(0.25), math.log(0.75)]])[
        None, None
    ]
    step.state, step.embeds = step.state[:, :2], step.embeds[:, :2]
    step.inputs.rotary = tuple(part[:, :2] for part in step.inputs.rotary)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    torch.testing.assert_close(step.attention_entropy(), torch.tensor(entropy))


class Observer(TrainerCallback):
    """Keeps gradients and weights before an update, and weights behind it."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = dict(model.named_parameters())
        self.seen["gradients"] = {name: it.grad.clone() for name, it in named.items() if it.grad is not None}
        self.seen["before"] = {name: it.detach().clone() for name, it in named.items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen["after"] = {name: it.detach().clone() for name, it in model.named_parameters()}


def length(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def test_gradients_and_updates_by_part(tmp_path, monkeypatch):
    """The norms are those before clipping, and their squares sum up to that of the whole; the update is what the
    optimizer did to the weights.
    """
    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig(), max_steps=2, max_grad_norm=0.01)
    observer = Observer()
    trainer.add_callback(observer)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    norms = {name.removeprefix("gradient_norm_"): it for name, it in entry.items() if name.startswith("gradient_norm_")}
    assert norms.keys() == {"embeddings", "prelude", "core", "coda", "norm"}
    assert math.hypot(*norms.values()) == pytest.approx(entry["grad_norm"], rel=1e-5) and entry["grad_norm"] > 0.1
    seen = observer.seen
    core = [name for name in seen["before"] if name.startswith("model.core.")]
    share = length(seen["gradients"][name] for name in core) / length(seen["gradients"].values())
    assert norms["core"] == pytest.approx(share * entry["grad_norm"], rel=1e-5)
    moved = length(seen["after"][name] - seen["before"][name] for name in core)
    assert entry["update_ratio_core"] == pytest.approx(moved / length(seen["before"][name] for name in core), rel=1e-3)


def test_measuring_changes_nothing(tmp_path):
    """Not the weights, with dropout, which draws random numbers."""
    weights = []
    for every in (0, 1):
        config = CallbacksConfig(stability=StabilityConfig(gradient_logs=every, core_steps=every))
        model = tiny_model(vocab_size=320, hidden_dropout=0.3)
        trainer = build_trainer(tmp_path / str(every), model=model, callbacks=config, gradient_accumulation_steps=2)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(("spectral_radius" in entry) == ("update_ratio_core" in entry) == bool(every) for entry in logs)
        assert not trainer.model._forward_hooks and not trainer.model.model.core._forward_pre_hooks
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))


def args(**changes):
    settings = {
        "deepspeed": None,
        "uses_fsdp": False,
        "compile_units": False,
        "depth_gap_alarm": 0.01,
        "logging_strategy": "steps",
    }
    return SimpleNamespace(**{**settings, "token_correlation_alarm": 0.95, "output_dir": "", **changes})


@pytest.mark.parametrize(
    ("config", "changes", "model", "message"),
    [
        ({"gradient_logs": 2}, {"deepspeed": "zero1"}, {}, "gradient_logs is 2, but not possible with training.deepsp"),
        ({"gradient_logs": 1}, {"logging_strategy": "epoch"}, {}, "not possible with training.logging_strategy epoch"),
        ({"core_steps": 5}, {"uses_fsdp": True}, {}, "core_steps is 5, but not possible with training.fsdp"),
        ({"core_steps": 5}, {"compile_units": True}, {}, "core_steps is 5, but not possible with training.torch_comp"),
        ({"core_steps": 5}, {}, {"recurrence": {"cache_policy": "first"}}, "not possible with cache policy 'first'"),
        (
            {"core_steps": 5},
            {},
            {"num_core_layers": 0},
            "core_steps is 5, but not possible with a model without a core",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_and_by_default_left_out(config, changes, model, message):
    with pytest.raises(ValueError, match=message):
        intervals_of(StabilityConfig(**config), args(**changes), tiny_model(**model))
    intervals = intervals_of(StabilityConfig(), args(**changes), tiny_model(**model))
    if "logging_strategy" in changes:
        assert intervals == (0, 100)
    else:
        assert intervals == (0 if {"deepspeed", "uses_fsdp"} & changes.keys() else 1, 0)
    assert intervals_of(StabilityConfig(), args(), tiny_model()) == (1, 100)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {"token_correlation": 0.96},
            "the states of different tokens have a mean correlation of 0.960: they are collaps",
        ),
        ({"state_growth": 12.0}, "the state after all steps is 12.0 times as long as after the first: it runs away"),
        (
            {"update_ratio_core": 0.01, "update_ratio_coda": 0.2},
            "an update moves the weights of the coda by 0.200 of thei",
        ),
        ({"attention_entropy": 0.01}, "the entropy of attention is 0.0100: tokens look at one other alone"),
        (
            {"depth_gap": 0.005, "loss_at_mean_steps": 4.9},
            "the loss at one core step is only 0.0050 nats above that at",
        ),
        ({"depth_gap": 0.005, "loss_at_mean_steps": 5.1}, None),  # the loss has not fallen by a nat
        ({"depth_gap": 0.02, "loss_at_mean_steps": 1.0}, None),
        ({"token_correlation": 0.94, "state_growth": 9.0, "spectral_radius": 1.9, "attention_entropy": 0.03}, None),
    ],
)
def test_alarms(figures, said):
    history = [{"loss": 7.0}, {"loss": 6.5, "loss_at_mean_steps": 6.0}, figures]
    callback = StabilityCallback(StabilityConfig(), (1, 1), kept=None)
    found = callback.alarms(args(), SimpleNamespace(log_history=history, global_step=10, max_steps=100), figures)
    assert len(found) == (said is not None) and all(text.startswith(said) for text in found)
    if figures.get("depth_gap") == 0.005:  # half of training is over: depth is expected to pay
        found = callback.alarms(args(), SimpleNamespace(log_history=history, global_step=10, max_steps=20), figures)
        assert len(found) == 1


@pytest.mark.parametrize(
    ("radii", "is_alarm"),
    [([2.1, 2.6, 2.3], True), ([0.7, 2.1, 2.6, 2.3], True), ([2.6, 2.3], False), ([2.1, 1.9, 2.3, 2.6], False)],
)
def test_the_spectral_radius_has_to_stay_large(radii, is_alarm):
    """Single measurements above 2 are those of healthy runs too. Between them are logs without one."""
    history = [entry for radius in radii for entry in ({"loss": 7.0}, {"loss": 7.0, "spectral_radius": radius})]
    callback = StabilityCallback(StabilityConfig(), (1, 1), kept=None)
    state = SimpleNamespace(log_history=history, global_step=10, max_steps=100)
    found = callback.alarms(args(), state, history[-1])
    assert [text.split(",")[0] for text in found] == [
        f"a step of the core multiplies small differences by {radii[-1]}0"
    ] * is_alarm
    history.append({"loss": 7.0})
    assert callback.alarms(args(), state, history[-1]) == []


@pytest.mark.parametrize("action", ["warn", "save", "stop"])
def test_what_an_alarm_leads_to(tmp_path, caplog, action):
    config = CallbacksConfig(stability=StabilityConfig(action=action, update_alarm=1e-6))
    trainer = build_trainer(tmp_path, callbacks=config, logging_steps=1)
    if action == "stop":
        with pytest.raises(
            StabilityError, match=r"step 1: an update moves .* docs/troubleshooting\.md says what helps"
        ):
            trainer.train()
    else:
        trainer.train()
        assert "step 1: an update moves the weights of" in caplog.text
    assert (tmp_path / "alarms" / "step-1-rank-0.pt").exists() == (action != "warn")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--callbacks.stability.action", "stop", "--callbacks.stability.update_alarm", "1e-6"],
            r"error: step 1: an update moves .* docs/troubleshooting\.md says what helps",
        ),
        (
            ["--training.learning_rate", "1e30"],
            r"error: At step 2 the grad_norm is nan\. .* callbacks\.non_finite\.action: .* goes on\.",
        ),
    ],
)
def test_an_alarm_ends_a_command_with_one_line(tmp_path, capsys, flags, said):
    always = ["--training.output_dir", str(tmp_path / "out"), "--training.logging_steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--config", str(write_config(tmp_path)), *always, *flags])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(said, line)


def test_padding_counts_for_nothing():
    """On either side: what is measured of a row alone is measured beside it, with a mask of any backend."""
    model, ids = tiny_model(scale=3.0), tiny_ids(1, 6)
    state, embeds, given = last_core_call(model, ids)
    alone = CoreStep.of(model.model.core, state, embeds, **given)
    expected = alone.spectral_radius(), alone.attention_entropy()
    for mask, padded in (
        ([[1] * 6 + [0] * 3], torch.nn.functional.pad(ids, (0, 3))),
        ([[0] * 3 + [1] * 6], torch.nn.functional.pad(ids, (3, 0))),
    ):
        is_real = torch.tensor(mask).bool()
        state, embeds, given = last_core_call(model, padded, attention_mask=torch.tensor(mask))
        step = CoreStep.of(model.model.core, state, embeds, **given)
        assert torch.equal(step.is_real, is_real)
        torch.testing.assert_close(step.attention_entropy(), expected[1], atol=1e-5, rtol=1e-4)
        given["inputs"] = replace(given["inputs"], mask=is_real)  # as FlashAttention has it
        flash = CoreStep.of(model.model.core, state, embeds, **given)
        seen = (step.inputs.mask > -1).expand_as(flash.inputs.mask)
        assert torch.equal((flash.inputs.mask > -1)[:, :, is_real[0]], seen[:, :, is_real[0]])
        assert torch.isfinite(flash.spectral_radius())


def test_padding_has_no_part_in_the_spectral_radius():
    """That of the derivative of real states by real states."""
    model = tiny_model(scale=3.0)
    mask = torch.ones(1, 5, dtype=torch.long)
    mask[0, 3:] = 0
    state, embeds, given = last_core_call(model, tiny_ids(1, 5), attention_mask=mask)
    step = CoreStep.of(model.model.core, state, embeds, **given)
    with torch.no_grad():
        derivative = torch.func.jacfwd(step.take)(state)[0, :3, :, 0, :3]
    size = 3 * state.shape[-1]
    largest = torch.linalg.eigvals(derivative.reshape(size, size)).abs().max()
    assert step.spectral_radius(400) == pytest.approx(float(largest), rel=0.02)


def test_adapters_are_measured_by_what_they_change(tmp_path):
    """The update of what learns, by the length of all weights of its part; none where there is no length."""
    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig(), max_steps=1, logging_steps=1)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = "core" in name and "norm" in name
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    observer = Observer()
    trainer.add_callback(observer)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    core = [name for name in before if name.startswith("model.core.")]
    moved = length(observer.seen["after"][name] - before[name] for name in core)
    assert moved > 0 and entry["update_ratio_core"] == pytest.approx(
        moved / length(before[name] for name in core), rel=1e-3
    )
    assert [name for name in entry if name.startswith("update_ratio_")] == ["update_ratio_core"]


def test_batches_of_alarms_are_saved_where_each_step_is_looked_at_and_not_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.stability.MOST_SAVED", 2)
    stability, non_finite = StabilityConfig(action="save", update_alarm=1e-6), NonFiniteConfig(action="skip")
    config = CallbacksConfig(stability=stability, non_finite=non_finite)
    trainer = build_trainer(tmp_path, callbacks=config, logging_steps=1, max_steps=4)
    trainer.train()
    saved = sorted(path.name for path in (tmp_path / "alarms").iterdir())
    assert saved == ["step-1-rank-0.pt", "step-2-rank-0.pt"]


def test_a_step_that_is_left_out_has_no_update(tmp_path):
    """And so raises no alarm, though the weights are others when it has gone back."""
    config = CallbacksConfig(non_finite=NonFiniteConfig(action="skip"))
    trainer = build_trainer(tmp_path, callbacks=config, logging_steps=1, max_steps=3)
    trainer.model.register_forward_hook(
        lambda model, args, output: (
            output.__setitem__("loss", output.loss * math.nan)
            if trainer.state.global_step == 1 and model.training
            else None
        )
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["update_ratio_core" in entry for entry in logs] == [True, False, True]


@pytest.mark.parametrize(("mean_steps", "gap", "is_alarm"), [(1, 0.0, False), (8, 0.0, True), (8, math.nan, False)])
def test_depth_cannot_be_ignored_where_there_is_none(mean_steps, gap, is_alarm):
    callback = StabilityCallback(StabilityConfig(), (1, 1), kept=None)
    callback.mean_steps = mean_steps
    state = SimpleNamespace(log_history=[{"loss_at_mean_steps": 6.0}], global_step=8, max_steps=10)
    assert callback.is_depth_ignored(args(), state, {"depth_gap": gap, "loss_at_mean_steps": 5.9}) == is_alarm
