"""The trainers of fine-tuning by name, and their arguments. Apart from those of pretraining, which need no TRL."""

from transformers import Trainer

from .arguments import RecurrentTrainingArguments
from .dpo import PreferenceArguments, PreferenceTrainer
from .exit_probe import ExitProbeArguments, ExitProbeTrainer
from .grpo import RolloutArguments, RolloutTrainer
from .recurrent import RecurrentTrainer
from .sft import SupervisedArguments, SupervisedTrainer

FINETUNERS: dict[str, tuple[type[Trainer], type[RecurrentTrainingArguments]]] = {
    "continued": (RecurrentTrainer, RecurrentTrainingArguments),
    "sft": (SupervisedTrainer, SupervisedArguments),
    "dpo": (PreferenceTrainer, PreferenceArguments),
    "grpo": (RolloutTrainer, RolloutArguments),
    "exit_probe": (ExitProbeTrainer, ExitProbeArguments),
}
