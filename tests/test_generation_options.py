"""Every option of `generate` in every mode: it changes something, or it is refused."""

import inspect
import json
from functools import cache
from random import Random

import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from model import MegaTransformerForConditionalGeneration
from model.generation_media import READ_BY
from model.modeling_megatransformer import MEDIA_NAMES
from tests.test_writing import Script
from tests.tiny import tiny_model
from tests.tiny_artist import artist_tokenizer
from tests.tiny_writing import ASSISTANT, BEGIN, IMAGE_START, USER, tiny_writer

MODES = ("text", "image", "audio", "any")
PROMPT = torch.tensor([[0, BEGIN, USER, 20, 21, ASSISTANT], [BEGIN, USER, 22, 23, 24, ASSISTANT]])
START = PROMPT.shape[1]
EXITS = {"exit_criterion": "kl_divergence", "velocity_threshold": 0.9, "exit_threshold": 0.5, "num_steps": 6}
TEXT_EXITS = {name: value for name, value in EXITS.items() if name != "velocity_threshold"}
SAMPLING = {"do_sample": True}
DRAWS = {"logits_processor": LogitsProcessorList([Script(START, {1: IMAGE_START}, {1: IMAGE_START})])}


@cache
def model() -> MegaTransformerForConditionalGeneration:
    return tiny_writer(scale=2.0)


class Recorder:
    """A streamer, a receiver of chunks, and what stands in for compiling."""

    def __init__(self):
        self.calls = []

    def put(self, value) -> None:
        self.calls.append(tuple(value.shape))

    def end(self) -> None:
        self.calls.append("end")

    def __call__(self, *args, **kwargs) -> None:
        self.calls.append("called")


class Stops:
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)


TOKENIZER = artist_tokenizer()
LETTERS = [TOKENIZER.decode([token]) for token in range(15, 40)]
# What is given, and beside what.
EFFECTS = {
    "max_new_tokens": (4, {}),
    "max_length": (START + 4, {}),
    "num_return_sequences": (2, SAMPLING),
    "do_sample": (True, {"num_return_sequences": 2}),
    "pad_token_id": (39, {}),  # what is padding in the prompt
    "eos_token_id": ([0], {}),  # then padding is none
    "bos_token_id": (5, {"inputs": None}),
    "return_dict_in_generate": (False, {}),
    "streamer": (Recorder(), {"inputs": PROMPT[1:]}),
    "synced_gpus": (True, {"num_steps": torch.tensor([1, 2])}),
    "num_steps": (1, {}),
    "exit_criterion": ("argmax_stability", {"num_steps": 30}),
    "exit_threshold": (50.0, {"exit_criterion": "kl_divergence", "exit_in_prefill": True, "num_steps": 6}),
    "min_steps": (5, EXITS),
    "exit_check_interval": (4, EXITS),
    "exit_in_prefill": (True, EXITS),
    "exit_schedule": ([1], {"exit_criterion": "schedule"}),
    "noise_level": (0.9, {}),
    "noise_schedule": ("sqrt", {}),
    "state_warm_start": (True, {}),
    "initial_state": (torch.ones(1, 1, 32), {}),
    "use_cache": (False, {"cache_policy": "last"}),
    "cache_policy": ("last", {}),
    "num_kept_steps": (1, {"cache_policy": "ring"}),
    "num_kept_tokens": (1, {"cache_policy": "first"}),
    "cache_implementation": ("static", {}),
    "max_cache_len": (99, {"cache_implementation": "static"}),
    "compile_config": (CompileConfig(), {"cache_implementation": "static"}),
    "prefill_chunk_size": (2, {"cache_policy": "last"}),
    "disable_compile": (True, {"cache_implementation": "static", "compile_config": CompileConfig()}),
    "num_flow_steps": (1, DRAWS),
    "flow_temperature": (0.1, DRAWS),
    "flow_seeds": ([8, 9], DRAWS),
    "on_chunk": (Recorder(), DRAWS),
    "chunk_size": (1, {**DRAWS, "on_chunk": Recorder()}),
    "velocity_threshold": (0.5, {**DRAWS, "exit_criterion": "kl_divergence", "num_steps": 6}),
    "guidance_scale": (3.0, DRAWS),
    "contrast_strength": (5.0, {**DRAWS, "num_steps": 6}),
    "contrast_step": (4, {**DRAWS, "num_steps": 6, "contrast_strength": 5.0}),
    "contrast_alpha": (1.0, {"num_steps": 6, "contrast_strength": 50.0}),
    # Refused: how they change what is generated, test_wavefront and test_wavefront_media say.
    "decoding": ("wavefront", {"state_warm_start": True}),
    "draft_steps": (2, {}),
    "latent_tolerance": (0.5, {}),
    "logits_processor": (DRAWS["logits_processor"], {}),
    "stopping_criteria": (StoppingCriteriaList([Stops()]), {}),
    "prefix_allowed_tokens_fn": (lambda row, ids: [20], {}),
    "stop_strings": (LETTERS, {"tokenizer": TOKENIZER}),
    "tokenizer": (TOKENIZER, {"stop_strings": LETTERS}),
    "temperature": (50.0, SAMPLING),
    "top_k": (1, SAMPLING),
    "top_p": (0.01, SAMPLING),
    "min_p": (0.99, SAMPLING),
    "top_h": (0.01, SAMPLING),
    "typical_p": (0.01, SAMPLING),
    "epsilon_cutoff": (0.5, SAMPLING),
    "eta_cutoff": (0.9, SAMPLING),
    "repetition_penalty": (1e-3, {}),
    "encoder_repetition_penalty": (1e3, {}),
    "bad_words_ids": ([[token] for token in range(15, 38)], {}),
    "no_repeat_ngram_size": (1, {"repetition_penalty": 1e-3}),
    "encoder_no_repeat_ngram_size": (1, {"encoder_repetition_penalty": 1e3}),
    "min_length": (START + 5, {"eos_token_id": list(range(15, 40))}),
    "min_new_tokens": (5, {"eos_token_id": list(range(15, 40))}),
    "forced_bos_token_id": (20, {"inputs": torch.tensor([[BEGIN]])}),
    "forced_eos_token_id": (20, {}),
    "exponential_decay_length_penalty": ((1, 50.0), {}),
    "suppress_tokens": (list(range(15, 38)), {}),
    "begin_suppress_tokens": (list(range(15, 38)), {}),
    "sequence_bias": ([[[20], 100.0]], {}),
    "watermarking_config": ({"bias": 50.0, "seeding_scheme": "lefthash"}, {}),
    "max_time": (1e-9, {}),
}
# Tested by themselves.
INPUTS = {
    "inputs",
    "inputs_embeds",
    "generation_config",
    "input_ids",
    "attention_mask",
    "cache",
    "past_key_values",
    "mm_encoder_outputs",
}
INPUTS |= {*MEDIA_NAMES} - {"flow_seeds", "num_targets_in_batch"}


def every_option() -> set[str]:
    """All that `generate` may be given by name."""
    functions = (GenerationMixin.generate, MegaTransformerForConditionalGeneration.generate)
    functions += (model().forward, model().prepare_inputs_for_generation)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names |= {name for name in vars(GenerationConfig()) if not name.startswith("_")} | READ_BY.keys()
    return names - {"self", "args", "kwargs", "generation_mode", "generation_config", "transformers_version"} - INPUTS


def outcome(mode: str, monkeypatch, **options) -> object:
    """All that a caller can see of what was generated."""
    compiled = Recorder()
    monkeypatch.setattr(type(model().model), "compile_units", compiled)
    recorders = [value for value in options.values() if isinstance(value, Recorder)]
    for recorder in recorders:
        recorder.calls.clear()
    asked = {"inputs": PROMPT, "return_dict_in_generate": True, "do_sample": False}
    if not {"max_length", "max_new_tokens"} & options.keys() and mode in ("text", "any"):
        asked["max_new_tokens"] = 7
    rows = 2 if "inputs" not in options else 1 if options["inputs"] is None else len(options["inputs"])
    if mode != "text":
        asked |= {"generation_mode": mode, "flow_seeds": list(range(rows * options.get("num_return_sequences", 1)))}
    torch.manual_seed(3)
    found = model().generate(**{**asked, **options})
    seen = [list(recorder.calls) for recorder in [compiled, *recorders]]
    if isinstance(found, torch.Tensor):
        return found.tolist(), seen
    latents = {name: [it.tolist() for it in parts] for name, parts in (found.get("latents") or {}).items()}
    cache = found.past_key_values
    in_cache = [layer.buffer.shape for layer in cache.layers], float(cache.layers[-1].buffer.sum()), cache.max_length
    return found.sequences.tolist(), latents, found.exit_steps.tolist(), in_cache, seen


def problem_of(mode: str, name: str, monkeypatch) -> str | None:
    """What is wrong with an option in a mode, if anything is."""
    value, beside = EFFECTS.get(name, (3, {}))
    beside = {key: it for key, it in beside.items() if mode in READ_BY.get(key, MODES)}
    is_read = mode in READ_BY.get(name, ("text", "drafts"))
    try:
        changed = outcome(mode, monkeypatch, **{**beside, name: value})
    except ValueError as error:
        return None if is_read or f"{name} has no effect" in str(error) else str(error)
    if not is_read:
        return "is taken in silence"
    try:
        return "changes nothing" if outcome(mode, monkeypatch, **beside) == changed else None
    except ValueError:
        return None  # it is not possible without the option


CELLS = [(mode, name) for mode in MODES for name in sorted(every_option()) if mode != "text" or name in READ_BY]
READ = [(mode, name) for mode, name in CELLS if mode in READ_BY.get(name, ("text", "drafts"))]


@pytest.mark.parametrize("mode", MODES)
def test_an_option_that_a_mode_does_not_read_is_refused(monkeypatch, mode):
    """Whatever there is."""
    problems = {cell: problem_of(*cell, monkeypatch) for cell in CELLS if cell[0] == mode and cell not in READ}
    assert {cell: problem for cell, problem in problems.items() if problem} == {}


def test_a_random_option_that_a_mode_reads_changes_something(monkeypatch):
    problems = {cell: problem_of(*cell, monkeypatch) for cell in Random(0).sample(READ, 12)}
    assert {cell: problem for cell, problem in problems.items() if problem} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), READ)
def test_each_option_that_a_mode_reads_changes_something(monkeypatch, mode, name):
    assert problem_of(mode, name, monkeypatch) is None


def test_each_option_that_is_read_is_tried():
    assert {name for name, loops in READ_BY.items() if loops} - INPUTS == EFFECTS.keys()


# ------------------------------------------------------------------------------------------------------ what arrives


@pytest.mark.parametrize("mode", MODES)
def test_a_streamer_gets_all_tokens_and_ends(mode):
    streamer = TextIteratorStreamer(TOKENIZER, timeout=0)
    most = {} if mode in ("image", "audio") else {"max_new_tokens": 4}
    options = {"generation_mode": mode, "return_dict_in_generate": True, "streamer": streamer, **most}
    ids = model().generate(PROMPT[1:], guidance_scale=None if mode == "text" else 1, **options).sequences[0]
    text = "".join(streamer)  # which would fail where no end comes
    assert text == TOKENIZER.decode(ids)


def test_a_text_of_any_mode_stops_at_a_string():
    """Which is that of the second token that would be written."""
    options = {"generation_mode": "any", "guidance_scale": 1, "max_new_tokens": 6, "eos_token_id": None}
    whole = model().generate(PROMPT[1:], **options).sequences[0, START:].tolist()
    stop = TOKENIZER.decode(whole[1:2])
    stopped = model().generate(PROMPT[1:], **options, stop_strings=stop, tokenizer=TOKENIZER)
    assert whole[0] != whole[1] and stopped.sequences[0, START:].tolist() == whole[:2]


@pytest.mark.parametrize("mode", ["image", "audio", "any"])
def test_media_are_refused_where_ranks_wait_for_each_other(monkeypatch, mode):
    """As transformers finds out, unless the caller says that all ranks do the same."""
    options = {"generation_mode": mode, "guidance_scale": 1, "max_new_tokens": 6}
    for name, found in (("is_deepspeed_zero3_enabled", True), ("is_fsdp_managed_module", False)):
        monkeypatch.setattr(f"model.generation_text.{name}", lambda *args, found=found: found)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *args: 2)
    with pytest.raises(ValueError, match="media are not written under ZeRO-3 or FSDP"):
        model().generate(PROMPT, **options)
    assert model().generate(PROMPT, **options, synced_gpus=False).sequences.shape[1] <= START + 6


def test_positional_arguments_are_those_of_transformers():
    stops = StoppingCriteriaList([Stops()])
    found = model().generate(PROMPT, GenerationConfig(max_new_tokens=5), None, stops)
    assert torch.equal(found, model().generate(PROMPT, max_new_tokens=5, stopping_criteria=stops))
    with pytest.raises(ValueError, match="stopping_criteria has no effect in generation_mode 'image'"):
        model().generate(PROMPT, None, None, stops, generation_mode="image")
    with pytest.raises(TypeError, match="too many positional arguments"):
        model().generate(PROMPT, *[None] * 20)


BEAMS = "num_beams has no effect in generation_mode '{mode}', whose latents have no scores to compare beams by; leave"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_steps": 2}, "min_steps has no effect with exit_criterion 'none'"),
        ({"exit_threshold": 0.1}, "exit_threshold has no effect with exit_criterion 'none'"),
        (
            {"exit_criterion": "cosine", "exit_schedule": [1]},
            "exit_schedule has no effect with exit_criterion 'cosine'",
        ),
        ({"exit_criterion": "schedule", "exit_schedule": []}, "'schedule' needs an exit_schedule"),
        ({"exit_criterion": "schedule", "exit_schedule": [4]}, "takes 4 steps for new token 1, but num_steps is 3; ra"),
        ({"cache_policy": "last", "use_cache": False}, "cache_policy has no effect with use_cache=False"),
        ({"state_warm_start": True, "initial_state": torch.ones(1, 1, 32)}, "initial_state has no effect with state_w"),
        ({"generation_mode": "image", "velocity_threshold": 0.1}, "velocity_threshold has no effect without an exit_c"),
        ({"generation_mode": "image", "inputs_embeds": torch.ones(1, 2, 32)}, "inputs_embeds has no effect"),
        (
            {"generation_config": GenerationConfig(num_beams=2), "generation_mode": "image"},
            "'image', whose latents have",
        ),
        *[({"num_beams": 2, "generation_mode": mode}, BEAMS.format(mode=mode)) for mode in ("image", "audio", "any")],
    ],
)
def test_options_without_effect_beside_others_are_refused(options, message):
    inputs = () if "inputs_embeds" in options else (PROMPT,)
    with pytest.raises(ValueError, match=message):
        model().generate(*inputs, num_steps=3, **{"max_new_tokens": 6, **options})


def test_a_generation_config_may_have_the_depth_of_rows():
    """Beside one of the model's."""
    ours = tiny_writer(scale=2.0)
    ours.generation_config.num_steps = torch.tensor([3, 3])
    config = GenerationConfig(max_new_tokens=3, num_steps=torch.tensor([2, 5]), return_dict_in_generate=True)
    assert ours.generate(PROMPT, config).exit_steps.tolist() == [[2] * 3, [5] * 3]


@pytest.mark.parametrize("options", [{"noise_level": 0.5}, {"initial_state": torch.ones(1, 1, 32)}], ids=str)
def test_options_of_the_core_need_one(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} was given, but this model has no core to iterate"):
        tiny_model(num_core_layers=0).generate(PROMPT, max_new_tokens=2, **options)


def test_a_saved_generation_config_keeps_depth_and_exits(tmp_path):
    """Of texts and media."""
    ours = tiny_writer(scale=2.0)
    said = {"num_steps": 6, "exit_criterion": "kl_divergence", "exit_threshold": 0.5, "num_flow_steps": 1}
    options = {"inputs": PROMPT, "return_dict_in_generate": True, "max_new_tokens": 6}
    media = {"generation_mode": "image", "flow_seeds": [1, 2], "guidance_scale": 2}
    text_options = {name: value for name, value in said.items() if name != "num_flow_steps"}
    text, image = ours.generate(**options, **text_options), ours.generate(**options, **media, **said)
    for name, value in said.items():
        setattr(ours.generation_config, name, value)
    ours.save_pretrained(tmp_path)
    ours = MegaTransformerForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = ours.generate(**options)
    assert torch.equal(again.sequences, text.sequences) and torch.equal(again.exit_steps, text.exit_steps)
    again = ours.generate(**options, **media)
    torch.testing.assert_close(again.latents["image"], image.latents["image"])
    assert torch.equal(again.exit_steps, image.exit_steps) and len(image.exit_steps.unique()) > 1


def test_a_generation_config_of_older_code_keeps_its_depth(tmp_path):
    """Of a file with the mark at which transformers leaves out what it does not know."""
    ours = tiny_writer(scale=2.0)
    ours.generation_config.num_steps = 2
    ours.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"_from_model_config": True, **json.loads(path.read_text())}))
    options = {"inputs": PROMPT[1:], "max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True}
    for depth in (2, 3):  # then that of the configuration
        ours = MegaTransformerForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert ours.generate(**options).exit_steps.tolist() == [[depth] * 3]
        path.unlink(missing_ok=True)


COPIES = [{}, {"num_beams": 2, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}]


@pytest.mark.parametrize("copies", COPIES, ids=str)
@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("option", ["num_steps", "initial_state", "initial_state of all"])
def test_options_of_rows_go_with_their_copies(option, static, copies):
    """Each row is the row alone with its own."""
    values = {
        "num_steps": torch.tensor([2, 5]),
        "initial_state": torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, 1, 32),
    }
    values["initial_state of all"] = torch.ones(1, 1, 32)
    options = {"max_new_tokens": 5, "eos_token_id": None, **static, **copies}
    name, value = option.removesuffix(" of all"), values[option]
    together = model().generate(PROMPT, **options, **{name: value})
    count = copies.get("num_return_sequences", 1)
    for row in range(2):
        alone = model().generate(
            PROMPT[row : row + 1],
            attention_mask=(PROMPT[row : row + 1] != 0).long(),
            **options,
            **{name: value[row : row + 1] if len(value) == 2 else value},
        )
        assert torch.equal(together[row * count : (row + 1) * count], alone)


@pytest.mark.parametrize("mode", ["image", "any"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_rows_of_media_have_their_own_depth(mode, scale):
    """With guidance, of which each row has a second one, and several items of a prompt."""
    options = {"generation_mode": mode, "guidance_scale": scale, "do_sample": True, "num_return_sequences": 2}
    options["max_new_tokens"] = 6
    if mode == "any":
        script = LogitsProcessorList([Script(START, *[{0: IMAGE_START}] * 2)])
        options |= {"max_new_tokens": 7, "top_k": 1, "logits_processor": script}
    both = {**options, "logits_processor": LogitsProcessorList([Script(START, *[{0: IMAGE_START}] * 4)])}
    both = both if mode == "any" else options
    together = model().generate(PROMPT[[1, 1]], num_steps=torch.tensor([2, 5]), flow_seeds=[1, 2, 3, 4], **both)
    for row, steps in enumerate((2, 5)):
        seeds = [2 * row + 1, 2 * row + 2]
        alone = model().generate(PROMPT[1:], num_steps=steps, flow_seeds=seeds, **options)
        assert torch.equal(together.exit_steps[2 * row : 2 * row + 2], alone.exit_steps)
        found = together.latents["image"][2 * row : 2 * row + 2]
        assert len(found) == 2
        torch.testing.assert_close(found, alone.latents["image"], atol=2e-3, rtol=1e-3)
