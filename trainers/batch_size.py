"""The largest micro-batch that fits into memory, with the batch of an update as it is."""

import gc
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.utils.data import Dataset

from .arguments import RecurrentTrainingArguments
from .dry_run import expected_steps
from .optimizers import bytes_of_states
from .parameter_groups import freeze
from .recurrent import inputs_of_model
from .resuming import read_state

logger = logging.getLogger(__name__)


def fit_batch_size(
    args: RecurrentTrainingArguments,
    model: nn.Module,
    dataset: Dataset,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    resume_point: str | None = None,
) -> None:
    """Divide the rows of a micro-batch until a step on the longest rows fits into memory, and make as many more
    micro-batches of an update, if `args.auto_find_batch_size` is true, which is false afterwards.

    accelerate's and transformers' search changes the batch of an update, and begins a training anew that has run out of
    memory, with weights that have learned. Here steps are tried before it begins, at the greatest depth that will be
    drawn; nothing is learned in them, and no random number drawn. A run that goes on has what its checkpoint had.

    Raises:
        ValueError: Not one row fits.
    """
    if not args.auto_find_batch_size:
        return
    args.auto_find_batch_size = False
    given = args.per_device_train_batch_size
    if resume_point is not None:
        rows = read_state(resume_point)["train_batch_size"]
    else:
        sizes = (rows for rows in range(given, 0, -1) if given % rows == 0)
        tries = ((rows, memory_suffices(args, model, dataset, collate, rows)) for rows in sizes)
        rows = next((rows for rows, suffices in tries if all_ranks(suffices, args)), None)
    if rows is None:
        raise ValueError(
            f"training.auto_find_batch_size: not one row fits into the memory of {args.device}; make data.block_size "
            "or the model smaller, or set training.activation_checkpointing"
        )
    if rows < given:
        args.per_device_train_batch_size = rows
        args.gradient_accumulation_steps *= given // rows
        logger.warning(
            "training.per_device_train_batch_size: %d rows do not fit into memory; from here on it is %d, and "
            "gradient_accumulation_steps %d, with as many rows in an update",
            *(given, rows, args.gradient_accumulation_steps),
        )


def all_ranks(is_so: bool, args: RecurrentTrainingArguments) -> bool:
    """Whether something is so on all ranks."""
    found = torch.tensor(int(is_so), device=args.device)
    if args.world_size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return bool(found)


def memory_suffices(
    args: RecurrentTrainingArguments,
    model: nn.Module,
    dataset: Dataset,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    rows: int,
) -> bool:
    """Whether a step on so many rows fits into it."""
    batch = inputs_of_model(collate(longest_rows(dataset, rows)))
    try:
        try_step(args, model, batch)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        clear_device_cache()
    return True


def longest_rows(dataset: Dataset, count: int) -> list[Any]:
    """The longest rows where the lengths are known, else the first."""
    if not hasattr(dataset, "lengths"):
        return list(itertools.islice(iter(dataset), count))
    order = np.argsort(dataset.lengths, kind="stable")[::-1]
    return [dataset[int(index)] for index in order[:count]]


def try_step(args: RecurrentTrainingArguments, model: nn.Module, batch: dict[str, Any]) -> None:
    """Make a forward and a backward pass beside as much memory as the states of the optimizer will have."""
    freeze(model, args.freeze)
    model.to(args.device).train()
    if args.activation_checkpointing:
        options = dict(args.activation_checkpointing_kwargs or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)
    states = torch.empty(bytes_of_states(args, model), dtype=torch.uint8, device=args.device)
    config, depth = model.config.get_text_config(), {}
    if config.num_core_layers:
        depth["num_steps"] = (1, expected_steps(config.recurrence, args.seed).most_grad)
    inputs = {name: value.to(args.device) for name, value in batch.items()}
    kind = torch.float16 if args.fp16 else torch.bfloat16
    devices = [args.device] if args.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.autocast(args.device.type, kind, enabled=args.fp16 or args.bf16),
    ):
        loss = model(**inputs, **depth, skip_logits=True).loss
    loss.backward()
    del states
