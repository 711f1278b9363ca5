"""The rules of sampling, by hand, on our model's own logits: transformers' `generate` with our cache."""

import math

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from model import RecurrentCache
from tests.tiny import PAD, for_forward, tiny_ids, tiny_model
from tests.tiny_language_model import tiny_model as byte_model
from tests.tiny_language_model import tiny_tokenizer

STEPS = {"num_steps": 3}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(scale=2.0)
    model.generation_config.eos_token_id = None
    return model


def scores_of(model, ids, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and what the rules made of them before the draw, of the first new token: (rows, vocab) each."""
    settings = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "output_scores": True, "output_logits": True}
    out = model.generate(ids, return_dict_in_generate=True, **STEPS, **settings | options)
    with torch.no_grad():
        expected = model(ids, attention_mask=options.get("attention_mask"), **STEPS).logits[:, -1]
    torch.testing.assert_close(out.logits[0], expected, atol=1e-4, rtol=1e-4)
    return out.logits[0], out.scores[0]


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_at_least_p(model, top_p):
    logits, scores = scores_of(model, tiny_ids(3, 6), top_p=top_p)
    for row in range(3):
        p = logits[row].double().softmax(-1).tolist()
        order, kept, total = sorted(range(len(p)), key=lambda token: -p[token]), set(), 0.0
        for token in order:
            kept.add(token)
            total += p[token]
            if total >= top_p:
                break
        assert set(scores[row].isfinite().nonzero().flatten().tolist()) == kept


def test_temperature_divides_and_top_k_keeps_k(model):
    logits, scores = scores_of(model, tiny_ids(2, 6), temperature=0.7)
    torch.testing.assert_close(scores, logits / 0.7)
    _, scores = scores_of(model, tiny_ids(2, 6), top_k=5)
    assert scores.isfinite().sum(-1).tolist() == [5, 5]
    assert torch.equal(scores.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_zero_and_below_are_refused(model, temperature):
    with pytest.raises(ValueError, match="temperature"):
        model.generate(tiny_ids(1, 4), do_sample=True, temperature=temperature, max_new_tokens=1, **STEPS)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_tokens_that_were_there(model):
    ids = tiny_ids(1, 6)
    logits, scores = scores_of(model, ids, repetition_penalty=1.5)
    for token, (before, after) in enumerate(zip(logits[0].tolist(), scores[0].tolist(), strict=True)):
        if token in ids:
            before = before / 1.5 if before > 0 else before * 1.5
        assert after == pytest.approx(before, abs=1e-5)


def test_draws_have_the_frequencies_of_the_distribution(model):
    """4000 draws after one prompt, against the probabilities: within 4 standard deviations for each likely token."""
    ids, n = tiny_ids(1, 5), 4000
    torch.manual_seed(0)
    drawn = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=n, **STEPS)[:, -1]
    with torch.no_grad():
        p = model(ids, **STEPS).logits[0, -1].softmax(-1)
    for token in p.topk(8).indices.tolist():
        mean, deviation = n * p[token].item(), math.sqrt(n * p[token].item() * (1 - p[token].item()))
        assert abs(int((drawn == token).sum()) - mean) < 4 * deviation


def test_a_padded_row_is_drawn_from_its_own_distribution(model):
    short, long = tiny_ids(1, 4, seed=1), tiny_ids(1, 7)
    ids = torch.cat((torch.nn.functional.pad(short, (3, 0), value=PAD), long))
    logits, _ = scores_of(model, ids, attention_mask=(ids != PAD).long())
    for row, prompt in enumerate((short, long)):
        with torch.no_grad():
            torch.testing.assert_close(logits[row], model(prompt, **STEPS).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_beams_find_the_best_of_all_continuations(model):
    """As many beams as tokens, two new tokens: an exhaustive search; and the scores are the sums of log p."""
    small = tiny_model(scale=2.0, vocab_size=9, eos_token_id=None, bos_token_id=None)
    ids = tiny_ids(1, 4, high=9)
    out = small.generate(
        ids, num_beams=9, num_return_sequences=3, max_new_tokens=2, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, **STEPS,
    )  # fmt: skip
    with torch.no_grad():
        first = small(ids, **STEPS).logits[0, -1].log_softmax(-1)
        pairs = torch.cat((ids.expand(9, -1), torch.arange(9)[:, None]), dim=1)
        both = first[:, None] + small(pairs, **STEPS).logits[:, -1].log_softmax(-1)
    best = both.flatten().topk(3)
    expected = [[index // 9, index % 9] for index in best.indices.tolist()]
    assert out.sequences[:, 4:].tolist() == expected
    torch.testing.assert_close(out.sequences_scores, best.values, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------- with exits: processors, criteria, streamers


class Ban(LogitsProcessor):
    """One token is never chosen."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.tensor([self.token]), -float("inf"))


class StopAt(StoppingCriteria):
    """A row is done when it is this long."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Collector(BaseStreamer):
    """What was streamed."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_processors_criteria_and_streamers_work_beside_exits(model):
    """Against decoding by hand: no token that is banned, nine tokens in all, each streamed once."""
    ids, exits = tiny_ids(1, 4), {"exit_criterion": "cosine", "exit_threshold": 0.05}
    banned = int(model.generate(ids, max_new_tokens=1, do_sample=False, **STEPS)[0, -1])
    streamer = Collector()
    out = model.generate(
        ids, max_new_tokens=20, do_sample=False, num_steps=8, logits_processor=[Ban(banned)],
        stopping_criteria=[StopAt(9)], streamer=streamer, return_dict_in_generate=True, **exits,
    )  # fmt: skip
    cache, chunk, tokens, steps = RecurrentCache(model.config), ids, [], []
    for _ in range(5):
        with torch.no_grad():
            step = model(chunk, cache=cache, num_steps=8, **(for_forward(**exits) if tokens else {}))
        logits = step.logits[0, -1].clone()
        logits[banned] = -float("inf")
        tokens.append(int(logits.argmax()))
        steps.append(int(step.exit_steps[0]))
        chunk = torch.tensor([tokens[-1:]])
    assert out.sequences[0, 4:].tolist() == tokens and out.exit_steps.tolist() == [steps]
    assert streamer.tokens == [*ids[0].tolist(), *tokens, "end"]


def test_stop_strings_end_a_row():
    """The others go on; behind the end stands padding, which transformers writes where there is an end token too."""
    model, tokenizer = byte_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    ids = torch.randint(40, 90, (6, 5))
    free = model.generate(ids, max_new_tokens=8, do_sample=False, **STEPS)[:, 5:]
    texts = [[tokenizer.decode(token) for token in row] for row in free]
    stop = next(text for row in texts for text in row[1:4] if len(text) == 1 and text.isascii() and text.isalnum())
    out = model.generate(
        ids, max_new_tokens=8, do_sample=False, stop_strings=[stop], tokenizer=tokenizer, eos_token_id=319,
        return_dict_in_generate=True, **STEPS,
    )  # fmt: skip
    lengths = [row.index(stop) + 1 if stop in row else 8 for row in texts]
    assert min(lengths) < max(lengths)
    for row, length in enumerate(lengths):
        new = out.sequences[row, 5:].tolist()
        assert new == free[row, :length].tolist() + [tokenizer.pad_token_id] * (len(new) - length)
        assert out.exit_steps[row].tolist() == [3] * length + [0] * (len(new) - length)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("policy", ["full", "ring", "last", "residual"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_backends_write_the_same_padded_rows_under_every_policy(position, policy):
    """Invariant 2, through the cache, rows of their own depth."""
    ids = torch.cat((tiny_ids(1, 7), torch.nn.functional.pad(tiny_ids(1, 4, seed=1), (3, 0), value=PAD)))
    written = []
    for backend in ("eager", "sdpa", "flex_attention"):
        model = tiny_model(scale=2.0, position_embedding=position, attn_implementation=backend)
        with torch.compiler.set_stance("force_eager"):
            out = model.generate(
                ids, attention_mask=(ids != PAD).long(), max_new_tokens=6, do_sample=False, cache_policy=policy,
                num_steps=torch.tensor([2, 4]), eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        written.append((out.sequences, torch.stack(out.logits)))
    for sequences, logits in written[1:]:
        assert torch.equal(sequences, written[0][0])
        torch.testing.assert_close(logits, written[0][1], atol=1e-4, rtol=1e-4)
