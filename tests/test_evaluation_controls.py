"""Controls of depth: schedules against others written out here, and models of which it is known what depth does."""

import json
import math

import pytest
import torch
from torch import nn

from evaluation.__main__ import main
from evaluation.answers import Example
from evaluation.controls import (
    ControlRunner,
    at_each_step,
    control_rows,
    control_tables,
    controls_markdown,
    divide_rows,
    states_of_next_rows,
)
from evaluation.depth import DepthEvaluator
from model.attention import apply_rotary, rotary_angles, rotary_tables
from tests.test_evaluation_command import plain_folder, run_folder  # noqa: F401  fixtures
from tests.test_evaluation_depth import collate
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_seq2seq import tiny_seq2seq

MOST = 4


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    """Enough for tiny models."""
    monkeypatch.setattr("evaluation.controls.FIT_ITERATIONS", 8)


def drawn_rows(model, num_rows: int = 120, length: int = 16, seed: int = 0) -> list[Example]:
    """Rows whose labels are drawn from what the model says at the most steps, so that it knows nothing better."""
    ids = tiny_ids(num_rows, length, seed=seed)
    with torch.no_grad():
        likely = model(ids, num_steps=MOST).logits.softmax(-1).flatten(0, 1)
    labels = torch.multinomial(likely, 1, generator=torch.Generator().manual_seed(1)).view(num_rows, length)
    labels = torch.cat((ids[:, :1], labels[:, :-1]), dim=1)
    return [{"input_ids": one, "labels": two} for one, two in zip(ids.tolist(), labels.tolist(), strict=True)]


def runner_of(model) -> ControlRunner:
    return ControlRunner(DepthEvaluator(model, collate, None, 80, None), MOST)


def batch_of(rows):
    return runner_of(tiny_model()).evaluator.batch_of(rows)


class IgnoresState(nn.Module):
    """An injection with which each step begins anew."""

    def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return embeds


def table_of(model, rows=None, depths=(1, MOST)):
    return control_tables(model, depths, {"text": rows or drawn_rows(model)}, {}, collate, 80)[0]


# ------------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    "options", [{}, {"cache_policy": "first", "num_kept_tokens": 3}, {"step_embedding": "sinusoidal"}]
)
@torch.no_grad()
def test_all_schedules_of_the_most_steps_are_the_same(options):
    model = tiny_model(scale=2.0, recurrence=options)
    batch = batch_of(drawn_rows(model, 5))
    runner = runner_of(model)
    whole = runner.run(batch, "prefix", MOST, with_states=True)
    start = states_of_next_rows(whole.states[0], [16] * 5)
    wanted = model(batch["input_ids"], num_steps=MOST, use_cache=False).logits
    for found in (whole, runner.run(batch, "frozen", MOST), runner.run(batch, "suffix", MOST, start=start)):
        assert torch.equal(found.logits, wanted)
    for schedule, further in (("frozen", {}), ("suffix", {"start": whole.states[2].roll(1, 0)})):
        assert not torch.allclose(runner.run(batch, schedule, 2, **further).logits, wanted, atol=1e-3)
    assert not model.model.core._forward_hooks and not model.model.core._forward_pre_hooks


@torch.no_grad()
def frozen_by_hand(model, ids: torch.Tensor, step: int) -> torch.Tensor:
    """Logits where each layer after `step` makes keys and values of what it was given at that step."""
    base, config = model.model, model.config
    rotary = rotary_tables(
        rotary_angles(torch.arange(ids.shape[1])[None], config.head_dim, config.rope_theta), torch.float
    )
    inputs, given = at_first_layer(model, ids)
    s, e = base.fixed_state(inputs).expand_as(inputs), inputs
    for number in range(1, MOST + 1):
        x = base.core.injection(s, e)
        for index, layer in enumerate(base.core.layers):
            given[index] = x if number <= step else given[index]
            query, _, _ = layer.attention._project(layer.attention_norm_in(x))
            _, key, value = layer.attention._project(layer.attention_norm_in(given[index]))
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
            key, value = (it.repeat_interleave(2, dim=1) for it in (key, value))
            out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = layer.attention_norm_out(x + layer.attention.o_proj(out.transpose(1, 2).flatten(2)))
            x = layer.mlp_norm_out(x + layer.mlp(layer.mlp_norm_in(x)))
        s = x
    read = {"num_steps": 1, "initial_state": s, "use_cache": False}
    with at_each_step(base.core, after=lambda taken, before, output: before):
        return model(ids, **read).logits


def at_first_layer(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """What the core is given of the prelude, and room for what its layers are given."""
    found = []
    hook = model.model.core.register_forward_pre_hook(lambda core, args: found.append(args[1]))
    model(ids, num_steps=1, use_cache=False)
    hook.remove()
    return found[0], {}


@torch.no_grad()
def test_frozen_against_a_loop_by_hand():
    model = tiny_model(scale=3.0)
    batch = batch_of(drawn_rows(model, 3))
    for step in (1, 2, 3, MOST):
        found = runner_of(model).run(batch, "frozen", step).logits
        torch.testing.assert_close(found, frozen_by_hand(model, batch["input_ids"], step), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_suffix_takes_the_last_steps():
    """With the states of its own row it is what the whole gives, if its steps are the last ones by number."""
    model = tiny_model(scale=2.0, recurrence={"step_embedding": "sinusoidal"})
    batch = batch_of(drawn_rows(model, 3))
    whole = runner_of(model).run(batch, "prefix", MOST, with_states=True)
    found = runner_of(model).run(batch, "suffix", 3, start=whole.states[1])
    torch.testing.assert_close(found.logits, whole.logits, atol=1e-5, rtol=1e-5)


def test_the_next_row_begins_anew_where_it_is_shorter():
    states = torch.arange(12.0).view(3, 4, 1)
    found = states_of_next_rows(states, [4, 2, 3]).squeeze(-1).tolist()
    assert found == [[4, 5, 4, 5], [8, 9, 10, 8], [0, 1, 2, 3]]


# -------------------------------------------------------------------------------------------------------------- readout


def test_the_fitted_temperature_is_the_factor_of_the_logits():
    model = tiny_model(scale=2.0, tie_word_embeddings=False)
    rows = drawn_rows(model, 160)
    model.lm_head.weight.data *= 3
    temperature, affine = runner_of(model).fit(rows, "prefix", MOST)
    assert float(temperature.log_temperature.exp()) == pytest.approx(3, rel=0.05)
    assert torch.equal(temperature.scale, torch.ones(32)) and torch.equal(temperature.shift, torch.zeros(32))
    assert (affine.scale - 1).abs().max() > 0.01


def test_a_few_rows_do_not_teach_a_map_their_noise(monkeypatch):
    """On other rows it is hardly worse than none, and with hardly any prior far worse."""
    model = tiny_model(scale=2.0)
    rows, worse = drawn_rows(model, 40), []
    for spread in (0.3, 30.0):
        monkeypatch.setattr("evaluation.controls.PRIOR_SPREAD", spread)
        scores = table_of(model, rows).rows[-1].scores
        worse.append(scores["recalibrated"] - scores["prefix"])
    assert abs(worse[0]) < 0.1 and worse[1] > 2 * abs(worse[0])


def test_no_row_is_both_scored_and_fitted_on(monkeypatch):
    """Each row is known by its first token."""
    used = {"fit": set(), "score": set()}
    for name in used:
        original = getattr(ControlRunner, name)

        def noted(self, items, *args, name=name, original=original):
            used[name] |= {tuple(items[index]["input_ids"]) for index in range(len(items))}
            return original(self, items, *args)

        monkeypatch.setattr(ControlRunner, name, noted)
    model = tiny_model()
    rows = {"a": drawn_rows(model, 20, 6), "b": drawn_rows(model, 9, 6, seed=7)}
    table = control_tables(model, [1, 2], rows, {}, collate, 8)[0]
    assert not used["fit"] & used["score"]
    assert (table.num_scored, table.num_fitted) == (len(used["score"]), len(used["fit"])) == (17, 6)


def test_rows_are_divided():
    assert divide_rows(8) == ([0, 1, 2, 3], [5, 6])
    assert divide_rows(1) == ([0], [])
    scored, fitted = divide_rows(10_000)
    assert len(scored) == 5000 and len(fitted) == 64 and fitted[-1] > 9_000


# ------------------------------------------------------------------------------- models of which it is known


def test_a_model_that_ignores_its_state_is_found_out():
    model = tiny_model(scale=3.0)
    model.model.core.injection = IgnoresState()
    table = table_of(model)
    few, most = table.rows
    assert few.gap == 0 and not few.shares and few.scores["frozen"] == most.scores["prefix"]
    assert "there is no gap to explain" in controls_markdown([table])


def test_a_model_of_which_only_the_readout_has_a_habit_is_found_out(monkeypatch):
    """It begins anew at each step, and leaves other states behind at the first ones."""
    monkeypatch.setattr("evaluation.controls.FIT_ITERATIONS", 15)
    model = tiny_model(scale=2.0)
    core, taken = model.model.core, []
    core.injection = IgnoresState()
    habit = torch.empty(32).uniform_(0.5, 1.8, generator=torch.Generator().manual_seed(0))
    model.register_forward_pre_hook(lambda *_: taken.clear())

    def leave(module, args, output):
        taken.append(1)
        return output * habit if len(taken) < MOST else output

    core.register_forward_hook(leave)
    (few, _) = table_of(model, drawn_rows(model, 240)).rows
    assert few.gap > 0.05 and few.gap_interval.low > 0
    assert few.shares["readout"] == pytest.approx(1, abs=0.1)
    assert few.shares["applications"] == pytest.approx(0, abs=0.1)
    assert few.shares["distinct steps"] == pytest.approx(0, abs=0.1)


def test_a_model_that_knows_the_number_of_its_step_alone_is_found_out():
    """The last step does all, by itself."""
    model = tiny_model(scale=3.0, recurrence={"step_embedding": "sinusoidal"})
    model.model.core.injection = IgnoresState()
    (few, _) = table_of(model).rows
    assert few.gap_interval.low > 0 and few.shares["last steps"] == pytest.approx(1, abs=1e-6)


def test_a_model_that_needs_depth_is_confirmed():
    (few, most) = table_of(tiny_model(scale=3.0)).rows
    assert few.gap_interval.low > 1 and few.share_intervals["distinct steps"].low > 0.2
    assert abs(few.shares["last steps"]) < 0.2 and few.shares["readout"] < 0.7
    assert sum(few.shares[name] for name in ("readout", "applications", "distinct steps")) == pytest.approx(1)
    assert not most.shares and most.gap == 0


@torch.no_grad()
def test_a_decoder_behind_an_encoder():
    """The core whose steps are counted is the decoder's; the encoder keeps its mean depth."""
    model = tiny_seq2seq()
    ids, targets = tiny_ids(12, 7), tiny_ids(12, 6, seed=1)
    rows = [{"input_ids": one, "decoder_input_ids": two, "labels": two} for one, two in zip(ids, targets, strict=True)]

    def stack(items):
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    table = control_tables(model, [1, MOST], {"text": rows}, {}, stack, 4)[0]
    scored = divide_rows(12)[0]
    logits = model(ids[scored], decoder_input_ids=targets[scored], num_steps=1).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), targets[scored].flatten())
    assert table.rows[0].scores["prefix"] == pytest.approx(float(wanted), rel=1e-5)
    assert table.rows[1].scores["frozen"] == table.rows[1].scores["suffix"] == table.rows[1].scores["prefix"]


# --------------------------------------------------------------------------------------------------------------- tables


def test_shares_by_hand():
    """Two rows of 10 and 30 tokens, and the mean of each curve is by tokens."""
    nats = {
        ("prefix", 1): 4.0, ("frozen", 1): 3.0, ("suffix", 1): 3.5, ("temperature", 1): 3.8, ("recalibrated", 1): 3.4,
        ("recalibrated frozen", 1): 2.8, ("prefix", 2): 2.0, ("frozen", 2): 2.0, ("suffix", 2): 2.0,
        ("temperature", 2): 2.0, ("recalibrated", 2): 1.9, ("recalibrated frozen", 2): 1.9,
    }  # fmt: skip
    scores = {key: torch.tensor([[10 * it, 10, 0], [30 * it, 30, 1]]).double().numpy() for key, it in nats.items()}
    few, most = control_rows(scores, [1, 2], "loss", {1: 1.0, 2: 1.0})
    assert few.scores == pytest.approx({name: it for (name, steps), it in nats.items() if steps == 1})
    assert few.gap == pytest.approx(2) and most.gap == 0
    shares = {"readout": 0.25, "applications": 0.3, "distinct steps": 0.45, "last steps": 0.25, "temperature": 0.1}
    assert few.shares == pytest.approx(shares)
    assert all(math.isclose(it.low, it.high, abs_tol=1e-9) for it in few.share_intervals.values())
    few, _ = control_rows(scores, [1, 2], "exact", {1: 1.0, 2: 1.0})
    assert few.scores["prefix"] == 0.5 and not few.shares


def test_the_command(run_folder, capsys, tmp_path):  # noqa: F811
    """A table of the losses, and one of each source with answers."""
    arguments = ["--num-steps", "1", "2", "--limit", "8", "--no-texts", "--output", str(tmp_path / "out")]
    assert main([str(run_folder), "--controls", *arguments]) == 0
    output = capsys.readouterr().out
    assert (tmp_path / "out/controls.md").read_text() in output
    assert (tmp_path / "out/controls.png").stat().st_size > 10_000 and (tmp_path / "out/depth.json").exists()
    tables = json.loads((tmp_path / "out/controls.json").read_text())["tables"]
    assert [(table["name"], table["measure"], table["num_fitted"]) for table in tables] == [
        *(("validation", "loss", 2), ("chained_lookup", "exact", 2), ("addition", "exact", 2))
    ]
    depth = json.loads((tmp_path / "out/depth.json").read_text())
    assert tables[1]["rows"][0]["scores"]["prefix"] == depth["rows"][0]["exact_match"]["chained_lookup"]["total"]
    assert "Loss of validation rows, of which 5 are scored and 2 others fitted on:" in output


def test_what_controls_cannot_do(run_folder, plain_folder, capsys):  # noqa: F811
    for folder, depths, what in (
        (plain_folder, ["1", "2"], "this model has no core (num_core_layers is 0): leave it out"),
        (run_folder, ["2"], "there is 2 alone: give --num-steps a smaller number as well"),
        (run_folder, ["1", "2", "--limit", "5"], "validation has 5 rows at most, but --controls need 6 of a source"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(folder), "--controls", "--num-steps", *depths])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and what in error
