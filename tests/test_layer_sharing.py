"""Layers that are executed several times: in which order, and that their weights are one and the same."""

import itertools

import pytest
import torch
from torch import nn

from callbacks.model_size import size_table
from model import MegaTransformerForCausalLM
from model.blocks import layer_order
from tests.tiny import tiny_config, tiny_ids, tiny_model
from trainers.dry_run import StepCounts, flops_per_token

PARTS = ("prelude", "core", "coda")
SHARED = {
    "num_prelude_layers": 4,
    "num_unique_prelude_layers": 2,
    "num_core_layers": 5,
    "num_unique_core_layers": 3,
    "num_coda_layers": 3,
    "num_unique_coda_layers": 1,
}
ORDERS = {
    "sequence": ((0, 0, 1, 1), (0, 0, 1, 1, 2), (0, 0, 0)),
    "cycle": ((0, 1, 0, 1), (0, 1, 2, 0, 1), (0, 0, 0)),
    "cycle_rev": ((0, 1, 1, 0), (0, 1, 2, 2, 1), (0, 0, 0)),
}


@pytest.mark.parametrize(
    ("schedule", "unique", "executed", "order"),
    [
        ("sequence", 3, 6, "AABBCC"),
        ("cycle", 3, 6, "ABCABC"),
        ("cycle_rev", 3, 6, "ABCCBA"),
        ("sequence", 2, 6, "AAABBB"),
        ("cycle", 2, 6, "ABABAB"),
        ("cycle_rev", 2, 6, "ABABBA"),
        ("sequence", 3, 8, "AAABBBCC"),
        ("cycle", 3, 8, "ABCABCAB"),
        ("cycle_rev", 3, 8, "ABCABCCB"),
        *((schedule, unique, 3, "ABC") for schedule in ORDERS for unique in (3, None)),
        *((schedule, None, 0, "") for schedule in ORDERS),
    ],
)
def test_the_order_is_that_of_the_paper(schedule, unique, executed, order):
    """Also where there are as many as are executed, the first round, which never runs backwards."""
    assert layer_order(unique, executed, schedule) == tuple("ABC".index(name) for name in order)


def unshared(model: MegaTransformerForCausalLM) -> MegaTransformerForCausalLM:
    """A model with a copy of a layer for each of its executions."""
    options = {name: None for name in SHARED if "unique" in name}
    plain = MegaTransformerForCausalLM(tiny_config(**SHARED | options)).train(model.training)
    state = model.state_dict()
    for part, order in zip(PARTS, ORDERS[model.config.layer_sharing], strict=True):
        whole = {name: state.pop(name) for name in list(state) if name.startswith(f"model.{part}.layers.")}
        for (place, index), (name, weight) in itertools.product(enumerate(order), whole.items()):
            prefix = f"model.{part}.layers.{index}."
            if name.startswith(prefix):
                state[name.replace(prefix, f"model.{part}.layers.{place}.")] = weight
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("schedule", ORDERS)
def test_gradients_are_the_sums_of_those_of_unshared_layers(schedule):
    """With the same weights in each place; the logits are the same too."""
    model, ids = tiny_model(scale=2.0, layer_sharing=schedule, **SHARED).train(), tiny_ids(2, 7)
    plain = unshared(model)
    outputs = [each(ids, labels=ids, num_steps=(1, 2)) for each in (model, plain)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for part, order in zip(PARTS, ORDERS[schedule], strict=True):
        layers, places = model.model.get_submodule(part).layers, plain.model.get_submodule(part).layers
        assert len(layers) == max(order) + 1 and len(places) == len(order)
        for index, layer in enumerate(layers):
            of_places = [dict(places[place].named_parameters()) for place, used in enumerate(order) if used == index]
            for name, weight in layer.named_parameters():
                expected = sum(parameters[name].grad for parameters in of_places)
                torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=1e-4)
                assert expected.abs().sum() > 0


@torch.no_grad()
def test_each_execution_has_its_own_place_in_the_cache():
    """Otherwise a layer would read the keys of another execution."""
    model, ids = tiny_model(scale=2.0, layer_sharing="cycle_rev", **SHARED), tiny_ids(2, 9)
    out = model(ids[:, :5], num_steps=3, use_cache=True)
    assert len(out.past_key_values.layers) == 4 + 5 + 3
    rest = model(ids[:, 5:], num_steps=3, past_key_values=out.past_key_values)
    logits = torch.cat((out.logits, rest.logits), dim=1)
    torch.testing.assert_close(logits, model(ids, num_steps=3).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_noise_is_normed_by_the_layer_that_is_executed_last():
    """And not by that which is last in the list: ABBA ends with the first."""
    model = tiny_model(scale=2.0, num_core_layers=4, num_unique_core_layers=2, layer_sharing="cycle_rev")
    seen = []
    for layer in model.model.core.layers:
        layer.mlp_norm_out = nn.Identity()
        layer.mlp_norm_out.register_forward_hook(lambda module, *_: seen.append(module))
    model.generate(tiny_ids(1, 3), max_new_tokens=1, do_sample=False, num_steps=2, noise_level=0.5)
    first, last = (layer.mlp_norm_out for layer in model.model.core.layers)
    assert seen == 2 * [first, first, last, last, first]


def test_operations_and_sizes_count_executed_layers():
    """Against those of unshared layers, which share no parameter."""
    model = tiny_model(layer_sharing="cycle", **SHARED)
    plain, steps = unshared(model), StepCounts(no_grad=1, grad=3, most_grad=3)
    assert flops_per_token(model, steps, 16) == flops_per_token(plain, steps, 16)
    rows = [size_table(each).splitlines() for each in (model, plain)]
    executed = [[row.rpartition("|")[0].rpartition("|")[2] for row in lines[2:-2]] for lines in rows]
    assert executed[0] == executed[1]
    assert rows[0][-1] == "6 layers, 27 executed at the mean depth"
    assert rows[1][-1] == "12 layers, 27 executed at the mean depth"


def test_a_layer_that_is_shared_is_saved_once(tmp_path):
    model, ids = tiny_model(scale=2.0, layer_sharing="sequence", **SHARED), tiny_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = MegaTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_unique_core_layers == 3
    torch.testing.assert_close(loaded(ids, num_steps=2).logits, model(ids, num_steps=2).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_unique_core_layers": 3}, r"num_unique_core_layers \(3\) must be .* at most num_core_layers \(2\)"),
        ({"num_unique_prelude_layers": 0}, r"num_unique_prelude_layers \(0\) must be at least 1"),
        ({"num_coda_layers": 0, "num_unique_coda_layers": 1}, r"num_unique_coda_layers \(1\).* num_coda_layers \(0\)"),
        ({"layer_sharing": "reverse"}, "layer_sharing: .*'cycle', 'sequence', 'cycle_rev'.*reverse"),
    ],
)
def test_what_cannot_be_shared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)
