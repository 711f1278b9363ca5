"""Trainers by name."""

from .arguments import PlannedTrainingArguments, RecurrentTrainingArguments
from .dry_run import describe_needs
from .losses import ModalityWeights
from .parameter_groups import ParameterGroup
from .reconstruction import ReconstructionTrainer
from .recurrent import RecurrentTrainer
from .resuming import check_weights, find_resume_point

TRAINERS = {"pretrain": RecurrentTrainer, "reconstruction": ReconstructionTrainer}

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
]
