"""Trains a model from a YAML: `deepspeed pretrain.py --config configs/recurrent_vlm.yaml`."""

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import os
from collections.abc import Sequence

from configs import load_config
from configs.pretraining import build_pretraining, describe_run
from configs.running import run_training, set_up_output
from inference.output import write_result
from inference.shutdown import run_to_the_end


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save what the command line describes.

    Raises:
        SystemExit: the input is bad; the code is 2, after one line on standard error, and nothing is written.
    """
    run = load_config(argv)
    set_up_output(run.log_level)
    if run.is_dry_run:
        if os.environ.get("RANK", "0") == "0":
            write_result(describe_run(run))
        return 0
    return run_training(run, build_pretraining)


if __name__ == "__main__":
    run_to_the_end(main)
