"""ZeRO's checkpoints for another number of ranks, by way of DeepSpeed's universal checkpoint."""

import logging
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments

from .resuming import ResumeError

logger = logging.getLogger(__name__)

UNIVERSAL = "universal"  # the folder, in that of a checkpoint, of what any number of ranks can load
LATEST_UNIVERSAL = "latest_universal"  # tells DeepSpeed its name


def ranks_of(checkpoint: str | Path) -> int:
    """The number of ranks that have written a checkpoint."""
    return max(len(list(Path(checkpoint).glob("rng_state_*.pth"))), 1)


def needs_regrouping(checkpoint: str | Path, args: TrainingArguments) -> bool:
    """Whether ZeRO has divided states in a checkpoint among another number of ranks than the run has."""
    is_divided = any(Path(checkpoint).glob("global_step*/*_optim_states.pt"))
    return bool(args.deepspeed) and is_divided and ranks_of(checkpoint) != args.world_size


class RegroupCallback(TrainerCallback):
    """Brings the states in a checkpoint into the form that any number of ranks loads, beside the others; when training
    begins, they are loaded, and what was written is deleted.

    Args:
        checkpoint: The folder, whose files are known to hold nothing but tensors and plain values.
    """

    def __init__(self, checkpoint: str, accelerator: Accelerator) -> None:
        self.checkpoint, self.accelerator = Path(checkpoint), accelerator

    def convert(self, args: TrainingArguments) -> None:
        """Write them, on the first rank.

        Raises:
            ResumeError: DeepSpeed has no conversion for this stage or optimizer, or what it gives cannot be written.
        """
        problem = None
        if args.hf_deepspeed_config.is_zero3():
            problem = "the options of its groups would be lost under ZeRO-3"
        elif args.should_save:
            logger.info("%s: states of %d ranks for %d", self.checkpoint, ranks_of(self.checkpoint), args.world_size)
            problem = to_universal(self.checkpoint)
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise ResumeError(
                f"training.resume_from_checkpoint: {self.checkpoint} is of {ranks_of(self.checkpoint)} ranks, and "
                f"cannot be divided among {args.world_size}: {problem}; start as many"
            )
        args.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete them; what is loaded later, such as the best checkpoint, is of this run's ranks."""
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        engine.load_universal_checkpoint = lambda: False
        PartialState().wait_for_everyone()
        if args.should_save:
            discard_universal(self.checkpoint)


def to_universal(checkpoint: Path) -> str | None:
    """Write the universal form of ZeRO's states into the folder of a checkpoint; why not, where that cannot be."""
    from deepspeed.checkpoint import ds_to_universal  # only where it runs

    discard_universal(checkpoint)
    name = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    options = Namespace(
        input_folder=str(checkpoint / name),
        output_folder=str(checkpoint / UNIVERSAL),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with redirect_stdout(StringIO()):
            ds_to_universal.main(options)
        (checkpoint / LATEST_UNIVERSAL).write_text(UNIVERSAL, encoding="utf-8")
    except (KeyError, AssertionError, RuntimeError, ValueError) as error:  # of states that are not Adam's
        discard_universal(checkpoint)
        return f"DeepSpeed converts Adam's states alone, and found no {error}"
    except OSError as error:
        discard_universal(checkpoint)
        return f"what DeepSpeed converts cannot be written ({error})"
    return None


def discard_universal(checkpoint: Path) -> None:
    (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)
