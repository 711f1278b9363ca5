"""Where a run goes on."""

import os

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def find_resume_point(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `training.resume_from_checkpoint` names: a path, "true" for the newest of the output
    folder, or None to start afresh.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not os.path.isdir(wanted):
            raise ValueError(
                f"training.resume_from_checkpoint: {wanted} is no folder; give a checkpoint folder, or true"
            )
        return str(wanted)
    newest = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if newest is None:
        raise ValueError(
            f"training.resume_from_checkpoint: {args.output_dir} holds no checkpoint; leave the option out to start"
        )
    return newest
