"""A checkpoint that writes media, with its heads and codecs, loaded elsewhere without this repository."""

import os
import shutil

import pytest
import torch

from model import build_processor
from model.output_heads import OutputHead
from tests.processes import run_python
from tests.tiny_artist import artist_processor, artist_tokenizer, tiny_artist
from tests.tiny_codecs import tiny_autoencoder, tiny_vocoder

LOADER = """
import sys, torch
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor
folder, found = sys.argv[1], {}
messages = [{"role": "user", "content": "a red circle"}]
options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
for name in ("plain", "codecs"):
    model = AutoModelForMultimodalLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    inputs, found[name] = processor.apply_chat_template(messages, **options), {}
    for mode in ("image", "audio"):
        output = model.generate(**inputs, generation_mode=mode, flow_seeds=[1], max_new_tokens=70, num_steps=2)
        (medium,) = processor.post_process_multimodal_output(output, generation_mode=mode)
        medium = list(medium.tobytes()) if mode == "image" else medium.tolist()
        found[name][mode] = (output.latents[mode][0], medium)
for name in ("autoencoder", "vocoder"):
    codec = AutoModel.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    found[name] = codec.decode(torch.ones(1, 64, 6) if name == "autoencoder" else torch.ones(1, 16, 8)).detach()
assert not [name for name in sys.modules if name.split(".")[0] in ("model", "tests", "inference")]
torch.save(found, "found.pt")
"""


def with_codecs(folder):
    """The same model whose images are made by an autoencoder and whose sound is made by a vocoder."""
    model = tiny_artist(scale=1.0)
    config = model.config
    image, audio = config.image_writer_config, config.audio_writer_config
    image.codec, image.codec_name_or_path = "autoencoder", str(folder / "autoencoder")
    audio.vocoder_name_or_path = str(folder / "vocoder")
    torch.manual_seed(1)
    for name, part in (("image", image), ("audio", audio)):
        model.model.writers[name] = OutputHead(name, part, config.text_config)
    model.model.load_backbones()
    return model.eval(), build_processor(config, artist_tokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models by name, and what a process elsewhere made with their folders."""
    folder, cwd = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("elsewhere")
    tiny_autoencoder(image_size=32).save_pretrained(folder / "autoencoder")
    tiny_vocoder(num_mel_bins=16).save_pretrained(folder / "vocoder")
    plain = tiny_artist(scale=1.0)  # larger weights would make much of the last digit of a float
    plain.save_pretrained(folder / "plain")
    artist_processor().save_pretrained(folder / "plain")
    model, processor = with_codecs(folder)
    model.save_pretrained(folder / "codecs")
    processor.save_pretrained(folder / "codecs")
    shutil.copytree(folder, cwd / "copy")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = run_python("-c", LOADER, cwd / "copy", cwd=cwd, environment=environment)
    assert run.returncode == 0, run.stderr
    return {"plain": plain, "codecs": model}, torch.load(cwd / "found.pt", weights_only=False)


@pytest.mark.parametrize("mode", ["image", "audio"])
@pytest.mark.parametrize("name", ["plain", "codecs"])
def test_what_is_written_elsewhere_is_what_is_written_here(made, name, mode):
    models, found = made
    messages = [{"role": "user", "content": "a red circle"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = artist_processor().apply_chat_template(messages, **options)
    output = models[name].generate(**inputs, generation_mode=mode, flow_seeds=[1], max_new_tokens=70, num_steps=2)
    latents, medium = found[name][mode]
    torch.testing.assert_close(output.latents[mode][0], latents, atol=1e-3, rtol=1e-3)
    here = list(output.images[0].tobytes()) if mode == "image" else output.audio[0].tolist()
    torch.testing.assert_close(
        torch.tensor(medium).float(), torch.tensor(here).float(), atol=1.0 if mode == "image" else 1e-3, rtol=0
    )


def test_codecs_alone_load_elsewhere(made):
    _, found = made
    with torch.no_grad():
        pixels = tiny_autoencoder(image_size=32).decode(torch.ones(1, 64, 6))
        sound = tiny_vocoder(num_mel_bins=16).decode(torch.ones(1, 16, 8))
    torch.testing.assert_close(found["autoencoder"], pixels)
    torch.testing.assert_close(found["vocoder"], sound)
