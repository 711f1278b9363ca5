"""A tiny model that reads and writes images and sound, and batches for it."""

import torch

from model import (
    MegaTransformerAudioConfig,
    MegaTransformerAudioWriterConfig,
    MegaTransformerConfig,
    MegaTransformerForConditionalGeneration,
    MegaTransformerImageWriterConfig,
    MegaTransformerTextConfig,
    MegaTransformerVisionConfig,
)

PAD, BEGIN, END, USER, ASSISTANT = 0, 1, 2, 3, 4
IMAGE_START, IMAGE, IMAGE_END, AUDIO_START, AUDIO, AUDIO_END = 6, 7, 8, 9, 10, 11
WRITTEN_IMAGE, WRITTEN_AUDIO, NULL = 12, 13, 14
FIRST_TEXT = 15
VOCABULARY = 40
NUM_PATCHES, NUM_MELS, FRAMES = 4, 8, 2


def tiny_writer_config(
    image: dict | None = None, audio: dict | None = None, code_offset: int | None = None, **text
) -> MegaTransformerConfig:
    encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    flow = {"flow_hidden_size": 16, "flow_num_layers": 1, "num_flow_steps": 3}
    return MegaTransformerConfig(
        text_config=MegaTransformerTextConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 4,
                "num_prelude_layers": 1,
                "num_core_layers": 1,
                "num_coda_layers": 1,
                "max_position_embeddings": 128,
                "pad_token_id": PAD,
                "bos_token_id": BEGIN,
                "eos_token_id": END,
                "recurrence": {"mean_steps": 3},
                **text,
            }
        ),
        vision_config=MegaTransformerVisionConfig(**encoder, patch_size=4, image_size=8),
        audio_config=MegaTransformerAudioConfig(
            **encoder, num_mel_bins=NUM_MELS, subsampling=2, n_fft=32, hop_length=16
        ),
        image_writer_config=MegaTransformerImageWriterConfig(
            **{**flow, "image_size": 8, "patch_size": 4, **(image or {})}
        ),
        image_code_offset=code_offset,
        audio_writer_config=MegaTransformerAudioWriterConfig(
            **{
                **flow,
                "n_fft": 32,
                "hop_length": 16,
                "num_mel_bins": NUM_MELS,
                "frames_per_token": FRAMES,
                "max_seconds": 0.02,
                **(audio or {}),
            }
        ),
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        written_image_token_id=WRITTEN_IMAGE,
        written_audio_token_id=WRITTEN_AUDIO,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        null_token_id=NULL,
        structure_token_ids=[token for token in range(FIRST_TEXT) if token != NULL],
    )


def tiny_writer(scale: float = 1.0, **parts) -> MegaTransformerForConditionalGeneration:
    """Weights that do something everywhere: those that begin as zero are noise here, and all are `scale` times as
    large as usual.
    """
    torch.manual_seed(0)
    model = MegaTransformerForConditionalGeneration(tiny_writer_config(**parts)).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "is_zero_at_first", False):
                module.weight.normal_(std=0.3)
            elif isinstance(module, torch.nn.Linear):
                module.weight.mul_(scale)
    return model


def written_image() -> list[int]:
    return [IMAGE_START, *[WRITTEN_IMAGE] * NUM_PATCHES, IMAGE_END]


def written_audio(tokens: int) -> list[int]:
    return [AUDIO_START, *[WRITTEN_AUDIO] * tokens, AUDIO_END]


def writing_batch(clip_tokens: int = 3) -> dict[str, torch.Tensor]:
    """Row 0 reads an image and writes an image and a sound, row 1 writes an image, and row 2 text alone; padded."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        [
            *[BEGIN, USER, 20, IMAGE_START, *[IMAGE] * 4, IMAGE_END, 21, ASSISTANT],
            *[*written_image(), 22, *written_audio(clip_tokens), END],
        ],
        [BEGIN, USER, 23, 24, 25, ASSISTANT, *written_image(), END],
        [BEGIN, USER, 26, ASSISTANT, 27, 28, END],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((ids == PAD) | (ids == WRITTEN_IMAGE) | (ids == IMAGE_END) | (ids == USER), -100)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": labels,
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
        "image_targets": torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1,
        "audio_targets": torch.randn(1, NUM_MELS, clip_tokens * FRAMES, generator=generator).clamp(-2, 2),
    }
