"""Hooks of single core steps: what they read, what they replace, and that they leave nothing behind."""

import copy

import pytest
import torch

from model import ExitOptions
from tests.tiny import tiny_ids, tiny_model


def test_a_hook_reads_the_state_of_its_step():
    """Normed, it is the state of a run of so many steps; unnormed, that of `output_states`."""
    model, ids, seen = tiny_model(scale=2.0), tiny_ids(2, 5), {}
    handles = [
        model.base_model.register_step_hook(step, lambda s, step=step: seen.update({step: s})) for step in (1, 3)
    ]
    with torch.no_grad():
        states = model(ids, num_steps=4, output_states=True).states
        assert list(seen) == [1, 3]
        found = dict(seen)
        for handle in handles:
            handle.remove()
        for step, state in found.items():
            assert torch.equal(state, states[step])
            torch.testing.assert_close(model.model.norm(state), model(ids, num_steps=step).state)
    assert not model.base_model.has_step_hooks


def test_a_hook_of_every_step_gets_its_number():
    model, steps = tiny_model(), []
    with torch.no_grad(), model.base_model.register_step_hook(None, lambda state, step: steps.append(step)):
        model(tiny_ids(1, 3), num_steps=3)
        model.generate(tiny_ids(1, 3), num_steps=2, max_new_tokens=3, do_sample=False, eos_token_id=None)
        model(tiny_ids(1, 3), num_steps=torch.tensor([2]))
    model(tiny_ids(1, 3), num_steps=4)
    assert steps == [1, 2, 3, *[1, 2] * 3, 1, 2]


def test_a_replaced_state_goes_on_from_there():
    """The state of step 2 of one prompt in another, after step 2: as a run from that state; in each mode."""
    model, ids, other = tiny_model(scale=2.0), tiny_ids(1, 6, seed=1), tiny_ids(1, 6, seed=2)
    with torch.no_grad():
        donor = model(other, num_steps=2, output_states=True).states[-1]
        expected, plain = model(ids, num_steps=3, initial_state=donor), model(ids, num_steps=5)
        assert not torch.allclose(expected.logits, plain.logits, atol=1e-3)
        handle = model.base_model.register_step_hook(2, lambda state: donor)
        patched = model(ids, num_steps=5, output_states=True)
        torch.testing.assert_close(patched.logits, expected.logits)
        torch.testing.assert_close(patched.state, expected.state)
        assert torch.equal(patched.states[2], donor)
        trained = model.train()(ids, num_steps=(3, 2))
        torch.testing.assert_close(trained.logits, expected.logits)
        model.eval()
        handle.remove()
        assert torch.equal(model(ids, num_steps=5).logits, plain.logits)


def test_generation_reads_what_a_hook_wrote():
    """A constant state after the last step makes every position say the same, whatever it saw."""
    model, constant = tiny_model(scale=2.0), torch.randn(32)
    asked = {"num_steps": 3, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ids = tiny_ids(1, 4)
    plain = model.generate(ids, **asked)
    model.base_model.register_step_hook(3, lambda state: constant.expand_as(state))
    patched = model.generate(ids, **asked)
    assert not torch.equal(patched, plain)
    expected = ids
    for _ in range(4):  # without a cache
        with torch.no_grad():
            expected = torch.cat((expected, model(expected, num_steps=3, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(patched, expected)


def test_hooks_see_the_rows_that_go_on():
    model, rows = tiny_model(), []
    model.base_model.register_step_hook(None, lambda state, step: rows.append(len(state)))
    with torch.no_grad():
        model(tiny_ids(3, 4), num_steps=torch.tensor([1, 3, 2]))
    assert rows == [3, 2, 1]
    rows.clear()
    with torch.no_grad():
        exits = ExitOptions("latent_difference", threshold=1e6)
        model(tiny_ids(3, 4), num_steps=4, exits=exits)
    assert rows == [3]


def test_a_gradient_flows_through_a_replaced_state():
    model, factor = tiny_model().train(), torch.ones((), requires_grad=True)
    model.base_model.register_step_hook(4, lambda state: state * factor)
    ids = tiny_ids(2, 5)
    model(ids, labels=ids, num_steps=(2, 2)).loss.backward()
    assert factor.grad.abs() > 0


def test_a_hook_adds_no_compiled_graph():
    """With a backend that counts; hooks and units take turns."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, ids, seen = tiny_model(), tiny_ids(1, 4), []
    model.base_model.compile_units(backend=count)
    with torch.no_grad():
        model(ids, num_steps=3, use_cache=False)
        before = len(graphs)
        model.base_model.register_step_hook(2, lambda state: seen.append(state) or state.mul(0.5))
        model(ids, num_steps=3, use_cache=False)
    assert before >= 2 and len(graphs) == before and len(seen) == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="has no core"):
        tiny_model(num_core_layers=0).base_model.register_step_hook(1, print)
    model = tiny_model()
    for step in (0, -1, 1.0, "1"):
        with pytest.raises(ValueError, match=r"step is .* give the number of a core step, 1 or more, or None"):
            model.base_model.register_step_hook(step, print)
    handle = model.base_model.register_step_hook(1, lambda state: state[:, :1])
    with pytest.raises(ValueError, match=r"core step 1 returned a state of shape \(1, 1, 32\), expected \(1, 4, 32\)"):
        model(tiny_ids(1, 4))
    handle.remove()
    model.base_model.register_step_hook(1, lambda state: None)
    with pytest.raises(ValueError, match="the model has step hooks"):
        model.generate(tiny_ids(1, 4), decoding="wavefront", do_sample=False, max_new_tokens=3)
    assert copy.deepcopy(model).base_model.has_step_hooks
