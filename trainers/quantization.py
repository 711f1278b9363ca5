"""Training beside weights of 8 and 4 bits: these stay as they are, adapters in full precision learn (QLoRA, Dettmers et
al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, TrainingArguments


def check_quantized_training(args: TrainingArguments, has_adapters: bool) -> None:
    """Refuse what cannot be trained beside rounded weights, before anything is loaded.

    Raises:
        ValueError: for ZeRO-3, for torch.compile, and where there are no adapters.
    """
    if not has_adapters:
        raise ValueError(
            "quantization.load_in: weights of 8 and 4 bits do not learn; add adapters (peft), or leave it out"
        )
    if args.deepspeed and args.hf_deepspeed_config.is_zero3():
        raise ValueError(
            "quantization.load_in: ZeRO-3 cannot divide weights of 8 and 4 bits among ranks; set training.deepspeed to "
            "zero2, where each rank holds all of them, or leave load_in out"
        )
    if args.torch_compile:
        raise ValueError(
            "quantization.load_in: torch.compile is not possible with weights of 8 and 4 bits; leave one of them out"
        )


def prepare_quantized_training(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """Freeze a model that is loaded in 8 or 4 bits, and make what is not rounded float32. Before adapters are added."""
    return prepare_model_for_kbit_training(
        model=model,
        use_gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )


def make_trained_weights_float32(model: nn.Module) -> None:
    """TRL makes the adapters of rounded models bfloat16, in which small updates are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
