"""Runs of pretraining: a fresh model, its trainer, and what such a run would need."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, set_seed
from transformers.integrations.deepspeed import deepspeed_config, set_hf_deepspeed_config, unset_hf_deepspeed_config

from callbacks import add_callbacks, add_codec_callbacks, check_codec_callbacks, size_table
from dataset_loading import (
    Collator,
    RunDatasets,
    Seq2SeqCollator,
    build_collator,
    build_datasets,
    build_examples,
    build_tokenizer,
)
from dataset_loading.codec_data import build_codec_datasets
from evaluation.metrics import METRICS, trainer_metrics
from evaluation.reconstruction import codec_scores, mean_scores
from model import (
    CODEC_CONFIGS,
    MODELS,
    MediaConfig,
    MegaTransformerImageAutoencoder,
    build_processor,
    codec_media,
    media_tokens,
    set_token_ids,
    tokenizer_of,
)
from model.backbones import reason_of
from model.chat import ROLE_TOKENS, prepare_tokenizer
from trainers import TRAINERS, RecurrentTrainer, RecurrentTrainingArguments, check_weights, describe_needs
from trainers.batch_size import fit_batch_size

from .runs import ResolvedConfig, RunConfig, one_line_errors

Processor = PreTrainedTokenizerBase | ProcessorMixin


def describe_run(run: RunConfig) -> str:
    """What a run would need, from the shapes of its model: no weights, no data, no tokenizer. Of codecs, which are
    small, only their sizes.

    Raises:
        SystemExit: the number of GPUs is none, or a pretrained encoder cannot be found; the code is 2.
    """
    with one_line_errors():
        model = without_weights(run)
        if isinstance(run.model, CODEC_CONFIGS):
            return f"{size_table(model)}\n"
        needs = describe_needs(model, run.training, run.data.block_size, run.data.packing)
    return f"{size_table(model)}\n\n{needs}\n"


def build_pretraining(run: RunConfig, resume_point: str | None = None, datasets: RunDatasets | None = None) -> Trainer:
    """Model, data and trainer of a run, all checked, nothing written.

    Args:
        run: The run.
        resume_point: The checkpoint that it goes on from.
        datasets: Datasets of a run of language whose data, tokenizer, seed and batches are the same. Default: they are
            built.

    Raises:
        ValueError: data cannot be read; or data, a checkpoint or options of training do not fit the model.
    """
    check_memory(run)
    if isinstance(run.model, CODEC_CONFIGS):
        return build_codec_trainer(run, resume_point)
    return build_language_trainer(run, resume_point, datasets)


def build_language_trainer(run: RunConfig, resume_point: str | None, datasets: RunDatasets | None) -> Trainer:
    """The trainer, and the tokenizer, of a model that reads text; see `build_pretraining`."""
    tokenizer = build_tokenizer(
        run.tokenizer,
        run.data,
        seed=run.training.seed,
        resume_point=resume_point,
        media_tokens=special_tokens(run),
    )
    has_processor = isinstance(run.model, MediaConfig)
    if not has_processor:  # a processor has its template
        prepare_tokenizer(tokenizer, run.model.vocab_size)
    model = build_model(run.model, run.training, tokenizer, with_backbones=resume_point is None)
    if resume_point is not None:
        check_weights(resume_point, model)
    elif model.config.get_text_config().residual == "admin":
        model.base_model.profile_residuals()  # the same on every rank; a checkpoint holds what was found
    processor = build_processor(model.config, tokenizer, **model.model.count_tokens()) if has_processor else tokenizer
    fit = partial(fit_batch_size, run.training, model, collate=collator_of(model, processor), resume_point=resume_point)
    return build_recurrent_trainer(TRAINERS[run.trainer], run, model, processor, fit, datasets)


def build_recurrent_trainer(
    trainer_class: type[RecurrentTrainer],
    run: ResolvedConfig,
    model: PreTrainedModel,
    processor: Processor,
    fit: Callable[[Dataset], None] = lambda dataset: None,
    datasets: RunDatasets | None = None,
) -> Trainer:
    """The trainer of a model on rows of tokens, of which some or all are learned, in pretraining and in fine-tuning.

    Args:
        fit: Gets the rows, and may change the micro-batch in the training arguments.
        datasets: The rows. Default: they are built.
    """
    args, datasets = run.training, datasets or build_rows(run, model, processor)
    fit(datasets.train)
    args.choose_best_metric(datasets.validation, METRICS)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=datasets.train,
        eval_dataset=datasets.validation,
        data_collator=collator_of(model, processor),
        processing_class=processor,
        **trainer_metrics(tokenizer_of(processor), model.config),
    )
    add_callbacks(trainer, run.callbacks, processor, build_media_examples(run, processor))
    return trainer


def build_rows(run: ResolvedConfig, model: PreTrainedModel, processor: Processor) -> RunDatasets:
    """The rows of tokens that a run learns from and is evaluated on."""
    args = run.training
    return build_datasets(
        run.data,
        processor,
        seed=args.seed,
        vocab_size=model.config.get_text_config().vocab_size,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    )


def build_media_examples(run: ResolvedConfig, processor: Processor) -> dict[str, Sequence]:
    """The examples that are shown during training, of each source with media: of what is held out of the train sources
    where the run names none for validation. A stream has none.
    """
    count = max(run.callbacks.media_samples.num_examples, run.callbacks.generated_samples.num_examples)
    return {  # directions take turns
        source.label: build_examples(
            source, run.data, processor, count * len(source.directed_prompts), seed=run.training.seed
        )
        for source in run.data.validation or run.data.train
        if source.is_media and not source.streaming and count
    }


def special_tokens(run: RunConfig) -> list[str]:
    """What a vocabulary has besides pad, begin and end: tokens of media, or of the roles in conversations."""
    if isinstance(run.model, MediaConfig):
        return media_tokens(run.model)
    learns_from_chats = any(source.is_media for source in run.data.train)
    return list(ROLE_TOKENS.values()) if learns_from_chats else []


def build_codec_trainer(run: RunConfig, resume_point: str | None) -> Trainer:
    """The trainer of an autoencoder of images or a vocoder; see `build_pretraining`."""
    check_codec_callbacks(run.callbacks)
    args, media = run.training, codec_media(run.model)
    model = build_model(run.model, args)
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    train_dataset, validation = build_codec_datasets(run.data, media, args.seed, batch_size)
    if isinstance(model, MegaTransformerImageAutoencoder) and resume_point is None and model.num_component_images:
        count = min(model.num_component_images, len(train_dataset))
        model.begin_with_components(torch.stack([train_dataset[index] for index in range(count)]))
    score = codec_scores(model)
    args.choose_best_metric(validation, ("loss", *score.names))
    if resume_point is not None:
        check_weights(resume_point, model)
    trainer = TRAINERS[run.trainer](
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=validation,
        data_collator=media.collate_codec_inputs,
        processing_class=media.processor,
        score=score,
        compute_metrics=partial(mean_scores, names=score.names),
    )
    add_codec_callbacks(trainer, run.callbacks)
    return trainer


# ------------------------------------------------------------------------------------------------------ fresh models


def build_model(
    config: PreTrainedConfig,
    args: RecurrentTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_backbones: bool = True,
) -> PreTrainedModel:
    """A fresh model, the same on every rank.

    Args:
        tokenizer: Whose special tokens the configuration gets; codecs have none.
        with_backbones: Whether pretrained encoders get their weights; a checkpoint has them.
    """
    if tokenizer is not None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config if config.is_encoder_decoder else config.get_text_config(), name, getattr(tokenizer, name))
        if config.is_encoder_decoder:
            config.share()
    reads_media = isinstance(config, MediaConfig)
    if reads_media:
        set_token_ids(config, tokenizer)
    set_seed(args.seed)
    with whole_weights(args):
        model = MODELS[type(config)](config)
        if reads_media and with_backbones:
            model.model.load_backbones()
    return model


def collator_of(model: PreTrainedModel, processor: Processor) -> Collator | Seq2SeqCollator:
    """The collator of a model."""
    return build_collator(processor, model.config.is_encoder_decoder)


@contextmanager
def whole_weights(args: RecurrentTrainingArguments) -> Iterator[None]:
    """Let the Auto classes build whole models. Under ZeRO-3 they build partitioned ones, which initialise differently,
    so that stages could not be compared; DeepSpeed partitions whole ones when training begins.
    """
    is_set = deepspeed_config() is not None  # a run that is only planned sets none
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed and is_set:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def without_weights(run: RunConfig) -> PreTrainedModel:
    """The model of a run on the meta device, which takes no memory."""
    try:
        with whole_weights(run.training), torch.device("meta"):
            return MODELS[type(run.model)](run.model)
    except (RuntimeError, OverflowError, TypeError) as error:  # as torch says that a size is none
        raise ValueError(f"no model of these sizes can be made ({reason_of(error)}); make the model smaller") from error


def check_memory(run: RunConfig) -> None:
    """Raises ValueError for a model whose weights alone are larger than the memory of this machine, before any of them
    is made. They are made whole on each rank, in float32.
    """
    count = without_weights(run).num_parameters()
    needed, memory = 4 * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the model has {count} parameters, which take {needed / 2**30:.0f} GiB in float32, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory: make it smaller; --dry_run true lists its parts"
        )
