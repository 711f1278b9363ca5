"""The engine: requests that come and go, each of which says what it says alone."""

import gc

import pytest
import torch
from torch import nn

from inference.engine import InferenceEngine, Stream, TextRequest
from model import ExitOptions
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_media import row_of, tiny_inputs, tiny_media_model

SHAPE = {"num_prelude_layers": 2, "num_core_layers": 4, "num_coda_layers": 2}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model(scale=2.0, **SHAPE)


def requests(count: int) -> list[TextRequest]:
    """Of different prompts, lengths, depths, exits and ways to choose tokens."""
    found = []
    for number in range(count):
        options = {"max_new_tokens": 3 + 5 * number % 13, "num_steps": 2 + number % 5}
        if number % 3 == 1:
            options |= {"sampling_seed": number, "temperature": 1.2, "top_k": 30, "top_p": 0.9}
        if number % 3 == 2:
            exits = ExitOptions("kl_divergence", 0.3 if number % 2 else 0.02)
            options |= {"exits": exits, "repetition_penalty": 1.3}
        if number % 4 == 3:
            options |= {"exits": ExitOptions("latent_difference", 0.4, min_steps=2)}
        found.append(TextRequest({"input_ids": tiny_ids(1, 2 + 3 * number % 11, seed=number)}, **options))
    return found


def alone(model: nn.Module, request: TextRequest) -> tuple[list[int], list[int]]:
    """The tokens of a request by plain `generate`, and their steps."""
    ids, exits = request.inputs["input_ids"], request.exits
    options = {"exit_criterion": exits.criterion, "exit_threshold": exits.threshold, "min_steps": exits.min_steps}
    options = {} if exits.criterion == "none" else options
    if request.sampling_seed is not None:
        options |= {"do_sample": True, "sampling_seed": request.sampling_seed, "temperature": request.temperature}
        options |= {"top_k": request.top_k, "top_p": request.top_p}
    output = model.generate(
        ids,
        num_steps=request.num_steps,
        max_new_tokens=request.max_new_tokens,
        repetition_penalty=request.repetition_penalty,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[0, ids.shape[1] :].tolist(), output.exit_steps[0].tolist()


def check_alone(model: nn.Module, streams: list[Stream]) -> None:
    for stream in streams:
        assert (stream.tokens, stream.exit_steps) == alone(model, stream.request)
        ended = stream.tokens[-1] == model.config.eos_token_id
        assert stream.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(
    ("places", "prefill", "short"), [(1, 512, 16), (3, 4, 0), (8, 16, 5), (8, 16, 0), (4, 512, 16)]
)
def test_each_request_says_what_it_says_alone(model, places, prefill, short, drafts):
    """Prompts are read by themselves, or go through the launches of others, or some of each."""
    engine = InferenceEngine(model, places, max_length=32, max_steps=7, prefill_tokens=prefill, drafts=drafts)
    engine.short_prompt = short
    streams = [engine.submit(request) for request in requests(12)]
    engine.run()
    check_alone(model, streams)
    assert engine.is_idle and sorted(engine.free) == list(range(places))


def test_exits_that_differ_from_token_to_token_are_those_alone(model):
    """More requests than places, so that rows of the cache come to others; checks look at what was said before."""
    exits = [ExitOptions("kl_divergence", 1.0), ExitOptions("argmax_stability", 2), ExitOptions("kl_divergence", 0.5)]
    engine = InferenceEngine(model, 3, max_length=32, max_steps=9)
    given = {"max_new_tokens": 8, "num_steps": 9}
    streams = [
        engine.submit(
            TextRequest({"input_ids": tiny_ids(1, 3 + number, seed=number)}, exits=exits[number % 3], **given)
        )
        for number in range(7)
    ]
    engine.run()
    check_alone(model, streams)
    assert len({step for stream in streams for step in stream.exit_steps[1:]}) > 3


@pytest.mark.parametrize("criterion", ["kl_divergence", "latent_difference"])
def test_each_exit_has_its_threshold(model, criterion):
    """Whichever of the requests that are judged together comes first."""
    ids = tiny_ids(1, 4)
    for thresholds in ([1e-9, 1e9], [1e9, 1e-9]):
        engine = InferenceEngine(model, 2, max_length=16, max_steps=6)
        options = [ExitOptions(criterion, threshold, min_steps=2) for threshold in thresholds]
        streams = [engine.submit(TextRequest({"input_ids": ids}, 5, num_steps=6, exits=exits)) for exits in options]
        engine.run()
        steps = {1e-9: [6] * 5, 1e9: [6, 2, 2, 2, 2]}  # a prompt is read with all steps
        assert [stream.exit_steps for stream in streams] == [steps[threshold] for threshold in thresholds]


def test_each_token_comes_with_what_the_model_gives_it(model):
    """Against the logits of one pass without cache over what was said."""
    engine = InferenceEngine(model, 2, max_length=24, max_steps=4)
    options = {"num_steps": 4, "max_new_tokens": 8, "num_likely": 3}
    asked = [TextRequest({"input_ids": tiny_ids(1, 5)}, **options, repetition_penalty=1.7)]
    asked.append(TextRequest({"input_ids": tiny_ids(1, 3)}, **options, sampling_seed=3, temperature=2.0, drafts=False))
    streams = [engine.submit(request) for request in asked]
    engine.run()
    for stream in streams:
        prompt = stream.request.inputs["input_ids"]
        ids = torch.cat((prompt, torch.tensor([stream.tokens])), dim=1)
        with torch.no_grad():
            logits = model(ids, num_steps=4, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1)
        found = [it.log_probability for it in stream.likelihoods]
        assert found == pytest.approx(expected[range(len(found)), stream.tokens].tolist(), abs=1e-4)
        likely = expected.topk(3)
        assert [[token for token, _ in it.likely] for it in stream.likelihoods] == likely.indices.tolist()
        values = [[value for _, value in it.likely] for it in stream.likelihoods]
        torch.testing.assert_close(torch.tensor(values), likely.values, atol=1e-4, rtol=0)
    assert not any(job.read for job in engine.jobs.values())


def test_requests_that_come_later_change_nothing(model):
    engine, streams, left = InferenceEngine(model, 4, max_length=32, max_steps=7), [], requests(10)
    while left or not engine.is_idle:
        if left:
            streams.append(engine.submit(left.pop(0)))
        for _ in range(3):
            engine.step()
    check_alone(model, streams)


def test_whatever_drafts_are_made_the_tokens_are_the_same(model, monkeypatch):
    """Widths change from step to step."""
    widths = torch.randint(0, 4, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()

    def choose(engine):
        for row in engine.scheduler.rows:
            row.draft_steps = widths.pop() or None

    monkeypatch.setattr(InferenceEngine, "_choose_width", choose)
    engine = InferenceEngine(model, 4, max_length=32, max_steps=7, drafts=False)
    streams = [engine.submit(request) for request in requests(12)]
    engine.run()
    check_alone(model, streams)
    assert 0 < engine.scheduler.counts.kept_drafts < engine.scheduler.counts.drafts


def test_no_request_starves_and_places_go_in_order(model):
    engine, begun = InferenceEngine(model, 2, max_length=32, max_steps=7), []
    streams = [engine.submit(request) for request in requests(9)]
    while not engine.is_idle:
        engine.step()
        begun += [number for number, stream in enumerate(streams) if stream.tokens and number not in begun]
    assert begun == list(range(9))


def test_free_places_wait_for_others_no_longer_than_a_reading_takes(model):
    """Seven requests and two places; prompts are read by themselves, the next one in four launches. The first to end
    leaves a place that waits for the other, which ends five launches later. If that takes longer, it is read before the
    eighth, by which half of the places have lost four.
    """
    for others, expected in ((6, 5), (30, 7)):
        engine = InferenceEngine(model, 2, max_length=48, max_steps=4, drafts=False)
        engine.short_prompt = 0
        options = {"num_steps": 1, "end_tokens": (), "max_new_tokens": 6}
        for number in range(7):
            prompt = {"input_ids": tiny_ids(1, 4, seed=number)}
            lengths = {0: {"max_new_tokens": 2}, 1: {"max_new_tokens": 1 + others}, 2: {"num_steps": 4}}
            engine.submit(TextRequest(prompt, **options | lengths.get(number, {})))
        engine.step()
        while not engine.free:
            engine.step()
        waited = 0
        while len(engine.waiting) == 5:
            engine.step()
            waited += 1
        assert waited - 1 == expected


def test_a_long_prompt_is_read_in_parts_beside_others(model):
    engine = InferenceEngine(model, 2, max_length=48, max_steps=4, prefill_tokens=5, drafts=False)
    short = engine.submit(TextRequest({"input_ids": tiny_ids(1, 3)}, max_new_tokens=12, num_steps=2))
    engine.step()
    long = engine.submit(TextRequest({"input_ids": tiny_ids(1, 33, seed=1)}, max_new_tokens=4, num_steps=3))
    before = 0
    while not long.tokens:
        engine.step()
        before = len(short.tokens)
    engine.run()
    assert before >= 3 and short.is_done
    check_alone(model, [short, long])


def test_prompts_with_media_are_read_alone_and_hold_up_no_texts():
    """Three places: the first text is read with the next two; the image between them is the first to be read then, as
    soon as there is one place.
    """
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    model.generation_config.eos_token_id = None
    texts = [TextRequest({"input_ids": tiny_ids(1, 4, seed=seed) % 60}, 2 + seed) for seed in range(4)]
    image = TextRequest(row_of(inputs, 0), max_new_tokens=8)
    assert image.has_media
    engine = InferenceEngine(model, 3, max_length=64, drafts=False)
    engine.short_prompt = 0
    streams = [engine.submit(request) for request in (texts[0], image, *texts[1:])]
    read = []
    while not engine.is_idle:
        engine.step()
        read += [[number for number, it in enumerate(streams) if it.tokens and not any(number in at for at in read)]]
    assert [numbers for numbers in read if numbers] == [[0, 2, 3], [1], [4]]
    assert (
        next(step for step, numbers in enumerate(read) if 1 in numbers) <= model.text_config.recurrence.mean_steps + 1
    )
    for stream in streams:
        given = dict(stream.request.inputs)
        expected = model.generate(**given, max_new_tokens=stream.request.max_new_tokens, do_sample=False)
        assert stream.tokens == expected[0, given["input_ids"].shape[1] :].tolist()


def test_a_model_that_has_served_can_be_trained():
    """Nothing that the engine has made under inference mode stays in the model."""
    model, inputs = tiny_media_model(), row_of(tiny_inputs(), 0)
    engine = InferenceEngine(model, 2, max_length=64)
    for prompt in (inputs, {"input_ids": tiny_ids(1, 4)}):
        engine.submit(TextRequest(prompt, max_new_tokens=4))
    engine.run()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert len(grads) > 10 and all(grad.isfinite().all() for grad in grads)


def test_a_cancelled_request_frees_its_place_at_once(model):
    engine = InferenceEngine(model, 1, max_length=48, max_steps=4)
    first, second, third = (engine.submit(request) for request in requests(3))
    while not first.tokens:
        engine.step()
    engine.cancel(second)
    engine.cancel(first)
    assert engine.free == [0] and not engine.scheduler.rows and list(engine.waiting) == [third]
    items = engine.scheduler.counts.items
    engine.run()
    engine.cancel(third)  # too late to matter
    check_alone(model, [third])
    assert first.finish_reason == second.finish_reason == "cancelled" and second.tokens == []
    assert engine.scheduler.counts.items - items <= third.request.num_steps * len(third.tokens) * 3


def test_a_request_cancelled_while_its_prompt_is_read(model):
    engine = InferenceEngine(model, 2, max_length=48, max_steps=4, prefill_tokens=4)
    long = engine.submit(TextRequest({"input_ids": tiny_ids(1, 20)}, max_new_tokens=4))
    engine.step()
    engine.cancel(long)
    assert engine.reading is None and sorted(engine.free) == [0, 1] and engine.is_idle
    other = engine.submit(requests(1)[0])
    engine.run()
    assert long.tokens == [] and sorted(engine.free) == [0, 1]
    check_alone(model, [other])


def test_a_request_cancelled_while_its_prompt_goes_through_launches(model):
    engine = InferenceEngine(model, 1, max_length=48, max_steps=4)
    first = engine.submit(TextRequest({"input_ids": tiny_ids(1, 12)}, max_new_tokens=4, num_steps=4))
    other = engine.submit(requests(1)[0])
    engine.step()
    assert engine.reading is None and len(engine.scheduler.rows[0].items) == 12
    engine.cancel(first)
    assert engine.free == [0] and not engine.scheduler.rows
    engine.run()
    expected = 4 * 12 + other.request.num_steps * other.request.num_tokens
    assert first.tokens == [] and engine.scheduler.counts.prompt_items == expected
    check_alone(model, [other])


def test_one_of_two_prompts_that_are_read_together_is_cancelled(model):
    engine = InferenceEngine(model, 2, max_length=48, max_steps=4, prefill_tokens=8)
    engine.short_prompt = 0
    streams = [engine.submit(TextRequest({"input_ids": tiny_ids(1, 4, seed=seed)}, num_steps=3)) for seed in (0, 1)]
    engine._begin_reading()
    engine.cancel(streams[0])
    assert len(engine.free) == 1
    engine.run()
    assert streams[0].tokens == [] and sorted(engine.free) == [0, 1]
    check_alone(model, streams[1:])


def test_numbers_below_1_are_refused(model):
    with pytest.raises(ValueError, match="must be at least 1"):
        InferenceEngine(model, 0)


def test_streams_hand_out_what_is_new(model):
    engine = InferenceEngine(model, 1, max_length=32)
    stream, parts = engine.submit(TextRequest({"input_ids": tiny_ids(1, 4)}, max_new_tokens=9)), []
    while not engine.is_idle:
        engine.step()
        parts.append(stream.take())
    assert [token for part in parts for token in part] == stream.tokens and max(map(len, parts)) < 5
    assert stream.take() == []


def test_the_memory_is_that_of_the_formula_and_stays(model):
    engine = InferenceEngine(model, 3, max_length=100, max_steps=6)
    slots = SHAPE["num_prelude_layers"] + 6 * SHAPE["num_core_layers"] + SHAPE["num_coda_layers"]
    assert engine.num_bytes == 2 * slots * 3 * 2 * 128 * 8 * 4  # places, heads, a block of tokens, features, bytes
    buffers = [layer.buffer.data_ptr() for layer in engine.cache.layers]
    for request in requests(20):
        engine.submit(request)
    engine.run()
    assert [layer.buffer.data_ptr() for layer in engine.cache.layers] == buffers
    assert not (engine.jobs or engine.scheduler.rows or engine.waiting)


def test_a_thousand_requests_leave_nothing_behind():
    """About as many tensors live after 1,000 requests, of which some are cancelled, as after the first 100."""
    engine, counts = InferenceEngine(tiny_model(), 8, max_length=32, max_steps=4), []
    for number in range(1000):
        options = {"max_new_tokens": 1 + number % 4, "num_steps": 1 + number % 3}
        exits = ExitOptions("kl_divergence", 0.3) if number % 5 == 0 else ExitOptions()
        prompt = {"input_ids": tiny_ids(1, 1 + number % 6, seed=number)}
        stream = engine.submit(TextRequest(prompt, exits=exits, sampling_seed=number % 2 or None, **options))
        if number % 7 == 0:
            engine.step()
            engine.cancel(stream)
        if number % 100 == 99:
            engine.run()
            del stream, prompt
            gc.collect()
            counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert max(counts) - min(counts) < 20 and sorted(engine.free) == list(range(8))  # a leak would be hundreds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 60}, r"4 \+ 60 tokens are more than a place has, 32"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ({"num_steps": 9}, r"num_steps \(9\) must be at least 1 and at most max_steps, 4"),
        ({"exits": ExitOptions("probe")}, "exit_criterion 'probe' is not possible"),
        ({"exits": ExitOptions("schedule", schedule=[1])}, "exit_criterion 'schedule' is not possible"),
        ({"stop_strings": ["."]}, "stop_strings need a tokenizer"),
    ],
)
def test_what_is_refused(model, options, said):
    engine = InferenceEngine(model, 1, max_length=32, drafts=False)
    with pytest.raises(ValueError, match=said):
        engine.submit(TextRequest({"input_ids": tiny_ids(1, 4)}, **options))
    assert engine.is_idle


def test_models_that_have_no_engine_say_so():
    with pytest.raises(ValueError, match="needs a model with a core"):
        InferenceEngine(tiny_model(num_core_layers=0))
