"""The trainer of a run of fine-tuning."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, set_seed

from callbacks import add_callbacks, add_codec_callbacks
from dataset_loading import Collator
from dataset_loading.preferences import build_pairs, build_prompts
from inference.adapters import base_model
from inference.checkpoints import adapters_in, find_checkpoint
from inference.loading import load_model, tokenizer_of
from model.chat import encode_conversation, prepare_tokenizer
from model.recurrence import draw_training_states, sample_depth
from model.step_lora import StepLora, add_step_lora
from trainers import check_weights
from trainers.building import whole_weights
from trainers.dpo import PreferenceTrainer
from trainers.exit_probe import ExitProbeTrainer
from trainers.finetuners import FINETUNERS
from trainers.finetuning import lora_config, step_lora_targets
from trainers.grpo import RolloutTrainer
from trainers.quantization import is_quantized, prepare_quantized_training

from .build_pretraining import build_recurrent_trainer, build_rows
from .finetuning import FinetuningConfig

Processor = PreTrainedTokenizerBase | ProcessorMixin


def build_trainer(run: FinetuningConfig, resume_point: str | None = None) -> Trainer:
    """Model, adapters, data and trainer of a run, all checked, nothing written.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, adapters that do not fit it, data that cannot be read, or
            options of training that do not fit.
    """
    folder = find_checkpoint(run.model.path)
    base = base_model(folder)
    model, processor = load_base(run, folder)
    set_seed(run.training.seed)
    if run.trainer == "exit_probe":
        add_exit_probe(model)
    model, adapters = add_adapters(run, model)
    beside = [base, *adapters] if run.has_adapters else []
    if resume_point is not None:
        check_adapters(run, resume_point)
        check_weights(resume_point, model)
        for part in beside:
            part.load(resume_point)
    trainer = BUILDERS[run.trainer](run, model, processor)
    trainer.beside = beside
    return trainer


def load_base(run: FinetuningConfig, folder: Path) -> tuple[PreTrainedModel, Processor]:
    """The checkpoint that is tuned, with its tokenizer or processor, made ready for conversations.

    Raises:
        ValueError: it cannot be loaded, or not trained in this way.
    """
    options, args = run.model, run.training
    dtype = options.dtype and getattr(torch, options.dtype)
    with whole_weights(args):
        model, processor = load_model(folder, args.device, dtype, run.quantization)
    prepare_tokenizer(tokenizer_of(processor), model.config.get_text_config().vocab_size)
    if is_quantized(model):
        model = prepare_quantized_training(model, args, has_lora=run.peft is not None)
    config = model.config.get_text_config()
    if options.num_steps is not None:
        config.recurrence.mean_steps = options.num_steps
    if options.backprop_steps is not None:
        config.recurrence.backprop_steps = options.backprop_steps
    return model, processor


def add_exit_probe(model: PreTrainedModel) -> None:
    """Give a model a fresh exit probe, which alone learns.

    Raises:
        ValueError: the model has no core, so that there is nothing to exit from.
    """
    if model.config.get_text_config().num_core_layers == 0:
        raise ValueError("model.path: the model has no core (num_core_layers is 0), so there is nothing to exit from")
    model.requires_grad_(False)
    model.model.add_exit_probe().float().requires_grad_(True)


def add_adapters(run: FinetuningConfig, model: PreTrainedModel) -> tuple[torch.nn.Module, list[StepLora]]:
    """The model with fresh adapters, which alone learn, and those of them that are not PEFT's; the model as it is where
    the run has none.

    Raises:
        ValueError: they are for layers that the model does not have.
    """
    if not run.has_adapters:
        return model, []
    lora = run.peft and lora_config(run.peft, model)  # while all linear layers are those of the model
    steps = []
    if run.step_lora is not None:
        options = run.step_lora
        targets = step_lora_targets(model, options.target_modules, lora)
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


def build_token_trainer(run: FinetuningConfig, model: torch.nn.Module, processor: Processor) -> Trainer:
    """The trainer of `continued` and `sft`: rows of tokens, of which some are learned."""
    return build_recurrent_trainer(FINETUNERS[run.trainer][0], run, model, processor)


def build_exit_probe_trainer(run: FinetuningConfig, model: torch.nn.Module, processor: Processor) -> Trainer:
    """The trainer of `exit_probe`: the same rows, on which a head learns when the model is done."""
    datasets = build_rows(run, model, processor)
    run.training.choose_best_metric(
        [f"eval_{source}_{name}" for source in datasets.validation for name in ("loss", "accuracy")]
    )
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
    args.choose_best_metric([f"eval_{source}_loss" for source in validation])
    trainer = PreferenceTrainer(
        model=model,
        ref_model=None if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        sample_depth=sample_depth,
        draw_states=draw_training_states,
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
    args.choose_best_metric([f"eval_{source}_reward" for source in validation])
    trainer = RolloutTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        sample_depth=sample_depth,
        encode_messages=functools.partial(encode_conversation, add_generation_prompt=True),
    )
    add_callbacks(trainer, run.callbacks, processor)
    return trainer


BUILDERS: dict[str, Callable[[FinetuningConfig, torch.nn.Module, Processor], Trainer]] = {
    "continued": build_token_trainer,
    "sft": build_token_trainer,
    "dpo": build_preference_trainer,
    "grpo": build_rollout_trainer,
    "exit_probe": build_exit_probe_trainer,
}
