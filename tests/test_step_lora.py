"""Deltas of single steps of the core, against a core whose weights are exchanged by hand before each step."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import finetune
from inference.loading import load_model
from model import ExitOptions, MegaTransformerForCausalLM
from model.step_lora import StepLora, add_step_lora, load_step_lora
from tests.test_finetuning import refusal, tune
from tests.test_pretrain import losses
from tests.tiny import tiny_ids, tiny_model

TARGETS = ("injection.proj", "layers.0.attention.qkv_proj", "layers.1.mlp.down_proj")
OPTIONS = {"num_steps": 3, "rank": 2, "alpha": 4}


def with_deltas(seed: int = 1, **overrides) -> tuple[MegaTransformerForCausalLM, StepLora]:
    """A tiny model with deltas that are not 0."""
    model = tiny_model(**overrides)
    steps = add_step_lora(model, TARGETS, **OPTIONS)
    generator = torch.Generator().manual_seed(seed)
    for parameter in steps.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model, steps


def with_weights_of(step: int, model: MegaTransformerForCausalLM, steps: StepLora) -> MegaTransformerForCausalLM:
    """A plain model with W + alpha / rank B_i A_i in place of W, for i < 3."""
    plain = tiny_model()
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if "step_lora" not in name})
    for target in TARGETS:
        deltas = steps.deltas[target.replace(".", "__")]
        if step < 3:
            weight = plain.model.core.get_submodule(target).weight
            weight.data += 4 / 2 * deltas.up[step] @ deltas.down[step]
    return plain


@torch.no_grad()
def test_each_step_has_weights_of_its_own():
    """Five steps, of which three have deltas, one call for each with the weights of that step."""
    model, steps = with_deltas()
    ids = tiny_ids(2, 7)
    whole = model(ids, num_steps=5, output_states=True)
    state = whole.states[0]
    for step in range(5):
        out = with_weights_of(step, model, steps)(ids, num_steps=1, initial_state=state, output_states=True)
        state = out.states[-1]
        torch.testing.assert_close(whole.states[step + 1], state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.logits, out.logits, atol=1e-5, rtol=1e-5)
    assert (whole.logits - with_weights_of(3, model, steps)(ids, num_steps=5).logits).abs().max() > 0.1


@torch.no_grad()
def test_fresh_deltas_change_nothing():
    model, ids = tiny_model(), tiny_ids(2, 7)
    before = model(ids).logits
    add_step_lora(model, TARGETS, **OPTIONS)
    assert torch.equal(model(ids).logits, before)


def test_only_the_deltas_of_steps_with_gradient_learn():
    model, steps = with_deltas()
    ids = tiny_ids(2, 7)
    model.train()(ids, labels=ids, num_steps=(1, 3)).loss.backward()
    for deltas in steps.deltas.values():
        assert [bool(grad.abs().sum() > 0) for grad in deltas.up.grad] == [False, True, True]


def test_a_depth_without_them_gives_zeros():
    """And not none, with which the optimizers of PyTorch would do otherwise than those of DeepSpeed."""
    model, steps = with_deltas()
    ids = tiny_ids(2, 7)
    model.train()(ids, labels=ids, num_steps=(3, 2)).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in steps.parameters())


def test_recomputed_activations_see_their_own_step():
    """T8: activation checkpointing runs the core again, when the loop is over."""
    ids, gradients = tiny_ids(2, 7), []
    for is_checkpointed in (False, True):
        model, steps = with_deltas()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(ids, labels=ids, num_steps=(1, 4)).loss.backward()
        gradients.append([parameter.grad for parameter in steps.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_generation_with_a_cache_and_exits_sees_them():
    """With and without a cache; and a row that exits equals one that is given as many steps."""
    model, _ = with_deltas()
    ids = tiny_ids(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "num_steps": 4}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    out = model(ids, num_steps=4, exits=ExitOptions("latent_difference", 1e3, min_steps=2))
    for row, count in enumerate(out.exit_steps.tolist()):
        alone = model(ids[row : row + 1], num_steps=count).logits
        torch.testing.assert_close(out.logits[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert out.exit_steps.tolist() == [2, 2]


def test_compiled_steps_see_their_own_deltas():
    model, _ = with_deltas()
    ids = tiny_ids(2, 7)
    expected = model(ids, num_steps=5).logits
    model.model.compile_units(backend="eager")
    torch.testing.assert_close(model(ids, num_steps=5).logits, expected)


def test_a_model_is_saved_without_them(tmp_path: Path):
    """They stand in files of their own, from which they come back."""
    model, steps = with_deltas()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == tiny_model().state_dict().keys() - {"lm_head.weight"}
    steps.save(tmp_path)
    again = MegaTransformerForCausalLM.from_pretrained(tmp_path)
    load_step_lora(again, tmp_path)
    ids = tiny_ids(2, 7)
    assert torch.equal(again(ids, num_steps=5).logits, model(ids, num_steps=5).logits)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    _, steps = with_deltas()
    steps.save(tmp_path)
    with pytest.raises(ValueError, match="needs a core"):
        add_step_lora(tiny_model(num_core_layers=0), TARGETS, **OPTIONS)
    with pytest.raises(ValueError, match=r"no linear layer 'layers.2.q'; it has .*layers.1.mlp.down_proj"):
        add_step_lora(tiny_model(), ["layers.2.q"], **OPTIONS)
    with pytest.raises(ValueError, match=r"does not fit: .* is \(3, 2, 64\) there and \(3, 2, 96\) here"):
        load_step_lora(tiny_model(hidden_size=48), tmp_path)
    weights = load_file(tmp_path / "step_lora.safetensors")
    weights.popitem()
    save_file(weights, tmp_path / "step_lora.safetensors")
    with pytest.raises(ValueError, match="is missing there"):
        load_step_lora(copy.deepcopy(tiny_model()), tmp_path)
    (tmp_path / "step_lora.json").write_text("{")
    with pytest.raises(ValueError, match=r"step_lora.json is damaged"):
        load_step_lora(tiny_model(), tmp_path)


# ------------------------------------------------------------ through finetune.py


@pytest.fixture(scope="module")
def alone(tiny_run, tmp_path_factory) -> Path:
    """A finished run whose only adapter is this. Read only."""
    folder = tmp_path_factory.mktemp("steps")
    return tune(folder, tiny_run, trainer="continued", peft=None, step_lora={"num_steps": 2})


def test_they_are_saved_alone_resumed_and_loaded(alone, tiny_run, tmp_path, capsys):
    """Half a run and the rest equal the whole, bitwise; merging says why it cannot be."""
    names = {path.name for path in (alone / "checkpoint-4").iterdir()}
    assert {"step_lora.json", "step_lora.safetensors", "base_model.json", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json", "adapter_config.json"} & names
    flags = ["--training.resume_from_checkpoint", alone / "checkpoint-2", "--training.save_strategy", "no"]
    half = tune(tmp_path, tiny_run, *flags, trainer="continued", peft=None, step_lora={"num_steps": 2})
    assert losses(half) == losses(alone)
    ours, whole = (load_file(folder / "step_lora.safetensors") for folder in (half, alone))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert all((weight != 0).any() for weight in whole.values())
    model, plain = load_model(alone)[0], load_model(tiny_run)[0]
    ids = tiny_ids(1, 6)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
    line = refusal(capsys, convert.main, "merge", alone, "--output", tmp_path / "merged")
    assert "cannot be merged: the core has one set of weights for all steps" in line


def test_they_go_with_lora(tiny_run, tmp_path):
    """Both learn, both are loaded."""
    folder = tune(tmp_path, tiny_run, "--training.save_strategy", "no", step_lora={"num_steps": 2, "rank": 1})
    lora = load_file(folder / "adapter_model.safetensors")
    steps = load_file(folder / "step_lora.safetensors")
    assert all((weight != 0).any() for weight in (*lora.values(), *steps.values()))
    model, _ = load_model(folder)
    assert model.model.core.step_lora.options["num_steps"] == 2
    for name, weight in model.model.core.step_lora.state_dict().items():
        assert torch.equal(weight, steps[name])


def test_a_run_without_core_has_no_steps(tmp_path, capsys):
    """Its parts are named."""
    from tests.tiny_finetuning import write_tuning_config
    from tests.tiny_language_model import save_checkpoint

    base = save_checkpoint(tmp_path / "base", num_core_layers=0)
    config = write_tuning_config(tmp_path, base, peft=None, step_lora={})
    line = refusal(capsys, finetune.main, "--config", config, "--training.output_dir", tmp_path / "out")
    assert "step_lora.target_modules: core has no linear layers; this model has prelude" in line
