"""Trains a model from a YAML: `deepspeed pretrain.py --config configs/recurrent_vlm.yaml`."""

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
from collections.abc import Sequence

from configs import load_config
from configs.pretraining import build_pretraining
from configs.running import run_training, set_up_output
from configs.tools import run_mode
from inference.shutdown import run_to_the_end


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save what the command line describes.

    Raises:
        SystemExit: the input is bad; the code is 2, after one line on standard error, and nothing is written.
    """
    run = load_config(argv)
    set_up_output(run.log_level)
    if run.mode is not None:
        return run_mode(run)
    return run_training(run, build_pretraining)


if __name__ == "__main__":
    run_to_the_end(main)
