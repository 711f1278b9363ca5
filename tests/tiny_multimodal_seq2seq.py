"""Tiny sequence-to-sequence models that read and write images and audio."""

import torch

from model import MegaTransformerForMultimodalSeq2SeqLM, MegaTransformerMultimodalSeq2SeqConfig
from tests.tiny_writing import tiny_writer_config

IDS = ("image", "audio", "written_image", "written_audio", "image_start", "image_end", "audio_start", "audio_end")


def tiny_multimodal_seq2seq(**overrides) -> MegaTransformerForMultimodalSeq2SeqLM:
    """The parts of `tiny_writer`, of which the encoder reads and the decoder writes, in evaluation mode. Weights do
    something everywhere: those that begin as zero are noise here, and matrices are three times as large as usual.
    """
    whole = tiny_writer_config().to_dict()
    ids = {name: whole[name] for name in (*(f"{it}_token_id" for it in IDS), "null_token_id", "structure_token_ids")}
    media = {name: part for name, part in whole.items() if name in ("vision_config", "audio_config")}
    media |= {f"{name}_writer_config": whole[f"{name}_writer_config"] for name in ("image", "audio")}
    text = whole["text_config"]
    part = {name: text[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    part |= {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "recurrence": {"mean_steps": 3}}
    tokens = {name: text[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = MegaTransformerMultimodalSeq2SeqConfig(
        **{"encoder_config": part, "decoder_config": part, **ids, **media, **tokens, **overrides}
    )
    model = MegaTransformerForMultimodalSeq2SeqLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "is_zero_at_first", False):
                module.weight.normal_(std=0.3)
            elif isinstance(module, torch.nn.Linear):
                module.weight.mul_(3)
    return model
