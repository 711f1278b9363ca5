"""Tiny sequence-to-sequence models for tests."""

from typing import Any

import torch

from model import MegaTransformerForSeq2SeqLM, MegaTransformerSeq2SeqConfig
from tests.tiny import BEGIN, END, PAD

PART = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_seq2seq_config(
    encoder: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, **overrides
) -> MegaTransformerSeq2SeqConfig:
    """Both parts of width 32 and layers 1 + 2 + 1, with a mean of 3 steps, and of 4 of which 2 carry gradient."""
    of_encoder = {**PART, "recurrence": {"mean_steps": 3, "backprop_steps": 3}, **(encoder or {})}
    of_decoder = {**PART, "recurrence": {"mean_steps": 4, "backprop_steps": 2}, **(decoder or {})}
    tokens = {"vocab_size": 64, "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
    return MegaTransformerSeq2SeqConfig(encoder_config=of_encoder, decoder_config=of_decoder, **{**tokens, **overrides})


def tiny_seq2seq(seed: int = 0, scale: float = 2.5, **overrides) -> MegaTransformerForSeq2SeqLM:
    """A model in evaluation mode, whose matrices are multiplied by `scale`."""
    torch.manual_seed(seed)
    model = MegaTransformerForSeq2SeqLM(tiny_seq2seq_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else torch.empty_like(parameter).uniform_(0.7, 1.3))
    return model
