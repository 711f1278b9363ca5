"""What may differ between a run and the checkpoint that it goes on from, and where a run begins."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trainers import RecurrentTrainingArguments
from trainers.resuming import TRAINER_STATE_NAME, find_resume_point, holds_checkpoints, is_finished

from .deepspeed_files import deepspeed_content
from .loader import OPTIONAL_SECTIONS, read_yaml, to_yaml
from .runs import ResolvedConfig, check_output_dir, find_run_config, resolve

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"

_TRAINING = {
    "the length of the run; the schedule is that of the new length": "max_steps num_train_epochs",
    "when to end; the weights until then are the same": "early_stopping_*",
    "how to go on": "resume_from_checkpoint allow_changes",
    "what is said while it trains": "logging_* log_* disable_tqdm num_completions_to_print deepspeed.steps_per_print "
    "deepspeed.wall_clock_breakdown deepspeed.dump_state deepspeed.comms_logger* deepspeed.flops_profiler*",
    "where figures go": "report_to run_name project trackio_*",
    "which figures there are": "skip_memory_metrics include_num_input_tokens_seen",
    "which figures there are; the loss at one step is computed aside": "recurrence_logging_steps",
    "when to warn": "*_alarm stall_seconds",
    "when and how to evaluate, which changes no weight": "eval_* per_device_eval_batch_size prediction_loss_only "
    "batch_eval_metrics include_for_metrics",
    "nothing reads them": "do_*",
    "when and where to save": "output_dir save_* enable_jit_checkpoint push_to_hub hub_*",
    "who reads the rows, whose order stays": "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context",
    "memory; the values are the same": "torch_empty_cache_steps",
    "memory; the values are computed again, and are the same": "activation_checkpointing gradient_checkpointing",
    "how long ranks wait for each other": "ddp_timeout",
}
# Patterns of the keys that may change when a run goes on, and why: what is computed stays the same. All other keys are
# those of the run that the checkpoint is of.
FREE = {f"training.{name}": reason for reason, names in _TRAINING.items() for name in names.split()} | {
    "data.max_invalid_rows": "when to give up; the rows are the same",
    "data.preprocessing_workers": "who prepares the rows, whose order stays",
    "callbacks.*": "what is measured besides the training, and what happens where a loss is not finite",
    "log_level": "what is said while it trains",
}
_OF_GROUPS = (f"parameter_groups[[]*[]].{it}" for it in ("learning_rate", "lr_factor", "weight_decay", "freeze_steps"))
_OF_OPTIMIZER = ("learning_rate", "muon_learning_rate", "weight_decay", "adam_*", "optim_args", *_OF_GROUPS)
_OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs*", "warmup_steps")
# Those that may change where `training.allow_changes` is true; the optimizer and the schedule then have the new ones.
CHANGEABLE = (
    *(f"training.{name}" for name in (*_OF_OPTIMIZER, *_OF_SCHEDULE)),
    *(f"training.deepspeed.{part}.params.*" for part in ("optimizer", "scheduler")),
)
# Schedules whose rates follow from what has happened, and not from the number of the step.
WITH_MEMORY = ("reduce_lr_on_plateau", "greedy")
# Which ranks and micro-batches the rows of an update are given to; their number is what counts.
OF_ROWS = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
MOST_SHOWN = 3


@dataclass(frozen=True)
class Difference:
    """An option whose value in a checkpoint is not that of the run."""

    key: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.key} is {short_value(self.there)} there and {short_value(self.here)} here"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        checkpoint: The folder that it goes on from; None for a run that begins anew.
        may_be_complete: Whether that checkpoint may be the last of the run, after which only the end is missing.
        is_finished: Whether nothing at all is left to do.
    """

    checkpoint: str | None = None
    may_be_complete: bool = False
    is_finished: bool = False


def find_start(run: ResolvedConfig) -> Start:
    """Where a run begins, by its output folder and `training.resume_from_checkpoint`. Nothing is written.

    Raises:
        ValueError: the output folder cannot be written, or is another run's; or the checkpoint is none, has other
            options than the run, or nothing left to train.
    """
    args = run.training
    check_output_dir(run)
    folder, wanted = Path(args.output_dir), str(args.resume_from_checkpoint).lower()
    if wanted in ("none", "false"):
        if name := holds_checkpoints(folder):  # those of both runs could not be told apart
            raise ValueError(
                f"training.output_dir: {folder} holds {name} of an earlier run; go on with it by "
                "--training.resume_from_checkpoint true, choose another output_dir, or remove the folder"
            )
        if (folder / TRAINER_STATE_NAME).is_file():
            logger.warning("%s holds a finished run, which this one replaces", folder)
        return Start()
    is_named = wanted != "true"
    checkpoint = find_resume_point(args)
    if checkpoint is not None:
        check_options(run, Path(checkpoint))
    if not is_named and is_finished(folder, args):
        if checkpoint is None:
            check_options(run, folder)
        return Start(is_finished=True)
    return Start(checkpoint, may_be_complete=not is_named)


def check_ranks(checkpoint: Path, args: RecurrentTrainingArguments, found: Sequence[Difference]) -> None:
    """Raises ValueError for a checkpoint of another number of ranks, where an update would be of another number of
    rows.
    """
    there = count_ranks(checkpoint)
    if there in (0, args.world_size):
        return
    if not (args.allow_changes or has_same_rows(checkpoint, args, found)):
        raise ValueError(
            f"training.resume_from_checkpoint: {checkpoint} is of {there} ranks, and this run has {args.world_size}; "
            "start as many, or add --training.allow_changes true, or give an update as many rows as there by "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    logger.info("ranks: %d -> %d, from here on", there, args.world_size)


def count_ranks(checkpoint: Path) -> int:
    """The number of ranks that have written a checkpoint; 0 where older code has not left it there."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def has_same_rows(checkpoint: Path, args: RecurrentTrainingArguments, found: Sequence[Difference]) -> bool:
    """Whether an update of the run is of as many rows as that of the checkpoint, however ranks share them. Batches that
    are made by tokens are others where they may have other numbers of rows.
    """
    there = {item.key: item.there for item in found}
    ours = {name: getattr(args, name.removeprefix("training.")) for name in OF_ROWS}
    theirs = [there.get(name, value) for name, value in ours.items()]
    if args.max_tokens_per_batch is not None and OF_ROWS[0] in there:
        return False
    return math.prod(ours.values()) * args.world_size == math.prod(theirs) * count_ranks(checkpoint)


# ----------------------------------------------------------------------------------------------------------- comparison


def config_text(run: ResolvedConfig) -> str:
    """The YAML that a checkpoint keeps of its run: that of the run folder, with what the file of DeepSpeed says in
    place of its name.
    """
    return to_yaml(with_deepspeed_content(run.resolved))


def check_options(run: ResolvedConfig, checkpoint: Path) -> None:
    """Compare the options of a run with those that a checkpoint was trained with.

    They are in the checkpoint; in the folder above, where older code has written it. What may change is logged.

    Raises:
        ValueError: there is a difference that may not be.
    """
    path = find_run_config(checkpoint)
    if path is None:
        logger.warning(
            "%s has no %s: whether its run had the same data, seed and options is not known", checkpoint, CONFIG_NAME
        )
        check_ranks(checkpoint, run.training, ())
        return
    if path.parent != checkpoint:
        logger.warning("%s has no %s; its options are taken to be those of %s", checkpoint, CONFIG_NAME, path)
    found = list(differences(run, path))
    check_ranks(checkpoint, run.training, found)
    if count_ranks(checkpoint) != run.training.world_size and has_same_rows(checkpoint, run.training, found):
        found = [item for item in found if item.key not in OF_ROWS]
    changed = [item for item in found if is_changeable(item)]
    refused = [item for item in found if item not in changed]
    if refused:
        raise ValueError(f"{refusal(checkpoint, refused)}; give the same, or begin anew in another output_dir")
    if changed and not run.training.allow_changes:
        raise ValueError(f"{refusal(checkpoint, changed)}; give the same, or add --training.allow_changes true")
    for item in changed:
        logger.info("%s: %s -> %s, from here on", item.key, short_value(item.there), short_value(item.here))


def refusal(checkpoint: Path, found: list[Difference]) -> str:
    """The beginning of a sentence about options that differ."""
    shown = "; ".join(map(str, found[:MOST_SHOWN]))
    more = f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return f"training.resume_from_checkpoint: {checkpoint} has other options: {shown}{more}"


def differences(run: ResolvedConfig, path: Path) -> Iterator[Difference]:
    """The options of a run that are not those of a configuration file, but for those that are free."""
    try:
        there = resolve(["--config", str(path)], type(run))  # options that are younger have their defaults
    except ValueError:  # keys that are gone since, or of a run of another kind: as it is, in which they are named
        there = read_yaml(path)
    with suppress(ValueError):  # where DeepSpeed's file is gone since, its name is compared
        there = with_deepspeed_content(there)
    has_adapters = any(run.resolved.get(part) for part in OPTIONAL_SECTIONS)
    for item in compare_trees(there, with_deepspeed_content(run.resolved)):
        is_base = has_adapters and item.key == "model.path"  # its weights are compared when the adapter is loaded
        if not (is_base or any(fnmatchcase(item.key, pattern) for pattern in FREE)):
            yield item


def compare_trees(there: Any, here: Any, key: str = "") -> Iterator[Difference]:
    """The innermost keys whose values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**here, **there}:
            yield from compare_trees(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from compare_trees(*pair, f"{key}[{index}]")
    elif there != here:
        yield Difference(key, there, here)


def with_deepspeed_content(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree with what DeepSpeed's file says in place of its name."""
    training = tree.get("training") or {}
    return {**tree, "training": {**training, "deepspeed": deepspeed_content(training.get("deepspeed"))}}


def is_changeable(item: Difference) -> bool:
    """Whether an optimizer or a schedule that is loaded can be given the new value."""
    if item.key == "training.muon_learning_rate" and None in (item.there, item.here):
        return False  # other parameters would be Muon's
    if item.key == "training.lr_scheduler_type" and {item.there, item.here} & set(WITH_MEMORY):
        return False
    return any(fnmatchcase(item.key, pattern) for pattern in CHANGEABLE)


def short_value(value: Any, most: int = 80) -> str:
    """A value in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
