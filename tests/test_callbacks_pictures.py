"""Pictures of what goes on in a model, inside real, tiny training runs on the CPU."""

import io
import logging
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset

from callbacks import CallbacksConfig, PicturesConfig
from callbacks.figures import exits_figure, flow_figure, maps_figure
from callbacks.pictures import (
    PicturesCallback,
    attention_maps,
    cut,
    exit_options,
    in_plane,
    layer_gradients,
    layer_of,
    spread,
)
from callbacks.reporting import Reporter
from dataset_loading import Collator
from model import RecurrenceConfig
from model.exit_criteria import KLDivergence
from model.step_lora import add_step_lora
from tests.test_callbacks import build_trainer, events, rows
from tests.test_callbacks_media import AUDIO, IMAGE, chat, row
from tests.tiny_language_model import one_update, tiny_model
from tests.tiny_processor import tiny_processor
from tests.tiny_reader import tiny_reader
from trainers import RecurrentTrainer, RecurrentTrainingArguments

INTERVALS = ("attention", "activations", "gradients", "exits", "trajectories")
IMAGES = {"attention", "gradient_flow", "exits", "trajectories"}


def pictures(every=0, **options):
    """All at one interval, unless options say otherwise."""
    return PicturesConfig(**{f"{name}_every_steps": every for name in INTERVALS} | options)


def picture_callback(trainer, **options):
    """That of a trainer that does not train."""
    return PicturesCallback(pictures(**options), Reporter(trainer))


def trained(folder, config, **options):
    trainer = build_trainer(folder, callbacks=CallbacksConfig(pictures=config), **options)
    trainer.train()
    return trainer


@pytest.fixture
def shown(monkeypatch):
    """What histograms are made of, by name."""
    found = {}
    monkeypatch.setattr(Reporter, "histogram", lambda self, name, values: found.setdefault(name, values))
    return found


# Runs


def test_each_picture_stands_in_tensorboard_at_its_interval(tmp_path):
    config = pictures(2, exits_every_steps=3, attention_every_steps=1, trajectories_every_steps=0)
    trained(tmp_path, config, max_steps=3)
    found, tags = events(tmp_path), events(tmp_path).Tags()
    steps = {tag.removeprefix("train/pictures/"): [it.step for it in found.Images(tag)] for tag in tags["images"]}
    assert steps == {"attention": [1, 2, 3], "gradient_flow": [2], "exits": [3]}
    parts = {"embed_tokens", "prelude", "core", "coda", "norm"}
    outputs = {"embeddings", "prelude", "core", "output"}
    assert {tag: [it.step for it in found.Histograms(tag)] for tag in tags["histograms"]} == {
        **{f"train/pictures/gradients/{part}": [2] for part in parts},
        **{f"train/pictures/activations/{part}": [2] for part in outputs},
    }
    assert [it.step for it in found.Scalars("train/pictures/exit_step")] == [3]
    (event,) = found.Images("train/pictures/exits")
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert pixels.shape == (350, 500, 3) and len(np.unique(pixels)) > 10


def test_a_model_without_a_core_has_neither_exits_nor_trajectories(tmp_path):
    trained(tmp_path, pictures(4), model=tiny_model(num_core_layers=0))
    assert {tag.split("/")[-1] for tag in events(tmp_path).Tags()["images"]} == {"attention", "gradient_flow"}


def test_pictures_do_not_disturb_the_training(tmp_path):
    """With dropout drawn from the global generator: the same weights to the bit, with pictures and without."""

    def train(name, config):
        torch.manual_seed(0)
        trainer = build_trainer(tmp_path / name, callbacks=CallbacksConfig(pictures=config))
        trainer.model.lm_head.register_forward_pre_hook(
            lambda module, inputs: (nn.functional.dropout(inputs[0], 0.3, module.training),)
        )
        trainer.train()
        return trainer

    without, watched = train("without", pictures()), train("with", pictures(2))
    assert watched.model.training
    assert {tag.split("/")[-1] for tag in events(tmp_path / "with").Tags()["images"]} == IMAGES
    for name, parameter in without.model.state_dict().items():
        assert torch.equal(parameter, watched.model.state_dict()[name]), name


def test_a_run_that_shows_no_images_makes_none(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig(pictures=pictures(1)), report_to="none")
    assert not any(isinstance(callback, PicturesCallback) for callback in trainer.callback_handler.callbacks)


def test_what_is_not_finite_ends_no_run(tmp_path, caplog):
    model = tiny_model()
    with torch.no_grad():
        model.model.core.injection.proj.weight[0, 0] = torch.nan
    trainer = build_trainer(tmp_path, model=model)
    callback = picture_callback(trainer)
    with caplog.at_level(logging.WARNING, logger="callbacks.pictures"):
        for show in (callback.show_attention, callback.show_activations, callback.show_exits):
            show(model)
        callback.show_trajectories(model)
    assert [it.getMessage() for it in caplog.records] == ["There is no picture of trajectories: states are not finite"]


# Attention


def test_maps_are_by_layer_and_core_step():
    """Numbered in the order in which the layers ran: 2 + 2 x 10 + 1; of the steps 8 are shown."""
    config = SimpleNamespace(num_prelude_layers=2, num_core_layers=2, num_coda_layers=1)
    heads = torch.tensor([0.5, 1.5]).view(1, 2, 1, 1)  # their mean is 1
    lines = attention_maps([heads * number * torch.ones(1, 2, 3, 3) for number in range(23)], config)
    numbers = {name: {step: values.unique().tolist() for step, values in line.items()} for name, line in lines.items()}
    shown_steps = (1, 2, 4, 5, 6, 7, 9, 10)
    assert numbers == {
        "prelude 0": {0: [0]},
        "prelude 1": {0: [1]},
        **{f"core {layer}": {step: [2 * step + layer] for step in shown_steps} for layer in (0, 1)},
        "coda 0": {0: [22]},
    }


def test_maps_are_those_of_the_first_row(tmp_path, monkeypatch):
    """Against queries and keys multiplied by hand, without positions."""
    model = tiny_model(position_embedding="none", num_key_value_heads=4)
    trainer = build_trainer(tmp_path, model=model)
    found = {}
    monkeypatch.setattr("callbacks.pictures.maps_figure", lambda lines: found.update(lines))
    monkeypatch.setattr(Reporter, "figure", lambda self, name, figure: None)
    picture_callback(trainer, max_tokens=6).show_attention(model)

    block = model.model.prelude.layers[0]
    hidden = model.model.embed_tokens(trainer.train_dataset[0]["input_ids"][:6])
    query, key, _ = block.attention.qkv_proj(block.attention_norm_in(hidden)).view(6, 3, 4, 8).unbind(1)
    logits = torch.einsum("qhd,khd->hqk", query, key) / 8**0.5
    logits = logits.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(found["prelude 0"][0], logits.softmax(-1).mean(0))


def test_a_map_is_where_its_line_and_column_say():
    first, second = torch.rand(5, 5), torch.rand(5, 5)
    figure = maps_figure({"prelude 0": {0: first}, "core 0": {1: first, 7: second}})
    (axes,) = figure.axes
    canvas = axes.images[0].get_array()
    assert canvas.shape == (2 * 5 + 4, 3 * 5 + 2 * 4)
    np.testing.assert_allclose(canvas[:5, :5], first.sqrt())
    np.testing.assert_allclose(canvas[9:, 18:], second.sqrt())
    assert canvas.mask[:5, 5:].all() if np.ma.is_masked(canvas) else np.isnan(canvas[:5, 5:]).all()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["once", "step 1", "step 7"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["prelude 0", "core 0"]


def test_numbers_are_spread_evenly():
    assert spread(1, 8) == [0] and spread(3, 8) == [0, 1, 2] and spread(33, 5) == [0, 8, 16, 24, 32]


# Activations


def test_activations_are_what_the_parts_put_out(tmp_path, shown):
    """Of all rows, against hooks on the modules."""
    model, found = tiny_model(), {"prelude": [], "core": [], "norm": []}
    trainer = build_trainer(tmp_path, model=model)
    picture_callback(trainer, num_rows=2, max_tokens=4).show_activations(model)
    for name, outputs in found.items():
        getattr(model.model, name).register_forward_hook(lambda *args, kept=outputs: kept.append(args[-1]))
    embeds = []
    for example in trainer.train_dataset[:2]:
        ids = example["input_ids"][None, :4]
        model(ids)
        embeds.append(model.model.embed_tokens(ids))
    # Per row: the core ran three times, the norm behind core and coda.
    expected = {
        "embeddings": embeds,
        "prelude": found["prelude"],
        "core": found["core"][2::3],
        "output": found["norm"][1::2],
    }
    assert shown.keys() == {f"pictures/activations/{part}" for part in expected}
    for part, values in expected.items():
        torch.testing.assert_close(shown[f"pictures/activations/{part}"], torch.cat(values).flatten())


# Gradients


def test_gradients_are_those_of_the_update(tmp_path, monkeypatch, shown):
    """Read off the weights before and after a step of plain gradient descent."""
    flow = {}
    monkeypatch.setattr("callbacks.pictures.flow_figure", lambda layers: flow.update(layers))
    monkeypatch.setattr(Reporter, "figure", lambda self, name, figure: None)
    options = one_update(tmp_path, 0.5, report_to="tensorboard", gradient_accumulation_steps=2)
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained(tmp_path, pictures(1), model=model, **{k: v for k, v in options.items() if k != "output_dir"})
    gradients = {name: (before[name] - parameter.detach()) / 0.5 for name, parameter in model.named_parameters()}
    layer = [gradient for name, gradient in gradients.items() if name.startswith("model.core.layers.0.")]
    numbers = torch.cat([gradient.flatten() for gradient in layer]).abs()
    assert flow["core 0"] == pytest.approx((numbers.mean().item(), numbers.max().item()), rel=1e-3)
    assert set(flow) == {"embed_tokens", "prelude 0", "core injection", "core 0", "coda 0", "norm"}
    embeddings = gradients["model.embed_tokens.weight"]
    torch.testing.assert_close(shown["pictures/gradients/embed_tokens"], embeddings.flatten(), atol=1e-5, rtol=1e-3)


def test_a_large_gradient_is_sampled_and_its_figures_are_of_all_of_it():
    model = nn.ModuleDict({"core": nn.Linear(300, 200, bias=False), "head": nn.Linear(2, 2)})
    model["core"].weight.grad = torch.arange(-30_000.0, 30_000.0).view(200, 300)
    found = layer_gradients(model)
    assert list(found) == ["core"]  # the other has none
    assert found["core"].mean == pytest.approx(15_000) and found["core"].largest == 30_000
    torch.testing.assert_close(found["core"].sample, torch.arange(-30_000.0, 30_000.0, 3))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.core.layers.3.attention.qkv_proj.weight", "core 3"),
        ("model.core.injection.proj.weight", "core injection"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.readers.image.encoder.layers.1.mlp.up.weight", "readers image encoder 1"),
        ("model.core.layers.0.attention.qkv_proj.lora_A.default.weight", "core 0"),
    ],
)
def test_names_of_layers(name, layer):
    assert layer_of(name) == layer


def test_the_flow_is_drawn_by_layer():
    (axes,) = flow_figure({"core 0": (1e-3, 0.1), "core 1": (2e-3, 0.3)}).axes
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0.3, 1e-3, 2e-3] and axes.get_yscale() == "log"
    assert flow_figure({"core 0": (0.0, 0.0)}).axes[0].get_yscale() == "linear"


# Exits


PAIRS = [(0, 2), *pairwise(range(2, 9))]  # the steps of two checks, of which the first is after step 2


def values_by_step(model, ids, criterion):
    """(steps 2 .. 8, tokens) of what is compared with the threshold, by whole forward passes."""
    outputs = [model(ids[None], num_steps=step, output_states=True) for step in range(1, 9)]
    states = outputs[-1].states
    if criterion == "latent_difference":
        return torch.stack([((states[b] - states[a]).norm(dim=-1) / states[b].norm(dim=-1))[0] for a, b in PAIRS])
    log_p = [torch.full_like(outputs[0].logits, 1 / model.config.vocab_size).log()]
    log_p += [output.logits.log_softmax(-1) for output in outputs]
    return torch.stack([(log_p[a].exp() * (log_p[a] - log_p[b])).sum(-1)[0] for a, b in PAIRS])


@pytest.mark.parametrize("criterion", ["none", "latent_difference", "kl_divergence"])
@pytest.mark.parametrize("steps", ["alike", "adapters", "embeddings"])
@torch.no_grad()
def test_tokens_exit_after_the_first_step_below_the_threshold(tmp_path, monkeypatch, criterion, steps):
    """Without a criterion by kl_divergence, at its default; the threshold is one that about half of the values pass."""
    embedding = "sinusoidal" if steps == "embeddings" else "none"
    recurrence = RecurrenceConfig(mean_steps=8, exit_criterion=criterion, min_steps=2, step_embedding=embedding)
    model = tiny_model(recurrence=recurrence, initializer_range=0.2)
    if steps == "adapters":
        lora = add_step_lora(model, ["layers.0.attention.qkv_proj"], num_steps=8, rank=2, alpha=4)
        for parameter in lora.parameters():
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(3))
    ids = rows(1)[0]["input_ids"]
    values = values_by_step(model, ids, criterion)
    threshold = values[:6].median().item()
    if criterion == "none":
        monkeypatch.setattr(KLDivergence, "default_threshold", threshold)
    else:
        recurrence.exit_threshold = threshold
    below = values < threshold
    below[6] = True  # after the last step there is nothing to save
    expected = below.int().argmax(0) + 2
    assert len(expected.unique()) > 2
    callback = picture_callback(build_trainer(tmp_path, model=model))
    found = callback.exit_steps(model, {"input_ids": ids[None]}, exit_options(model))
    assert found.tolist() == expected.tolist()


def test_exits_are_counted_by_step(tmp_path, monkeypatch):
    """Of all rows; those that never exit count at the last step."""
    model, found = tiny_model(), {}
    steps = iter(torch.tensor([[1, 3, 3], [2, 3, 1]]))
    monkeypatch.setattr(PicturesCallback, "exit_steps", lambda *args: next(steps))
    monkeypatch.setattr("callbacks.pictures.exits_figure", lambda *args: found.update(counts=args))
    monkeypatch.setattr(Reporter, "figure", lambda *args: None)
    monkeypatch.setattr(Reporter, "write", lambda self, args, state, control, values: found.update(values))
    picture_callback(build_trainer(tmp_path, model=model), num_rows=2).show_exits(model)
    assert found == {"counts": ([2, 1, 3], "kl_divergence"), "pictures/exit_step": pytest.approx(13 / 6)}
    assert [bar.get_height() for bar in exits_figure([2, 1, 3], "kl_divergence").axes[0].patches] == [2, 1, 3]


# Trajectories


def test_states_that_lie_in_a_plane_keep_their_distances():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q  # orthonormal
    points = torch.randn(5, 3, 2, generator=generator)
    found = in_plane(points @ plane.T + 7)
    assert found.shape == (5, 3, 2)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points))


@torch.no_grad()
def test_distances_are_to_the_last_state(tmp_path, monkeypatch):
    """Of 8 tokens of 10, for s_0, s_1 and s_2."""
    model, found = tiny_model(), {}
    monkeypatch.setattr(
        "callbacks.pictures.trajectories_figure", lambda points, distances: found.update(distances=distances)
    )
    monkeypatch.setattr(Reporter, "figure", lambda *args: None)
    trainer = build_trainer(tmp_path, model=model)
    picture_callback(trainer).show_trajectories(model)
    states = model(trainer.train_dataset[0]["input_ids"][None], output_states=True).states
    chosen = [0, 1, 3, 4, 5, 6, 8, 9]
    expected = [((states[-1] - state).norm(dim=-1) / states[-1].norm(dim=-1))[0, chosen] for state in states[:-1]]
    torch.testing.assert_close(found["distances"], torch.stack(expected))


# Rows


def inputs_of_pictures(trainer, **options):
    return picture_callback(trainer, **options).rows


def test_rows_are_of_the_validation_sources_in_turn(tmp_path):
    trainer = build_trainer(tmp_path, data=rows(16))
    other = [{name: value + 1 for name, value in row.items()} for row in rows(16)]
    trainer.eval_dataset = {"a": rows(2), "b": other}
    found = [inputs["input_ids"][0] for inputs in inputs_of_pictures(trainer, num_rows=4, max_tokens=7)]
    expected = [rows(2)[0], other[0], rows(2)[1], other[1]]
    assert [ids.tolist() for ids in found] == [row["input_ids"][:7].tolist() for row in expected]
    trainer.eval_dataset = None
    (inputs,) = inputs_of_pictures(trainer, num_rows=1)
    assert inputs.keys() == {"input_ids"} and torch.equal(inputs["input_ids"][0], rows(16)[0]["input_ids"])


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("the training reads it")


@pytest.mark.parametrize("data", [Stream(), [{"prompt": "the cat"}] * 4], ids=["stream", "prompts"])
def test_without_rows_there_are_gradients_alone(tmp_path, caplog, data):
    trainer = build_trainer(tmp_path)
    trainer.train_dataset = data
    callback = PicturesCallback(pictures(1), Reporter(trainer))
    with caplog.at_level(logging.INFO, logger="callbacks.pictures"):
        for _ in range(2):
            callback.on_step_end(trainer.args, SimpleNamespace(global_step=1), None, model=trainer.model)
    (record,) = caplog.records
    assert record.getMessage().startswith("There are no pictures of attention, activations, exits and trajectories")


def test_rows_with_media_are_whole_or_left_out():
    text = {"input_ids": torch.ones(1, 9), "position_ids": torch.arange(9)[None]}
    assert cut(text, 4)["position_ids"].tolist() == [[0, 1, 2, 3]]
    media = {"input_ids": torch.ones(1, 9), "pixel_values": torch.zeros(1, 3, 8, 8)}
    assert cut(media, 9) is media and cut(media, 8) is None


def test_pictures_of_a_model_that_reads_images_and_audio(tmp_path, shown):
    processor, model = tiny_processor(), tiny_reader()
    arguments = RecurrentTrainingArguments(str(tmp_path), use_cpu=True, max_steps=1)
    data = [row(processor, chat(media, "say", "a")) for media in ([IMAGE], [AUDIO, IMAGE], [])]
    trainer = RecurrentTrainer(model, arguments, train_dataset=data, data_collator=Collator(processor))
    callback = PicturesCallback(pictures(1), Reporter(trainer))
    assert len(callback.rows) == 3
    for show in (callback.show_attention, callback.show_activations, callback.show_exits, callback.show_trajectories):
        show(model)
    parts = {"embeddings", "image", "audio", "prelude", "core", "output"}
    assert shown.keys() == {f"pictures/activations/{part}" for part in parts}
    features = [model.get_image_features(inputs["pixel_values"]).pooler_output[0] for inputs in callback.rows[:2]]
    torch.testing.assert_close(shown["pictures/activations/image"], torch.cat(features).flatten())


# Options, ranks, libraries


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits_every_steps": -1}, "pictures.exits_every_steps is -1, must be at least 0."),
        ({"num_rows": 0}, "pictures.num_rows is 0, must be at least 1."),
        ({"max_tokens": 1}, "pictures.max_tokens is 1, must be at least 2."),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PicturesConfig(**options)


def test_gradients_that_are_divided_are_left_out_with_one_line(tmp_path, caplog):
    trainer = build_trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    callback = PicturesCallback(pictures(1), Reporter(trainer))
    with caplog.at_level(logging.INFO, logger="callbacks.pictures"):
        callback.on_train_begin(trainer.args, trainer.state, None)
    callback.on_pre_optimizer_step(trainer.args, trainer.state, None, model=trainer.model)
    assert [it.getMessage() for it in caplog.records] == [
        "There are no pictures of gradients, which DeepSpeed and FSDP divide among ranks"
    ]
    assert callback.gradients == {}


def test_histograms_are_of_finite_values(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig(pictures=pictures()))
    trainer.train()
    reporter = Reporter(trainer)
    reporter.histogram("some", torch.tensor([[1.0, torch.nan], [3.0, torch.inf]], dtype=torch.bfloat16))
    reporter.histogram("none", torch.tensor([torch.nan]))
    (event,) = events(tmp_path).Histograms("train/some")  # written after the end of the training
    value = event.histogram_value
    assert (value.num, value.min, value.max, value.sum) == (2, 1, 3, 4)
    assert events(tmp_path).Tags()["histograms"] == ["train/some"]


@pytest.mark.slow
def test_pictures_compile_nothing(tmp_path):
    """They would need graphs of their own, which take longer than all pictures."""
    graphs, model = [], tiny_model()
    model.model.compile_units(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    callback = picture_callback(build_trainer(tmp_path, model=model))
    for show in (callback.show_attention, callback.show_activations, callback.show_exits, callback.show_trajectories):
        show(model)
    assert graphs == []
    model(callback.rows[0]["input_ids"])
    assert graphs
