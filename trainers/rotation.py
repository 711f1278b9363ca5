"""Checkpoints of a run: finished one after the other, and only so many kept."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import begin, complete, fault, is_unfinished
from .saved_tensors import not_finite

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
DELETED = "deleted-"  # in front of a name, so that a half of it is never taken for a checkpoint


class CheckpointKeeper(TrainerCallback):
    """Writes the manifest of each checkpoint when all ranks have written theirs, then deletes old ones.

    It comes after all other callbacks, which may add files to a checkpoint.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def begin(self, folder: Path, args: TrainingArguments) -> None:
        """Make the folder of a checkpoint, on all ranks, before anything is written into it. One of that name is
        deleted: what was cut off there would be mixed with what comes.
        """
        self.limit, args.save_total_limit = args.save_total_limit, None  # `Trainer` would count what is not whole
        if args.should_save:
            if folder.exists():
                discard(folder)
            begin(folder)
        PartialState().wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the checkpoint of this step; after that it counts, unless something in it is not finite."""
        args.save_total_limit = self.limit
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        PartialState().wait_for_everyone()
        if args.should_save:
            problem = not_finite(folder)
            if problem is not None:
                logger.warning("%s %s: no run goes on from it", folder, problem)
            complete(folder, problem)
            rotate(folder, args.save_total_limit, state.best_model_checkpoint)
        PartialState().wait_for_everyone()


def rotate(newest: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest whole checkpoints of a run, by their steps, and those that are not whole.

    Those of later steps are left alone: the run went on from an earlier one, and replaces them when it is there.

    Args:
        newest: The checkpoint that was saved last, which stays.
        limit: How many whole ones stay, at least 1; None for all, and then only what was cut off is deleted.
        best: The checkpoint that stays in any case.
    """
    for path in newest.parent.glob(f"{DELETED}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)
    kept = {newest.name, Path(best).name if best else newest.name}
    last_step = number_of(newest)
    checkpoints = [path for path in checkpoints_in(newest.parent) if number_of(path) <= last_step]
    whole = [path for path in checkpoints if looks_whole(path)]
    for path in checkpoints:
        if path.name not in kept and path not in whole and (limit or is_unfinished(path)):
            discard(path)
    if not limit:
        return
    excess = len(whole) - max(limit, len(kept & {path.name for path in whole}))
    for path in [path for path in whole if path.name not in kept][: max(excess, 0)]:
        discard(path)


def looks_whole(folder: Path) -> bool:
    """Whether a checkpoint is whole as far as names and sizes tell."""
    return (folder / TRAINER_STATE_NAME).is_file() and fault(folder, with_digests=False) is None


def discard(folder: Path) -> None:
    """Delete a checkpoint, which is none any more from the first moment on."""
    renamed = folder.with_name(f"{DELETED}{folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)  # what is left, the next rotation deletes


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints in that of a run, whole or not, by their steps."""
    paths = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return sorted((path for path in paths if CHECKPOINT_NAME.fullmatch(path.name)), key=number_of)


def number_of(folder: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(CHECKPOINT_NAME.fullmatch(folder.name)[1])
