"""A model that reads images and sound, small enough for tests, for the processor of `tiny_processor`."""

from pathlib import Path

import torch

from model import MegaTransformerConfig, MegaTransformerForConditionalGeneration
from tests.tiny_processor import tiny_processor

ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_reader_config(tokenizer, **text_options) -> MegaTransformerConfig:
    """Width 32, layers 1 + 1 + 1, mean of 3 steps; encoders of one layer."""
    text = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_core_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "recurrence": {"mean_steps": 3, "backprop_steps": 2},
    }
    return MegaTransformerConfig(
        text_config={**text, **text_options},
        vision_config={**ENCODER, "patch_size": 4, "pixel_shuffle": 2, "max_image_size": 64},
        audio_config={
            **ENCODER,
            "num_mel_bins": 16,
            "sampling_rate": 8000,
            "n_fft": 256,
            "hop_length": 80,
            "max_seconds": 2.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
    )


def tiny_reader(seed: int = 0, scale: float = 3.0, **text_options) -> MegaTransformerForConditionalGeneration:
    """In evaluation mode. `scale` multiplies the weight matrices, so that what it writes depends on what it reads."""
    torch.manual_seed(seed)
    config = tiny_reader_config(tiny_processor().tokenizer, **text_options)
    model = MegaTransformerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def save_reader(folder: Path, **options) -> Path:
    """A checkpoint folder with weights, configuration and processor."""
    tiny_reader(**options).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder
