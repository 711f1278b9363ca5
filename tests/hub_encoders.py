"""Folders in place of the hub, for the pretrained encoders that files in configs/ name, and of codecs that are trained
before.
"""

from pathlib import Path

import torch
import yaml
from transformers import (
    PreTrainedConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from model import MegaTransformerImageAutoencoderConfig, MegaTransformerVocoderConfig


def siglip2(side: int, width: int, inner: int, layers: int, heads: int) -> SiglipConfig:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    vision = {**sizes, "num_attention_heads": heads, "image_size": side, "patch_size": 16}
    return SiglipConfig(vision_config=vision)


def whisper(width: int, layers: int, heads: int, num_mel_bins: int) -> WhisperConfig:
    encoder = {"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": heads}  # not that of the hub: nobody reads it
    return WhisperConfig(d_model=width, num_mel_bins=num_mel_bins, **encoder, **decoder)


# As their config.json on the hub says.
ENCODERS: dict[str, PreTrainedConfig] = {
    "google/siglip2-base-patch16-256": siglip2(side=256, width=768, inner=3072, layers=12, heads=12),
    "google/siglip2-so400m-patch16-384": siglip2(side=384, width=1152, inner=4304, layers=27, heads=16),
    "openai/whisper-small": whisper(width=768, layers=12, heads=12, num_mel_bins=80),
    "openai/whisper-large-v3-turbo": whisper(width=1280, layers=32, heads=20, num_mel_bins=128),
}


CODECS: dict[str, PreTrainedConfig] = {
    "image_autoencoder_128": MegaTransformerImageAutoencoderConfig(image_size=128, latent_size=16),
    "vocoder_16khz": MegaTransformerVocoderConfig(sampling_rate=16000, n_fft=512, hop_length=160),
}


def local_encoders(config: Path, folder: Path) -> list[str]:
    """Flags that put folders within `folder` in place of the encoders and codecs that a YAML file names, if it names
    any. They have configurations and no weights.
    """
    model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    flags = []
    for part in ("vision_config", "audio_config"):
        name = model.get(part, {}).get("backbone")
        if name is not None:
            ENCODERS[name].save_pretrained(folder / name)
            flags += [f"--model.{part}.backbone", str(folder / name)]
    for part, key in (("image_writer_config", "codec_name_or_path"), ("audio_writer_config", "vocoder_name_or_path")):
        name = model.get(part, {}).get(key)
        if name is not None:
            CODECS[Path(name).name].save_pretrained(folder / Path(name).name)
            flags += [f"--model.{part}.{key}", str(folder / Path(name).name)]
    return flags


def save_tiny_encoders(folder: Path) -> list[str]:
    """Flags that name whole, tiny checkpoints: `siglip`, of pictures of 16 x 16 pixels (4 tokens), and `whisper`, of a
    second of sound (50 tokens).
    """
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**sizes, "image_size": 16, "patch_size": 8}, {**sizes, "vocab_size": 30}
    layer = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    layers = {f"{part}_{name}": count for part in ("encoder", "decoder") for name, count in layer.items()}
    audio = WhisperConfig(vocab_size=60, num_mel_bins=8, d_model=16, max_source_positions=50, pad_token_id=0, **layers)
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder / "siglip")
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "siglip")
    WhisperModel(audio).save_pretrained(folder / "whisper")
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=8000, hop_length=80, chunk_length=1, n_fft=256)
    extractor.save_pretrained(folder / "whisper")
    names = {"vision_config": "siglip", "audio_config": "whisper"}
    return [word for part, name in names.items() for word in (f"--model.{part}.backbone", str(folder / name))]
