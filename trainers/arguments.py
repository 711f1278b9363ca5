"""`transformers.TrainingArguments` with the defaults of this project, and those of a run that is only planned."""

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .gradient_filters import GradientFilterOptions
from .keywords import check_fsdp, check_keywords, recorded_fsdp
from .locks import warn_of_build_locks
from .losses import ModalityWeights
from .objectives import ObjectiveOptions, build_objective
from .optimizers import FOR_MATRICES, OPTIMIZERS, check_distribution
from .parameter_groups import ParameterGroup

# Least values that make sense, where transformers checks none.
MINIMUMS = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "eval_accumulation_steps", "dataloader_prefetch_factor"), 1),
    **dict.fromkeys(("early_stopping_patience", "max_tokens_per_batch"), 1),
    "early_stopping_threshold": 0,
    **dict.fromkeys(("learning_rate", "muon_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), 0),
    **dict.fromkeys(("num_train_epochs", "warmup_steps", "logging_steps", "eval_steps", "save_steps"), 0),
    **dict.fromkeys(("recurrence_logging_steps", "dataloader_num_workers", "stall_seconds", "seed", "data_seed"), 0),
}
SHARES = ("adam_beta1", "adam_beta2", "ema_decay", "label_smoothing_factor")
# What has a backward pass of its own, which is run once.
OF_BACKWARD = (
    "deepspeed",
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("activation_checkpointing", "gradient_checkpointing"),
)
# What transformers offers and our metrics and model cannot do: the value there has to be, and what another would cause.
FIXED = {
    "label_names": (None, "the metrics need the labels that the model takes, which are called labels"),
    "eval_do_concat_batches": (True, "the metrics need the batches of an evaluation as one"),
    "remove_unused_columns": (False, "rows hold what collator and trainer take, not the model alone"),
    "use_liger_kernel": (False, "Liger has no kernels for this model, and nothing would happen"),
}


def check_choices(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(known)}")


def check_fixed(args: TrainingArguments, fixed: Mapping[str, tuple[Any, str]]) -> None:
    """Raises ValueError for an option that has not the value that it has to have."""
    for name, (value, reason) in fixed.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name} is {getattr(args, name)}, but {reason}; leave it out")


@dataclass
class RecurrentTrainingArguments(TrainingArguments):
    """Training arguments; see `transformers.TrainingArguments` for the inherited ones.

    Args:
        dataloader_drop_last: Whether a last batch that is smaller is left out in training; evaluation takes all rows.
    """

    report_to: str | list[str] | None = "tensorboard"
    """Where metrics go; TensorBoard by default."""
    resume_from_checkpoint: bool | str | None = None
    """Checkpoint folder to go on from; true for the newest whole one of the output folder, and for a start where there
    is none yet, so that the same command may be given again and again."""
    allow_changes: bool = False
    """Whether a run that goes on may have another learning rate, weight decay, other arguments of the optimizer or
    another schedule than its checkpoint; they are then those of this run."""
    logging_nan_inf_filter: bool = False
    """Whether losses that are not finite are hidden from the logs; off, so that they are seen."""
    remove_unused_columns: bool | None = False
    """Off: rows hold what collator and trainer take, not the model alone."""
    recurrence_logging_steps: int = 100
    """Every this many steps the loss of the next batch at one core step is compared with that at the mean depth, and
    state change per step and token correlation are logged. 0 turns it off."""
    depth_gap_alarm: float = 0.01
    """A warning is logged when the loss at one step is less than this many nats above that at the mean depth, in the
    second half of training or once the loss has fallen by a nat: the recurrence is being ignored."""
    token_correlation_alarm: float = 0.95
    """A warning is logged when the mean cosine between the states of different tokens is above this (at least -1, at
    most 1): the states are collapsing."""
    modality_weights: ModalityWeights = field(default_factory=ModalityWeights)
    """How much a token counts in the loss, by what its document contains."""
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """What the steps of a model learn from."""
    deepspeed: dict | str | None = field(default=None, metadata={"is_path": True})
    """File of DeepSpeed, also by its name in `configs/deepspeed/`, or what stands in it."""
    fsdp: bool | str | None = None
    """Whether weights, gradients and states of the optimizer are divided among the ranks by torch's `fully_shard`
    (FSDP2), also on CPUs. Not with DeepSpeed."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that are not trained: patterns of their names with the wildcards * ? [] of a shell, such as
    model.readers.image.*; each has to match."""
    parameter_groups: list[ParameterGroup] = field(default_factory=list)
    """Parameters that learn at a rate of their own, or later than the rest, by patterns of their names."""
    optimizer: str | None = None
    """Name of the optimizer, muon, adamuon, schedule_free or soap, or import name of a function, module:function, that
    builds one from the groups of parameters, the training arguments and the model; by default `optim` names one of
    transformers'."""
    muon_learning_rate: float | None = None
    """Where given, Muon, or AdaMuon where `optimizer` names it, trains the matrices inside the layers at this rate, at
    least 0 and often 3 to 10 times that of AdamW; embeddings, head, convolutions, norms and biases are trained by
    `optim` at `learning_rate`."""
    gradient_filter: GradientFilterOptions = field(default_factory=GradientFilterOptions)
    """Filter that amplifies the slow part of gradients before each step of the optimizer (Grokfast), which may let a
    model generalise long before it would otherwise. Not with DeepSpeed or FSDP."""
    ema_decay: float | None = None
    """Where given, at least 0 and below 1, the run leaves the exponential moving average of its weights behind: 0.995
    to 0.999 for short runs, 0.9999 for long ones. Evaluations during training are of that average, and
    `load_best_model_at_end` leaves the average of the best checkpoint. Not with DeepSpeed or FSDP."""
    auto_find_batch_size: bool = False
    """Whether `per_device_train_batch_size` is divided, and `gradient_accumulation_steps` multiplied, until a step fits
    into memory, which is tried before training begins; the batch of an update stays. With `trainer: pretrain`, and not
    with DeepSpeed or FSDP."""
    max_tokens_per_batch: int | None = None
    """Where given, a micro-batch has as many rows of similar length as have at most so many tokens, padding
    included, and at most `per_device_train_batch_size`. For rows of different lengths (`packing: false`) that are not
    streamed."""
    early_stopping_patience: int | None = None
    """Where given, the run ends when so many evaluations one after another have not improved
    `metric_for_best_model`, by default the mean loss of all validation sources. `load_best_model_at_end` keeps the best
    model and not the last."""
    early_stopping_threshold: float = 0.0
    """Least improvement of that metric over its best value that counts."""
    stall_seconds: float = 600.0
    """Seconds without a step or a batch of an evaluation, at least 0, after which a warning says what the run waits
    for, such as a worker that hangs; 0 turns it off."""

    is_planned: ClassVar[bool] = False
    """Whether the machine of the run is another one than this."""

    def __post_init__(self) -> None:
        self._check_ranges()
        # The trainer compiles the units of the model; transformers would compile the whole model, whose loop varies in
        # length, until dynamo gives up and runs it eagerly.
        self.compile_units = self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)
        self.compile_options = {"backend": self.torch_compile_backend or "inductor", "mode": self.torch_compile_mode}
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if not torch.accelerator.is_available():
            self.use_cpu = True  # with DeepSpeed, transformers would otherwise see one process only
        if self.objective.name == "full":
            self.activation_checkpointing = True
        if build_objective(self.objective).is_read_after_steps:
            # DDP would look for them behind the forward pass, and part its outputs from each other.
            self.ddp_find_unused_parameters = False
        if self.data_seed is None:
            self.data_seed = self.seed  # accelerate would take whatever the global generator was last seeded with
        if self.greater_is_better is None:
            self.greater_is_better = False  # transformers takes all metrics but losses to be better when greater
        if self.deepspeed and self.fsdp:
            raise ValueError("deepspeed and fsdp are both set, and each divides the weights; leave one of them out")
        if self.deepspeed:
            warn_of_build_locks()  # what comes builds already
        self.fsdp_config = recorded_fsdp(self.fsdp_config, bool(self.fsdp))
        super().__post_init__()
        self.fsdp_config = check_fsdp(self.fsdp_config)
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            found = "; ".join(line.removeprefix("- ds ") for line in self.hf_deepspeed_config.mismatches)
            raise ValueError(f"deepspeed: its file says otherwise than the arguments: {found}; write auto there")
        if self.fp16 and self.use_cpu and not self.is_planned:
            raise ValueError(
                f"{type(self).__name__}.fp16: it is on, but on a CPU the run would be in float32 all the same; set "
                "bf16 to true instead"
            )
        self._check_distribution(self.hf_deepspeed_config.config if self.deepspeed else None)

    def _check_distribution(self, deepspeed: Mapping[str, Any] | None) -> None:
        zero = None if deepspeed is None else deepspeed.get("zero_optimization", {})
        check_distribution(self, zero, bool(self.fsdp))

    def _check_ranges(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}.{item.name}: {value} is not finite; give a number")
        for name, least in MINIMUMS.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give at least {least}")
        self._check_report_to()
        check_keywords(self)
        for name in SHARES:
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; give a number from 0 to below 1")
        check_fixed(self, FIXED)
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if choices and value is not None:
                check_choices(item.name, value, choices)
        self._check_optimizer()
        if self.early_stopping_patience is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"early_stopping_patience is {self.early_stopping_patience}, but eval_strategy is no, so that "
                "nothing is evaluated; set eval_strategy to steps or epoch"
            )
        if self.early_stopping_patience is None and self.early_stopping_threshold:
            raise ValueError(
                f"early_stopping_threshold is {self.early_stopping_threshold}, but early_stopping_patience is null, so "
                "that nothing would read it; set that, or leave the threshold out"
            )
        self._check_batches()
        self._check_objective()
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; give at least 1, or -1 to count in num_train_epochs")
        if self.max_steps == -1 and self.num_train_epochs == 0:
            raise ValueError("num_train_epochs is 0: there is nothing to train; give more than 0, or max_steps")
        if not -1 <= self.token_correlation_alarm <= 1:
            raise ValueError(f"token_correlation_alarm is {self.token_correlation_alarm}; a cosine lies from -1 to 1")

    def _check_optimizer(self) -> None:
        """Raises ValueError for a name that nothing is registered under, and for rates that nothing reads."""
        if self.optimizer is not None and ":" not in self.optimizer and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer is {self.optimizer!r}; give one of {', '.join(OPTIMIZERS)}, or module:function of your own"
            )
        if self.optimizer in FOR_MATRICES and self.muon_learning_rate is None:
            raise ValueError(
                f"optimizer is {self.optimizer!r}, but muon_learning_rate is null; give its rate, such as 0.01"
            )
        if self.optimizer not in (None, *FOR_MATRICES) and self.muon_learning_rate is not None:
            raise ValueError(
                f"muon_learning_rate is {self.muon_learning_rate}, but optimizer is {self.optimizer!r}, which is not "
                "Muon; leave one of them out"
            )
        if self.optimizer == "schedule_free":
            self._check_schedule_free()

    def _check_schedule_free(self) -> None:
        """Raises ValueError for a schedule or an average beside that of the optimizer."""
        if not str(self.lr_scheduler_type).startswith("constant"):
            raise ValueError(
                f"lr_scheduler_type is {self.lr_scheduler_type!s}, but optimizer is 'schedule_free', whose average "
                "takes the place of a falling rate; give constant or constant_with_warmup"
            )
        if self.ema_decay is not None:
            raise ValueError(
                f"ema_decay is {self.ema_decay}, but optimizer is 'schedule_free', which averages by itself; set it to "
                "null"
            )

    def _check_objective(self) -> None:
        """Raises ValueError for an objective that is unknown, or that cannot be with what else is asked for."""
        objective, name = build_objective(self.objective), self.objective.name
        excluded = ["fsdp", "ddp_find_unused_parameters"] if objective.is_read_after_steps else []
        excluded += OF_BACKWARD if objective.takes_gradients else ()
        for option in excluded:
            if getattr(self, option):
                raise ValueError(
                    f"objective.name is {name!r}, which is not possible with {option}; leave {option} out, or give "
                    "another objective, such as truncated"
                )
        zero = (self.deepspeed_settings or {}).get("zero_optimization", {})
        if objective.is_read_after_steps and zero.get("stage") == 3:
            raise ValueError(
                f"objective.name is {name!r}, which needs weights after the forward pass, and ZeRO-3 gathers them "
                "within it alone; use zero2, or give another objective, such as full"
            )

    @property
    def deepspeed_settings(self) -> dict[str, Any] | None:
        """Content of the DeepSpeed file; None for a run without DeepSpeed."""
        if not isinstance(self.deepspeed, str):
            return self.deepspeed
        return json.loads(Path(self.deepspeed).read_text(encoding="utf-8"))

    def _check_batches(self) -> None:
        """Raises ValueError for options of batches that cannot be had together."""
        others = [name for name in ("deepspeed", "fsdp", "max_tokens_per_batch") if getattr(self, name)]
        if self.auto_find_batch_size and others:
            raise ValueError(
                f"auto_find_batch_size is true, but with {others[0]} the memory of a step is another one than what is "
                "tried; set it to false and give per_device_train_batch_size, as --dry-run estimates it"
            )
        if self.auto_find_batch_size and self.objective.name != "truncated":
            raise ValueError(
                f"auto_find_batch_size is true, but objective.name is {self.objective.name!r}, whose memory is not "
                "what is tried; set it to false and give per_device_train_batch_size"
            )
        if self.max_tokens_per_batch is not None and self.train_sampling_strategy != "random":
            raise ValueError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch} and train_sampling_strategy "
                f"{self.train_sampling_strategy!r}, but batches by tokens have an order of their own; leave one "
                "of them out"
            )

    @property
    def optimizer_name(self) -> str | None:
        """Name of the optimizer as `build_optimizer` takes it; None where `optim` names it."""
        return "muon" if self.optimizer is None and self.muon_learning_rate is not None else self.optimizer

    def _check_report_to(self) -> None:
        """`Trainer` would refuse them after the data have been read."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in names:
            if name in ("all", "none") and len(names) == 1:
                continue
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(["none", "all", *sorted(INTEGRATION_TO_CALLBACK)])
                raise ValueError(f"{type(self).__name__}.report_to: {name!r} is unknown; known: {known}")
            # Flyte is there where flyte runs.
            if name not in (*get_available_reporting_integrations(), "flyte") and not self.is_planned:
                raise ValueError(
                    f"{type(self).__name__}.report_to: {name!r} needs a package that is not installed; install it, or "
                    "give another, such as tensorboard or none"
                )

    def to_dict(self) -> dict:
        """The arguments as plain values, those of ours too."""
        groups = [asdict(group) for group in self.parameter_groups]
        ours = {name: asdict(getattr(self, name)) for name in ("modality_weights", "objective", "gradient_filter")}
        return {**super().to_dict(), **ours, "parameter_groups": groups}

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP divides the weights, by `fsdp` or by a YAML of `accelerate launch`."""
        return bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")

    def check_launcher(self) -> None:
        """Refuse FSDP, and DeepSpeed, in a process that no launcher told its rank: it would look for one through MPI.

        Raises:
            ValueError: if neither is there.
        """
        name = "deepspeed" if self.deepspeed else "fsdp"
        needs_rank = self.fsdp or (self.deepspeed and importlib.util.find_spec("mpi4py") is None)
        if needs_rank and "RANK" not in os.environ:
            raise ValueError(
                f"training.{name} is set, but RANK is not in the environment; start with `deepspeed` instead of "
                f"`python`, or leave training.{name} out"
            )

    def choose_best_metric(self, sources: Iterable[str], names: Sequence[str]) -> None:
        """Where the best model is asked for, and no metric named, make it the mean over all sources of the first one.

        Args:
            sources: Names of the validation sources.
            names: Metrics of each; of the first there is a mean over all sources (`BaseTrainer.evaluate`).

        Raises:
            ValueError: if the one that is named is not known.
        """
        known = [f"eval_{names[0]}", *(f"eval_{source}_{name}" for source in sources for name in names)]
        name = self.metric_for_best_model
        is_needed = self.save_strategy == SaveStrategy.BEST or self.early_stopping_patience is not None
        if name in ("loss", "eval_loss") or (name is None and is_needed):
            self.metric_for_best_model = known[0]  # transformers' default is the loss of a validation set without name
        elif name is not None and not {name, f"eval_{name}"} & set(known):
            raise ValueError(
                f"training.metric_for_best_model: {name!r} is unknown; the metrics of this run are {', '.join(known)}"
            )


class PlannedTrainingArguments(RecurrentTrainingArguments):
    """Checked like those of a run, but for what only the machine of the run can answer: whether its GPUs know bf16 and
    TF32, what is installed there, and whether its processes find each other. No device, process group or DeepSpeed
    engine is set up.
    """

    is_planned = True

    def __post_init__(self) -> None:
        deepspeed, self.deepspeed = self.deepspeed, None
        self.use_cpu, self.tf32 = True, None
        super().__post_init__()
        self.deepspeed = deepspeed
        self._check_objective()  # with it
        self._check_distribution(self.deepspeed_settings)

    @property
    def device(self) -> torch.device:
        """Where the model of a plan stands: it has shapes and no numbers."""
        return torch.device("meta")

    @property
    def world_size(self) -> int:
        """Number of ranks of the planned run: WORLD_SIZE, 1 where that is not set.

        Raises:
            ValueError: if it is no number of processes.
        """
        text = os.environ.get("WORLD_SIZE", "1")
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"WORLD_SIZE is {text!r} in the environment; give the number of GPUs, at least 1")
        return int(text)
