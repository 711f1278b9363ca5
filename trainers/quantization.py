"""Training beside weights of 8 and 4 bits: these stay as they are, adapters in full precision learn (QLoRA, Dettmers et
al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, TrainingArguments


def is_quantized(model: nn.Module) -> bool:
    """Whether the model, or what its adapters are on, was loaded in 8 or 4 bits."""
    return getattr(model, "is_quantized", False)  # transformers sets it on such models alone


def prepare_quantized_training(model: PreTrainedModel, args: TrainingArguments, has_lora: bool) -> PreTrainedModel:
    """Freeze a model that is loaded in 8 or 4 bits, and make what is not rounded float32; before adapters are added.

    Raises:
        ValueError: without adapters of PEFT, under ZeRO-3, and with torch.compile.
    """
    if not has_lora:
        raise ValueError(
            "peft: weights of 8 and 4 bits do not learn, and step_lora alone is not trained beside them; add adapters, "
            "or load the base in more bits"
        )
    if args.deepspeed and args.hf_deepspeed_config.is_zero3():
        raise ValueError(
            "training.deepspeed: ZeRO-3 does not divide weights of 8 and 4 bits among ranks; use zero2, where each "
            "rank holds all of them, or load the base in more bits"
        )
    if args.torch_compile:
        raise ValueError("training.torch_compile: it is not possible with weights of 8 and 4 bits; leave it out")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In evaluation, on CPUs with bfloat16 instructions, it would arrange the weights for a kernel that has no
            # gradient, and which training would use from then on.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(
        model=model,
        use_gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )


def make_trained_weights_float32(model: nn.Module) -> None:
    """TRL makes the adapters of quantised models bfloat16, in which small updates are lost."""
    if not is_quantized(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
