"""Makes a checkpoint out of others: `python convert.py merge runs/finetune_lora --output runs/merged`."""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

from inference import arguments
from inference.checkpoints import find_checkpoint, is_adapter
from inference.loading import load_model
from model.step_lora import CONFIG as STEP_LORA


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input; nothing is written then.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    try:
        merge(args.adapter, args.base, args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(prog="convert.py", description="Make a checkpoint out of others.")
    parser.add_argument(
        "command", choices=["merge"], help="merge: add the LoRA of an adapter to the weights of its base"
    )
    parser.add_argument("adapter", type=Path, help="folder of a run of finetune.py, or of a checkpoint in it")
    parser.add_argument("--base", type=Path, help="folder of its base; default: where it was in training")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; empty or new")
    return parser


def merge(adapter: Path, base: Path | None, output: Path) -> None:
    """Write the model with an adapter in its weights: a checkpoint like any other.

    Args:
        base: folder of the adapter's model; None: where it was in training.

    Raises:
        ValueError: the folder holds no LoRA, or one of another base, or of a base that is saved in 8 or 4 bits; or the
            output folder holds something.
    """
    folder = find_checkpoint(adapter)
    if not is_adapter(folder):
        raise ValueError(f"{folder} holds a whole model, and no adapter: there is nothing to merge.")
    if (folder / STEP_LORA).is_file():
        raise ValueError(
            f"{folder} has deltas for single steps ({STEP_LORA}), which cannot be merged: the core has one set of "
            "weights for all steps. Load it as it is."
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output: {output} is not empty; name another folder.")
    model, processor = load_model(folder, base=base)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base of {folder} is saved in 8 or 4 bits, in which most of what was learned would be lost: load the "
            "adapter as it is."
        )
    model.save_pretrained(output)
    processor.save_pretrained(output)
    sys.stdout.write(f"written to {output}\n")


if __name__ == "__main__":
    sys.exit(main())
