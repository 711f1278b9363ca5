"""`from_pretrained(folder, mean_steps=4)`: options of the recurrence by their names alone, as num_steps is given."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.tiny import tiny_ids, tiny_model
from tests.tiny_media import tiny_media_model
from tests.tiny_multimodal_seq2seq import tiny_multimodal_seq2seq
from tests.tiny_seq2seq import tiny_seq2seq

FLAT = {"mean_steps": 5, "exit_criterion": "latent_difference", "exit_threshold": 0.5}
MODELS = {
    "text": (tiny_model, AutoModelForCausalLM, ("recurrence",)),
    "any_to_any": (tiny_media_model, AutoModelForCausalLM, ("text_config", "recurrence")),
    "seq2seq": (tiny_seq2seq, AutoModelForSeq2SeqLM, ("decoder_config", "recurrence")),
    "multimodal_seq2seq": (tiny_multimodal_seq2seq, AutoModelForSeq2SeqLM, ("decoder_config", "recurrence")),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_model(scale=2.0).save_pretrained(folder)
    return folder


def at(content: dict, path: tuple[str, ...]) -> dict:
    """The part of a config.json at the end of a path, which it is taken out of."""
    *outer, last = path
    for name in outer:
        content = content[name]
    return content.pop(last)


@pytest.mark.parametrize("name", MODELS)
def test_flat_options_stand_in_the_one_place_of_the_part_that_writes_text(tmp_path, name):
    """Loaded, and saved again: nothing else differs from the file that was there, such as the encoder's recurrence."""
    build, auto, path = MODELS[name]
    build().save_pretrained(tmp_path / "made")
    auto.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "first")
    model = auto.from_pretrained(tmp_path / "made", **FLAT)
    recurrence = model.config.get_text_config(decoder=True).recurrence
    assert {key: getattr(recurrence, key) for key in FLAT} == FLAT
    model.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("first", "second"))
    before, after = at(first, path), at(second, path)
    assert after == before | FLAT and second == first
    again = auto.from_pretrained(tmp_path / "second").config.get_text_config(decoder=True).recurrence
    assert {key: getattr(again, key) for key in FLAT} == FLAT


def test_flat_options_change_what_the_model_computes(text):
    ids, model = tiny_ids(2, 6), tiny_model(scale=2.0)
    with torch.no_grad():
        deeper = AutoModelForCausalLM.from_pretrained(text, mean_steps=5)(ids).logits
        torch.testing.assert_close(deeper, model(ids, num_steps=5).logits)
        assert not torch.allclose(deeper, model(ids).logits, atol=1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(text, **FLAT)
    asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    ours, theirs = (
        loaded.generate(ids, **asked),
        model.generate(ids, num_steps=5, exit_criterion="latent_difference", exit_threshold=0.5, **asked),
    )
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.exit_steps, theirs.exit_steps)
    assert 1 < ours.exit_steps.float().mean() < 5


def test_configs_take_them_too_and_leave_what_is_not_theirs(text):
    config, unused = AutoConfig.from_pretrained(text, **FLAT, min_steps=2, colour=1, return_unused_kwargs=True)
    assert config.recurrence.min_steps == 2 and config.recurrence.mean_steps == 5 and unused == {"colour": 1}
    assert not FLAT.keys() & vars(config).keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean_steps": 0}, "RecurrenceConfig.mean_steps: "),
        ({"mean_steps": "many"}, "RecurrenceConfig.mean_steps: "),
        ({"exit_criterion": "soon"}, "RecurrenceConfig.exit_criterion: .*got soon"),
        ({"exit_threshold": "low"}, "RecurrenceConfig.exit_threshold: "),
        ({"exit_threshold": float("nan")}, "exit_threshold is nan"),
        ({"mean_steps": 4, "num_steps": 8}, "mean_steps has no effect beside num_steps, which is 8"),
        ({"mean_steps": 4, "recurrence": {"mean_steps": 5}}, "mean_steps is given beside recurrence, where it stands"),
    ],
)
def test_wrong_values_are_one_error(text, given, said):
    with pytest.raises(ValueError, match=said) as error:
        AutoModelForCausalLM.from_pretrained(text, **given)
    assert "\n" not in str(error.value)


def test_unknown_names_are_errors_as_before(text):
    with pytest.raises(TypeError, match="mean_step"):
        AutoModelForCausalLM.from_pretrained(text, mean_step=4)


def test_the_number_of_untied_cores_stays(tmp_path):
    """They have weights, which a file with another number does not have."""
    tiny_model(recurrence={"untied_core": True, "mean_steps": 3}).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, mean_steps=3).config.recurrence.mean_steps == 3
    with pytest.raises(ValueError, match="mean_steps is the number of untied cores"):
        AutoModelForCausalLM.from_pretrained(tmp_path, mean_steps=4)
    with pytest.raises(ValueError, match="exit_criterion is 'cosine', which untied_core makes impossible"):
        AutoModelForCausalLM.from_pretrained(tmp_path, exit_criterion="cosine")


def test_the_code_of_a_checkpoint_takes_them(text, tmp_path):
    """In a process that knows nothing of this repository."""
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **json.loads(sys.argv[2]))
assert "model" not in sys.modules
print(json.dumps([model.config.recurrence.exit_threshold, model(torch.tensor([[3, 4, 5]])).logits[0, -1].tolist()]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, str(text), json.dumps(FLAT)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    threshold, logits = json.loads(run.stdout)
    expected = tiny_model(scale=2.0)(torch.tensor([[3, 4, 5]]), num_steps=5).logits[0, -1]
    assert threshold == 0.5
    torch.testing.assert_close(torch.tensor(logits), expected.detach())
