"""Depth sampling, initial states, injections, and what `num_steps` may be."""

import math
import subprocess
import sys

import pytest
import torch

from model import RecurrenceConfig, RecurrentCache
from model.attention import AttentionInputs
from model.depth import keyed_generator, resolve_depth, sample_depth
from model.recurrence import INJECTIONS, ActiveRows, default_state, draw_state, draw_training_states
from tests.tiny import tiny_config, tiny_ids, tiny_model


def depths(config, count=4000):
    return torch.tensor([sample_depth(config, 0, step, 0) for step in range(count)]).float()


def test_lognormal_poisson_has_the_moments_of_its_definition():
    """Closed form: E[p] = mean + 1, Var[p] = mean + mean^2 (exp(sigma^2) - 1); the quantiles were computed from
    200,000 draws of another implementation.
    """
    steps = depths(RecurrenceConfig(mean_steps=32, backprop_steps=8))
    total = steps.sum(1)
    variance = 32 + 32**2 * (math.exp(0.25) - 1)
    error = math.sqrt(variance / len(total))
    assert total.mean().item() == pytest.approx(33, abs=4 * error)
    assert total.std().item() == pytest.approx(math.sqrt(variance), rel=0.08)
    assert torch.quantile(total, torch.tensor([0.05, 0.5, 0.95])).tolist() == pytest.approx([12, 29, 67], rel=0.08)
    assert (steps[:, 1] == total.clamp(max=8)).all() and (steps[:, 0] == (total - 8).clamp(min=0)).all()
    assert total.min() >= 1


@pytest.mark.parametrize(
    ("distribution", "mean", "variance"), [("poisson", 6, 5), ("uniform", 6, (11**2 - 1) / 12), ("fixed", 6, 0)]
)
def test_other_distributions_have_their_moments(distribution, mean, variance):
    total = depths(RecurrenceConfig(mean_steps=6, step_distribution=distribution)).sum(1)
    assert total.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / len(total)) + 1e-6)
    assert total.var().item() == pytest.approx(variance, rel=0.1, abs=1e-6)


def test_depth_depends_on_its_key_alone_also_in_another_process():
    """Whatever the global generators, the hash seed, the process."""
    config = RecurrenceConfig(mean_steps=8)
    here = [sample_depth(config, 7, step, micro) for step in range(5) for micro in range(2)]
    torch.manual_seed(99)
    assert here == [sample_depth(config, 7, step, micro) for step in range(5) for micro in range(2)]
    assert len(set(here)) > 3
    assert here != [sample_depth(config, 8, step, micro) for step in range(5) for micro in range(2)]
    code = (
        "from model import RecurrenceConfig; from model.depth import sample_depth; "
        "c = RecurrenceConfig(mean_steps=8); print([sample_depth(c, 7, s, m) for s in range(5) for m in range(2)])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "3"}
    )
    assert out.stdout.strip() == str(here)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample_depth(RecurrenceConfig(), 1, 2, 3)
    draw_training_states(tiny_config(), 4, [(0, 0, 0)])
    tiny_model_state = default_state(tiny_config())
    assert tiny_model_state.shape == (1, 1, 32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("kind", "std"),
    [
        ("like-init", math.sqrt(2 / 5) * 0.9866),
        ("normal", 1.0),
        ("embed", 1 / math.sqrt(32)),
        ("unit", 1.0),
        ("zero", 0.0),
    ],
)
def test_initial_states_have_their_scale(kind, std):
    """Standard deviations in closed form; 0.9866 is that of a unit normal cut at three deviations."""
    config = tiny_config(recurrence={"state_init": kind})
    state = draw_state(config, (64, 50, 32), keyed_generator("test"))
    assert state.std().item() == pytest.approx(std, rel=0.02, abs=1e-6)
    if kind == "like-init":
        assert state.abs().max() <= 3 * math.sqrt(2 / 5) + 1e-6
    if kind == "unit":
        torch.testing.assert_close(state.mean(-1), torch.zeros(64, 50), atol=1e-5, rtol=0)
        torch.testing.assert_close(state.var(-1, unbiased=False), torch.ones(64, 50), atol=1e-3, rtol=0)
    scaled = draw_state(
        tiny_config(recurrence={"state_init": kind, "state_scale": 2.0}), (64, 50, 32), keyed_generator("test")
    )
    torch.testing.assert_close(scaled, 2 * state)


def test_like_init_has_the_scale_of_fresh_embeddings():
    model = tiny_model(hidden_size=128, vocab_size=512)
    embeds = model.model.embed_tokens(tiny_ids(8, 60, high=512))
    state = draw_state(model.config, (8, 60, 128), keyed_generator("x"))
    assert state.std().item() == pytest.approx(embeds.std().item(), rel=0.03)


def test_training_states_belong_to_rows_not_to_batches():
    keys = [(0, 5, row) for row in range(4)]
    whole = draw_training_states(tiny_config(), 6, keys)
    parts = torch.cat(
        [draw_training_states(tiny_config(), 6, keys[:2]), draw_training_states(tiny_config(), 6, keys[2:])]
    )
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.gpu
def test_rows_on_a_gpu_do_not_depend_on_the_batch_either():
    keys = [(0, 3, row) for row in range(4)]
    whole = draw_training_states(tiny_config(), 6, keys, "cuda")
    halves = [draw_training_states(tiny_config(), 6, part, "cuda") for part in (keys[:2], keys[2:])]
    assert torch.equal(whole, torch.cat(halves)) and whole.std() > 0.1


def test_default_state_is_one_draw_for_all_rows_and_positions():
    model, ids = tiny_model(scale=2.0), tiny_ids(3, 6)
    state = default_state(model.config)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, initial_state=state).logits)
        assert not torch.equal(model(ids).logits, model(ids, initial_state=0 * state).logits)
    other = tiny_config(recurrence={"state_seed": 1})
    assert not torch.equal(default_state(other), state)


def test_injections_compute_their_formula():
    """Several injections by name, each against its closed form."""
    torch.manual_seed(0)
    s, e = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    concat, add, gate = (INJECTIONS[name](8) for name in ("concat", "add", "gate"))
    w = concat.proj.weight
    torch.testing.assert_close(concat(s, e), s @ w[:, :8].T + e @ w[:, 8:].T)
    torch.testing.assert_close(add(s, e), s + e)
    g = 1 / (1 + torch.exp(-(s @ gate.gate.weight[:, :8].T + e @ gate.gate.weight[:, 8:].T)))
    torch.testing.assert_close(gate(s, e), g * s + (1 - g) * e)


def test_states_are_those_of_each_depth():
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 5)
    with torch.no_grad():
        out = model(ids, num_steps=4, output_states=True)
        assert len(out.states) == 5
        for steps in (1, 2, 4):
            torch.testing.assert_close(model.model.norm(out.states[steps]), model(ids, num_steps=steps).state)
        longer = model(ids, num_steps=2, initial_state=out.states[2]).logits
    torch.testing.assert_close(longer, out.logits, atol=1e-5, rtol=1e-4)


def test_depth_falls_back_from_argument_to_config_to_mean():
    config = tiny_config()
    assert resolve_depth(None, config, 1).total == 4
    assert resolve_depth(None, tiny_config(num_steps=7), 1).total == 7
    assert resolve_depth(3, tiny_config(num_steps=7), 1).total == 3
    in_training = resolve_depth(None, config, 1, training=True)
    assert (in_training.no_grad, in_training.total) == (2, 4)
    assert (resolve_depth((3, 2), config, 1).no_grad, resolve_depth((3, 2), config, 1).total) == (3, 5)
    assert resolve_depth(torch.tensor(5), config, 1).total == 5
    rows = resolve_depth(torch.tensor([2, 6]), config, 2)
    assert rows.total == 6 and rows.rows.tolist() == [2, 6]


@pytest.mark.slow
def test_compiled_units_need_two_graphs_each_however_deep():
    """Compiled is each unit, never the loop: after 20 random depths, without and with gradient, at most 2 graphs a
    unit.
    """
    from torch._dynamo.utils import counters

    model, ids = tiny_model().train(), tiny_ids(2, 8)
    eager = model(ids, labels=ids, num_steps=(2, 3)).loss
    graphs = {}
    for name in ("prelude", "core", "coda"):
        torch._dynamo.reset()
        counters.clear()
        getattr(model.model, name).compile(backend="aot_eager")
        for step in range(20):
            model(ids, labels=ids, num_steps=sample_depth(model.config.recurrence, 0, step, 0)).loss.backward()
        graphs[name] = counters["stats"]["unique_graphs"]
        getattr(model.model, name)._compiled_call_impl = None
    assert all(1 <= count <= 2 for count in graphs.values()), graphs
    assert not counters["recompile_limit"]
    torch._dynamo.reset()
    model.model.compile_units(backend="aot_eager")
    torch.testing.assert_close(model(ids, labels=ids, num_steps=(2, 3)).loss, eager)


def test_rows_that_leave_keep_their_state_and_their_steps():
    """Four rows of at most 3 steps: two stop after the first, one after the second, the last goes on to its limit."""
    state = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    active = ActiveRows(state, 10 * state, AttentionInputs(mask=None), limits=[3] * 4)
    active.state = active.state + 0.1
    assert active.leave(1, torch.tensor([True, False, False, True]))
    assert active.index.tolist() == [1, 2] and active.embeds[:, 0, 0].tolist() == [10, 20]
    active.state = active.state + 0.2
    assert active.leave(2, torch.tensor([False, True])) and active.index.tolist() == [1]
    active.state = active.state + 0.4
    assert not active.leave(3, None)
    torch.testing.assert_close(active.scatter_into_batch()[:, 0, 0], torch.tensor([0.1, 1.7, 2.3, 3.1]))
    assert active.steps == [1, 3, 2, 1]


# ------------------------------------------------------------------------------------------------- embeddings of steps


EMBEDDED = {"recurrence": {"step_embedding": "sinusoidal"}}


@torch.no_grad()
def test_each_step_adds_its_sinusoid_behind_the_injection():
    """Step by step by hand, on a core without embeddings whose injection has a bias; also in steps without gradient,
    and for more steps than were ever taken.
    """
    model, ids = tiny_model(scale=2.0, **EMBEDDED), tiny_ids(2, 7)
    plain = tiny_model(scale=2.0)
    plain.load_state_dict(model.state_dict())
    projection = plain.model.core.injection.proj
    projection.bias = torch.nn.Parameter(torch.zeros(32))
    out = model(ids, num_steps=(2, 30), output_states=True)
    state = out.states[0]
    for step in range(1, 33):
        angles = [step / 10000 ** (2 * pair / 32) for pair in range(16)]
        projection.bias.data = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        by_hand = plain(ids, num_steps=1, initial_state=state, output_states=True)
        state = out.states[step]
        torch.testing.assert_close(by_hand.states[1], state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_hand.logits, out.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_warm_start_counts_its_steps_from_the_first():
    """A token that starts where the one before ended takes its own first step first, in `generate` as in `forward`."""
    model, ids = tiny_model(scale=2.0, **EMBEDDED), tiny_ids(1, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "num_steps": 3}
    found = model.generate(ids, state_warm_start=True, **options)
    cache, written, state = RecurrentCache(model.config), ids, None
    for _ in range(3):
        new = written[:, cache.get_seq_length() :]
        out = model(new, num_steps=3, cache=cache, initial_state=state)
        state = out.state[:, -1:]
        written = torch.cat((written, out.logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, written)


def test_an_embedding_of_steps_needs_pairs_of_features():
    with pytest.raises(ValueError, match="step_embedding 'sinusoidal' needs an even hidden_size, got 33"):
        tiny_config(hidden_size=33, head_dim=8, **EMBEDDED)
