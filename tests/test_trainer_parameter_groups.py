"""Parts of a model that learn at a rate of their own, later, or not at all."""

import pytest
import torch
import yaml
from accelerate.utils import DummyOptim
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel

from configs import load_config
from tests.test_trainer import Interrupt, build, losses
from tests.tiny import tiny_model
from tests.tiny_media import tiny_media_model
from tests.tiny_writing import tiny_writer
from trainers import ParameterGroup, find_resume_point


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(trainer, before):
    """Names of the parameters that training has changed."""
    return {name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])}


def train(folder, **options):
    """A trainer whose training is over, and the weights from before."""
    trainer = build(folder, **options)
    before = weights_of(trainer.model)
    trainer.train()
    return trainer, before


def test_what_is_frozen_stays_and_costs_no_gradient(tmp_path):
    patterns = ["model.prelude.*", "*norm_in.weight"]
    trainer, before = train(tmp_path, freeze=patterns)
    frozen = {name for name in before if name.startswith("model.prelude.") or name.endswith("norm_in.weight")}
    assert moved(trainer, before) == set(before) - frozen and 0 < len(frozen) < len(before)
    assert all(weight.requires_grad == (name not in frozen) for name, weight in trainer.model.named_parameters())


def test_a_group_learns_at_its_own_rate(tmp_path):
    """One step of SGD without momentum: how far a weight moves is its rate times its gradient, which is the same for
    all of them as without groups.
    """
    options = {
        "max_steps": 1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
    }
    groups = [
        ParameterGroup("model.coda.*", learning_rate=0.02),
        ParameterGroup("model.*.layers.0.*", lr_factor=3.0),
        ParameterGroup("model.norm.*", learning_rate=0.0),
    ]
    whole, before = train(tmp_path, **options)
    grouped, _ = train(tmp_path, parameter_groups=groups, **options)
    rates = {"model.coda": 0.02, "model.prelude.layers.0": 1.5, "model.core.layers.0": 1.5, "model.norm": 0.0}
    without, with_groups = weights_of(whole.model), weights_of(grouped.model)
    for name, weight in with_groups.items():
        rate = next((rate for start, rate in rates.items() if name.startswith(start)), 0.5)
        torch.testing.assert_close(weight, before[name] + rate / 0.5 * (without[name] - before[name]))
    learning_rates = {group["lr"] for group in grouped.optimizer.param_groups}
    assert learning_rates == {0.5, 0.02, 1.5, 0.0}
    assert whole.state.log_history[0]["learning_rate"] == grouped.state.log_history[0]["learning_rate"] == 0.5


def test_the_schedule_is_the_same_for_all_groups(tmp_path):
    trainer, _ = train(tmp_path, max_steps=4, parameter_groups=[ParameterGroup("model.coda.*", lr_factor=0.1)])
    rates = trainer.lr_scheduler.base_lrs
    assert sorted(set(rates)) == pytest.approx([1e-3, 1e-2])
    assert trainer.state.log_history[1]["learning_rate"] == pytest.approx(1e-2 * 3 / 4)


def test_weight_decay_of_a_group(tmp_path):
    """With a gradient of 0, decoupled decay alone moves weights: by rate times decay; what does not decay otherwise
    stays.
    """
    groups = [
        ParameterGroup("model.coda.*", weight_decay=0.5),
        ParameterGroup("model.prelude.*", lr_factor=2.0),
        ParameterGroup("*norm*", weight_decay=0.5),
    ]
    options = {"weight_decay": 0.1, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = build(tmp_path, parameter_groups=groups, **options)
    before = weights_of(trainer.model)
    for parameter in trainer.model.parameters():
        parameter.register_hook(torch.zeros_like)
    trainer.train()
    shrinkage = {"model.coda": 0.1 * 0.5, "model.prelude": 0.2 * 0.1}
    for name, weight in weights_of(trainer.model).items():
        share = next((share for start, share in shrinkage.items() if name.startswith(start)), 0.1 * 0.1)
        torch.testing.assert_close(weight, before[name] * (1 - (0 if "norm" in name else share)))


def one_dimensional(model):
    """The names of all scales and shifts: of norms and biases, the only ones of one dimension."""
    return {name for name, parameter in model.named_parameters() if parameter.ndim < 2}


def library_encoder():
    """A pretrained encoder's architecture, whose norms have types of transformers' own."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return AutoModel.from_config(
        AutoConfig.for_model("qwen3", vocab_size=16, num_key_value_heads=2, head_dim=8, **sizes)
    )


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(qk_norm=True, qk_bias=True),
        tiny_model(norm="layernorm", norm_placement="post"),
        tiny_model(norm_placement="pre", residual="rezero", mlp="peer", peer_num_experts=256),
        tiny_media_model(),
        tiny_writer(),
        library_encoder(),
        get_peft_model(tiny_model(), LoraConfig(target_modules=["qkv_proj"], modules_to_save=["attention_norm_in"])),
    ],
    ids=["text", "layernorm", "rezero", "media", "writer", "library", "adapter"],
)
def test_matrices_alone_decay(tmp_path, model):
    """No norm decays, whatever it is called, and no bias, of several dimensions or not; all matrices do."""
    decaying = set(build(tmp_path, weight_decay=0.1).get_decay_parameter_names(model))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert decaying == names - one_dimensional(model) - {name for name in names if name.endswith("bias")}
    assert any("norm" in name for name in one_dimensional(model))


def test_what_deepspeeds_own_optimizer_lets_decay(tmp_path):
    """Its file describes an optimizer, so that it gets parameters in place of one: those that do not decay apart."""
    trainer = build(tmp_path, weight_decay=0.1)
    trainer.optimizer = DummyOptim(params=[*trainer.model.parameters()])
    first, second = trainer.create_optimizer().params
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    assert {names[parameter] for parameter in second["params"]} == one_dimensional(trainer.model)
    assert {*first["params"], *second["params"]} == set(names) and len(first["params"] + second["params"]) == len(names)
    assert "weight_decay" not in first and second["weight_decay"] == 0.0


def test_a_group_that_begins_later_is_frozen_until_then(tmp_path):
    """Three steps as with `freeze`, to the bit (SGD has no memory); then it moves too. With accumulation."""
    options = {"optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    late = [ParameterGroup("model.coda.*", freeze_steps=3, lr_factor=0.5)]

    class Watch(Interrupt):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seen = {**getattr(self, "seen", {}), state.global_step: weights_of(model)}

    watches = []
    for settings in ({"freeze": ["model.coda.*"]}, {"parameter_groups": late}):
        trainer = build(tmp_path, max_steps=4, **settings, **options)
        watches.append(Watch(0))
        trainer.add_callback(watches[-1])
        trainer.train()
    frozen, begun = (watch.seen for watch in watches)
    for step in (1, 2, 3):
        assert all(torch.equal(weight, begun[step][name]) for name, weight in frozen[step].items())
    different = {name for name, weight in frozen[4].items() if not torch.equal(weight, begun[4][name])}
    assert different and all(name.startswith("model.coda.") for name in different)


@pytest.mark.parametrize("scheduler", ["cosine", "reduce_lr_on_plateau"])
def test_resumed_equals_uninterrupted_with_groups(tmp_path, scheduler):
    """Invariant 6: cut before the group begins to learn; also with a schedule that computes each rate from the last."""
    options = {
        "max_steps": 8,
        "lr_scheduler_type": scheduler,
        "parameter_groups": [ParameterGroup("model.coda.*", freeze_steps=4), ParameterGroup("*norm*", lr_factor=0.1)],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    }
    whole, before = train(tmp_path / "whole", **options)
    assert moved(whole, before) == set(before)
    first = build(tmp_path / "cut", **options)
    first.add_callback(Interrupt(3))
    first.train()
    second = build(tmp_path / "cut", model=tiny_model(seed=5), resume_from_checkpoint="true", **options)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(whole)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


BAD = {
    "freeze of nothing": (
        {"freeze": ["model.reader.*"]},
        "freeze: 'model.reader.\\*' matches no parameter; .* such as mo",
    ),
    "freeze of all": ({"freeze": ["*"]}, "freeze: nothing is left to learn with '\\*'"),
    "group of nothing": (
        {"parameter_groups": [ParameterGroup("coda")]},
        "parameter_groups: 'coda' matches no parameter",
    ),
    "group of what is frozen": (
        {"freeze": ["model.coda.*"], "parameter_groups": [ParameterGroup("model.coda.layers.0.*")]},
        "'model.coda.layers.0.\\*' matches what is frozen or in a group before it only",
    ),
    "group within a group": (
        {"parameter_groups": [ParameterGroup("*", lr_factor=2.0), ParameterGroup("model.coda.*")]},
        "'model.coda.\\*' matches what is frozen or in a group before it only",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_patterns_without_parameters_are_refused_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate of 'x' is -1.0; give at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay of 'x' is nan; give at least 0"),
        ({"freeze_steps": -1}, "freeze_steps of 'x' is -1; give at least 0"),
        (
            {"learning_rate": 1.0, "lr_factor": 1.0},
            "'x' has learning_rate 1.0 and lr_factor 1.0; leave one of them out",
        ),
    ],
)
def test_groups_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ParameterGroup("x", **settings)


def test_groups_stand_in_the_yaml(tmp_path, capsys):
    training = {
        "freeze": ["model.prelude.*"],
        "parameter_groups": [{"pattern": "model.coda.*", "lr_factor": 0.1}, {"pattern": "*", "freeze_steps": 5}],
        "modality_weights": {"image": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"training": {**training, "output_dir": str(tmp_path)}}))
    run = load_config(["--config", str(path), "--training.modality_weights.audio", "0.5"])
    assert run.training.freeze == ["model.prelude.*"]
    assert run.training.parameter_groups == [
        ParameterGroup("model.coda.*", lr_factor=0.1),
        ParameterGroup("*", freeze_steps=5),
    ]
    assert vars(run.training.modality_weights) == {"text": 1.0, "image": 2.0, "audio": 0.5}
    for flags, message in (
        (["--training.parameter_groups", "[{patern: x}]"], "did you mean pattern?"),
        (["--training.modality_weights.video", "1"], "unknown key training.modality_weights.video"),
        (["--training.modality_weights.image", "-1"], "training.modality_weights: the weight of image is -1.0; give"),
        (["--training.parameter_groups", "[{pattern: x, lr_factor: -1}]"], "lr_factor of 'x' is -1.0; give at least 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            load_config(["--config", str(path), *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err
