"""A model that reads and writes pictures of 32 pixels and sound at 8 kHz, small enough for tests, and its processor."""

from functools import cache
from pathlib import Path

import torch
from transformers import LogitsProcessorList

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


CODES = {
    "head": "fsq",
    "codec": "autoencoder",
    "codec_config": {
        "model_type": "megatransformer_image_autoencoder",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "bottleneck": "fsq",
        "fsq_levels": [3, 5],
    },
}
"""Of a writer whose images are 16 tokens of 15 codes."""


def artist_config(image: dict | None = None) -> MegaTransformerConfig:
    """Width 32, layers 1 + 1 + 1, mean of 3 steps; bytes as tokens, and room for codes.

    Args:
        image: Further options of the writer of images, such as `CODES`.
    """
    config = MegaTransformerConfig(
        text_config={
            "vocab_size": 272 if image is None else 288,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_core_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "recurrence": {"mean_steps": 3, "backprop_steps": 2},
        },
        vision_config={**ENCODER, "patch_size": 4, "pixel_shuffle": 2, "max_image_size": 64},
        audio_config={**ENCODER, **SOUND, "max_seconds": 2.0},
        image_writer_config={**FLOW, "image_size": 32, "patch_size": 8, **(image or {})},
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


def artist_processor(image: dict | None = None) -> MegaTransformerProcessor:
    return build_processor(artist_config(image), artist_tokenizer())


def tiny_artist(
    seed: int = 0, scale: float = 1.5, image: dict | None = None
) -> MegaTransformerForConditionalGeneration:
    """In evaluation mode. Weights that begin as zero are noise, and matrices `scale` times as large as usual, so that
    what it writes depends on its prompt.
    """
    torch.manual_seed(seed)
    model = MegaTransformerForConditionalGeneration(artist_config(image)).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "is_zero_at_first", False):
                module.weight.normal_(std=0.3)
            elif isinstance(module, torch.nn.Linear):
                module.weight.mul_(scale)
    return model


def write_codes(monkeypatch) -> None:
    """Lets every model draw what is asked for, as one that was trained for long does: a start token, then codes alone,
    as likely as it says.
    """
    plain = MegaTransformerForConditionalGeneration.generate

    def generate(self, input_ids, logits_processor=(), **options):
        first = self.config.image_code_offset
        codes, start = list(range(first, first + 15)), [self.config.image_start_token_id]

        def forbid_the_others(ids, scores):
            allowed = start if ids.shape[1] == input_ids.shape[1] else codes
            return torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor(allowed), scores[:, allowed])

        processors = LogitsProcessorList([*logits_processor, forbid_the_others])
        return plain(self, input_ids, logits_processor=processors, **options)

    monkeypatch.setattr(MegaTransformerForConditionalGeneration, "generate", generate)


def save_artist(folder: Path, image: dict | None = None) -> Path:
    """A checkpoint folder with weights, configuration and processor."""
    tiny_artist(image=image).save_pretrained(folder)
    artist_processor(image).save_pretrained(folder)
    return folder
