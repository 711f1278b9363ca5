"""Models as training begins with them: of a size that can be, whole, and the same on every rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from model import MODELS, MegaTransformerConfig, set_token_ids
from model.backbones import reason_of

from .arguments import RecurrentTrainingArguments


def build_model(
    config: PreTrainedConfig,
    args: RecurrentTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_backbones: bool = True,
) -> PreTrainedModel:
    """A fresh model, the same on every rank.

    Args:
        tokenizer: Whose special tokens the configuration gets; codecs have none.
        with_backbones: Whether pretrained encoders get their weights; a checkpoint has them.
    """
    if tokenizer is not None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config.get_text_config(), name, getattr(tokenizer, name))
    reads_media = isinstance(config, MegaTransformerConfig)
    if reads_media:
        set_token_ids(config, tokenizer)
    set_seed(args.seed)
    with whole_weights(args):
        model = MODELS[type(config)](config)
        if reads_media and with_backbones:
            model.model.load_backbones()
    return model


@contextmanager
def whole_weights(args: RecurrentTrainingArguments) -> Iterator[None]:
    """Let the Auto classes build whole models. Under ZeRO-3 they build partitioned ones, which initialise differently,
    so that stages could not be compared; DeepSpeed partitions whole ones when training begins.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, which takes no memory.

    Raises:
        ValueError: for sizes beyond what any tensor can have.
    """
    try:
        with torch.device("meta"):
            return MODELS[type(config)](config)
    except (RuntimeError, OverflowError, TypeError) as error:  # as torch says that a size is none
        reason = reason_of(error)
        raise ValueError(
            f"no model of these sizes can be made ({reason}); make them smaller in section model"
        ) from error


def check_memory(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose weights alone are larger than the memory of this machine, before any of them
    is made. They are made whole on each rank, in float32.
    """
    count = model.num_parameters()
    needed, memory = 4 * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the model has {count} parameters, which take {needed / 2**30:.0f} GiB in float32, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory: make it smaller; --dry_run true lists its parts"
        )
