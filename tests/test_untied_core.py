"""The untied twin: a core of its own for each step, against the recurrent model whose weights all of them have."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import pretrain
from inference.engine import InferenceEngine
from model import MegaTransformerForCausalLM
from model.core_step import CoreStep
from model.depth import sample_depth
from model.step_lora import add_step_lora
from tests.processes import run_python
from tests.test_pretrain import write_config
from tests.tiny import tiny_config, tiny_ids, tiny_model
from trainers.dry_run import expected_steps, flops_per_token


def untied_model(seed: int = 0, **options) -> MegaTransformerForCausalLM:
    return tiny_model(seed=seed, scale=2.0, recurrence={"untied_core": True, **options})


@pytest.fixture
def twins() -> tuple[MegaTransformerForCausalLM, MegaTransformerForCausalLM]:
    """A recurrent model, and an untied one with its weights in each core."""
    tied = tiny_model(scale=2.0, recurrence={"step_embedding": "sinusoidal"})
    untied = untied_model(seed=1, step_embedding="sinusoidal")
    weights = {name: it for name, it in tied.state_dict().items() if not name.startswith("model.core.")}
    for name, weight in tied.model.core.state_dict().items():
        weights |= {f"model.core.cores.{step}.{name}": weight for step in range(4)}
    untied.load_state_dict(weights)
    return tied, untied


@torch.no_grad()
def test_the_same_weights_in_each_core_are_the_recurrent_model(twins):
    tied, untied = twins
    ids = tiny_ids(2, 9)
    assert torch.equal(untied(ids).logits, tied(ids, num_steps=4).logits)
    new = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(untied.generate(ids, **new), tied.generate(ids, num_steps=4, **new))


@torch.no_grad()
def test_steps_by_themselves_are_those_of_the_model(twins):
    """By a hook of steps, and by `CoreStep`, which callbacks measure; the cores differ."""
    _, untied = twins
    for number, core in enumerate(untied.model.core.cores):
        core.injection.proj.weight.mul_(1 + 0.1 * number)
    calls, seen = [], []
    handle = untied.model.register_step_hook(None, lambda state, step: seen.append((step, state)))
    hook = untied.model.core.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with hook:
        states = untied(tiny_ids(1, 7), output_states=True, use_cache=False).states
    handle.remove()
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    (state, embeds), given = calls[0]
    first = CoreStep.of(untied.model.core, state, embeds, **given)
    for taken, (_, found) in enumerate(seen):
        assert torch.equal(found, states[taken + 1])
        torch.testing.assert_close(first.after(taken).take(states[taken]), found, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_step_is_that_of_its_core(twins):
    """A core that is changed changes the states from its step on."""
    _, untied = twins
    ids = tiny_ids(1, 7)
    before = untied(ids, output_states=True).states
    untied.model.core.cores[2].injection.proj.weight.mul_(1.5)
    after = untied(ids, output_states=True).states
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True] * 3 + [False] * 2


@torch.no_grad()
def test_a_cache_changes_nothing():
    model = untied_model()
    ids = tiny_ids(2, 6)
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], cache=first.past_key_values)
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 4:], atol=1e-5, rtol=1e-4)


def test_all_cores_learn_whatever_the_draw():
    """The configuration has a distribution of depths and truncates them, which untied cores do not."""
    model = untied_model(backprop_steps=1).train()
    drawn = {sample_depth(model.config.recurrence, 0, step) for step in range(20)}
    assert drawn == {(0, 4)}
    for steps in (*drawn, (3, 1), None):
        model.zero_grad()
        ids = tiny_ids(2, 8)
        model(ids, labels=ids, num_steps=steps).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.core.parameters())


def test_saved_is_loaded_with_its_code(tmp_path):
    model = untied_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["recurrence"]["untied_core"]
    ids = tiny_ids(2, 9)
    torch.save((ids, model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)), tmp_path / "said.pt")
    code = (
        "import torch; from transformers import AutoModelForCausalLM; ids, said = torch.load('said.pt');"
        "model = AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True);"
        "assert type(model).__module__.startswith('transformers_modules');"
        "assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None), said)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_as_many_operations_and_more_weights():
    tied, untied = tiny_model(), tiny_model(recurrence={"untied_core": True})
    assert untied.config.mean_executed_layers == tied.config.mean_executed_layers == 10
    assert (tied.config.num_unique_layers, untied.config.num_unique_layers) == (4, 10)
    counts = {
        model.config.recurrence.untied_core: flops_per_token(model, expected_steps(model.config.recurrence, 0), 16)
        for model in (tiny_model(recurrence={"step_distribution": "fixed", "backprop_steps": 4}), untied)
    }
    assert counts[True] == counts[False]


def test_other_depths_and_exits_are_refused():
    model = untied_model()
    ids = tiny_ids(2, 5)
    what = r"num_steps is .*, but this model has 4 untied cores, each for one step .*; give 4, or leave it out"
    for steps in (3, 5, (1, 2), torch.tensor([4, 3])):
        with pytest.raises(ValueError, match=what):
            model(ids, num_steps=steps)
    for steps in (4, (2, 2), torch.tensor([4, 4])):
        assert torch.equal(model(ids, num_steps=steps).logits, model(ids).logits)
    with pytest.raises(ValueError, match=what):
        model.generate(ids, num_steps=8, max_new_tokens=2)
    with pytest.raises(ValueError, match="exits are not possible with untied_core"):
        model.generate(ids, exit_criterion="kl_divergence", max_new_tokens=2)
    with pytest.raises(ValueError, match="state_noise and its options are not possible with untied_core"):
        model.generate(ids, noise_level=0.1, max_new_tokens=2)
    with pytest.raises(ValueError, match="untied_core has not; use generate"):
        InferenceEngine(model)
    with pytest.raises(ValueError, match="step_lora adapts the steps of one core"):
        add_step_lora(model, ["layers.0.mlp.down_proj"], num_steps=4, rank=1, alpha=1)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"recurrence": {"untied_core": True, "exit_criterion": "cosine"}}, "exit_criterion is 'cosine', which untied"),
        ({"recurrence": {"untied_core": True, "cache_policy": "last"}}, "cache_policy is 'last', which untied_core"),
        ({"recurrence": {"untied_core": True}, "num_steps": 2}, r"num_steps \(2\) is not mean_steps \(4\)"),
    ],
)
def test_what_the_configuration_refuses(options, what):
    with pytest.raises(ValueError, match=what):
        tiny_config(**options)


def test_it_is_trained_by_the_command(tmp_path, capsys):
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "recurrence_logging_steps": 1}
    config = write_config(tmp_path, training=training)
    assert pretrain.main(["--config", str(config), "--model.recurrence.untied_core", "true"]) == 0
    assert re.search(r"\| core \| ([\d,]+) \| .* \| 1 \| \1 \|", capsys.readouterr().err)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert len(loaded.model.core.cores) == loaded.config.recurrence.mean_steps
