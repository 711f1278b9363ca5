"""Objectives of training: loss and gradient of each against a few lines that compute them otherwise."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from dataset_loading import DataConfig, build_datasets
from model import ExitOptions
from model.depth import sample_depth
from model.recurrence import draw_training_states
from model.step_lora import add_step_lora
from tests import test_trainer_media, test_trainer_writing
from tests.processes import ROOT
from tests.test_finetuning import tune
from tests.test_pretrain import losses as losses_of
from tests.test_step_lora import OPTIONS, TARGETS, with_weights_of
from tests.test_trainer import Interrupt, build, losses
from tests.test_trainer_ranks import launch
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_artist import artist_processor
from tests.tiny_processor import tiny_processor
from tests.tiny_reader import tiny_reader
from trainers import PlannedTrainingArguments, RecurrentTrainingArguments, find_resume_point
from trainers.objectives import OBJECTIVES, ObjectiveOptions, distillation
from trainers.objectives.exit_distribution import log_exit_prior
from trainers.objectives.steps import dropped_steps, scheduled_mean
from trainers.sft import SupervisedArguments, SupervisedTrainer

KEYS = [(0, 0, row) for row in range(4)]


def model_for(name, **overrides):
    """A tiny model of fixed depth, with the gate that one of the objectives needs."""
    gate = {"exit_probe": True} if name == "exit_distribution" else {}
    recurrence = {"step_distribution": "fixed", **gate, **overrides.pop("recurrence", {})}
    return tiny_model(scale=2.0, recurrence=recurrence, **overrides).train()


def batch_of(count=4, length=7):
    """The second row has fewer labels and padding at its end."""
    ids = tiny_ids(count, length)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 4:], mask[1, 5:] = -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def trained_loss(folder, model, options, batch=None, **settings):
    """The loss of the first micro-batch, divided by 20 labels, and the gradients of all weights by name."""
    trainer = build(folder, model=model, objective=options, **settings)
    trainer._position = (0, 0)
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch or batch_of()), num_items_in_batch=torch.tensor(20))
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def expected(model, compute):
    """Loss and gradients of what `compute(state)` returns, from the initial state of the trainer."""
    model.zero_grad()
    loss = compute(draw_training_states(model.config, 7, KEYS))
    loss.backward()
    return loss.item(), gradients(model)


def assert_same(found, wanted, atol=1e-6, rtol=1e-4):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=rtol, msg=lambda text, n=name: n + text)


def cross_entropies(logits, labels):
    """(batch, sequence - 1), of the prediction at each position."""
    flat = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return flat.view(labels[:, 1:].shape)


def loss_at(model, state, num_steps):
    batch = batch_of()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], num_steps=num_steps, initial_state=state)
    return cross_entropies(logits.logits, batch["labels"]).sum() / 20


def test_truncated_is_the_default_and_goes_the_way_of_before(tmp_path):
    model = model_for("truncated")
    assert RecurrentTrainingArguments(output_dir=str(tmp_path)).objective == ObjectiveOptions("truncated")
    found = trained_loss(tmp_path, model, ObjectiveOptions())
    assert_same(found, expected(model, lambda state: loss_at(model, state, (2, 2))))


def test_full_has_the_gradient_of_all_steps_and_computes_activations_again(tmp_path):
    model = model_for("full")
    found = trained_loss(tmp_path, model, ObjectiveOptions("full"))
    wanted = expected(model, lambda state: loss_at(model, state, 4))
    assert_same(found, wanted)
    truncated = expected(model, lambda state: loss_at(model, state, (2, 2)))
    assert (truncated[1]["model.core.injection.proj.weight"] - found[1]["model.core.injection.proj.weight"]).norm() > 0
    model.gradient_checkpointing_enable()
    assert_same(trained_loss(tmp_path, model, ObjectiveOptions("full")), wanted)
    trainer = build(tmp_path, model=model_for("full"), objective=ObjectiveOptions("full"), max_steps=1)
    trainer.train()
    assert trainer.model.model.core.gradient_checkpointing


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_every_step_is_the_weighted_mean_of_losses_at_each_depth(tmp_path, exponent):
    model = model_for("every_step", recurrence={"mean_steps": 4, "backprop_steps": 3})
    found = trained_loss(tmp_path, model, ObjectiveOptions("every_step", exponent=exponent))

    def compute(state):
        weights = [step**exponent for step in (1, 2, 3)]
        parts = [weight * loss_at(model, state, (1, step)) for step, weight in zip((1, 2, 3), weights, strict=True)]
        return sum(parts) / sum(weights)

    assert_same(found, expected(model, compute))


def exits_by_hand(model, state, num_steps):
    """p(i) of each token, (steps, batch, sequence), and the loss of what it predicts after step i."""
    batch = batch_of()
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "initial_state": state}
    states = model(**arguments, num_steps=num_steps, output_states=True).states
    left, probabilities, token_losses = torch.ones(4, 7), [], []
    for step in range(1, num_steps + 1):
        hazard = torch.sigmoid(model.model.exit_probe(states[step], states[step - 1]))
        probabilities.append(left * hazard if step < num_steps else left)
        left = left * (1 - hazard)
        token_losses.append(cross_entropies(model(**arguments, num_steps=step).logits, batch["labels"]))
    return torch.stack(probabilities)[..., :-1], torch.stack(token_losses), batch["labels"][:, 1:] != -100


def test_exit_distribution_is_the_expected_loss_and_an_entropy(tmp_path):
    """sum_i p(i) L_i - weight H(p), and weight ln r, which is the same for all weights."""
    model = model_for("exit_distribution")
    found = trained_loss(tmp_path, model, ObjectiveOptions("exit_distribution", weight=0.3))

    def compute(state):
        p, token_losses, is_label = exits_by_hand(model, state, 4)
        entropy = -(p * p.log()).sum(0)
        return ((p * token_losses).sum(0) - 0.3 * entropy + 0.3 * math.log(4))[is_label].sum() / 20

    assert_same(found, expected(model, compute))


def test_exit_distribution_may_keep_the_mean_of_a_batch_near_a_geometric_prior(tmp_path):
    model = model_for("exit_distribution")
    options = ObjectiveOptions("exit_distribution", weight=0.3, prior="batch", prior_steps=2.0)
    found = trained_loss(tmp_path, model, options)
    prior = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    torch.testing.assert_close(log_exit_prior(4, 2.0).exp(), prior)

    def compute(state):
        p, token_losses, is_label = exits_by_hand(model, state, 4)
        mean = p[:, is_label].mean(1)
        divergence = (mean * (mean / prior).log()).sum()
        return (p * token_losses).sum(0)[is_label].sum() / 20 + 0.3 * is_label.sum() / 20 * divergence

    assert_same(found, expected(model, compute))


def test_the_gate_of_an_exit_distribution_is_an_exit_criterion(tmp_path):
    """Trained, saved and loaded, a row stops after the first step at which lambda is above 1 - threshold."""
    model = model_for("exit_distribution")
    trainer = build(tmp_path, model=model, objective=ObjectiveOptions("exit_distribution"))
    trainer.train()
    trainer.save_model(str(tmp_path))
    loaded, ids = type(model).from_pretrained(tmp_path).eval(), tiny_ids(8, 5)
    with torch.no_grad():
        states = loaded(ids, num_steps=4, output_states=True).states
        after = zip(states[1:], states[:-1], strict=True)
        hazards = torch.stack([loaded.model.exit_probe(now, before)[:, -1].sigmoid() for now, before in after])
        threshold = 1 - hazards[0].sort().values[3:5].mean().item()  # which half of the rows pass at once
        found = loaded(ids, num_steps=4, exits=ExitOptions("probe", threshold)).exit_steps
    passes = hazards[:3] > 1 - threshold
    first = [next((step for step in range(3) if passes[step, row]), 3) + 1 for row in range(8)]
    assert found.tolist() == first and len(set(first)) > 1


def test_fixed_point_is_the_relative_distance_of_the_last_two_states(tmp_path):
    model = model_for("fixed_point", recurrence={"backprop_steps": 4})
    found = trained_loss(tmp_path, model, ObjectiveOptions("fixed_point", weight=0.7))

    def compute(state):
        batch, total = batch_of(), loss_at(model, state, 4)
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "initial_state": state}
        before, after = (model(**given, num_steps=steps, output_states=True).states[-1] for steps in (3, 4))
        for row, (tokens, labels) in enumerate(((7, 6), (5, 3), (7, 6), (7, 6))):
            moves = after[row, :tokens] - before[row, :tokens]
            distance = moves.norm(dim=-1) ** 2 / after[row, :tokens].norm(dim=-1) ** 2
            total = total + 0.7 * labels / 20 * distance.mean()
        return total

    assert_same(found, expected(model, compute))


def test_fixed_point_is_finite_where_a_state_of_padding_is_zero(tmp_path):
    """What the padding holds does not count: neither in the loss nor in any gradient."""
    model = model_for("fixed_point", recurrence={"state_init": "zero"})
    batch = {name: value.flip(1) for name, value in batch_of().items()}
    found, states = [], []
    model.register_forward_hook(lambda m, inputs, outputs: states.append(outputs.states[-1]))
    for padding in (0, 5):
        batch["input_ids"][1, :2] = padding
        found.append(trained_loss(tmp_path, model, ObjectiveOptions("fixed_point"), batch))
    assert not states[0][1, 0].any() and states[1][1, 0].any()
    assert_same(*found)
    assert math.isfinite(found[0][0])


def last_step(model, state, steps):
    """s_{r-1} without gradient, and core as a function of it: (one row) (sequence, hidden) -> (sequence, hidden)."""
    with torch.no_grad():
        before = model(batch_of()["input_ids"][:1], num_steps=steps - 1, initial_state=state, output_states=True)

    def core(s):
        one = model(batch_of()["input_ids"][:1], num_steps=1, initial_state=s[None], output_states=True)
        return one.states[-1][0]

    return before.states[-1][0], core


def test_the_jacobian_penalty_estimates_the_norm_of_the_whole_jacobian(tmp_path):
    """The mean over 100 draws against all 224 x 224 derivatives, and its gradient against a finite difference."""
    model = model_for("jacobian").double()
    batch = {"input_ids": tiny_ids(4, 7)[:1], "labels": tiny_ids(4, 7)[:1]}
    state = draw_training_states(model.config, 7, KEYS[:1]).double()
    before, core = last_step(model, state, 4)
    whole = torch.autograd.functional.jacobian(core, before).square().sum().item() / before.numel()
    trainer = build(tmp_path, model=model, objective=ObjectiveOptions("jacobian", weight=1.0))

    def loss(draw, start=state, num_steps=(2, 2)):
        trainer._keys = lambda rows: [(0, draw, 0)]
        trainer._draw_recurrence = lambda *shape: {"num_steps": num_steps, "initial_state": start}
        return trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(6))

    plain = model(**batch, num_steps=(2, 2), initial_state=state).loss
    draws = torch.stack([(loss(draw) - plain).detach() for draw in range(100)])
    error = draws.std().item() / 100**0.5
    assert abs(draws.mean().item() - whole) < 3 * error and error < 0.1 * whole

    trainer._position, weight = (0, 0), model.model.core.injection.proj.weight
    loss(0).backward()
    direction = weight.grad / weight.grad.norm()
    prefix = model(**batch, num_steps=(2, 2), initial_state=state, output_states=True).states[2].detach()
    ends = []
    for change in (1e-3, -1e-3):  # from where backpropagation is cut off
        with torch.no_grad():
            weight += change * direction
        ends.append(loss(0, prefix, (0, 2)).item())
        with torch.no_grad():
            weight -= change * direction
    assert weight.grad.norm().item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_implicit_gradient_is_a_power_series_of_the_whole_jacobian(tmp_path, terms):
    """u = sum_{i < terms} (J^T)^i dL/ds, and the gradient of the weights is u^T dcore/dw, by 224 x 224 derivatives."""
    model = model_for("implicit").double()
    batch = {"input_ids": tiny_ids(4, 7)[:1], "labels": tiny_ids(4, 7)[:1]}
    found = trained_loss(tmp_path, model, ObjectiveOptions("implicit", terms=terms), batch)
    state = draw_training_states(model.config, 7, KEYS[:1]).double()
    before, core = last_step(model, state, 4)
    jacobian = torch.autograd.functional.jacobian(core, before).view(224, 224)
    model.zero_grad()
    outputs = model(**batch, num_steps=1, initial_state=before[None], output_states=True)
    loss = outputs.loss * 6 / 20
    vector = torch.autograd.grad(loss, outputs.states[-1], retain_graph=True)[0].flatten()
    total = sum(torch.linalg.matrix_power(jacobian.T, power) @ vector for power in range(terms))
    (loss + outputs.states[-1].flatten() @ (total - vector)).backward()
    assert_same(found, (loss.item(), gradients(model)))
    if terms > 1:
        one = trained_loss(tmp_path, model, ObjectiveOptions("implicit", terms=1), batch)[1]
        change = one["model.core.injection.proj.weight"] - found[1]["model.core.injection.proj.weight"]
        assert change.norm() > 1e-3 * one["model.core.injection.proj.weight"].norm()


@pytest.mark.parametrize("chunk", [None, 64 * 5], ids=["at once", "in chunks"])
def test_distillation_adds_the_divergence_of_few_steps_from_all(tmp_path, monkeypatch, chunk):
    """Of 2 steps the student can only take 1, each of two times."""
    if chunk:
        monkeypatch.setattr(distillation, "LOGITS_PER_CHUNK", chunk)
    model = model_for("distillation", recurrence={"mean_steps": 2, "backprop_steps": 2})
    found = trained_loss(tmp_path, model, ObjectiveOptions("distillation", weight=0.4, passes=2))

    def compute(state):
        batch = batch_of()
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "initial_state": state}
        teacher = model(**given, num_steps=2).logits.detach().softmax(-1)
        student = model(**given, num_steps=1).logits.softmax(-1)
        divergences = (teacher * (teacher / student).log()).sum(-1)[:, :-1]
        return loss_at(model, state, 2) + 0.4 * divergences[batch["labels"][:, 1:] != -100].sum() / 20

    assert_same(found, expected(model, compute))


def test_students_take_from_one_to_all_but_one_step_with_as_much_gradient(tmp_path):
    model = model_for("distillation")
    trainer = build(tmp_path, model=model, objective=ObjectiveOptions("distillation", passes=3))
    seen = []
    model.model.register_forward_pre_hook(lambda m, a, given: seen.append(given["num_steps"]), with_kwargs=True)
    for micro_batch in range(8):
        trainer._position = (0, micro_batch)
        trainer.compute_loss(model, batch_of(), num_items_in_batch=torch.tensor(20))
    assert seen[::4] == [(2, 2)] * 8
    students = [depth for index, depth in enumerate(seen) if index % 4]
    assert set(students) == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("name", ["every_step", "fixed_point", "jacobian", "implicit", "distillation"])
def test_accumulation_equals_one_large_batch(tmp_path, name):
    """4 rows at once, of which some have fewer labels, equal 1 row four times."""
    found = []
    for per_device, steps in ((4, 1), (1, 4)):
        model = model_for(name, recurrence={"mean_steps": 2})
        options = ObjectiveOptions(name)
        settings = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = build(tmp_path, model=model, objective=options, optim="sgd", **settings)
        trainer.train()
        found.append((losses(trainer), [weight.detach() for weight in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for at_once, spread in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(at_once, spread, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_learns_in_half_precision_and_gives_every_parameter_a_gradient(tmp_path, name):
    model = model_for(name)
    dataset = [{key: value[row] for key, value in batch_of().items()} for row in range(4)] * 4
    dataset = [{**row, "modality_ids": torch.zeros(7, dtype=torch.long)} for row in dataset]
    trainer = build(tmp_path, model=model, dataset=dataset, objective=ObjectiveOptions(name), bf16=True, max_steps=6)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.2 and all(map(math.isfinite, found))
    trained_loss(tmp_path, model, ObjectiveOptions(name))
    assert [key for key, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_exit_probe_learns_where_the_objective_trains_it(tmp_path, name):
    """DDP waits for the gradients of all that learn. The groups of the optimizer stay, or checkpoints would not fit."""
    trainer = build(tmp_path, model=model_for(name, recurrence={"exit_probe": True}), objective=ObjectiveOptions(name))
    weights = list(trainer.model.parameters())
    trainer.model.train()
    trainer._position = (0, 0)
    trainer.compute_loss(trainer.model, batch_of(), num_items_in_batch=torch.tensor(20)).backward()
    assert [weight.requires_grad for weight in weights] == [weight.grad is not None for weight in weights]
    assert {it.requires_grad for it in trainer.model.model.exit_probe.parameters()} == {name == "exit_distribution"}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(weights)


@pytest.mark.parametrize("name", ["every_step", "distillation"])
def test_compiled_units_give_the_same_losses(tmp_path, name):
    found = []
    for backend in (None, "eager"):
        model, options = model_for(name), ObjectiveOptions(name)
        trainer = build(tmp_path, model=model, objective=options, torch_compile_backend=backend, max_steps=2)
        trainer.train()
        found.append(losses(trainer))
    torch._dynamo.reset()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ------------------------------------------------------------------------------------------ steps that grow, or go bare


def test_the_mean_depth_grows_linearly_and_stays():
    """10 of 40 updates from 1 to 9, a step every 1.25 of them."""
    means = [scheduled_mean(9, 0.25, step, 40) for step in range(40)]
    assert means[:10] == [round(1 + 8 * step / 10) for step in range(10)] and means[10:] == [9] * 30
    assert means[0] == 1 and means[5] == 5 and {scheduled_mean(9, 0.0, step, 40) for step in range(3)} == {9}


def test_depths_are_drawn_around_the_scheduled_mean_and_a_resumed_run_goes_on_with_them(tmp_path):
    options, seen = ObjectiveOptions("every_step", step_schedule=0.5), []
    settings = {"objective": options, "max_steps": 8, "gradient_accumulation_steps": 2}
    model = tiny_model(recurrence={"mean_steps": 9})
    model.register_forward_pre_hook(lambda m, a, given: seen.append(given["num_steps"]), with_kwargs=True)
    whole = build(tmp_path / "whole", model=model, **settings)
    whole.train()
    for step in range(8):
        recurrence = tiny_model(recurrence={"mean_steps": [1, 3, 5, 7, 9, 9, 9, 9][step]}).config.recurrence
        wanted = [sample_depth(recurrence, 0, step, micro_batch) for micro_batch in range(2)]
        assert seen[2 * step : 2 * step + 2] == wanted
    first = build(tmp_path / "cut", model=tiny_model(recurrence={"mean_steps": 9}), **settings)
    first.add_callback(Interrupt(3))
    first.train()
    model = tiny_model(seed=4, recurrence={"mean_steps": 9})
    second = build(tmp_path / "cut", model=model, resume_from_checkpoint="true", **settings)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(whole) and len(losses(second)) == 8
    assert model.config.recurrence.mean_steps == 9


def test_dropped_steps_run_with_the_weights_of_the_core_alone():
    model = tiny_model()
    steps = add_step_lora(model, TARGETS, **OPTIONS)
    generator = torch.Generator().manual_seed(1)
    for parameter in steps.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    ids = tiny_ids(2, 7)
    state = model(ids, num_steps=1, output_states=True).states[0]
    with torch.no_grad():
        complete = model(ids, num_steps=3).logits
        for step in range(3):  # the weights of step 3 have no update
            weights_of = 3 if step == 1 else step
            plain = with_weights_of(weights_of, model, steps)
            state = plain(ids, num_steps=1, initial_state=state, output_states=True).states[-1]
    steps.dropped = frozenset({1})
    dropped = model.train()(ids, num_steps=3, output_states=True)
    torch.testing.assert_close(dropped.states[-1], state, atol=1e-5, rtol=1e-5)
    dropped.logits.sum().backward()
    for deltas in steps.deltas.values():
        assert [bool(gradient.abs().sum() > 0) for gradient in deltas.up.grad] == [True, False, True]
    assert torch.equal(model.eval()(ids, num_steps=3).logits, complete)


def test_steps_are_dropped_by_key_at_their_rate(tmp_path):
    draws = [dropped_steps(0.3, 8, 5, update, 0) for update in range(400)]
    assert sum(map(len, draws)) / 3200 == pytest.approx(0.3, abs=0.03) and draws[0] != draws[1]
    assert {step for draw in draws for step in draw} == set(range(8))
    model = tiny_model()
    steps = add_step_lora(model, TARGETS, **OPTIONS)
    trainer = build(tmp_path, model=model, objective=ObjectiveOptions(loop_dropout=0.5), gradient_accumulation_steps=2)
    seen = []
    model.register_forward_pre_hook(lambda m, a: seen.append(steps.dropped))
    trainer.train()
    assert seen == [dropped_steps(0.5, 3, 0, step, micro_batch) for step in range(4) for micro_batch in range(2)]
    assert len(set(seen)) > 1


# ------------------------------------------------------------------------------------------ media, adapters, processes


@pytest.mark.parametrize("name", ["every_step", "exit_distribution", "distillation", "jacobian"])
def test_models_that_read_media_learn_from_padded_and_weighted_rows(tmp_path, media_rows, name):
    """4 rows at once equal 2 twice, encoders and all."""
    found = []
    for per_device, steps in ((4, 1), (2, 2)):
        recurrence = {"mean_steps": 2, "backprop_steps": 2, "step_distribution": "fixed", "exit_probe": True}
        model = tiny_reader(scale=1.0, recurrence=recurrence)
        settings = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps, "max_steps": 2}
        options = ObjectiveOptions(name)
        trainer = test_trainer_media.build(tmp_path, media_rows, model, objective=options, optim="sgd", **settings)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.fixture(scope="module")
def media_rows():
    config = DataConfig(train=test_trainer_media.SOURCES, block_size=160, packing=False)
    return build_datasets(config, tiny_processor(), seed=3).train


def test_models_that_write_media_are_refused_where_tokens_are_read_and_else_learn(tmp_path):
    config, model = DataConfig(train=test_trainer_writing.SOURCES, block_size=160), test_trainer_writing.model_of()
    rows = build_datasets(config, artist_processor(), seed=3).train
    with pytest.raises(ValueError, match=r"'every_step', .* also writes image and audio; give another, such as full"):
        test_trainer_writing.build(tmp_path, rows, model, objective=ObjectiveOptions("every_step"))
    options = ObjectiveOptions("implicit")
    trainer = test_trainer_writing.build(tmp_path, rows, model, objective=options, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))


READ_AFTER_STEPS = [name for name, objective in OBJECTIVES.items() if objective.is_read_after_steps]


@pytest.mark.parametrize("name", READ_AFTER_STEPS)
def test_fine_tuning_has_the_gradients_of_pretraining(tmp_path, name):
    model, options, passes = model_for(name, recurrence={"backprop_steps": 3}), ObjectiveOptions(name), []
    wanted = trained_loss(tmp_path, model, options)
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "seed": 0, "objective": options}
    dataset, tokenizer = [{"input_ids": tiny_ids(7), "labels": tiny_ids(7)}], tiny_processor().tokenizer
    args = SupervisedArguments(**settings)
    trainer = SupervisedTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer._position = (0, 0)
    model.zero_grad()
    model.register_forward_hook(lambda m, inputs, outputs: passes.append(outputs.states[-1].requires_grad))
    loss = trainer.compute_loss(model, batch_of(), num_items_in_batch=torch.tensor(20))
    loss.backward()
    assert_same((loss.item(), gradients(model)), wanted)
    assert passes == [True]


def test_fine_tuning_drops_steps_and_distils_into_few(tiny_run, tmp_path):
    """By YAML, with the loss of TRL and with low-rank updates of steps; the run goes on exactly."""
    options = {"name": "distillation", "loop_dropout": 0.5}
    sections = {"peft": None, "step_lora": {"num_steps": 2, "rank": 2}, "training": {"objective": options}}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = losses_of(tune(tmp_path / "whole", tiny_run, **sections))
    cut = tune(tmp_path / "cut", tiny_run, **sections)
    shutil.rmtree(cut / "checkpoint-4")
    again = tune(tmp_path / "cut", tiny_run, "--training.resume_from_checkpoint", "true", **sections)
    assert losses_of(again) == whole and len(whole) == 4


RANKS = """
import json, sys
from inference.shutdown import end_process
from tests.test_objectives import model_for
from tests.test_trainer import build
from trainers.objectives import OBJECTIVES, ObjectiveOptions

found = {}
for name in sys.argv[3].split():
    settings = {"per_device_train_batch_size": int(sys.argv[2]), "max_steps": 3, **json.loads(sys.argv[4])}
    model = model_for(name, recurrence={"mean_steps": 2, "exit_probe": True})
    trainer = build(f"{sys.argv[1]}/{name}", model=model, objective=ObjectiveOptions(name), **settings)
    trainer.train()
    found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if trainer.state.is_world_process_zero:
    print("FOUND", json.dumps(found))
end_process(0)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_equal_one_with_and_without_zero(tmp_path):
    names = " ".join(OBJECTIVES)
    one = launch(1, RANKS, str(tmp_path), "4", names, "{}")
    two = launch(2, RANKS, str(tmp_path), "2", names, "{}")
    settings = json.dumps({"deepspeed": str(ROOT / "configs/deepspeed/zero2.json")})
    zero = launch(2, RANKS, str(tmp_path), "2", "full every_step exit_distribution fixed_point distillation", settings)
    assert {name: pytest.approx(found, abs=1e-4) for name, found in one.items()} == two
    assert {name: pytest.approx(one[name], abs=1e-4) for name in zero} == zero


# ------------------------------------------------------------------------------------------------------------- refusals


def test_zero_3_is_refused_where_weights_are_needed_after_the_forward_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "deepspeed": str(ROOT / "configs/deepspeed/zero3.json")}
    with pytest.raises(ValueError, match=r"'fixed_point', which needs weights after .* ZeRO-3 .*; use zero2, or"):
        RecurrentTrainingArguments(**settings, objective=ObjectiveOptions("fixed_point"))
    with pytest.raises(ValueError, match="ZeRO-3"):
        PlannedTrainingArguments(**settings, objective=ObjectiveOptions("fixed_point"))
    assert PlannedTrainingArguments(**settings, objective=ObjectiveOptions("full")).activation_checkpointing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "implict"}, "objective.name is 'implict'; give one of truncated, full, every_step"),
        ({"weight": -1.0}, "objective.weight is -1.0; give a finite number of at least 0"),
        ({"weight": math.inf}, "objective.weight is inf"),
        (
            {"weight": 0.5},
            "objective.weight is 0.5, but truncated has no such option; .* to exit_distribution or",
        ),
        ({"name": "jacobian", "terms": 2}, "objective.terms is 2, but jacobian has no such option; .* to implicit"),
        ({"name": "implicit", "terms": 0}, "objective.terms is 0; give a finite number of at least 1"),
        ({"name": "every_step", "exponent": -0.1}, "objective.exponent is -0.1"),
        ({"name": "distillation", "passes": 0}, "objective.passes is 0"),
        ({"name": "exit_distribution", "prior": "row"}, "objective.prior is 'row'; give one of token, batch"),
        ({"name": "exit_distribution", "prior_steps": 1.0}, "objective.prior_steps is 1.0; give a mean above 1"),
        ({"step_schedule": 1.1}, "objective.step_schedule is 1.1; give a share from 0 to 1"),
        ({"loop_dropout": 1.0}, "objective.loop_dropout is 1.0; give at least 0 and less than 1"),
    ],
)
def test_options_that_no_objective_can_have_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said) as error:
        RecurrentTrainingArguments(output_dir=str(tmp_path), use_cpu=True, objective=ObjectiveOptions(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["jacobian", "implicit"])
@pytest.mark.parametrize("option", ["torch_compile", "activation_checkpointing", "deepspeed"])
def test_gradients_on_the_way_are_refused_with_what_computes_activations_otherwise(tmp_path, name, option):
    value = {"train_batch_size": 8} if option == "deepspeed" else True
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "objective": ObjectiveOptions(name), option: value}
    with pytest.raises(ValueError, match=f"'{name}', which is not possible with {option}; leave"):
        RecurrentTrainingArguments(**settings)


@pytest.mark.parametrize(
    ("options", "model", "said"),
    [
        ({"name": "full"}, {"num_core_layers": 0}, "training.objective is .* this model has no core"),
        ({"step_schedule": 0.5}, {"num_core_layers": 0}, "this model has no core"),
        ({"name": "exit_distribution"}, {}, "which this model has not; set model.recurrence.exit_probe to true"),
        ({"name": "jacobian"}, {"attn_implementation": "flex_attention"}, "flex_attention .* set .* to sdpa"),
        ({"loop_dropout": 0.1}, {}, "loop_dropout is 0.1, but no step has a low-rank update; add step_lora"),
    ],
)
def test_models_that_an_objective_cannot_train_are_refused(tmp_path, options, model, said):
    with pytest.raises(ValueError, match=said):
        build(tmp_path / "run", model=tiny_model(**model), objective=ObjectiveOptions(**options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", READ_AFTER_STEPS)
def test_weights_of_16_bits_need_no_mixed_precision(tmp_path, name):
    """In which accelerate copies their states, so that no gradient can be taken at them."""
    for mixed in (False, True):
        model, settings = model_for(name).bfloat16(), {"bf16": mixed, "max_steps": 1}
        if mixed and OBJECTIVES[name].takes_gradients:
            with pytest.raises(ValueError, match=f"'{name}', .* copies of those that are bfloat16; set bf16 to false"):
                build(tmp_path / "run", model=model, objective=ObjectiveOptions(name), **settings)
            assert not (tmp_path / "run").exists()
        else:
            trainer = build(tmp_path / str(mixed), model=model, objective=ObjectiveOptions(name), **settings)
            trainer.train()
            assert math.isfinite(losses(trainer)[0])
