"""`python -m evaluation.dynamics`: its files against the model called directly, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import normalizers

from evaluation.dynamics import first_core_step, generate_items, main, read_steps, with_decoder_start
from evaluation.dynamics_report import shown
from evaluation.iteration import follow_states, judge_states
from inference.prompts import encode_prompt, encode_question
from model import ExitOptions
from model.core_step import spectral_radius
from model.exit_criteria import EXIT_CRITERIA
from tests.tiny_artist import artist_processor, save_artist, tiny_artist
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer
from tests.tiny_reader import save_reader
from tests.tiny_seq2seq import tiny_seq2seq

PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("text"))


def run(folder, output, *flags):
    argv = [folder, "--output", output, *flags]
    assert main([str(argument) for argument in argv]) == 0
    return json.loads((output / "dynamics.json").read_text())


def test_the_files_hold_what_the_model_does(text_folder, tmp_path, capsys):
    found = run(text_folder, tmp_path / "out", "--prompt", PROMPT, "--num-steps", 4, "--tensorboard")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    inputs = encode_prompt(tokenizer, PROMPT)
    ids = inputs["input_ids"]
    asked = {"use_cache": False, "output_states": True}
    with torch.no_grad():
        states = torch.stack(model(**inputs, num_steps=32, **asked).states)
    assert found["tokens"] == [tokenizer.decode([token]) for token in ids[0]] and found["prompt"] == PROMPT
    assert (found["num_steps"], found["num_followed"]) == (4, 32)

    lengths = states.flatten(1).norm(dim=1)
    updates = states.diff(dim=0).flatten(1)
    assert found["step_sizes"] == pytest.approx((updates.norm(dim=1) / lengths[1:]).tolist(), abs=1e-5)
    cosine = float(updates[1] @ updates[0] / updates[:2].norm(dim=1).prod())
    assert found["angles"][0] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.1)
    residuals = (states[:5] - states[16]).flatten(1).norm(dim=1) / lengths[16]
    assert found["residuals"] == pytest.approx(residuals.tolist(), abs=1e-5)
    for step, read in enumerate(found["lens"], start=1):
        with torch.no_grad():
            probabilities = model(ids, num_steps=step, use_cache=False).logits[0].softmax(-1)
        assert read["step"] == step and read["ids"] == probabilities.argmax(-1).tolist()
        assert read["probabilities"] == pytest.approx(probabilities.amax(-1).tolist(), rel=1e-4)
        assert read["texts"] == [tokenizer.decode([token]) for token in read["ids"]]
    verdict = found["verdict"]
    assert verdict["name"] == judge_states(states, verdict["spectral_radius"]).name

    with torch.no_grad():
        derivative = torch.func.jacfwd(lambda s: eager_step(model, inputs, s))(states[2])
    largest = torch.linalg.eigvals(derivative.reshape(2 * [states[2].numel()])).abs().max()
    assert found["spectral_radii"][2] == pytest.approx(float(largest), rel=0.1)

    files = {path.name for path in (tmp_path / "out").iterdir() if "tfevents" not in path.name}
    assert files == {"dynamics.json", "dynamics.md", "dynamics.png", "lens.png"}
    out = capsys.readouterr().out
    assert out.startswith((tmp_path / "out" / "dynamics.md").read_text()) and f"iteration {verdict['name']}" in out
    assert Image.open(tmp_path / "out" / "lens.png").size[0] > 300
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    assert len(events.Scalars("dynamics/step_size")) == 32 and "dynamics/lens" in events.Tags()["images"]


def eager_step(model, inputs, state):
    """A step of the whole model, computed so that forward derivatives are known."""
    asked = {"num_steps": 1, "use_cache": False, "output_states": True, "output_attentions": True}
    return model(**inputs, **asked, initial_state=state).states[1]


def test_exits_are_those_of_a_prompt_that_ends_there():
    """The last position exits where `forward` with the same criterion stops a row, which judges by it, and of criteria
    that look at all tokens, where there is one.
    """
    model, inputs = tiny_model(), encode_prompt(tiny_tokenizer(), PROMPT)
    _, exits = read_steps(model, inputs, 12, lambda ids: [""] * len(ids))
    assert set(exits) == set(EXIT_CRITERIA) - {"probe", "q_exit"}
    for name in ("kl_divergence", "min_p_kl", "entropy_difference", "argmax_stability"):
        with torch.no_grad():
            expected = model(**inputs, num_steps=12, exits=ExitOptions(name), use_cache=False).exit_steps.item()
        assert exits[name].steps[-1] == expected, name
    with torch.no_grad():
        first = model(inputs["input_ids"][:, :1], num_steps=12, exits=ExitOptions("latent_difference"), use_cache=False)
    assert exits["latent_difference"].steps[0] == first.exit_steps.item()
    assert len({it.steps[-1] for it in exits.values()}) > 1


def test_media_are_read_and_generated(tmp_path):
    """Placeholders are positions like others; one waveform for each depth."""
    folder = save_artist(tmp_path / "model")
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(tmp_path / "a.png")
    image = ["--image", tmp_path / "a.png"]
    found = run(folder, tmp_path / "out", "--prompt", "a", *image, "--mode", "audio", "--num-steps", 2)
    assert found["media"] == [["image", str(tmp_path / "a.png")]] and "<|image|>" in found["tokens"]
    assert len(found["lens"][0]["ids"]) == len(found["position_step_sizes"][0]) == len(found["tokens"])
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("dynamics.json", "dynamics.md", "dynamics.png", "lens.png", "items.png", "item_1.wav", "item_2.wav")
    }


def test_images_by_depth():
    """Those of `generate` with so many steps, from the same noise."""
    model, inputs = tiny_artist(), encode_question(artist_processor(), ([], "a"))
    items, rate = generate_items(model, inputs, "image", 3)
    assert list(items) == [1, 2, 3] and rate is None
    (expected,) = model.generate(**inputs, generation_mode="image", num_steps=2, flow_seeds=[0], do_sample=False).images
    assert np.array_equal(items[2], expected) and not np.array_equal(items[1], expected)


def test_a_core_whose_steps_differ():
    """With an embedding of the step, the captured step is that of each number."""
    model = tiny_model(recurrence={"mean_steps": 3, "step_embedding": "sinusoidal"})
    inputs = encode_prompt(tiny_tokenizer(), PROMPT)
    with torch.no_grad():
        states = torch.stack(model(**inputs, num_steps=3, output_states=True, use_cache=False).states)
        step = first_core_step(model, inputs)
        found = follow_states(lambda state, taken: step.after(taken).take(state), step.state, 3)
    torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(step.take(states[2]), states[3], atol=1e-3)


def test_a_decoder_behind_an_encoder():
    """It is measured at its start token."""
    model, ids = tiny_seq2seq(), torch.tensor([[5, 6, 7]])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    inputs = with_decoder_start(model, {"input_ids": ids})
    assert torch.equal(inputs["decoder_input_ids"], start)
    step = first_core_step(model, inputs)
    with torch.no_grad():
        states = model(input_ids=ids, decoder_input_ids=start, num_steps=2, use_cache=False, output_states=True).states
        torch.testing.assert_close(step.after(0).take(states[0]), states[1], atol=1e-5, rtol=1e-4)
    assert torch.isfinite(spectral_radius(step.take, step.state))


def test_tokens_are_shown_in_plain_characters():
    texts = {" cat": " cat", " ": "' '", "a|b`": "a|b`", "\n": "'\\n'", "日": "\\u65e5", "a long token": "a long.."}
    assert [shown(text) for text in texts] == list(texts.values())


def check_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == ""
    assert found.err.startswith("evaluation.dynamics: error: ") and found.err.count("\n") == 1
    assert message in found.err


def test_bad_input_is_one_line(text_folder, tmp_path, capsys):
    asked = ["--prompt", PROMPT, "--output", tmp_path / "out"]
    plain = save_checkpoint(tmp_path / "plain", num_core_layers=0)
    check_error(capsys, [plain, *asked], "has no core (num_core_layers is 0), so nothing is iterated: give a recurrent")
    first = save_checkpoint(tmp_path / "first", recurrence={"mean_steps": 3, "cache_policy": "first"})
    check_error(capsys, [first, *asked], "the cache policy of this model is 'first'")
    untied = save_checkpoint(tmp_path / "untied", recurrence={"mean_steps": 3, "untied_core": True})
    check_error(capsys, [untied, *asked], "this model has a core for each step (untied_core)")
    check_error(capsys, [text_folder, "--prompt", ""], "the prompt is empty: give --prompt TEXT")
    check_error(capsys, [text_folder, *asked, "--image", tmp_path / "no.png"], "but this model reads text alone")
    check_error(capsys, [text_folder, *asked, "--mode", "image"], "this model writes text alone: leave it out")
    check_error(capsys, [text_folder, *asked, "--num-steps", 0], "--num-steps: 0 is less than 1")
    check_error(capsys, [text_folder, *asked, "--max-prompt-tokens", 2], "tokens, more than 2; shorten it")
    check_error(capsys, [tmp_path / "nowhere", *asked], f"{tmp_path / 'nowhere'} does not exist")
    reader = save_reader(tmp_path / "reader")
    check_error(capsys, [reader, *asked, "--image", tmp_path / "no.png"], "no.png")
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_tokens_is_refused(tmp_path, capsys):
    """Of a tokenizer that knows no spaces, and has no token to begin with."""
    folder = save_checkpoint(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.save_pretrained(folder)
    check_error(
        capsys, [folder, "--prompt", "xx", "--output", tmp_path], "the prompt 'xx' has no tokens: give --prompt"
    )
