"""Damaged codecs and encoders, by folder: one line that names them, before anything is trained or measured."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.loading import load_codec
from model import MegaTransformerAudioWriterConfig, MegaTransformerImageWriterConfig
from model.backbones import Backbone
from model.codecs import build_codec
from model.configuration_megatransformer import MegaTransformerVisionConfig
from tests.hub_encoders import siglip2
from tests.tiny_codecs import tiny_autoencoder, tiny_vocoder


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def drop(weights):
    weights.pop(min(weights))


def poison(weights):
    weights[min(weights)][...] = torch.nan


DAMAGE = {
    "cut": (cut, "IncompleteMetadata|not cover|buffer|invalid|damaged"),
    "types": (lambda folder: change_config(folder, hidden_size="wide"), "hidden_size"),
    "sizes": (lambda folder: change_config(folder, hidden_size=2**40), "cannot be loaded|is wrong|is damaged"),
    "missing": (lambda folder: change_weights(folder, drop), "lack"),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "not a number"])
def test_a_damaged_codec_is_not_evaluated(tmp_path, damage):
    change, reason = DAMAGE.get(damage, (lambda folder: change_weights(folder, poison), "infinite or no numbers"))
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    assert all(torch.equal(here, model.state_dict()[name]) for name, here in loaded.state_dict().items())
    change(tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        load_codec(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def writer_of(kind, folder):
    if kind == "vocoder":
        sound = {"num_mel_bins": 64, "sampling_rate": 8000, "n_fft": 256, "hop_length": 80}
        return build_codec(MegaTransformerAudioWriterConfig(**sound, vocoder_name_or_path=str(folder)))
    image = {"image_size": 16, "patch_size": 4, "codec": "autoencoder"}
    return build_codec(MegaTransformerImageWriterConfig(**image, codec_name_or_path=str(folder)))


@pytest.mark.parametrize("kind", ["autoencoder", "vocoder"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_codec_writes_nothing(tmp_path, kind, damage):
    change, reason = DAMAGE[damage]
    (tiny_autoencoder() if kind == "autoencoder" else tiny_vocoder()).save_pretrained(tmp_path)
    writer_of(kind, tmp_path).load()
    change(tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        writer_of(kind, tmp_path).load()
    assert f"codec {str(tmp_path)!r}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [["a"], {"num_hidden_layers": ["a"]}, {"hidden_size": 2**40}, {"hidden_act": "no such"}, 3]
)
def test_a_damaged_encoder_is_refused(tmp_path, value):
    siglip2(side=16, width=8, inner=8, layers=1, heads=1).save_pretrained(tmp_path)
    options = {"backbone": str(tmp_path), "image_size": 16}
    assert Backbone(MegaTransformerVisionConfig(**options), "pixel_values").output_size == 8
    change_config(tmp_path, vision_config=value)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        Backbone(MegaTransformerVisionConfig(**options), "pixel_values")
    assert f"backbone {str(tmp_path)!r}" in str(error.value) and "\n" not in str(error.value)
