"""Texts by the scheduler of items: the tokens, and the steps of each, are those of plain decoding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from inference.engine import InferenceEngine, TextRequest
from model.generation_wavefront import WavefrontRun
from model.item_slots import ItemPlaces
from model.scheduler import Scheduler
from model.step_lora import add_step_lora
from tests.tiny import tiny_config, tiny_ids, tiny_model
from tests.tiny_media import row_of, tiny_inputs, tiny_media_model
from tests.tiny_writing import tiny_writer

SHAPE = {"num_prelude_layers": 2, "num_core_layers": 4, "num_coda_layers": 2}
EXITS = {
    "kl_divergence": 0.3,
    "entropy_difference": 0.3,
    "latent_difference": 0.45,
    "cosine": 0.12,
    "argmax_stability": 2,
    "probe": 0.5,
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found = tiny_model(scale=2.0, **SHAPE)
    found.model.add_exit_probe()
    return found


def prompts(rows: int = 3, tokens: int = 7, seed: int = 0) -> dict:
    """Prompts of different lengths, padded on the left."""
    ids = tiny_ids(rows, tokens, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : (3 * row) % tokens] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both_ways(model: nn.Module, draft_steps: int | str, **options) -> tuple:
    """What plain decoding gives, and a wavefront."""
    options = {"max_new_tokens": 16, "num_steps": 6, "return_dict_in_generate": True, "do_sample": False} | options
    return model.generate(**options), model.generate(**options, decoding="wavefront", draft_steps=draft_steps)


def check_equal(plain, wave) -> None:
    assert torch.equal(plain.sequences, wave.sequences) and torch.equal(plain.exit_steps, wave.exit_steps)


@pytest.fixture
def counts(monkeypatch) -> list:
    """What schedulers have counted."""
    made, make = [], Scheduler.__init__

    def note(scheduler, *args):
        make(scheduler, *args)
        made.append(scheduler.counts)

    monkeypatch.setattr(Scheduler, "__init__", note)
    return made


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("draft_steps", [1, 2, 4, "auto"])
def test_the_tokens_are_those_of_plain_decoding(model, rows, draft_steps, counts):
    check_equal(*both_ways(model, draft_steps, **prompts(rows)))
    assert 0 < counts[0].kept_drafts < counts[0].drafts and counts[0].ticks < rows * 15 * 6


@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_positions_and_norms(position, placement):
    model = tiny_model(scale=1.5, position_embedding=position, norm_placement=placement, final_logit_softcapping=9.0)
    check_equal(*both_ways(model, 2, **prompts()))


@pytest.mark.parametrize("core", [{"injection": "gate"}, {"injection": "add"}, {"step_embedding": "sinusoidal"}])
def test_cores(core):
    check_equal(*both_ways(tiny_model(scale=2.0, recurrence=core, num_prelude_layers=0), 1, **prompts()))


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("draft_steps", [1, 3])
@pytest.mark.parametrize("criterion", EXITS)
def test_exits_are_those_of_plain_decoding(model, criterion, draft_steps, rows, interval):
    options = {"exit_criterion": criterion, "exit_threshold": EXITS[criterion], "exit_check_interval": interval}
    plain, wave = both_ways(model, draft_steps, num_steps=9, min_steps=2, **options, **prompts(rows, seed=3))
    check_equal(plain, wave)
    assert len(plain.exit_steps[:, 1:].unique()) > 1


def test_rows_have_steps_of_their_own(model, counts):
    """And prompts, which exit too, and are longer than a block of the cache."""
    options = {"num_steps": torch.tensor([2, 9, 5]), "exit_criterion": "kl_divergence", "exit_threshold": 0.1}
    check_equal(*both_ways(model, 1, exit_in_prefill=True, **options, **prompts()))
    long = tiny_model(scale=2.0, max_position_embeddings=256, **SHAPE)
    check_equal(*both_ways(long, 1, **prompts(2, 125)))


def test_processors_see_what_is_before_a_token(model):
    options = {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "eos_token_id": [7, 11, 13, 20],
    }
    plain, wave = both_ways(model, 2, **options, **prompts(4))
    check_equal(plain, wave)
    assert (plain.sequences[:, 7:] == 0).any() and not (plain.sequences[:, 7:12] == 0).any()


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_keyed_samples_are_those_of_plain_decoding(model, draft_steps):
    options = {
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 20,
        "sampling_seed": [3, 4, 5],
        "num_return_sequences": 2,
    }
    plain, wave = both_ways(model, draft_steps, **options, **prompts())
    check_equal(plain, wave)
    assert len({tuple(row) for row in plain.sequences[:, 7:].tolist()}) == 6


def test_a_keyed_sample_depends_on_its_row_alone(model):
    options = {"do_sample": True, "max_new_tokens": 10, "num_steps": 3}
    given = prompts()
    together = model.generate(**given, sampling_seed=[3, 4, 5], **options)
    for row in range(3):
        kept = given["attention_mask"][row].bool()
        alone = model.generate(given["input_ids"][row : row + 1, kept], sampling_seed=3 + row, **options)
        assert torch.equal(alone[0, -10:], together[row, -10:])
    assert not torch.equal(together, model.generate(**given, sampling_seed=[3, 4, 6], **options))


def test_keyed_samples_follow_the_distribution(model):
    """First tokens of 4,000 copies: their frequencies are the probabilities, by a chi-squared test."""
    ids, count = prompts(1)["input_ids"], 4000
    options = {"do_sample": True, "max_new_tokens": 1, "num_steps": 2, "top_k": 0}
    drawn = model.generate(ids, num_return_sequences=count, sampling_seed=0, **options)[:, -1]
    with torch.no_grad():
        expected = count * model(ids, num_steps=2).logits[0, -1].softmax(-1)
    likely = expected > 10
    found = torch.bincount(drawn, minlength=64).float()
    error = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert likely.sum() > 8 and error < 2 * likely.sum()  # beyond 3 deviations for so many


def test_samples_without_a_seed_follow_the_global_generator(model):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**prompts(), do_sample=True, max_new_tokens=6, decoding="wavefront")

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_entries_that_are_gathered_are_those_of_views(model, monkeypatch):
    """Of one row, where there is a view, too."""
    views = both_ways(model, 1, **prompts(1))
    monkeypatch.setattr(ItemPlaces, "_stride", lambda places: None)
    check_equal(*both_ways(model, 1, **prompts(1)))
    check_equal(*views)


def test_modules_that_are_not_plain_are_called():
    model = tiny_model(scale=2.0, **SHAPE)
    model.model.core.layers[1].attention.register_forward_hook(lambda module, args, output: 1.5 * output)
    check_equal(*both_ways(model, 1, **prompts()))
    tuned = get_peft_model(tiny_model(scale=2.0, **SHAPE), LoraConfig(target_modules=["qkv_proj", "down_proj"], r=2))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    check_equal(*both_ways(tuned, 1, **prompts()))


def test_its_cache_goes_on_as_that_of_plain_decoding(model):
    outputs = both_ways(model, 1, **prompts(1))
    more = tiny_ids(1, 3, seed=9)
    found = []
    for output, decoding in zip(outputs, ("plain", "wavefront"), strict=True):
        ids = torch.cat((output.sequences, more), dim=1)
        cache = output.past_key_values
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        found.append(model.generate(ids, past_key_values=cache, max_new_tokens=8, num_steps=6, decoding=decoding))
    assert torch.equal(*found)


class Streamer(BaseStreamer):
    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.has_ended = True


def test_a_streamer_sees_final_tokens_alone(model):
    streamer, ids = Streamer(), prompts(1)["input_ids"]
    output = model.generate(ids, max_new_tokens=12, decoding="wavefront", draft_steps=1, streamer=streamer)
    assert streamer.tokens == output[0].tolist() and streamer.has_ended


def test_options_come_from_the_generation_config(model, monkeypatch):
    given, read = [], WavefrontRun.decode
    monkeypatch.setattr(WavefrontRun, "decode", lambda run: given.append(run.loop.draft_steps) or read(run))
    config = GenerationConfig(max_new_tokens=4)
    config.decoding, config.draft_steps = "wavefront", 3
    found = model.generate(**prompts(), generation_config=config)
    assert given == [3] and torch.equal(found, model.generate(**prompts(), max_new_tokens=4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache_policy": "ring", "num_kept_steps": 2}, "cache policy 'ring'"),
        ({"cache_policy": "last"}, "cache policy 'last'"),
        ({"state_warm_start": True}, "state_warm_start"),
        ({"num_beams": 2}, "beams"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "static cache"),
        ({"noise_level": 0.1}, "noise_level"),
        ({"exit_criterion": "schedule", "exit_schedule": [2]}, "schedule"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"output_logits": True, "return_dict_in_generate": True}, "outputs of each step"),
        ({"draft_steps": 0}, "draft_steps must be an integer of at least 1, or 'auto', got 0"),
        ({"decoding": "wave"}, "decoding 'wave' is unknown"),
        ({"decoding": "plain", "draft_steps": 2}, "draft_steps has no effect without decoding='wavefront'"),
        ({"sampling_seed": 3}, "sampling_seed has no effect without do_sample"),
        ({"sampling_seed": [1, 2], "do_sample": True}, "sampling_seed has 2 seeds for 3 prompts"),
        ({"sampling_seed": "x", "do_sample": True}, "sampling_seed must be an integer"),
        ({"sampling_seed": 3, "do_sample": True, "num_beams": 2}, "sampling_seed is not possible with beams"),
    ],
)
def test_what_is_refused(model, options, said):
    with pytest.raises(ValueError, match=said):
        model.generate(**prompts(), **{"max_new_tokens": 4, "decoding": "wavefront", **options})


def test_a_ring_that_keeps_all_steps_is_as_good(model):
    check_equal(*both_ways(model, 1, cache_policy="ring", num_kept_steps=6, **prompts()))


def test_padding_behind_tokens_is_refused(model):
    given = prompts()
    given["attention_mask"][0, 2] = 0
    with pytest.raises(ValueError, match="padding on the left alone"):
        model.generate(**given, decoding="wavefront")


def test_models_that_have_no_wavefront_say_so():
    with pytest.raises(ValueError, match="without core"):
        tiny_model(num_core_layers=0).generate(**prompts(), decoding="wavefront")
    model = tiny_model()
    add_step_lora(model, ["layers.0.mlp.down_proj"], num_steps=2, rank=1, alpha=1)
    with pytest.raises(ValueError, match="adapters of single steps"):
        model.generate(**prompts(), decoding="wavefront")
    eager = type(model)(tiny_config(attn_implementation="eager")).eval()
    with pytest.raises(ValueError, match="backend 'eager'; use sdpa"):
        eager.generate(**prompts(), decoding="wavefront")


def test_prompts_with_media_and_those_of_a_model_that_writes_media():
    """Texts of both; and an engine that reads media."""
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    model.generation_config.eos_token_id = None
    check_equal(*both_ways(model, 1, **inputs))
    writer, texts = tiny_writer(scale=2.0), prompts()
    texts["input_ids"] = (20 + texts["input_ids"] % 8) * texts["attention_mask"]  # of its smaller vocabulary
    check_equal(*both_ways(writer, 1, **texts))
    with pytest.raises(ValueError, match="decoding has no effect in generation_mode 'any'"):
        writer.generate(**texts, generation_mode="any", decoding="wavefront")
    engine = InferenceEngine(model, 2, max_length=64, max_steps=6)
    rows = [row_of(inputs, row) for row in range(len(inputs["input_ids"]))]
    streams = [engine.submit(TextRequest(row, max_new_tokens=8, num_steps=6)) for row in rows]
    engine.run()
    for row, stream in zip(rows, streams, strict=True):
        expected = model.generate(**row, max_new_tokens=8, num_steps=6, do_sample=False)
        assert stream.tokens == expected[0, row["input_ids"].shape[1] :].tolist()
