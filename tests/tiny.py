"""Tiny models for tests."""

from typing import Any

import torch

from model import (
    ExitOptions,
    MegaTransformerForCausalLM,
    MegaTransformerForSequenceClassification,
    MegaTransformerTextConfig,
    NoiseOptions,
)
from model.depth import EXIT_KEYWORDS

PAD, BEGIN, END = 0, 1, 2


def tiny_config(**overrides) -> MegaTransformerTextConfig:
    """Width 32, 4 query and 2 key/value heads, layers 1 + 2 + 1, mean of 4 steps of which 2 carry gradient."""
    recurrence = {"mean_steps": 4, "backprop_steps": 2, **overrides.pop("recurrence", {})}
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }
    return MegaTransformerTextConfig(**{**settings, **overrides}, recurrence=recurrence)


def tiny_model(seed: int = 0, scale: float = 1.0, **overrides) -> MegaTransformerForCausalLM:
    """A tiny model in evaluation mode. `scale` multiplies the weight matrices, to move a fresh model off its gentle
    start; the norms' weights then differ from 1 too, or a norm of what is normed already would not show.
    """
    torch.manual_seed(seed)
    model = MegaTransformerForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif scale != 1:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
    return model


def tiny_classifier(**overrides) -> MegaTransformerForSequenceClassification:
    """A tiny classifier, of 3 classes unless told otherwise, in evaluation mode."""
    torch.manual_seed(0)
    return MegaTransformerForSequenceClassification(tiny_config(**{"num_labels": 3, **overrides})).eval()


def tiny_ids(*shape: int, seed: int = 0, low: int = 3, high: int = 64) -> torch.Tensor:
    """Random token ids without special tokens."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def for_forward(**options: Any) -> dict[str, Any]:
    """Keywords of `generate` as `forward` takes them: those of exits, and of noise, as one object each."""
    found = dict(options)
    for name, part, fields in (
        ("exits", ExitOptions, EXIT_KEYWORDS),
        ("state_noise", NoiseOptions, {"noise_level": "level"}),
    ):
        given = {fields[key]: found.pop(key) for key in options if key in fields}
        found |= {name: part(**given)} if given else {}
    return found
