"""A small processor for tests, and small media."""

import io

import numpy as np
import soundfile
from PIL import Image

from dataset_loading import train_tokenizer
from model import (
    MEDIA_TOKENS,
    MegaTransformerFeatureExtractor,
    MegaTransformerImageProcessor,
    MegaTransformerProcessor,
)
from model.modalities import TARGET_TOKENS


def tiny_processor(**parts) -> MegaTransformerProcessor:
    """Bytes as tokens; images in tokens of 8 pixels, at most 64 a side; sound at 8 kHz, a token for 40 ms."""
    ours = {
        "tokenizer": train_tokenizer([], 268, media_tokens=MEDIA_TOKENS),
        "image_processor": MegaTransformerImageProcessor(patch_size=4, pixel_shuffle=2, max_side=64),
        "feature_extractor": MegaTransformerFeatureExtractor(
            feature_size=16, sampling_rate=8000, n_fft=256, hop_length=80, subsampling=4, max_seconds=2
        ),
    }
    return MegaTransformerProcessor(**{**ours, **parts})


def writing_processor(**parts) -> MegaTransformerProcessor:
    """The same for a model that also writes: images of 16 x 16 pixels in 4 tokens, sound in tokens of 40 ms."""
    ours = {
        "tokenizer": train_tokenizer([], 271, media_tokens=(*MEDIA_TOKENS, *TARGET_TOKENS)),
        "image_writer": {"image_size": 16, "num_tokens": 4, "is_learned": False},
        "audio_writer": {
            "num_mel_bins": 16,
            "frames_per_token": 4,
            "sampling_rate": 8000,
            "n_fft": 256,
            "hop_length": 80,
            "max_seconds": 1.0,
        },
    }
    return tiny_processor(**{**ours, **parts})


def picture(width: int = 32, height: int = 16, seed: int = 0) -> Image.Image:
    """Noise, RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def sound(samples: int = 4000, seed: int = 0) -> np.ndarray:
    """Noise, float32, from -0.5 to 0.5."""
    return (np.random.default_rng(seed).random(samples, dtype=np.float32) - 0.5).astype(np.float32)


def image_file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def audio_file(samples: np.ndarray, rate: int = 8000, format: str = "WAV", subtype: str | None = None) -> bytes:
    """The bytes of a file; samples (samples,) or (samples, channels)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()
