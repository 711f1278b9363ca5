"""Exits: the values of the criteria, rows that leave the batch, adaptive depth inside `generate`, noise."""

import math

import pytest
import torch
from transformers import GenerationConfig

from model import ExitOptions, NoiseOptions, RecurrenceConfig, RecurrentCache
from model.depth import keyed_generator
from model.exit_criteria import EXIT_CRITERIA, ExitCheck
from tests.tiny import PAD, for_forward, tiny_config, tiny_ids, tiny_model

THRESHOLDS = {
    "kl_divergence": 0.02,
    "min_p_kl": 0.02,
    "entropy_difference": 0.03,
    "latent_difference": 0.3,
    "cosine": 0.05,
    "argmax_stability": 2,
}
CRITERIA = [name for name, criterion in EXIT_CRITERIA.items() if criterion.part is None]
MOST = 8
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(scale=2.0)
    model.generation_config.eos_token_id = None  # full length, for comparison
    return model


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **for_forward(**kwargs)).logits


# ------------------------------------------------------------------------------------------------------ values, options


def softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def entropy(p: list[float]) -> float:
    return -sum(a * math.log(a) for a in p)


def min_p(p: list[float]) -> list[float]:
    kept = [a if a >= 0.1 * max(p) else 1 / len(p) for a in p]
    return [a / sum(kept) for a in kept]


def norm(v: list[float]) -> float:
    return math.sqrt(sum(a * a for a in v))


def cos(v: list[float], w: list[float]) -> float:
    return sum(a * b for a, b in zip(v, w, strict=True)) / norm(v) / norm(w)


def difference(v: list[float], w: list[float]) -> float:
    return norm([a - b for a, b in zip(v, w, strict=True)]) / norm(v)


def closed_form(name: str, logits: list, states: list, step: int) -> float:
    """The value after `step` steps. logits[i]: (vocab,) after i + 1 steps; states[i]: the tokens' states after i."""
    p, before = (
        softmax(logits[step - 1]),
        softmax(logits[step - 2]) if step > 1 else [1 / len(logits[0])] * len(logits[0]),
    )
    pairs = list(zip(states[step], states[step - 1], strict=True))
    if name == "argmax_stability":
        likeliest = [row.index(max(row)) for row in logits[:step]]
        return next((i for i in range(step - 1) if likeliest[-1 - i] != likeliest[-2 - i]), step - 1)
    return {
        "kl_divergence": lambda: kl(before, p),
        "min_p_kl": lambda: kl(min_p(before), min_p(p)),
        "entropy_difference": lambda: abs(entropy(p) - (entropy(before) if step > 1 else 100)),
        "latent_difference": lambda: sum(difference(now, past) for now, past in pairs) / len(pairs),
        "cosine": lambda: 1 - sum(cos(now, past) for now, past in pairs) / len(pairs),
    }[name]()


@pytest.mark.parametrize("name", CRITERIA)
def test_values_are_those_of_the_closed_form(name):
    """Four steps of two rows, each with its padding; against loops over Python numbers."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, 5, generator=generator) for _ in range(5)]
    logits = [torch.randn(2, 7, generator=generator) * 3 + torch.eye(7)[2] * 6 for _ in range(4)]
    is_token = torch.tensor([[True, True, True], [False, True, True]])
    before = ExitCheck(0, states[0], is_token=is_token)
    for step in range(1, 5):
        now = ExitCheck(step, states[step], logits[step - 1], is_token)
        now.value = EXIT_CRITERIA[name].value(now, before)
        for row in range(2):
            of_row = [state[row][is_token[row]].double().tolist() for state in states]
            expected = closed_form(name, [each[row].double().tolist() for each in logits], of_row, step)
            assert now.value[row].item() == pytest.approx(expected, abs=1e-4)
        before = now


def test_thresholds_stop_below_or_for_stability_from():
    assert EXIT_CRITERIA["cosine"].stops(torch.tensor([0.1, 0.2, 0.3]), 0.2).tolist() == [True, False, False]
    assert EXIT_CRITERIA["argmax_stability"].stops(torch.tensor([4, 5, 6]), 5).tolist() == [False, True, True]


@pytest.mark.parametrize("name", CRITERIA)
def test_a_row_stops_at_the_first_check_that_passes(model, name):
    """Against the states and readings of a pass that takes all steps."""
    ids = tiny_ids(4, 6)
    with torch.no_grad():
        full = model(ids, num_steps=MOST, output_states=True, use_cache=False)
        logits = [logits_of(model, ids, num_steps=step)[:, -1].double().tolist() for step in range(1, MOST + 1)]
        exits = for_forward(exit_criterion=name, exit_threshold=THRESHOLDS[name])
        out = model(ids, num_steps=MOST, use_cache=False, **exits)
    expected = []
    for row in range(4):
        states = [state[row].double().tolist() for state in full.states]
        values = [closed_form(name, [step[row] for step in logits], states, step) for step in range(1, MOST + 1)]
        stops = [EXIT_CRITERIA[name].stops(torch.tensor(value), THRESHOLDS[name]) for value in values]
        expected.append(stops.index(True) + 1 if True in stops else MOST)
    assert out.exit_steps.tolist() == expected
    assert len(set(expected)) > 1  # or the test shows little


def test_first_check_and_every_n_steps(model):
    """After steps 3, 5 and 7: with a threshold that all pass, rows stop at the first check; with one that none passes,
    at the end.
    """
    checks = {"exit_criterion": "cosine", "min_steps": 3, "exit_check_interval": 2, "num_steps": MOST}

    def steps_of(rows: int, **options) -> list[int]:
        return model(tiny_ids(rows, 4), **for_forward(**{**checks, **options})).exit_steps.tolist()

    assert steps_of(2, exit_threshold=2.0) == [3, 3]
    assert steps_of(2, exit_threshold=1e-9) == [MOST, MOST]
    assert set(steps_of(8, exit_criterion="argmax_stability", exit_threshold=1)) <= {5, 7, 8}


def test_old_names_of_options_work_with_a_line_that_names_the_new_ones(model, monkeypatch):
    settings = {"num_steps": MOST, "max_new_tokens": 4, "return_dict_in_generate": True, "exit_in_prefill": True}
    settings |= {"exit_criterion": "cosine", "exit_threshold": 2.0}
    new = model.generate(tiny_ids(2, 4), min_steps=3, exit_check_interval=2, **settings).exit_steps
    assert new.tolist() == [[3] * 4] * 2
    old = {"exit_first_step": 3, "exit_every": 2}
    said = []
    monkeypatch.setattr("model.configuration_megatransformer_text.logger.warning_once", said.append)
    by_keyword = model.generate(tiny_ids(2, 4), **old, **settings).exit_steps
    assert said == [
        "exit_first_step is now called min_steps; the old name will not be known to the next version",
        "exit_every is now called exit_check_interval; the old name will not be known to the next version",
    ]
    by_config = model.generate(tiny_ids(2, 4), GenerationConfig(**old, **settings)).exit_steps
    assert torch.equal(by_keyword, new) and torch.equal(by_config, new)
    recurrence = RecurrenceConfig(exit_first_step=3, exit_every=2)
    assert (recurrence.min_steps, recurrence.exit_check_interval, recurrence.exit_every) == (3, 2, 2)
    assert RecurrenceConfig.from_dict(old).to_dict() == recurrence.to_dict()
    assert "exit_every" not in recurrence.to_dict()
    with pytest.raises(ValueError, match="exit_every and exit_check_interval are two names of the same option; give"):
        model.generate(tiny_ids(2, 4), exit_every=2, exit_check_interval=2, **settings)
    with pytest.raises(ValueError, match="exit_check_interval"):
        RecurrenceConfig(exit_every=0)


def test_depth_of_each_token_is_reported_without_exits_too(model):
    assert model(tiny_ids(2, 4), num_steps=3).exit_steps.tolist() == [3, 3]
    assert model(tiny_ids(2, 4), num_steps=torch.tensor([4, 2])).exit_steps.tolist() == [4, 2]
    out = model.generate(tiny_ids(2, 4), num_steps=3, max_new_tokens=2, return_dict_in_generate=True)
    assert out.exit_steps.tolist() == [[3, 3], [3, 3]]
    plain = tiny_model(num_core_layers=0)
    assert plain(tiny_ids(2, 4)).exit_steps is None


# ------------------------------------------------------------------------------------------------ rows that have exited


@pytest.mark.parametrize("policy", ["full", "ring", "last", "first", "residual"])
@pytest.mark.parametrize("name", CRITERIA)
def test_rows_that_exit_equal_each_alone_with_that_number_of_steps(model, name, policy):
    """Invariant 4: the row's own logits, and those of later tokens through the cache that it has left."""
    ids, cache = tiny_ids(4, 8), RecurrentCache(model.config, policy)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[2, :3] = 0
    exits = for_forward(exit_criterion=name, exit_threshold=THRESHOLDS[name], num_steps=MOST)
    with torch.no_grad():
        out = model(ids[:, :6], attention_mask=mask[:, :6], cache=cache, **exits)
        kept = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=False, logits_to_keep=1, **exits).logits
    later = [logits_of(model, ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache) for i in (6, 7)]
    for row, steps in enumerate(out.exit_steps.tolist()):
        alone, real = RecurrentCache(model.config, policy), mask[row].bool()
        own = ids[row : row + 1][:, real]
        expected = logits_of(model, own[:, :-2], num_steps=steps, cache=alone)
        torch.testing.assert_close(out.logits[row][real[:6]], expected[0], **CLOSE)
        torch.testing.assert_close(kept[row, 0], expected[0, -1], **CLOSE)
        for i, ours in enumerate(later):
            expected = logits_of(model, own[:, i - 2 :][:, :1], cache=alone)
            torch.testing.assert_close(ours[row], expected[0], **CLOSE)


@pytest.mark.parametrize("name", ["kl_divergence", "latent_difference"])
def test_rows_that_have_exited_do_no_more_work(model, name):
    """Rows through the core, and through the coda: a check reads each row that is still there, and nothing is read
    twice; a criterion on the state reads all rows once, at the end.
    """
    through = {"core": [], "coda": []}
    hooks = [
        getattr(model.model, part).register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(out)))
        for part, rows in through.items()
    ]
    with torch.no_grad():
        exits = for_forward(exit_criterion=name, exit_threshold=THRESHOLDS[name])
        steps = model(tiny_ids(4, 6), num_steps=MOST, **exits).exit_steps
    for hook in hooks:
        hook.remove()
    active = [int((steps > step).sum()) for step in range(int(steps.max()))]
    assert through["core"] == active and active[-1] < 4
    assert through["coda"] == (active if name == "kl_divergence" else [4])


def test_rows_with_a_budget_and_an_exit_stop_at_the_first_of_both(model):
    ids, exits = tiny_ids(4, 6), for_forward(exit_criterion="cosine", exit_threshold=THRESHOLDS["cosine"])
    free = model(ids, num_steps=MOST, **exits).exit_steps
    budgets = torch.tensor([1, MOST, 2, MOST])
    assert model(ids, num_steps=budgets, **exits).exit_steps.tolist() == torch.minimum(free, budgets).tolist()
    checked_late = for_forward(exit_criterion="kl_divergence", min_steps=3, exit_threshold=THRESHOLDS["kl_divergence"])
    out = model(ids, num_steps=budgets, **checked_late)
    for row, steps in enumerate(out.exit_steps.tolist()):
        expected = logits_of(model, ids[row : row + 1], num_steps=steps)[0]
        torch.testing.assert_close(out.logits[row], expected, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- `generate`


def by_hand(model, ids, new_tokens, num_steps=MOST, policy=None, choose=lambda logits: logits.argmax(-1), **exits):
    """Token by token, one row: the prompt at full depth, then each token where it exits.

    Returns:
        The new tokens, their logits and their steps.
    """
    cache, tokens, scores, steps = RecurrentCache(model.config, policy), [], [], []
    chunk = ids
    for _ in range(new_tokens):
        with torch.no_grad():
            out = model(chunk, cache=cache, num_steps=num_steps, **(for_forward(**exits) if tokens else {}))
        scores.append(out.logits[0, -1])
        steps.append(int(out.exit_steps[0]))
        tokens.append(int(choose(out.logits[0, -1])))
        chunk = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(scores), steps


@pytest.mark.parametrize("policy", ["full", "ring", "last", "first", "residual"])
@pytest.mark.parametrize("name", CRITERIA)
def test_adaptive_generation_in_a_batch_equals_each_row_by_hand(model, name, policy):
    """Left padding, greedy: tokens, logits and steps of each row."""
    prompts = [tiny_ids(1, length, seed=length) for length in (6, 4, 5)]
    batch = torch.cat([torch.nn.functional.pad(ids, (6 - ids.shape[1], 0), value=PAD) for ids in prompts])
    exits = {"exit_criterion": name, "exit_threshold": THRESHOLDS[name]}
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(
        batch, attention_mask=(batch != PAD).long(), num_steps=MOST, cache_policy=policy, **exits, **settings
    )
    assert len(out.exit_steps[:, 1:].unique()) > 1
    for row, ids in enumerate(prompts):
        tokens, logits, steps = by_hand(model, ids, 8, policy=policy, **exits)
        assert out.sequences[row, 6:].tolist() == tokens
        assert out.exit_steps[row].tolist() == steps
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], logits, **CLOSE)


def test_sampling_with_exits_draws_from_the_same_distributions(model):
    """One row, seeded: against a draw by hand from the logits where the token exits."""
    ids, exits = tiny_ids(1, 6), {"exit_criterion": "kl_divergence", "exit_threshold": 0.02}
    torch.manual_seed(5)
    out = model.generate(
        ids, num_steps=MOST, max_new_tokens=10, do_sample=True, top_k=0, return_dict_in_generate=True, **exits
    )
    torch.manual_seed(5)
    tokens, _, steps = by_hand(model, ids, 10, choose=lambda logits: torch.multinomial(logits.softmax(-1), 1), **exits)
    assert out.sequences[0, 6:].tolist() == tokens and out.exit_steps[0].tolist() == steps


def test_options_come_from_keyword_then_generation_config_then_config(model):
    ids, settings = tiny_ids(2, 5), {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}

    def steps_of(**kwargs):
        return model.generate(ids, num_steps=MOST, **settings, **kwargs).exit_steps.tolist()

    by_keyword = {
        threshold: steps_of(exit_criterion="cosine", exit_threshold=threshold) for threshold in (0.01, 0.05, 0.2)
    }
    assert len({str(steps) for steps in by_keyword.values()}) == 3
    assert steps_of() == [[MOST] * 6] * 2  # `generate` exits only when asked to
    recurrence = model.config.recurrence
    try:
        recurrence.exit_criterion, recurrence.exit_threshold = "cosine", 0.01
        assert steps_of() == by_keyword[0.01]
        model.generation_config.exit_threshold = 0.05
        assert steps_of() == by_keyword[0.05]
        assert steps_of(exit_threshold=0.2) == by_keyword[0.2]
        assert steps_of(exit_criterion="none") == [[MOST] * 6] * 2
    finally:
        recurrence.exit_criterion, recurrence.exit_threshold = "none", None
        del model.generation_config.exit_threshold


def test_the_prompt_exits_only_when_told_to(model):
    """All its tokens together."""
    ids = tiny_ids(3, 6)
    exits = {"exit_criterion": "cosine", "exit_threshold": 0.2, "num_steps": MOST}
    settings = {"max_new_tokens": 1, "return_dict_in_generate": True}
    assert model.generate(ids, **exits, **settings).exit_steps.tolist() == [[MOST]] * 3
    in_prefill = model.generate(ids, exit_in_prefill=True, **exits, **settings).exit_steps
    assert in_prefill[:, 0].tolist() == model(ids, **for_forward(**exits)).exit_steps.tolist() != [MOST] * 3
    in_chunks = model.generate(ids, prefill_chunk_size=4, **exits, **settings).exit_steps
    assert in_chunks.tolist() == [[MOST]] * 3


@pytest.mark.parametrize("schedule", [[9, 3, 1, 2], lambda index: [9, 3, 1, 2][min(index, 3)]])
def test_a_schedule_gives_each_new_token_its_steps(model, schedule):
    ids = tiny_ids(1, 5)
    out = model.generate(
        ids, num_steps=4, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        exit_criterion="schedule", exit_schedule=schedule,
    )  # fmt: skip
    assert out.exit_steps.tolist() == [[4, 3, 1, 2, 2, 2]]
    cache, tokens, chunk = RecurrentCache(model.config), [], ids
    for steps in (4, 3, 1, 2, 2, 2):
        tokens.append(logits_of(model, chunk, num_steps=steps, cache=cache)[0, -1].argmax())
        chunk = tokens[-1].view(1, 1)
    assert out.sequences[0, 5:].tolist() == torch.stack(tokens).tolist()


def test_steps_of_beams_are_those_of_the_sequences_returned(model):
    """Each token's steps against the same sequence, fed token by token."""
    ids, exits = tiny_ids(2, 5), {"exit_criterion": "cosine", "exit_threshold": 0.05}
    out = model.generate(
        ids,
        num_steps=MOST,
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        **exits,
    )
    for sequence, steps in zip(out.sequences, out.exit_steps.tolist(), strict=True):
        forced = iter(sequence[5:].tolist())
        _, _, expected = by_hand(
            model, sequence[None, :5], 6, choose=lambda logits, forced=forced: next(forced), **exits
        )
        assert steps == expected


def test_no_steps_are_reported_behind_the_end_of_a_text(model):
    ids = tiny_ids(3, 5)
    free = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 5:]
    end = int(free[0, 2])
    out = model.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=PAD, return_dict_in_generate=True
    )
    for row, tokens in enumerate(free.tolist()):
        length = tokens.index(end) + 1 if end in tokens else 6
        assert out.exit_steps[row].tolist() == [4] * length + [0] * (out.exit_steps.shape[1] - length)
    assert 0 in out.exit_steps


def test_warm_start_begins_where_the_token_before_ended(model):
    """Against `initial_state` by hand; beams carry their state with them."""
    ids, cache = tiny_ids(1, 5), RecurrentCache(model.config)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_steps": 2}
    ours = model.generate(ids, state_warm_start=True, **settings)
    tokens, chunk, state = [], ids, None
    for _ in range(6):
        with torch.no_grad():
            out = model(chunk, cache=cache, num_steps=2, initial_state=state)
        state = out.state[:, -1:]
        tokens.append(int(out.logits[0, -1].argmax()))
        chunk = torch.tensor([tokens[-1:]])
    assert ours[0, 5:].tolist() == tokens != model.generate(ids, **settings)[0, 5:].tolist()

    beams = model.generate(tiny_ids(2, 5), num_beams=3, state_warm_start=True, **settings)
    for row in range(2):
        alone = model.generate(tiny_ids(2, 5)[row : row + 1], num_beams=3, state_warm_start=True, **settings)
        assert torch.equal(beams[row], alone[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_criterion": "patience"}, "exit_criterion 'patience' is unknown; choose one of none, schedule, kl_div"),
        ({"exit_criterion": "cosine", "exit_threshold": 2.5}, "of cosine must be above 0 and at most 2.0, got 2.5"),
        ({"exit_criterion": "kl_divergence", "exit_threshold": 0}, "must be above 0 and at most inf, got 0"),
        ({"exit_criterion": "cosine", "min_steps": 0}, "min_steps must be an integer of at least 1, got 0"),
        ({"exit_criterion": "cosine", "exit_check_interval": 1.5}, "exit_check_interval must be an integer of at leas"),
        ({"exit_criterion": "schedule"}, "needs an exit_schedule"),
        ({"exit_criterion": "cosine", "use_cache": False}, "'cosine' is not possible with use_cache=False"),
        ({"exit_criterion": "cosine", "prompt_lookup_num_tokens": 2}, "not possible with assisted generation"),
        ({"state_warm_start": True, "prompt_lookup_num_tokens": 2}, "state_warm_start is not possible with assisted"),
        ({"exit_criterion": "cosine", "synced_gpus": True}, "not possible with synced_gpus"),
        (
            {"num_steps": torch.tensor([2]), "synced_gpus": True},
            "num_steps with a number per row is not possible with sync",
        ),
        ({"exit_criterion": "probe"}, "needs a model with a probe; train one with trainer: exit_probe"),
        ({"attention_mask": torch.zeros(1, 4)}, "row 0 of the prompt is all padding"),
        ({"attention_mask": torch.ones(1, 3)}, r"has shape \(1, 3\), expected \(batch, sequence\) = \(1, 4\)"),
        ({"noise_level": -1.0}, "noise_level must be at least 0, got -1.0"),
        ({"noise_level": 0.1, "noise_schedule": "sqrt"}, "noise_schedule is 'sqrt', but noise falls with the number"),
        ({"num_steps": torch.tensor([0])}, "at least 1 in every row"),
    ],
)
def test_bad_options_are_one_clear_error(model, options, message):
    with pytest.raises(ValueError, match=message) as error:
        model.generate(tiny_ids(1, 4), max_new_tokens=2, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: ExitOptions("cosine", check_interval=0), "exit_check_interval must be an integer of at least 1"),
        (lambda model: NoiseOptions(-1.0), "noise_level must be at least 0, got -1.0"),
        (lambda model: model(tiny_ids(1, 4), exits=ExitOptions("schedule", schedule=[2])), "give num_steps"),
        (lambda model: model(tiny_ids(1, 4), initial_state="first"), "initial_state is 'first'; give a tensor, or"),
    ],
)
def test_bad_options_of_forward_are_one_clear_error(model, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_model_without_core_has_no_exits():
    with pytest.raises(ValueError, match="has no core to iterate"):
        tiny_model(num_core_layers=0).generate(tiny_ids(1, 4), max_new_tokens=2, exit_criterion="cosine")


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_mixed_in_before_each_step_and_normed():
    """Two steps by hand; the weight in closed form."""
    model, ids = tiny_model(scale=2.0, num_prelude_layers=0, num_coda_layers=0), tiny_ids(1, 3)
    core, embeds, state = model.model.core, model.model.embed_tokens(ids), torch.full((1, 3, 32), 0.3)
    amount = 0.5 * math.sqrt(2 / 5)  # the embedding scale is sqrt(h)
    inputs = []
    hook = core.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    ours = logits_of(model, ids, num_steps=2, initial_state=state, noise_level=0.5)
    hook.remove()
    for step in (0, 1):
        noise = [torch.randn(32, generator=keyed_generator("noise", 0, step, position)) for position in range(3)]
        w = amount / (step + 1)
        state = core.layers[-1].mlp_norm_out((1 - w) * state + w * torch.stack(noise))
        torch.testing.assert_close(inputs[step], state)
        state = logits_states(model, embeds, state)
    expected = model.lm_head(model.model.norm(model.model.norm(state)))
    torch.testing.assert_close(ours, expected, **CLOSE)


def logits_states(model, embeds, state):
    """One core step over a whole sequence."""
    with torch.no_grad():
        return model.model(inputs_embeds=embeds, initial_state=state, num_steps=1, output_states=True).states[-1]


def test_noise_of_a_token_does_not_depend_on_its_batch_or_chunk(model):
    ids, noise = tiny_ids(2, 6), {"num_steps": 3, "noise_level": 0.5}
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), ids), dim=1)
    expected = logits_of(model, ids, **noise)
    assert not torch.allclose(expected, logits_of(model, ids, num_steps=3), atol=1e-2)
    ours = logits_of(model, padded, attention_mask=(padded != PAD).long(), **noise)[:, 2:]
    torch.testing.assert_close(ours, expected, **CLOSE)
    torch.testing.assert_close(logits_of(model, ids[:1], **noise), expected[:1], **CLOSE)
    cache = RecurrentCache(model.config)
    parts = [logits_of(model, part, cache=cache, **noise) for part in ids.split([4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def test_noise_of_level_one_is_as_large_as_the_initial_state():
    noise, config = NoiseOptions(1.0), tiny_config(hidden_size=64)
    mixed = noise.mix(0, torch.zeros(1, 400, 64), torch.arange(400)[None], config)
    assert mixed.std() == pytest.approx(math.sqrt(2 / 5), rel=0.02)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("criterion", ["kl_divergence", "argmax_stability", "latent_difference", "probe"])
def test_padding_on_the_right_is_not_judged(criterion, keep):
    """Rows of a padded batch take the steps that they take alone, and have their logits, those of padding as well."""
    model = tiny_model(scale=3.0)
    model.model.add_exit_probe()
    with torch.no_grad():
        model.model.exit_probe.out.weight.mul_(40)
    threshold = {"kl_divergence": 0.05, "argmax_stability": 2, "latent_difference": 0.3, "probe": 0.5}[criterion]
    ids, lengths = tiny_ids(6, 9), (9, 3, 5, 4, 7, 2)
    mask = torch.tensor([[int(place < length) for place in range(9)] for length in lengths])
    options = {"num_steps": MOST, "exits": ExitOptions(criterion, threshold)}
    with torch.no_grad():
        together = model(ids, attention_mask=mask, logits_to_keep=keep, **options)
        alone = [model(ids[row : row + 1, :length], **options) for row, length in enumerate(lengths)]
        steps = torch.cat([each.exit_steps for each in alone])
        whole = model(ids, attention_mask=mask, num_steps=steps).logits
    assert together.exit_steps.tolist() == steps.tolist() and len(set(steps.tolist())) > 1
    torch.testing.assert_close(together.logits, whole[:, -keep:], atol=1e-4, rtol=1e-4)
    for row, (length, each) in enumerate(zip(lengths, alone, strict=True)):
        torch.testing.assert_close(whole[row, :length], each.logits[0], atol=1e-4, rtol=1e-4)
