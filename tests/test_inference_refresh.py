"""Checkpoints that code of before has written, under transformers 5.23, load with the code of today.

Those in `tests/checkpoints` came without their code, whose place a file takes that cannot be run. What that code
computed is in `expected.safetensors`: logits after 4 steps of the models, and what the codecs make of latents.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
from inference.loading import load_model
from model import MegaTransformerTextModel
from tests.processes import run_python
from tests.tiny import tiny_config, tiny_model

TARGET_MODALITIES = Path(__file__).parent / "checkpoints"
NAMES = sorted(path.name for path in TARGET_MODALITIES.iterdir())
LOADER = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
folder, autos = sys.argv[1], {"text": AutoModelForCausalLM, "media": AutoModelForMultimodalLM}
for name in sys.argv[2:]:
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = autos.get(name, AutoModel).from_pretrained(f"{folder}/{name}", **options).eval()
    expected = load_file(f"{folder}/{name}/expected.safetensors")
    with torch.no_grad():
        if name in autos:
            logits = expected.pop("logits")
            torch.testing.assert_close(model(**expected, num_steps=4).logits[:, -logits.shape[1] :], logits)
        else:
            torch.testing.assert_close(model.decode(expected["latents"]), expected["decoded"])
    if name in autos:
        AutoTokenizer.from_pretrained(f"{folder}/{name}")("the cat")
processor = AutoProcessor.from_pretrained(f"{folder}/media", trust_remote_code=True)
assert type(processor).__name__ == "MegaTransformerProcessor"
assert not [name for name in sys.modules if name.split(".")[0] in ("model", "tests", "inference")]
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path):
    """The checkpoints, with code that cannot be run."""
    folder = tmp_path / "old"
    shutil.copytree(TARGET_MODALITIES, folder)
    for name in NAMES:
        config = json.loads((folder / name / "config.json").read_text())
        config["auto_map"]["AutoModel"] = "modeling_of_before.Model"
        (folder / name / "config.json").write_text(json.dumps(config))
        for target in config["auto_map"].values():
            code = "from .gone import nothing\nraise RuntimeError('code of before')\n"
            (folder / name / f"{target.split('.')[0]}.py").write_text(code)
        (folder / name / "gone.py").write_text("raise RuntimeError('code of before')\n")
        (folder / name / "notes.py").write_text("raise RuntimeError('by somebody else')\n")
        (folder / name / "checkpoint-3").mkdir()
        (folder / name / "checkpoint-3/trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize("is_in_place", [True, False])
def test_checkpoints_of_before_load_elsewhere(old, tmp_path, is_in_place):
    folder = old if is_in_place else tmp_path / "new"
    before = {name: contents(old / name) for name in NAMES}
    for name in NAMES:
        arguments = [str(old / name)] if is_in_place else [str(old / name), str(folder / name)]
        assert convert.main(["refresh", *arguments]) == 0
        after = contents(folder / name)
        kept = {key for key in before[name] if not key.endswith((".py", "config.json")) and "/" not in key}
        kept |= {"generation_config.json", "tokenizer_config.json"} & before[name].keys()
        assert {"model.safetensors", "expected.safetensors"} <= kept
        assert all(after[key] == before[name][key] for key in kept)
        assert not {"gone.py", "modeling_of_before.py"} & after.keys()
        assert not [key for key in after if ".refresh" in key]
        if is_in_place:
            assert after["notes.py"] == before[name]["notes.py"] and "checkpoint-3/trainer_state.json" in after
        else:
            assert contents(old / name) == before[name]
    assert "AutoModelForCausalLM" in json.loads((folder / "media/config.json").read_text())["auto_map"]
    if not is_in_place:
        return
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = run_python("-c", LOADER, folder, *NAMES, cwd=elsewhere, environment=environment)
    assert run.returncode == 0, run.stderr


def test_what_is_written_now_stays_as_it_is(tmp_path):
    """Code and configuration of a checkpoint of today are those that refreshing writes."""
    tiny_model().save_pretrained(tmp_path / "model")
    MegaTransformerTextModel(tiny_config()).save_pretrained(tmp_path / "base")
    for name in ("model", "base"):
        before = contents(tmp_path / name)
        convert.refresh(tmp_path / name)
        assert contents(tmp_path / name) == before


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        convert.main(["refresh", *map(str, arguments)])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_checkpoint_is_refused_and_stays_as_it_is(old, tmp_path, capsys):
    text, other = old / "text", tmp_path / "other"
    other.mkdir()
    assert "holds no checkpoint: it has no config.json" in refused(capsys, other)
    (other / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "has architectures ['LlamaForCausalLM']" in refused(capsys, other)
    (other / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(capsys, other)
    assert f"{other} is not empty" in refused(capsys, text, other)
    weights = load_file(text / "model.safetensors")
    for change in ({"model.norm.weight": None}, {"surprise": torch.ones(1)}, {"model.norm.weight": torch.ones(3)}):
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        save_file(changed, text / "model.safetensors", metadata={"format": "pt"})
        before = contents(text)
        assert f" 1 of the weights ({next(iter(change))})" in refused(capsys, text)
        assert contents(text) == before
    (text / "model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors is damaged" in refused(capsys, text)


def test_nothing_changes_if_something_fails_on_the_way(old, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    before = contents(old / "media")
    monkeypatch.setattr("inference.refresh.custom_object_save", fail)
    with pytest.raises(OSError, match="no space left"):
        convert.refresh(old / "media")
    assert contents(old / "media") == before
    with pytest.raises(OSError, match="no space left"):
        convert.refresh(old / "media", old / "new")
    assert not (old / "new").exists() and not list(old.glob(".refresh*"))


def test_refreshed_folder_serves_the_commands(old):
    convert.refresh(old / "media")
    model, processor = load_model(old / "media")
    assert type(model).__name__ == "MegaTransformerForConditionalGeneration" and processor.num_image_tokens is None
