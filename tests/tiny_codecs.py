"""Tiny codecs, and a sound for them."""

import math

import torch

from model import (
    MegaTransformerImageAutoencoder,
    MegaTransformerImageAutoencoderConfig,
    MegaTransformerVocoder,
    MegaTransformerVocoderConfig,
)

BLOCKS = {"hidden_size": 24, "intermediate_size": 32, "discriminator_size": 4}
AUTOENCODER = {
    **BLOCKS,
    "image_size": 16,
    "patch_size": 4,
    "latent_size": 6,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
VOCODER = {**BLOCKS, "num_hidden_layers": 2, "clip_seconds": 0.2, "stft_sizes": [64, 256]}


def tiny_autoencoder(**options) -> MegaTransformerImageAutoencoder:
    """For 16 x 16 pixels, 16 tokens of 6 numbers; in evaluation mode."""
    torch.manual_seed(0)
    return MegaTransformerImageAutoencoder(MegaTransformerImageAutoencoderConfig(**{**AUTOENCODER, **options})).eval()


def tiny_vocoder(**options) -> MegaTransformerVocoder:
    """At 8 kHz, frames of 256 samples, 80 apart, of 64 mel bins; in evaluation mode."""
    torch.manual_seed(0)
    return MegaTransformerVocoder(MegaTransformerVocoderConfig(**{**VOCODER, **options})).eval()


def pictures(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """(count, 3, side, side) in -1 .. 1."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def voice(seconds: float = 0.5, pitch: float = 120.0, rate: int = 8000) -> torch.Tensor:
    """(samples,): harmonics of a pitch that wavers, louder and softer, over soft noise."""
    times = torch.arange(round(seconds * rate)) / rate
    phase = 2 * math.pi * (pitch * times + 0.5 * torch.sin(2 * math.pi * 5 * times))
    tone = sum(torch.sin(number * phase) / number for number in range(1, 12))
    noise = torch.randn(len(times), generator=torch.Generator().manual_seed(0))
    return (0.1 * tone * (1.2 + torch.sin(2 * math.pi * 3 * times)) + 0.001 * noise).float()
