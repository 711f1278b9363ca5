"""Decisions that all ranks of a run have to make alike."""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import TrainingArguments

Answer = TypeVar("Answer")


def decide(choose: Callable[[], Answer], args: TrainingArguments) -> Answer:
    """What the first rank finds, on all ranks: each might find something else in a folder that is being written.

    Raises:
        ValueError: on all ranks, where the first one has found a ValueError or an OSError.
    """
    if args.world_size == 1:
        return choose()
    answer: list = [None, None]
    if args.process_index == 0:
        try:
            answer[0] = choose()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    torch.distributed.broadcast_object_list(answer, src=0, device=args.device)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]
