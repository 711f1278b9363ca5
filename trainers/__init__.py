"""Trainers by name."""

from .arguments import PlannedTrainingArguments, RecurrentTrainingArguments
from .dry_run import describe_needs
from .losses import ModalityWeights
from .optimizers import ParameterGroup
from .reconstruction import ReconstructionTrainer
from .recurrent import RecurrentTrainer
from .resuming import check_weights, find_resume_point

TRAINERS = {"pretrain": RecurrentTrainer, "reconstruction": ReconstructionTrainer}


def get_trainer_class(name: str) -> type[RecurrentTrainer | ReconstructionTrainer]:
    """The trainer registered under `name`.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in TRAINERS:
        raise ValueError(f"trainer {name!r} is unknown; known trainers: {', '.join(TRAINERS)}")
    return TRAINERS[name]


__all__ = [
    "TRAINERS",
    "ModalityWeights",
    "ParameterGroup",
    "PlannedTrainingArguments",
    "ReconstructionTrainer",
    "RecurrentTrainer",
    "RecurrentTrainingArguments",
    "check_weights",
    "describe_needs",
    "find_resume_point",
    "get_trainer_class",
]
