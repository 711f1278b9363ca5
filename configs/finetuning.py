"""Runs of `finetune.py`: a checkpoint, adapters, and the rest as in pretraining; and the trainer of such a run."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, set_seed

from callbacks import CallbacksConfig, add_callbacks, add_codec_callbacks, check_codec_callbacks
from dataset_loading import Collator
from dataset_loading.configuration import DataConfig
from dataset_loading.preferences import build_pairs, build_prompts
from inference.adapters import base_model
from inference.checkpoints import adapters_in, find_checkpoint
from inference.loading import load_model
from model import tokenizer_of
from model.chat import prepare_tokenizer
from model.quantization import QuantizationConfig
from model.step_lora import StepLora, add_step_lora
from trainers import RecurrentTrainingArguments, check_weights
from trainers.base import is_quantized
from trainers.dpo import PreferenceArguments, PreferenceTrainer
from trainers.exit_probe import ExitProbeArguments, ExitProbeTrainer
from trainers.finetuning import (
    FINETUNERS,
    ModelOptions,
    PeftOptions,
    StepLoraOptions,
    peft_config,
    prepare_quantized_training,
    step_lora_targets,
)
from trainers.grpo import RolloutArguments, RolloutTrainer
from trainers.sft import SupervisedArguments

from .loader import NOT_OPTIONS, OPTIONAL_SECTIONS, Layout, closest
from .pretraining import build_recurrent_trainer, build_rows, whole_weights
from .runs import ResolvedConfig

Processor = PreTrainedTokenizerBase | ProcessorMixin

DEFAULT_TRAINER = "sft"
# What the sections `model` and `data` say instead.
NOT_OPTIONS[SupervisedArguments] = {
    *("model_init_kwargs", "trust_remote_code", "chat_template_path", "eos_token", "pad_token"),
    *("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "shuffle_dataset"),
    *("max_length", "truncation_mode", "pad_to_multiple_of"),
    *("packing", "packing_strategy", "padding_free", "eval_packing"),
    *("completion_only_loss", "assistant_only_loss", "router_aux_loss_coef"),
}
NOT_OPTIONS[PreferenceArguments] = {
    *("model_init_kwargs", "trust_remote_code", "dataset_num_proc", "pad_token", "pad_to_multiple_of"),
    *("truncation_mode", "padding_free", "precompute_ref_log_probs", "precompute_ref_batch_size", "use_weighting"),
    *("modality_weights", "objective", "router_aux_loss_coef"),
}
NOT_OPTIONS[RolloutArguments] = {
    *("model_init_kwargs", "trust_remote_code", "pad_to_multiple_of", "chat_template_kwargs"),
    *("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching", "use_transformers_paged"),
    *("transformers_continuous_batching_config", "max_tool_calling_iterations", "num_generations_eval"),
    *("log_multimodal", "log_completions_hub_repo", "modality_weights", "objective", "router_aux_loss_coef"),
    *("recurrence_logging_steps", "depth_gap_alarm", "token_correlation_alarm", "cast_lm_head_to_fp32"),
    *(name for name in RolloutArguments.__dataclass_fields__ if "vllm" in name),
}
NOT_OPTIONS[ExitProbeArguments] = {
    *("recurrence_logging_steps", "depth_gap_alarm", "token_correlation_alarm", "modality_weights", "objective"),
}
SECTIONS = {
    "model": ModelOptions,
    "peft": PeftOptions,
    "step_lora": StepLoraOptions,
    "quantization": QuantizationConfig,
    "data": DataConfig,
    "callbacks": CallbacksConfig,
}


@dataclass
class FinetuningConfig(ResolvedConfig):
    """All that defines a run of fine-tuning.

    Args:
        model: The checkpoint that is tuned.
        peft: Low-rank adapters; without them, and those of steps, all weights learn.
        step_lora: Low-rank adapters of single steps of the core.
        quantization: Bits of the weights that do not learn.
        data: What is read.
        callbacks: What is logged and generated besides the trainer's own logs.
        training: Training arguments, of the class that belongs to the trainer; None if `load_finetuned_run` left them
            out.
        trainer: Name of the trainer: what is learned from the data.
        log_level: Least severe message that is shown.
        resolved: Every option as plain values.
    """

    model: ModelOptions
    peft: PeftOptions | None
    step_lora: StepLoraOptions | None
    quantization: QuantizationConfig
    data: DataConfig
    callbacks: CallbacksConfig
    training: RecurrentTrainingArguments | None
    trainer: str
    log_level: str
    resolved: dict[str, Any] = field(repr=False)
    identity: ClassVar[tuple[str, ...]] = ("model.", "peft", "step_lora", "quantization.")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn, and not the weights of the model."""
        return not (self.peft is None and self.step_lora is None)

    def __post_init__(self) -> None:
        parts = [name for name in OPTIONAL_SECTIONS if getattr(self, name) is not None]
        if self.trainer == "exit_probe" and parts:
            raise ValueError(
                f"{parts[0]}: an exit probe learns alone, beside a model that stays as it is; leave it out"
            )
        spikes = self.callbacks.non_finite.spike_deviations
        if self.trainer in ("dpo", "grpo") and spikes is not None:
            raise ValueError(
                f"callbacks.non_finite.spike_deviations is {spikes}, but with trainer {self.trainer} a pass of the "
                "model has no loss of its own; leave it out"
            )

    @classmethod
    def layout(cls, trees: Sequence[dict[str, Any]]) -> Layout:
        """The sections of fine-tuning, and the training arguments of the trainer that is named."""
        trainer = next((tree["trainer"] for tree in reversed(trees) if "trainer" in tree), DEFAULT_TRAINER)
        if trainer not in FINETUNERS:
            raise ValueError(f"trainer: {trainer!r} is unknown; {closest(trainer, list(FINETUNERS))}")
        sections = (*SECTIONS.items(), ("training", FINETUNERS[trainer][1]))
        return Layout(tuple(FINETUNERS), DEFAULT_TRAINER, sections, OPTIONAL_SECTIONS)


# ------------------------------------------------------------------------------------------------------- the trainer


def build_finetuning(run: FinetuningConfig, resume_point: str | None = None) -> Trainer:
    """Model, adapters, data and trainer of a run, all checked, nothing written.

    Raises:
        ValueError: the checkpoint cannot be loaded, adapters or options of training do not fit it, or data cannot be
            read.
    """
    folder = find_checkpoint(run.model.path)
    base = base_model(folder)
    model, processor = load_base(run, folder)
    set_seed(run.training.seed)
    if run.trainer == "exit_probe":
        add_exit_probe(model)
    model, adapters = add_fresh_adapters(run, model)
    auxiliary = [base, *adapters] if run.has_adapters else []
    if resume_point is not None:
        check_adapters(run, resume_point)
        check_weights(resume_point, model)
        for part in auxiliary:
            part.load(resume_point)
    trainer = BUILDERS[run.trainer](run, model, processor)
    trainer.auxiliary = auxiliary
    return trainer


def load_base(run: FinetuningConfig, folder: Path) -> tuple[PreTrainedModel, Processor]:
    """The checkpoint that is tuned, with its tokenizer or processor, made ready for conversations."""
    options, args = run.model, run.training
    dtype = options.dtype and getattr(torch, options.dtype)
    with whole_weights(args):
        model, processor = load_model(folder, args.device, dtype, run.quantization)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model.path: {folder} is a model of sequence to sequence, which finetune.py does not train; train "
            "it with pretrain.py, or with PEFT and transformers' Seq2SeqTrainer"
        )
    prepare_tokenizer(tokenizer_of(processor), model.config.get_text_config().vocab_size)
    if is_quantized(model):
        model = prepare_quantized_training(model, args, has_lora=run.peft is not None)
    config = model.config.get_text_config()
    if options.num_steps is not None:
        config.recurrence.mean_steps, config.num_steps = options.num_steps, None  # which would be that of evaluation
    if options.backprop_steps is not None:
        config.recurrence.backprop_steps = options.backprop_steps
    return model, processor


def add_exit_probe(model: PreTrainedModel) -> None:
    """Give a model a fresh exit probe, which alone learns."""
    if model.config.get_text_config().num_core_layers == 0:
        raise ValueError("model.path: the model has no core (num_core_layers is 0), so there is nothing to exit from")
    model.requires_grad_(False)
    model.model.add_exit_probe().float().requires_grad_(True)


def add_fresh_adapters(run: FinetuningConfig, model: PreTrainedModel) -> tuple[torch.nn.Module, list[StepLora]]:
    """The model with fresh adapters, which alone learn, and those of them that are not PEFT's; the model as it is where
    the run has none.
    """
    if not run.has_adapters:
        return model, []
    lora = run.peft and peft_config(run.peft, model)  # while all linear layers are those of the model
    steps = []
    if run.step_lora is not None:
        options = run.step_lora
        targets = step_lora_targets(model, options.target_modules)
        steps = [add_step_lora(model, targets, options.num_steps, options.rank, options.alpha)]
    model.requires_grad_(False)
    if lora is not None:
        model = get_peft_model(model, lora)
    for adapter in steps:
        adapter.requires_grad_(True)  # PEFT freezes all but its own
        if lora is not None:
            switch = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
            # Off together with PEFT's, as in the pass of a reference: the model without any.
            adapter.is_off = functools.partial(getattr, switch, "disable_adapters")
    return model, steps


def check_adapters(run: FinetuningConfig, resume_point: str) -> None:
    """Raises ValueError for a checkpoint with other kinds of adapters than those of the run."""
    kinds = {"adapter_config.json": "peft", "step_lora.json": "step_lora"}
    there = [kind for name, kind in kinds.items() if name in adapters_in(Path(resume_point))]
    here = [kind for kind in kinds.values() if getattr(run, kind) is not None]
    if there != here:
        there, here = (" and ".join(names) or "no adapters" for names in (there, here))
        raise ValueError(
            f"training.resume_from_checkpoint: {resume_point} has {there}, but this run has {here}; give the same "
            "sections, or another checkpoint"
        )


def build_exit_probe_trainer(run: FinetuningConfig, model: torch.nn.Module, processor: Processor) -> Trainer:
    """The trainer of `exit_probe`: the same rows, on which a head learns when the model is done."""
    check_codec_callbacks(run.callbacks)
    datasets = build_rows(run, model, processor)
    run.training.choose_best_metric(datasets.validation, ("loss", "accuracy"))
    trainer = ExitProbeTrainer(
        model=model,
        args=run.training,
        train_dataset=datasets.train,
        eval_dataset=datasets.validation,
        data_collator=Collator(processor),
        processing_class=processor,
    )
    add_codec_callbacks(trainer, run.callbacks)
    return trainer


def build_preference_trainer(run: FinetuningConfig, model: torch.nn.Module, processor: Processor) -> Trainer:
    """The trainer of `dpo`: pairs of answers, of which one is better."""
    args = run.training
    train, validation = build_pairs(run.data, tokenizer_of(processor), args.seed)
    args.choose_best_metric(validation, ("loss",))
    trainer = PreferenceTrainer(
        model=model,
        ref_model=None if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
    )
    add_callbacks(trainer, run.callbacks, processor)
    return trainer


def build_rollout_trainer(run: FinetuningConfig, model: torch.nn.Module, processor: Processor) -> Trainer:
    """The trainer of `grpo`: prompts, to which the model writes answers that are rewarded."""
    args = run.training
    train, validation = build_prompts(run.data, args.seed)
    needed = args.generation_batch_size // args.num_generations
    positions = model.config.get_text_config().max_position_embeddings
    if len(train) < needed:
        raise ValueError(
            f"data.train: there are {len(train)} prompts, fewer than the {needed} of one update; add rows, or lower "
            "training.per_device_train_batch_size"
        )
    if args.max_completion_length >= positions:
        raise ValueError(
            f"training.max_completion_length is {args.max_completion_length}, but with its prompt an answer has "
            f"{positions} positions in this model; give less"
        )
    args.choose_best_metric(validation, ("reward",))
    trainer = RolloutTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
    )
    add_callbacks(trainer, run.callbacks, processor)
    return trainer


BUILDERS: dict[str, Callable[[FinetuningConfig, torch.nn.Module, Processor], Trainer]] = {
    "continued": functools.partial(build_recurrent_trainer, FINETUNERS["continued"][0]),
    "sft": functools.partial(build_recurrent_trainer, FINETUNERS["sft"][0]),
    "dpo": build_preference_trainer,
    "grpo": build_rollout_trainer,
    "exit_probe": build_exit_probe_trainer,
}
