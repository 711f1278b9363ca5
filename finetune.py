"""Tunes a checkpoint from a YAML: `deepspeed finetune.py --config configs/finetune_lora.yaml`."""

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
from collections.abc import Sequence

from configs import load_config, one_line_errors
from configs.finetuning import FinetuningConfig, build_finetuning
from configs.running import run_training, set_up_output
from inference.shutdown import run_to_the_end
from trainers.rewards import RewardError


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, evaluate and save what the command line describes.

    Raises:
        SystemExit: the input is bad; the code is 2, after one line on standard error, and nothing is written.
    """
    run = load_config(argv, FinetuningConfig)
    set_up_output(run.log_level)
    with one_line_errors((RewardError,)):  # the code of a user is tried when training begins
        return run_training(run, build_finetuning)


if __name__ == "__main__":
    run_to_the_end(main)
