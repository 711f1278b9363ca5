"""A model that reads and writes pictures of 32 pixels and sound at 8 kHz, small enough for tests, and its processor."""

from functools import cache
from pathlib import Path

import torch

from dataset_loading import train_tokenizer
from model import (
    MegaTransformerConfig,
    MegaTransformerForConditionalGeneration,
    MegaTransformerProcessor,
    build_processor,
    media_tokens,
    set_token_ids,
)

ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FLOW = {"flow_hidden_size": 16, "flow_num_layers": 1, "num_flow_steps": 2}
SOUND = {"num_mel_bins": 16, "sampling_rate": 8000, "n_fft": 256, "hop_length": 80}


def artist_config() -> MegaTransformerConfig:
    """Width 32, layers 1 + 1 + 1, mean of 3 steps; bytes as tokens."""
    config = MegaTransformerConfig(
        text_config={
            "vocab_size": 272,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_core_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "recurrence": {"mean_steps": 3, "backprop_steps": 2},
        },
        vision_config={**ENCODER, "patch_size": 4, "pixel_shuffle": 2, "max_image_size": 64},
        audio_config={**ENCODER, **SOUND, "max_seconds": 2.0},
        image_writer_config={**FLOW, "image_size": 32, "patch_size": 8},
        audio_writer_config={**FLOW, **SOUND, "frames_per_token": 4, "max_seconds": 1.0},
    )
    tokenizer = artist_tokenizer()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    set_token_ids(config, tokenizer)
    return config


@cache
def artist_tokenizer():
    """Bytes, and the tokens of media."""
    any_writer = MegaTransformerConfig(text_config={"vocab_size": 272}, image_writer_config={})
    return train_tokenizer([], 271, media_tokens=media_tokens(any_writer))


def artist_processor() -> MegaTransformerProcessor:
    return build_processor(artist_config(), artist_tokenizer())


def tiny_artist(seed: int = 0, scale: float = 1.5) -> MegaTransformerForConditionalGeneration:
    """In evaluation mode. Weights that begin as zero are noise, and matrices `scale` times as large as usual, so that
    what it writes depends on its prompt.
    """
    torch.manual_seed(seed)
    model = MegaTransformerForConditionalGeneration(artist_config()).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "is_zero_at_first", False):
                module.weight.normal_(std=0.3)
            elif isinstance(module, torch.nn.Linear):
                module.weight.mul_(scale)
    return model


def save_artist(folder: Path) -> Path:
    """A checkpoint folder with weights, configuration and processor."""
    tiny_artist().save_pretrained(folder)
    artist_processor().save_pretrained(folder)
    return folder
