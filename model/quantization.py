"""Weights of 8 and 4 bits: which matrices have them, and how. bitsandbytes rounds them while a checkpoint is loaded."""

from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCK = 64  # weights of 4 bits that share a scale
# Patterns of module names. Of what is not kept all linear maps are rounded; never norms, embeddings, convolutions.
PARTS = {
    "injection": r"model\.(encoder\.)?core\.(cores\.\d+\.)?injection",
    "heads": "lm_head",
    "projectors": r"model\.readers\.\w+\.projector",
    "encoders": r"model\.readers\.\w+\.encoder",
    "prelude": r"model\.(encoder\.)?prelude",
    "core": r"model\.(encoder\.)?core\.(cores\.\d+\.)?layers",
    "coda": r"model\.(encoder\.)?coda",
}
Part = Literal["injection", "heads", "projectors", "encoders", "prelude", "core", "coda"]
# Small, and what they give is no choice among tokens but numbers: when to stop, latents, pixels and sound.
ALWAYS_KEPT = (r"model\.exit_probe", r"model\.exit_gate", r"model\.writers")


@dataclass
class QuantizationConfig:
    """Weights in fewer bits."""

    load_in: Literal["8bit", "4bit"] | None = None
    """Bits of a weight: "8bit" has a scale for each row of a matrix, and rounds what is multiplied with it to 8 bits as
    well, except when training on a CPU (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339); "4bit" has one for each 64
    weights (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Default: as they are in the checkpoint."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4bit: the 16 values that a weight can have, times its scale; "nf4" are quantiles of the normal distribution."""

    double_quant: bool = True
    """4bit: whether the scales are rounded to 8 bits too, which saves 0.4 bits a weight."""

    outlier_threshold: float = 0.0
    """8bit: a feature that is larger than this, at least 0, anywhere in the batch is not rounded; 0 rounds all, so that
    a row's result depends on nothing but the row. Large pretrained models need 6."""

    keep_in_high_precision: list[Part] = field(default_factory=lambda: ["injection", "heads"])
    """Parts of the model whose matrices stay as they are in the checkpoint, as norms and embeddings always do."""

    def __post_init__(self) -> None:
        if not 0 <= self.outlier_threshold < float("inf"):
            raise ValueError(f".outlier_threshold: {self.outlier_threshold} is no size; give 0 or more, such as 6")
        unknown = [name for name in self.keep_in_high_precision if name not in PARTS]
        if unknown:
            raise ValueError(f".keep_in_high_precision: {unknown[0]!r} is unknown; known parts: {', '.join(PARTS)}")


def bits_and_bytes(config: QuantizationConfig, model: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers wants to know of a model like that which is loaded; its weights are not looked at. `dtype` is
    that of products with matrices of 4 bits. ValueError: the head cannot be quantised, or nothing of the model can be.
    """
    if model.config.get_text_config().tie_word_embeddings and "heads" not in config.keep_in_high_precision:
        raise ValueError(
            "keep_in_high_precision has no heads, but the head of this model is its embedding (tie_word_embeddings), "
            "which is never quantised: add heads."
        )
    kept = [*ALWAYS_KEPT, *(PARTS[name] for name in config.keep_in_high_precision)]
    if config.load_in == "4bit":
        kept += uneven_layers(model, kept)
    return BitsAndBytesConfig(
        load_in_4bit=config.load_in == "4bit",
        load_in_8bit=config.load_in == "8bit",
        llm_int8_threshold=float(config.outlier_threshold),
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def uneven_layers(model: PreTrainedModel, kept: list[str]) -> list[str]:
    """The linear layers, but for those of `kept` patterns, whose rows are not made of whole blocks of weights with one
    scale. bitsandbytes 0.50 reads the scales of such matrices at wrong places, on CPUs with AVX-512, so that they stay
    as they are everywhere. ValueError if nothing else is left.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    widths = {name: module.in_features for name, module in linear.items() if should_convert_module(name, kept)}
    uneven = [name for name, width in widths.items() if width % BLOCK]
    if len(uneven) == len(widths):
        raise ValueError(f"load_in 4bit: no layer that is to be quantised has a width that {BLOCK} divides; use 8bit.")
    if uneven:
        logger.warning(
            f"{len(uneven)} of {len(widths)} layers stay as they are, not in 4 bits, since {BLOCK} does not divide "
            f"their width: {uneven[0]} ..."
        )
    return uneven


def keep_scales(layer: nn.Module) -> None:
    """Lets a `Linear4bit`, whose weights are rounded already, be saved after it was used. For its fast kernel on CPUs
    bitsandbytes 0.50 rearranges a layer's weights in their place, in the first forward pass of evaluation. When they
    are saved it arranges them back, bit for bit, but not their scales: these have been rounded to bfloat16, and without
    `double_quant` they stay transposed. So the scales of before, a small part of the whole, are kept, and take the
    place of those.
    """
    if layer.support_avx512bf16_for_cpu:
        layer.register_forward_pre_hook(_keep_scales)
        layer.register_state_dict_post_hook(_restore_scales)


def _keep_scales(layer: nn.Module, args: tuple) -> None:
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):  # not rearranged yet
        layer.kept_scales = copy(layer.weight.quant_state)  # rearranging changes attributes of that object alone


def _restore_scales(layer: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    # It is arranged back by now, and is rearranged again in the next forward pass.
    kept = layer.__dict__.get("kept_scales")
    if kept is None:
        return
    layer.weight.quant_state = layer.quant_state = copy(kept)
    for name, value in kept.as_dict(packed=True).items():
        state_dict[f"{prefix}weight.{name}"] = value
