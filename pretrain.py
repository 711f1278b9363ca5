"""Trains a model from a YAML: `deepspeed pretrain.py --config configs/recurrent_vlm.yaml`."""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from callbacks import ModelCardWriter, add_callbacks, add_codec_callbacks, size_table, sources_of
from configs import (
    ResolvedConfig,
    RunConfig,
    load_config,
    one_line_errors,
)
from configs.resuming import Start, config_text, find_start
from dataset_loading import Collator, build_datasets, build_examples, build_tokenizer
from dataset_loading.codec_data import build_codec_datasets
from evaluation.metrics import METRICS, trainer_metrics
from evaluation.reconstruction import codec_scores, mean_scores
from inference.devices import choose_threads, device_report
from inference.shutdown import run_to_the_end
from inference.terminal import write_result
from model import (
    CODEC_CONFIGS,
    MODELS,
    MegaTransformerConfig,
    MegaTransformerImageAutoencoder,
    build_processor,
    codec_media,
    media_tokens,
    modality_names,
    set_token_ids,
)
from model.backbones import reason_of
from model.chat import ROLE_TOKENS, prepare_tokenizer
from model.recurrence import draw_training_states, sample_depth
from trainers import (
    RecurrentTrainingArguments,
    check_weights,
    describe_needs,
    get_trainer_class,
)
from trainers.ranks import decide
from trainers.resumed import ResumeError
from trainers.resuming import TRAINER_STATE_NAME, save_state_of
from trainers.run_lock import RunLock
from trainers.signals import StopCallback, StopRequest, watch_launcher

logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save what the command line describes.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input; nothing is written then.
    """
    run = load_config(argv)
    set_up_output(run.log_level)
    if run.is_dry_run:
        if os.environ.get("RANK", "0") == "0":
            write_result(describe_run(run))
        return 0
    build = build_codec_trainer if isinstance(run.model, CODEC_CONFIGS) else build_trainer
    return run_training(run, build)


def run_training(run: ResolvedConfig, build: Callable[[ResolvedConfig, str | None], Trainer]) -> int:
    """Build the trainer of a run, train, and leave.

    Args:
        build: run and checkpoint to go on from -> trainer.

    Raises:
        SystemExit: as `main`, and with 143 or 130 after SIGTERM or Ctrl-C.
    """
    logger.info("%s", device_report())
    with StopRequest() as request:
        return build_and_train(run, build, request)


def build_and_train(run: ResolvedConfig, build: Callable[..., Trainer], request: StopRequest) -> int:
    """As `run_training`, until there is a signal."""
    args, lock = run.training, RunLock(run.training.output_dir)
    watch_launcher()
    try:
        with one_line_errors():
            args.check_launcher()
            start = decide(lambda: begin(run, lock), args)
            if start.is_finished:
                logger.info("%s holds the finished run: nothing is left to do", args.output_dir)
                return 0
            trainer = build(run, start.checkpoint)
            decide(lock.take, args)
        choose_threads(trainer.model)
        card = ModelCardWriter(run.resolved, sources_of(run.data))
        trainer.config_text = config_text(run)
        trainer.add_callback(ConfigWriter(run))
        trainer.add_callback(card)
        trainer.stop = StopCallback(request)
        with one_line_errors((ResumeError, NoRowsError)):
            train(trainer, start.checkpoint, card)
    finally:
        # Left open, the group makes the launcher wait, or report a failure that was none.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        lock.release()
    return 0


def begin(run: ResolvedConfig, lock: RunLock) -> Start:
    """Where a run begins, in a folder that no other run writes to; a folder that is not there yet is not made.

    Raises:
        ValueError: as `find_start`, and for a folder in use.
    """
    start = find_start(run)
    if not start.is_finished:
        lock.take(may_make_folder=False)
    if start.checkpoint is None and start.may_be_complete:
        logger.warning("%s holds no whole checkpoint to go on from: the run begins anew", run.training.output_dir)
    return start


def set_up_output(log_level: str) -> None:
    """Logs of this rank, and progress bars where somebody sees them."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(log_level, rank)
    if rank != 0 or not sys.stderr.isatty():
        disable_progress_bars()


def describe_run(run: RunConfig) -> str:
    """What a run would need, from the shapes of its model: no weights, no data, no tokenizer. Of codecs, which are
    small, only their sizes.

    Raises:
        SystemExit: with code 2, for a number of GPUs that is none, and a pretrained encoder that cannot be found.
    """
    with one_line_errors():
        model = without_weights(run.model)
        if isinstance(run.model, CODEC_CONFIGS):
            return f"{size_table(model)}\n"
        needs = describe_needs(model, run.training, sample_depth, run.data.block_size, run.data.packing)
    return f"{size_table(model)}\n\n{needs}\n"


class ConfigWriter(TrainerCallback):
    """Writes config.yaml when training begins: all is built and loaded then, and no refused start has replaced the file
    of an earlier run. The state of a finished run that is replaced is removed: it would say that this one is finished.
    """

    def __init__(self, run: ResolvedConfig) -> None:
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Write it, on the first rank."""
        if state.is_world_process_zero:
            self.run.save(os.path.join(args.output_dir, "config.yaml"))
            if state.global_step == 0:
                Path(args.output_dir, TRAINER_STATE_NAME).unlink(missing_ok=True)


def build_trainer(run: RunConfig, resume_point: str | None = None) -> Trainer:
    """Tokenizer, data, model and trainer of a run, all checked, nothing written.

    Raises:
        ValueError: for data that cannot be read, or that do not fit the model; for a checkpoint or options of training
            that do not fit either.
    """
    check_memory(without_weights(run.model))
    args = run.training
    trainer_class = get_trainer_class(run.trainer)
    reads_media = isinstance(run.model, MegaTransformerConfig)
    tokenizer = build_tokenizer(
        run.tokenizer,
        run.data,
        seed=args.seed,
        resume_point=resume_point,
        media_tokens=special_tokens(run),
    )
    if not reads_media:  # a processor has its template
        prepare_tokenizer(tokenizer, run.model.vocab_size)
    model = build_model(run, tokenizer, with_backbones=resume_point is None)
    processor = build_processor(model.config, tokenizer, **model.model.count_tokens()) if reads_media else tokenizer
    datasets = build_datasets(
        run.data,
        processor,
        seed=args.seed,
        vocab_size=model.text_config.vocab_size,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    )
    args.choose_best_metric([f"eval_{source}_{name}" for source in datasets.validation for name in METRICS])
    if resume_point is not None:
        check_weights(resume_point, model)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=datasets.train,
        eval_dataset=datasets.validation,
        data_collator=Collator(processor),
        processing_class=processor,
        sample_depth=sample_depth,
        draw_states=draw_training_states,
        modalities=modality_names() if reads_media else ("text",),
        **trainer_metrics(tokenizer),
    )
    add_callbacks(trainer, run.callbacks, processor, build_media_examples(run, processor))
    return trainer


def special_tokens(run: RunConfig) -> list[str]:
    """What a vocabulary has besides pad, begin and end: tokens of media, or of the roles in conversations."""
    if isinstance(run.model, MegaTransformerConfig):
        return media_tokens(run.model)
    return list(ROLE_TOKENS.values()) if learns_from_chats(run) else []


def learns_from_chats(run: RunConfig) -> bool:
    """Whether a train source has conversations."""
    return any(source.is_media for source in run.data.train)


def build_codec_trainer(run: RunConfig, resume_point: str | None = None) -> Trainer:
    """Media, model and trainer of a run that trains a codec, all checked, nothing written.

    Raises:
        ValueError: as `build_trainer`.
    """
    check_memory(without_weights(run.model))
    args, media = run.training, codec_media(run.model)
    set_seed(args.seed)
    with whole_weights(args):
        model = MODELS[type(run.model)](run.model)
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    train_dataset, validation = build_codec_datasets(run.data, media, args.seed, batch_size)
    if isinstance(model, MegaTransformerImageAutoencoder) and resume_point is None and model.num_component_images:
        count = min(model.num_component_images, len(train_dataset))
        model.begin_with_components(torch.stack([train_dataset[index] for index in range(count)]))
    score = codec_scores(model)
    args.choose_best_metric([f"eval_{source}_{name}" for source in validation for name in ("loss", *score.names)])
    if resume_point is not None:
        check_weights(resume_point, model)
    trainer = get_trainer_class(run.trainer)(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=validation,
        data_collator=media.collate,
        processing_class=media.processor,
        score=score,
        compute_metrics=partial(mean_scores, names=score.names),
    )
    add_codec_callbacks(trainer, run.callbacks)
    return trainer


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, which takes no memory.

    Raises:
        ValueError: for sizes beyond what any tensor can have.
    """
    try:
        with torch.device("meta"):
            return MODELS[type(config)](config)
    except (RuntimeError, OverflowError, TypeError) as error:  # as torch says that a size is none
        reason = reason_of(error)
        raise ValueError(
            f"no model of these sizes can be made ({reason}); make them smaller in section model"
        ) from error


def check_memory(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose weights alone are larger than the memory of this machine, before any of them
    is made. They are made whole on each rank, in float32.
    """
    count = model.num_parameters()
    needed, memory = 4 * count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the model has {count} parameters, which take {needed / 2**30:.0f} GiB in float32, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory: make it smaller; --dry_run true lists its parts"
        )


def build_model(run: RunConfig, tokenizer: PreTrainedTokenizerFast, with_backbones: bool = True) -> PreTrainedModel:
    """A fresh model, the same on every rank, that knows the tokenizer's special tokens.

    Args:
        with_backbones: Whether pretrained encoders get their weights; a checkpoint has them.
    """
    config = run.model
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config.get_text_config(), name, getattr(tokenizer, name))
    if isinstance(config, MegaTransformerConfig):
        set_token_ids(config, tokenizer)
    set_seed(run.training.seed)
    with whole_weights(run.training):
        model = MODELS[type(config)](config)
        if isinstance(config, MegaTransformerConfig) and with_backbones:
            model.model.load_backbones()
    return model


@contextmanager
def whole_weights(args: RecurrentTrainingArguments) -> Iterator[None]:
    """Let the Auto classes build whole models. Under ZeRO-3 they build partitioned ones, which initialise differently,
    so that stages could not be compared; DeepSpeed partitions whole ones when training begins.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def build_media_examples(run: RunConfig, processor: PreTrainedTokenizerFast | ProcessorMixin) -> dict[str, Sequence]:
    """The examples that are shown during training, of each source with media: of what is held out of the train sources
    where the run names none for validation. A stream has none.
    """
    count = max(run.callbacks.media_samples.num_examples, run.callbacks.written_samples.num_examples)
    return {  # directions take turns
        source.label: build_examples(source, run.data, processor, count * len(source.turns), seed=run.training.seed)
        for source in run.data.validation or run.data.train
        if source.is_media and not source.streaming and count
    }


class NoRowsError(ValueError):
    """Data of which not one row came, as only their end shows."""


def train(trainer: Trainer, resume_point: str | None, card: ModelCardWriter) -> None:
    """Train, save weights, tokenizer and code in the run folder, evaluate; last the state, which says that all of it is
    there.

    Raises:
        NoRowsError: for data that gave none.
    """
    with trainer.stop.request.deferred():
        trainer.train(resume_from_checkpoint=resume_point)
        if trainer.state.global_step == 0:
            raise NoRowsError("data.train: not one row came of it, and nothing was trained; look at its sources")
        trainer.save_model()
    state = copy.copy(trainer.state)
    state.log_history = list(state.log_history)  # the evaluation below has a file of its own
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "runtime" not in name))
    if trainer.is_world_process_zero():
        card.write(trainer.args.output_dir, trainer.model, trainer.state)
        save_state_of(state, trainer.args.output_dir)


if __name__ == "__main__":
    run_to_the_end(main)
