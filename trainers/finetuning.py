"""The trainers of fine-tuning by name, what a run starts from, and which low-rank adapters it adds where. Apart from
pretraining, which needs neither TRL nor PEFT.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

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

ALL_LINEAR = "all-linear"
# Patterns of the names of modules.
PARTS = {
    "prelude": "model.prelude.*",
    "core": "model.core.*",
    "coda": "model.coda.*",
    "vision": "model.readers.image.encoder.*",
    "audio": "model.readers.audio.encoder.*",
    "projectors": "model.readers.*.projector.*",
}


@dataclass
class ModelOptions:
    """The checkpoint that is tuned."""

    path: str = field(default="", metadata={"is_path": True})
    """Folder of a run or of a checkpoint, or a name on the Hugging Face hub; it has to be given."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights; by default that of the checkpoint. Adapters are float32."""
    num_steps: int | None = None
    """Mean of the core steps in training, and those of evaluation, at least 1; by default the checkpoint's."""
    backprop_steps: int | None = None
    """Last core steps that carry gradient, at least 1; by default as many as in the checkpoint's own training."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(".path: it is missing; give the folder of a checkpoint, such as runs/recurrent_lm")
        for name in ("num_steps", "backprop_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f".{name}: {value} is no number of steps; give at least 1")


@dataclass
class TargetOptions:
    """Linear layers by part of the model: names such as [qkv_proj, down_proj], or "all-linear"."""

    prelude: str | list[str] | None = None
    """Layers that run once, in front of the core."""
    core: str | list[str] | None = None
    """Layers that are iterated, and the injection (`proj` or `gate`); one low-rank update serves all steps."""
    coda: str | list[str] | None = None
    """Layers that run once, behind the core."""
    vision: str | list[str] | None = None
    """The encoder of images."""
    audio: str | list[str] | None = None
    """The encoder of audio."""
    projectors: str | list[str] | None = None
    """What maps features of images and audio onto the model's width."""


@dataclass
class PeftOptions:
    """Low-rank adapters by PEFT (LoRA, Hu et al. 2021, arXiv 2106.09685): W x + alpha / rank B A x."""

    rank: int = 8
    """Rank of the low-rank update, at least 1."""
    alpha: int = 16
    """Scale of the low-rank update, times the rank; at least 1."""
    dropout: float = 0.0
    """Dropout of what goes into the low-rank update; at least 0, below 1."""
    target_modules: TargetOptions = field(default_factory=TargetOptions)
    """Where the adapters are; at least one part has to be named."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f".dropout: {self.dropout} is no share; give at least 0 and less than 1")


@dataclass
class StepLoraOptions:
    """A low-rank update of the core's weights for each of its first steps, instead of one for all."""

    num_steps: int = 8
    """Steps that have a low-rank update, the first ones, at least 1; later steps have none."""
    rank: int = 4
    """Rank of the low-rank update, at least 1."""
    alpha: int = 8
    """Scale of the low-rank update, times the rank; at least 1."""
    target_modules: str | list[str] = ALL_LINEAR
    """Linear layers of the core, by name, or "all-linear"."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha)
        if self.num_steps < 1:
            raise ValueError(f".num_steps: {self.num_steps} steps have no delta; give at least 1")


def check_low_rank(rank: int, alpha: int) -> None:
    """Raises ValueError for a rank or a scale below 1."""
    for name, value in (("rank", rank), ("alpha", alpha)):
        if value < 1:
            raise ValueError(f".{name}: {value} is too small; give at least 1")


# ------------------------------------------------------------------------------------------------ options to adapters


def peft_config(options: PeftOptions, model: nn.Module) -> LoraConfig:
    """The configuration of PEFT; ValueError as of `find_targets`."""
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=find_targets(model, options.target_modules),
        task_type="CAUSAL_LM",
    )


def find_targets(model: nn.Module, options: TargetOptions) -> list[str]:
    """The full names of the linear layers that the options name; ValueError if they name none, says what there is."""
    layers, found = linear_layers(model), []
    wanted = {
        "prelude": options.prelude,
        "core": options.core,
        "coda": options.coda,
        "vision": options.vision,
        "audio": options.audio,
        "projectors": options.projectors,
    }
    for part, names in wanted.items():
        if names is not None:
            found += match(layers, part, names, f"peft.target_modules.{part}")
    if not found:
        raise ValueError(f"peft.target_modules: no part is named; this model has {describe_layers(layers)}")
    return found


def step_lora_targets(model: nn.Module, names: str | list[str]) -> list[str]:
    """The linear layers of the core that are named, or all of them, as the core calls them.

    Raises:
        ValueError: The same as `find_targets`.
    """
    layers = match(linear_layers(model), "core", names, "step_lora.target_modules")
    return [layer.removeprefix("model.core.") for layer in layers]


def linear_layers(model: nn.Module) -> dict[str, list[str]]:
    """The full names of the linear layers of each part that has any."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parts = {part: [name for name in linear if fnmatchcase(name, pattern)] for part, pattern in PARTS.items()}
    return {part: names for part, names in parts.items() if names}


def match(layers: dict[str, list[str]], part: str, names: str | list[str], key: str) -> list[str]:
    """The full names of the layers of a part that are named, or of all; ValueError for names that match nothing."""
    if part not in layers:
        raise ValueError(f"{key}: {part} has no linear layers; this model has {describe_layers(layers)}")
    if names == ALL_LINEAR:
        return layers[part]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in map(last_name, layers[part]):
            known = ", ".join(dict.fromkeys(map(last_name, layers[part])))
            raise ValueError(
                f"{key}: {name!r} matches nothing; the linear layers of {part} are {known}; or {ALL_LINEAR}"
            )
    return [layer for layer in layers[part] if last_name(layer) in names]


def last_name(name: str) -> str:
    """`qkv_proj` of `model.core.layers.0.attention.qkv_proj`."""
    return name.rpartition(".")[2]


def describe_layers(layers: dict[str, list[str]]) -> str:
    """The parts and the names of their layers."""
    return ", ".join(f"{part} ({', '.join(dict.fromkeys(map(last_name, names)))})" for part, names in layers.items())


# ----------------------------------------------------------------------------------------------------- quantised models


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
