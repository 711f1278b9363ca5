"""`transformers.Trainer` with what options of ours describe, all of it built and checked before a folder is made."""

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DummyOptim, broadcast_object_list, is_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import EvalLoopOutput, unwrap_peft_model

from .arguments import RecurrentTrainingArguments
from .averaging import WeightAverage
from .checkpoints import CHECKPOINT_NAME, CheckpointKeeper, bytes_of_checkpoint, checkpoints_in, number_of
from .early_stopping import EarlyStopping, has_stopped
from .gradient_filters import GradientFilter
from .norms import speed_up_norms
from .optimizers import CombinedOptimizer, build_optimizer, check_distribution, keeps_low_state
from .parameter_groups import FreezeStepsCallback, assign, freeze, parameters_of_norms, split_groups
from .regrouping import RegroupCallback, needs_regrouping
from .resuming import (
    UNDECAYED,
    OptionsOfRun,
    ResumeError,
    check_weights,
    damage,
    forget_tied_weights,
    group_options,
    nothing_left,
    read_state,
)
from .sharding import ShardingCallback, let_cpus_shard, saving_whole
from .signals import StopCallback, StopRequest, sheltered
from .stalls import StallCallback
from .step_losses import StepLosses

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
OF_ALL_SOURCES = ("loss", "reward")
"""Metrics of which an evaluation of several validation sources has a mean, each source counting the same."""
# How libraries refuse an option or miss a package, other than by a ValueError.
REFUSALS = (ImportError, RuntimeError, TypeError)


class BaseTrainer(Trainer):
    """Optimizers, parameter groups, averages and compilation by our arguments, and checkpoints that have to fit.

    `auxiliary` are parts that are saved with each checkpoint, in files of their own: objects with `save(folder,
    state_dict)`, which gets the state of the whole model where it has been gathered from the ranks, and `load(folder)`.
    A model that has any, and is not PEFT's, does not learn itself and is not saved. `config_text` is kept in each
    checkpoint as config.yaml, where it is given.

    Raises:
        ValueError: The libraries refuse an option; nothing is written then.
    """

    args: RecurrentTrainingArguments
    has_token_batches = False
    """Whether `max_tokens_per_batch` has a meaning for this trainer."""
    smooths_labels = False
    """Whether `label_smoothing_factor` has one."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.options_of_run = OptionsOfRun()
        self.gradient_filter: GradientFilter | None = None
        self.resume_point: str | None = None
        self.config_text: str | None = None
        try:
            super().__init__(*args, **kwargs)
        except REFUSALS as error:
            raise ValueError(f"training: {error}") from error
        make_trained_weights_float32(self.model)
        speed_up_norms(self.model)
        if self.optimizer is None:
            self.optimizer = self.built_optimizer
        self.auxiliary: list[Any] = []
        self.keeper = CheckpointKeeper()
        self.losses = StepLosses()
        self.stop = StopCallback(StopRequest())  # of nobody, until a script puts its own here
        self.add_callback(self.options_of_run)
        self.add_callback(FinalWeights())
        if self.args.fsdp or self.is_fsdp_enabled:
            self.add_callback(ShardingCallback())
        self.add_callback(EpochCallback())
        self.stalls = StallCallback(self.args.stall_seconds)
        if self.args.stall_seconds:
            self.add_callback(self.stalls)
        if isinstance(self.model, PreTrainedModel):
            self.model.register_load_state_dict_post_hook(forget_tied_weights)
        self.average = None if self.args.ema_decay is None else WeightAverage(self.args.ema_decay)
        if self.average is not None:
            self.add_callback(self.average)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience, self.args.early_stopping_threshold))
        if any(group.freeze_steps for group in self.args.parameter_groups):
            self.add_callback(FreezeStepsCallback())

    def create_accelerator_and_postprocess(self) -> None:
        """Also builds what options describe and `Trainer` builds when training begins, before it makes a folder."""
        if self.args.uses_fsdp:
            let_cpus_shard()
        super().create_accelerator_and_postprocess()
        # As `Trainer` sets them a little later, which forgets what is built here.
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = self.built_optimizer = None
        self._check_batches()
        freeze(self.model, self.args.freeze)
        assign(self.model, self.args.parameter_groups)
        self._check_deepspeed_settings()
        settings = self.args.hf_deepspeed_config.config if self.is_deepspeed_enabled else None
        zero = None if settings is None else settings.get("zero_optimization", {})
        check_distribution(self.args, zero, self.is_fsdp_enabled)
        if zero and self.args.optimizer_name == "muon":
            zero["reduce_scatter"] = False  # which leaves no rank whole gradients
        if self.args.ema_decay is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"training.ema_decay is {self.args.ema_decay}, but DeepSpeed and FSDP keep weights where an average of "
                "them would have to be gathered; set it to null"
            )
        if self.args.compile_units:
            with naming("torch_compile_backend or torch_compile_mode"):
                unwrap_peft_model(self.model).base_model.compile_units(**self.args.compile_options)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # they take it over when they wrap the weights
            with naming("optim or optim_args") if self.args.optimizer is None else nullcontext():
                self.built_optimizer = self.create_optimizer()
        with naming("lr_scheduler_type or lr_scheduler_kwargs"):
            unused = torch.optim.SGD(self.model.parameters())
            self.create_scheduler(max(self.args.max_steps, 1), unused)

    def _check_batches(self) -> None:
        """Raises ValueError for options of batches and labels that only other trainers read."""
        if self.args.label_smoothing_factor and not self.smooths_labels:
            raise ValueError(
                f"training.label_smoothing_factor is {self.args.label_smoothing_factor}, but only trainer: pretrain "
                "smooths labels; leave it out"
            )
        if self.args.auto_find_batch_size:
            raise ValueError(
                "training.auto_find_batch_size is true, but only trainer: pretrain looks for a size; set it to false, "
                "and lower per_device_train_batch_size where memory runs out"
            )
        if self.args.max_tokens_per_batch is not None and not self.has_token_batches:
            raise ValueError(
                f"training.max_tokens_per_batch is {self.args.max_tokens_per_batch}, but this trainer counts rows, not "
                "tokens; leave it out"
            )

    def _check_deepspeed_settings(self) -> None:
        """Raises ValueError where DeepSpeed's file contradicts the arguments, which `Trainer` would say when training
        begins, or would replace the optimizer or schedule that our groups belong to.
        """
        if self.is_deepspeed_enabled and self.args.max_steps > 0:
            config = copy.deepcopy(self.args.hf_deepspeed_config)
            with naming("deepspeed"):
                config.trainer_config_finalize(self.args, self.model, self.args.max_steps)
        described = self.args.hf_deepspeed_config.config if self.is_deepspeed_enabled else {}
        for option, name in (
            ("parameter_groups", "optimizer"),
            ("parameter_groups", "scheduler"),
            ("optimizer", "optimizer"),
            ("muon_learning_rate", "optimizer"),
        ):
            if name in described and getattr(self.args, option):
                raise ValueError(
                    f"training.{option} has no effect on the {name} that DeepSpeed's file describes; take {name!r} out "
                    f"of {self.args.deepspeed}"
                )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Also without those of norms whose names `Trainer` does not know."""
        norms = parameters_of_norms(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in norms]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of the arguments, with their groups. DeepSpeed's own gets the parameters that do not decay as a group
        of theirs.
        """
        if isinstance(self.optimizer, DummyOptim):
            self.optimizer.params = self._by_decay(self.optimizer.params)
        if self.optimizer is not None:
            return self.optimizer
        model, name = model or self.model, self.args.optimizer_name
        if name is not None:
            self.optimizer_cls_and_kwargs = torch.optim.SGD, {}  # of which the groups alone are taken
        optimizer = super().create_optimizer(model)
        if name is not None:
            groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
            self.optimizer = optimizer = build_optimizer(name, groups, self.args, model)
        elif keeps_low_state(optimizer) and not (self.args.deepspeed or self.args.uses_fsdp):
            self.optimizer = optimizer = CombinedOptimizer(optimizer)
        if self.args.parameter_groups:
            split_groups(optimizer, model, self.args.parameter_groups, self.get_decay_parameter_names(model))
        self.options_of_run.remember(optimizer)
        if self.args.gradient_filter.name is not None:
            self.gradient_filter = GradientFilter(self.args.gradient_filter, model)
            self.gradient_filter.attach(optimizer)
        return optimizer

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given; one of the last step is only brought to the end of the run."""
        for callback in (self.keeper, self.stop):  # last, as others write into checkpoints too
            self.pop_callback(callback)
            self.add_callback(callback)
        self.resume_point = resume_from_checkpoint
        if resume_from_checkpoint is not None and needs_regrouping(resume_from_checkpoint, self.args):
            regrouping = RegroupCallback(resume_from_checkpoint, self.accelerator)
            regrouping.convert(self.args)
            self.add_callback(regrouping)
        try:
            with self.keeper.discarding():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.stalls.end()
        self.state.num_train_epochs = self.num_train_epochs
        return output

    def set_initial_training_values(self, args: RecurrentTrainingArguments, dataloader: DataLoader) -> tuple:
        """Without an epoch where all steps are behind a checkpoint, after which `Trainer` would take one more, or the
        run had stopped early; ResumeError for a checkpoint of a step that the run does not have.
        """
        self.num_train_epochs, *others = super().set_initial_training_values(args, dataloader)
        state = {"global_step": 0} if self.resume_point is None else read_state(self.resume_point)
        step, max_steps = state["global_step"], others[-1]
        if step > max_steps:
            raise ResumeError(f"training.resume_from_checkpoint: {nothing_left(self.resume_point, step, args)}")
        if step < max_steps and not has_stopped(state, args.early_stopping_patience):
            return (self.num_train_epochs, *others)
        logger.info("%s is of step %d, the last: only what comes after it is left to do", self.resume_point, step)
        return (0, *others)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; its loss for the log."""
        return self.losses.add(super().training_step(*args, **kwargs))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The loss of training steps is NaN where one of them was not finite."""
        if "loss" in logs:
            logs["loss"] = self.losses.for_log(logs["loss"])
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The loader, with workers that leave signals to this process."""
        return sheltered(super().get_train_dataloader())

    def _by_decay(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Two groups of parameters, of which the first decays as the optimizer does; one if none does not."""
        names = set(self.get_decay_parameter_names(self.model))
        decaying = {parameter for name, parameter in self.model.named_parameters() if name in names}
        groups = [
            {"params": [it for it in parameters if it in decaying]},
            {"params": [it for it in parameters if it not in decaying], "weight_decay": 0.0, "name": UNDECAYED},
        ]
        return [group for group in groups if group["params"]]

    @property
    def base_is_frozen(self) -> bool:
        """Whether the weights of the model itself stay as they are."""
        return bool(self.auxiliary) and not is_peft_model(self.model)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Also the auxiliary parts and, while it trains, the average of the weights. In a checkpoint all of
        it stands before the manifest that makes that complete.
        """
        folder = output_dir or self.args.output_dir
        if self.is_in_train and CHECKPOINT_NAME.fullmatch(Path(folder).name):
            saved = self.model.parameters()
            if is_peft_model(self.model) or self.base_is_frozen:
                saved = (parameter for parameter in saved if parameter.requires_grad)
            num_bytes = bytes_of_checkpoint(saved, has_moments=not self.args.save_only_model)
            averages = [] if self.average is None else self.average.average.values()
            states = [] if self.gradient_filter is None else self.gradient_filter.states().values()
            self.keeper.begin(Path(folder), self.args, num_bytes + sum(it.nbytes for it in (*averages, *states)))
        if self.config_text is not None and self.is_in_train and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            Path(folder, CONFIG_NAME).write_text(self.config_text, encoding="utf-8")
        if self.is_in_train:
            self.optimizer.eval()
        if self.average is not None and self.is_in_train and self.args.should_save:
            self.average.save(folder)
        if self.gradient_filter is not None and self.is_in_train and self.args.should_save:
            self.gradient_filter.save(folder)
        if not self.base_is_frozen:
            with saving_whole(self.accelerator) if self.is_fsdp_enabled else nullcontext():
                super().save_model(folder, *args, **kwargs)
        elif self.args.should_save:
            self.processing_class.save_pretrained(folder)
        state_dict = self.accelerator.get_state_dict(self.model) if self.auxiliary and self.is_fsdp_enabled else None
        with whole_weights_of(self.auxiliary):
            for part in self.auxiliary if self.args.should_save else ():
                part.save(folder, state_dict)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of each source as eval_SOURCE_NAME, and as eval_loss the mean of their losses, by which the best
        model is chosen unless another metric is named.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sources = self.eval_dataset if eval_dataset is None else eval_dataset
        means = {}
        for name in OF_ALL_SOURCES if isinstance(sources, dict) else ():
            found = [metrics.get(f"{metric_key_prefix}_{source}_{name}") for source in sources]
            if found and None not in found:
                means[f"{metric_key_prefix}_{name}"] = sum(found) / len(found)
        if means:
            self.log(dict(means))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return metrics | means

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """While it trains, of the average of the weights, which is what the run leaves behind."""
        with self.average.applied(self.model) if self.average is not None and self.is_in_train else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The loader of all rows: `dataloader_drop_last` is for training."""
        with keeping_last(self.args):
            return sheltered(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The loader of all rows."""
        with keeping_last(self.args):
            return sheltered(super().get_test_dataloader(*args, **kwargs))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Missing or unexpected weights are errors; `Trainer` warns and trains on."""
        for part in self.auxiliary:
            part.load(resume_from_checkpoint)
        if self.average is not None:
            self.average.load(resume_from_checkpoint)
        if self.gradient_filter is not None:
            self.gradient_filter.load(resume_from_checkpoint)
        if not self.base_is_frozen:
            check_weights(resume_from_checkpoint, model or self.model)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def roll_back(self) -> str | None:
        """Give the model, its auxiliary parts, its average and the optimizer what the newest whole checkpoint of the
        run holds, in the midst of training; its name, or None where there is none. The step, the schedule with its
        rates, and the data stay where they are.
        """
        found: list[Path | None] = [None]
        if self.args.process_index == 0:
            saved = [it for it in checkpoints_in(Path(self.args.output_dir)) if number_of(it) <= self.state.global_step]
            found = [next((folder for folder in reversed(saved) if damage(folder) is None), None)]
        (folder,) = broadcast_object_list(found)
        if folder is None:
            return None
        self.optimizer.eval()  # of those that save an average in place of the weights
        self._load_from_checkpoint(str(folder))
        if self.average is not None:
            self.average.on_train_begin(self.args, self.state, self.control, model=self.model)  # to its device
        options = group_options(self.optimizer.param_groups)
        state = torch.load(folder / OPTIMIZER_NAME, map_location=self.args.device, weights_only=True)
        self.optimizer.load_state_dict(state)
        built = self.options_of_run.options  # without what an optimizer counts, which goes back
        for group, of_now, known in zip(self.optimizer.param_groups, options, built, strict=True):
            group |= {name: value for name, value in of_now.items() if name in ("initial_lr", *known)}
        self.optimizer.train()
        return folder.name

    def _load_best_model(self) -> None:
        """Load it with its auxiliary parts and its average. Where it is damaged, the weights stay as they are."""
        reason = damage(Path(self.state.best_model_checkpoint))
        if reason is not None:
            logger.warning(
                "%s, the best checkpoint, %s: the weights of the last step are kept instead",
                self.state.best_model_checkpoint,
                reason,
            )
            return
        self.optimizer.eval()
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)
        for part in self.auxiliary:
            part.load(self.state.best_model_checkpoint)
        if not self.base_is_frozen:
            super()._load_best_model()

    def _send_telemetry(self) -> None:
        """TRL's trainers would tell the hub of each run."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Theirs would say how to load models of other kinds; the run's own card is written by a callback."""


class ScoringTrainer(BaseTrainer):
    """Trainer whose `compute_metrics` gets the scores of all rows."""

    def scores_of(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Scores of the rows of a batch: what `compute_loss` returns as outputs, where it is not overridden."""
        return outputs

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss, and the scores in the place of predictions, and of labels, without which `Trainer` computes no
        metrics.
        """
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        scores = None if prediction_loss_only else self.scores_of(outputs, inputs)
        return loss, scores, scores


class EpochCallback(TrainerCallback):
    """Tells sampler and dataset which epoch begins. accelerate tells only the first of them that it finds, and none
    where a run of several ranks is resumed within an epoch. Of a stream, which has no sampler, it tells the dataset.
    """

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: DataLoader | None = None, **kwargs: Any
    ) -> None:
        """Counts epochs as `Trainer` does."""
        dataset = train_dataloader.dataset
        if isinstance(dataset, IterableDataset):
            return
        epoch = state.global_step // math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        train_dataloader.set_epoch(epoch)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)


class FinalWeights(TrainerCallback):
    """Gives the model what a run leaves behind, of optimizers whose average that is, before samples are made of it."""

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Give it."""
        optimizer.eval()


def whole_weights_of(parts: Sequence[Any]) -> AbstractContextManager:
    """A context in which the modules among `parts` have their whole weights, on all ranks of ZeRO-3 too."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # only where it runs

    modules = (part for part in parts if isinstance(part, nn.Module))
    return deepspeed.zero.GatheredParameters([weight for module in modules for weight in module.parameters()])


@contextmanager
def keeping_last(args: RecurrentTrainingArguments) -> Iterator[None]:
    """A context in which loaders keep a last batch that is smaller."""
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


@contextmanager
def naming(keys: str) -> Iterator[None]:
    """Turn what a library says against training options into a ValueError that names them."""
    try:
        yield
    except (*REFUSALS, ValueError) as error:
        raise ValueError(f"training.{keys}: {error}") from error


def is_quantized(model: nn.Module) -> bool:
    """Whether the model, or what its adapters are on, was loaded in 8 or 4 bits."""
    return getattr(model, "is_quantized", False)  # transformers sets it on such models alone


def make_trained_weights_float32(model: nn.Module) -> None:
    """TRL makes the adapters of quantised models bfloat16, in which small updates are lost."""
    if not is_quantized(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
