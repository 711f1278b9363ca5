"""Tiny models that read images and sound, and inputs for them."""

import torch

from model import MegaTransformerConfig, MegaTransformerForConditionalGeneration
from tests.tiny import tiny_config, tiny_ids

IMAGE, AUDIO = 61, 62
ENCODER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 12}


def tiny_media_config(**overrides) -> MegaTransformerConfig:
    """Width 32 in the language model and 24 in the encoders. Patches of 4 pixels, 2 x 2 of them a token; 8 mel bins, 4
    frames a token.
    """
    vision = {"patch_size": 4, "pixel_shuffle": 2, **ENCODER, **overrides.pop("vision", {})}
    audio = {"num_mel_bins": 8, **ENCODER, **overrides.pop("audio", {})}
    parts = {"vision_config": vision, "audio_config": audio, "image_token_id": IMAGE, "audio_token_id": AUDIO}
    parts |= overrides.pop("parts", {})
    return MegaTransformerConfig(text_config=tiny_config(**overrides).to_dict(), **parts)


def tiny_media_model(seed: int = 0, scale: float = 1.0, **overrides) -> MegaTransformerForConditionalGeneration:
    """In evaluation mode; `scale` as in `tiny_model`."""
    torch.manual_seed(seed)
    model = MegaTransformerForConditionalGeneration(tiny_media_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif scale != 1:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
    return model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_inputs() -> dict[str, torch.Tensor]:
    """Three rows of 16 tokens: an image of 16 x 8 pixels (2 tokens), a clip of 10 frames (3); images of 8 x 8 (1) and
    16 x 16 (4); text alone.
    """
    ids = tiny_ids(3, 16, high=60)
    ids[0, 2:4], ids[0, 7:10] = IMAGE, AUDIO
    ids[1, 1], ids[1, 5:9] = IMAGE, IMAGE
    sizes = torch.tensor([[16, 8], [8, 8], [16, 16]])
    pixels = torch.zeros(3, 3, 16, 16)
    for number, (height, width) in enumerate(sizes.tolist()):
        pixels[number, :, :height, :width] = draw(3, height, width, seed=number)
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes, "input_features": draw(1, 8, 10, seed=9)}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of `tiny_inputs` alone, its media without padding."""
    alone = {"input_ids": inputs["input_ids"][row : row + 1]}
    if row == 0:
        alone |= {"pixel_values": inputs["pixel_values"][:1, :, :, :8], "input_features": inputs["input_features"]}
    if row == 1:
        alone |= {"pixel_values": inputs["pixel_values"][1:], "image_sizes": inputs["image_sizes"][1:]}
    return alone
