"""Pretrained encoders of others in the place of ours, from local folders in the format of the hub."""

import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from model import MegaTransformerForConditionalGeneration
from tests.tiny import tiny_ids
from tests.tiny_media import AUDIO, IMAGE, draw, tiny_media_config

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny SigLIP, ViT and Whisper checkpoints, and how many tokens their encoders give."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones")
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config={**SMALL, "vocab_size": 30}))
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=60,
            num_mel_bins=8,
            d_model=16,
            max_source_positions=6,
            pad_token_id=0,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=24,
            max_target_positions=8,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=24,
            dropout=0.5,
        )
    )
    for name, model in {"siglip": siglip, "whisper": whisper, "vit": ViTModel(ViTConfig(**vision))}.items():
        model.save_pretrained(folder / name)
    return folder


def build(folders, vision="siglip", audio="whisper", **options) -> MegaTransformerForConditionalGeneration:
    torch.manual_seed(1)
    parts = {
        "vision": {"backbone": str(folders / vision), **options},
        "audio": {"backbone": str(folders / audio), **options},
    }
    model = MegaTransformerForConditionalGeneration(tiny_media_config(**parts))
    model.model.load_backbones()
    return model


def inputs_of() -> dict[str, torch.Tensor]:
    ids = tiny_ids(1, 16, high=60)
    ids[0, 1:5], ids[0, 6:12] = IMAGE, AUDIO
    return {"input_ids": ids, "pixel_values": draw(1, 3, 16, 16), "input_features": draw(1, 8, 12)}


def test_the_encoders_are_those_of_the_checkpoints(folders):
    """Against transformers' own loading of the whole models."""
    model, inputs = build(folders), inputs_of()
    assert model.model.count_tokens() == {"num_image_tokens": 4, "num_audio_tokens": 6}
    siglip = SiglipModel.from_pretrained(folders / "siglip")
    whisper = WhisperForConditionalGeneration.from_pretrained(folders / "whisper").eval()
    with torch.no_grad():
        image = siglip.vision_model(inputs["pixel_values"]).last_hidden_state
        audio = whisper.get_encoder()(inputs["input_features"]).last_hidden_state
        readers = model.eval().model.readers
        torch.testing.assert_close(readers["image"].encoder(pixel_values=inputs["pixel_values"])[0], image)
        torch.testing.assert_close(readers["audio"].encoder(input_features=inputs["input_features"])[0], audio)
    parts = [type(part).__name__ for part in model.modules()]
    assert not [name for name in parts if "Decoder" in name or ("Text" in name and "Siglip" in name)]


def test_a_model_that_is_an_encoder_as_a_whole(folders):
    model = build(folders, vision="vit")
    assert model.model.count_tokens()["num_image_tokens"] == 5  # with the token of the class


@pytest.mark.parametrize("is_frozen", [True, False])
def test_frozen_or_not(folders, is_frozen):
    """Frozen, it gets no gradient and stays without dropout, while its projector learns."""
    model, inputs = build(folders, freeze_backbone=is_frozen).train(), inputs_of()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, reader in model.model.readers.items():
        assert all(parameter.grad.any() for parameter in reader.projector.parameters()), name
        assert {parameter.requires_grad for parameter in reader.encoder.parameters()} == {not is_frozen}
        assert (reader.encoder.model.layers[0] if name == "audio" else reader.encoder.model).training != is_frozen


def test_a_checkpoint_of_ours_needs_the_folder_no_more(folders, tmp_path):
    model, inputs = build(folders).eval(), inputs_of()
    model.save_pretrained(tmp_path)
    for part in ("vision_config", "audio_config"):
        getattr(model.config, part).backbone = "nowhere"
    model.config.save_pretrained(tmp_path)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_what_is_no_backbone_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"backbone .*nowhere.* cannot be loaded"):
        build(folders, vision="nowhere")
    with pytest.raises(ValueError, match="takes pixel_values, not input_features"):
        build(folders, audio="vit")
    Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "wav")
    with pytest.raises(ValueError, match="takes input_values, not input_features"):
        build(tmp_path.parent, audio=str(tmp_path / "wav"), vision=str(folders / "siglip"))
