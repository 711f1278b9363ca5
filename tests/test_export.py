"""A checkpoint folder is enough: loaded elsewhere, without this repository, through the auto classes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from model import (
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerTextModel,
    build_processor,
)
from tests.hub_encoders import save_tiny_encoders
from tests.tiny import tiny_classifier, tiny_ids, tiny_model
from tests.tiny_media import tiny_media_model
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor
from tests.tiny_reader import save_reader, tiny_reader

LOADER = """
import json, os, sys, torch
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
    AutoModelForMultimodalLM, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer,
)
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
found = {}

def load(auto_class, name):
    return auto_class.from_pretrained(f"{folder}/{name}", trust_remote_code=True)

def outcome(model, head, inputs):
    with torch.no_grad():
        logits = model(**inputs, num_steps=3).logits
        torch.testing.assert_close(model.lm_head(head(**inputs, num_steps=3).last_hidden_state), logits)
        return [logits, model.generate(**inputs, num_steps=3, max_new_tokens=5, do_sample=False)]

causal, base = load(AutoModelForCausalLM, "text").eval(), load(AutoModel, "text").eval()
found["text"] = {"class": type(load(AutoConfig, "text")).__name__, "out": outcome(causal, base, {"input_ids": ids})}
causal.save_pretrained("again/text")  # exported again from the exported code
classifier = load(AutoModelForSequenceClassification, "classifier").eval()
with torch.no_grad():
    found["classifier"] = classifier(ids, num_steps=3).logits
classifier.save_pretrained("again/classifier")
of_causal = AutoModelForSequenceClassification.from_pretrained(f"{folder}/text", num_labels=1, trust_remote_code=True)
assert of_causal.score.weight.shape == (1, 32) and torch.equal(of_causal.model.norm.weight, base.norm.weight)

messages = json.load(open(f"{folder}/messages.json"))
for name in ("reader", "pretrained"):
    processor, tokenizer = load(AutoProcessor, name), load(AutoTokenizer, name)
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    model, other, base, causal = (
        load(auto, name).eval()
        for auto in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModel, AutoModelForCausalLM)
    )
    assert type(model) is type(other) is type(causal) and tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    parts = [load(AutoImageProcessor, name), load(AutoFeatureExtractor, name)]
    assert [type(part) for part in parts] == [type(processor.image_processor), type(processor.feature_extractor)]
    with torch.no_grad():
        torch.testing.assert_close(other(**batch, num_steps=3).logits, model(**batch, num_steps=3).logits)
    text = causal.generate(ids + 40, num_steps=3, max_new_tokens=5, do_sample=False)
    found[name] = {
        "class": type(load(AutoConfig, name)).__name__,
        "batch": dict(batch),
        "out": outcome(model, base, batch),
        "text": text,
        "classes": [type(part).__name__ for part in (model, processor, *parts)],
        "template": tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False),
    }
    model.save_pretrained(f"again/{name}")
    processor.save_pretrained(f"again/{name}")
assert not [name for name in sys.modules if name.split(".")[0] in ("model", "tests", "inference")]
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with three checkpoints, and what each of them was made of: models, and processors or None."""
    folder = tmp_path_factory.mktemp("exported")
    text = tiny_model(scale=2.0)
    text.save_pretrained(folder / "text")
    tiny_classifier().save_pretrained(folder / "classifier")
    save_reader(folder / "reader")
    pretrained, processor = with_pretrained_encoders(tmp_path_factory.mktemp("backbones"))
    pretrained.save_pretrained(folder / "pretrained")
    processor.save_pretrained(folder / "pretrained")
    return folder, {
        "text": (text, None),
        "reader": (tiny_reader(), tiny_processor()),
        "pretrained": (pretrained, processor),
    }


def with_pretrained_encoders(folder):
    """A model with encoders of others, in the place of whose folder there is nothing any more, and its processor."""
    save_tiny_encoders(folder)
    tokenizer = tiny_processor().tokenizer
    image, audio = tokenizer.convert_tokens_to_ids(["<|image|>", "<|audio|>"])
    model = tiny_media_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        vision={"backbone": str(folder / "siglip")},
        audio={"backbone": str(folder / "whisper")},
        parts={"image_token_id": image, "audio_token_id": audio},
    )
    model.model.load_backbones()
    processor = build_processor(model.config, tokenizer, **model.model.count_tokens())
    shutil.rmtree(folder)
    return model, processor


def write_messages(folder: Path) -> list:
    """Conversations of a text, and of a picture, a question and a recording, which lie beside them."""
    (folder / "a.png").write_bytes(image_file(picture(20, 30)))
    (folder / "a.flac").write_bytes(audio_file(sound(3000), 11025, "FLAC"))
    parts = [{"type": kind, "path": str(folder / name)} for kind, name in (("image", "a.png"), ("audio", "a.flac"))]
    question = {"type": "text", "text": "What is it? <|end|>"}
    messages = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": [parts[0], question, parts[1]]}, {"role": "assistant", "content": "Yes"}],
    ]
    (folder / "messages.json").write_text(json.dumps(messages))
    return messages


@pytest.fixture(scope="module")
def elsewhere(exported, tmp_path_factory):
    """A copy of the checkpoints, what was found there by a process whose current folder and path know nothing of this
    repository, the messages it was asked, and what it saved.
    """
    folder, cwd = tmp_path_factory.mktemp("there") / "copy", tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(exported[0], folder)
    messages = write_messages(folder)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(cwd / "hf")}
    command = [sys.executable, "-c", LOADER, str(folder), json.dumps(tiny_ids(2, 6).tolist())]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(cwd / "found.pt"), messages, cwd / "again"


def check_outcome(model, inputs, outcome) -> None:
    with torch.no_grad():
        torch.testing.assert_close(outcome[0], model(**inputs, num_steps=3).logits)
    assert torch.equal(outcome[1], model.generate(**inputs, num_steps=3, max_new_tokens=5, do_sample=False))


def check_saved_again(again: Path, folder: Path) -> None:
    """From what was loaded, all is saved that was there, the code of the model among it."""
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.py"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_text_model_elsewhere(exported, elsewhere):
    """AutoConfig, AutoModel, AutoModelForCausalLM with trust_remote_code=True, from another folder."""
    folder, parts = exported
    found, _, again = elsewhere
    assert found["text"]["class"] == "MegaTransformerTextConfig"
    check_outcome(parts["text"][0], {"input_ids": tiny_ids(2, 6)}, found["text"]["out"])
    check_saved_again(again / "text", folder / "text")


def test_classifier_elsewhere(exported, elsewhere):
    with torch.no_grad():
        logits = tiny_classifier()(tiny_ids(2, 6), num_steps=3).logits
    torch.testing.assert_close(elsewhere[0]["classifier"], logits)
    check_saved_again(elsewhere[2] / "classifier", exported[0] / "classifier")


@pytest.mark.parametrize("name", ["reader", "pretrained"])
def test_text_through_a_model_with_media(exported, elsewhere, name):
    """AutoModelForCausalLM, registered and elsewhere, writes what the model that was saved writes."""
    model = AutoModelForCausalLM.from_pretrained(exported[0] / name).eval()
    assert type(model) is MegaTransformerForConditionalGeneration
    ids = tiny_ids(2, 6) + 40  # behind the special tokens
    expected = exported[1][name][0].generate(ids, num_steps=3, max_new_tokens=5, do_sample=False)
    assert expected.shape[1] > 6
    assert torch.equal(elsewhere[0][name]["text"], expected)
    assert torch.equal(model.generate(ids, num_steps=3, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("name", ["reader", "pretrained"])
def test_model_with_media_and_its_processor_elsewhere(exported, elsewhere, name):
    """A model that reads images and audio, with encoders of ours and of others, is the same elsewhere."""
    folder, parts = exported
    (model, processor), (found, messages, again) = parts[name], elsewhere
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    assert found[name]["batch"].keys() == batch.keys() and {"pixel_values", "input_features"} <= batch.keys()
    for key, tensor in batch.items():
        torch.testing.assert_close(found[name]["batch"][key], tensor)
    check_outcome(model, batch, found[name]["out"])
    own = ["MegaTransformerImageProcessor", "MegaTransformerFeatureExtractor"]
    classes = own if name == "reader" else [type(processor.image_processor).__name__, "WhisperFeatureExtractor"]
    names = ["MegaTransformerForConditionalGeneration", "MegaTransformerProcessor", *classes]
    assert found[name]["class"] == "MegaTransformerConfig" and found[name]["classes"] == names
    assert found[name]["template"] == "<|begin|><|user|>a"
    check_saved_again(again / name, folder / name)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("text", {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}),
        (
            "reader",
            {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"}
            | {"AutoModelForImageTextToText", "AutoModelForMultimodalLM"},
        ),
    ],
)
def test_every_file_of_the_model_is_exported(exported, name, classes):
    folder = exported[0] / name
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == classes
    for target in auto_map.values():
        assert (folder / f"{target.split('.')[0]}.py").is_file()


def test_a_text_model_is_exported_without_what_serves_media_alone(exported):
    """The code of those that read images and sound is more than twice as much."""
    folder = exported[0] / "text"
    names = {path.stem for path in folder.glob("*.py")}
    assert not names & {"modeling_megatransformer", "configuration_megatransformer", "fusion", "writers", "vision"}
    assert sum(len(path.read_text().splitlines()) for path in folder.glob("*.py")) < 6500


def test_base_model_saved_alone_loads_as_auto_model(tmp_path):
    base = tiny_model(scale=2.0).model
    base.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MegaTransformerTextModel
    ids = tiny_ids(1, 4)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).state, base(ids).state)


def test_missing_weights_are_reported_by_the_loader(exported):
    """What transformers found is available to callers, who must raise; no key goes missing in a whole
    checkpoint.
    """
    folder, _ = exported
    _, info = MegaTransformerForCausalLM.from_pretrained(folder / "text", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
