"""Trainers by name."""

from .arguments import RecurrentTrainingArguments
from .recurrent import RecurrentTrainer
from .resuming import find_resume_point

TRAINERS = {"pretrain": RecurrentTrainer}


def get_trainer_class(name: str) -> type[RecurrentTrainer]:
    """The trainer registered under `name`.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in TRAINERS:
        raise ValueError(f"trainer {name!r} is unknown; known trainers: {', '.join(TRAINERS)}")
    return TRAINERS[name]


__all__ = ["TRAINERS", "RecurrentTrainer", "RecurrentTrainingArguments", "find_resume_point", "get_trainer_class"]
