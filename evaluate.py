"""What depth buys a trained model: `python evaluate.py runs/recurrent_lm --num-steps 1 2 4 8 16`."""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from configs import RunConfig, load_run_config
from dataset_loading import Collator, build_examples, build_validation
from evaluation import Writer, depth_table, markdown_table, save_depth_table, token_byte_lengths
from inference import arguments
from inference.devices import DTYPES, choose_device, device_report
from inference.loading import find_checkpoint, load_model, tokenizer_of
from model import MODALITIES

logger = logging.getLogger("evaluate")

DEFAULT_DEPTHS = [1, 2, 4, 8, 16]
EXAMPLES_PER_SOURCE = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint at several depths; writes a table to standard output, and JSON, Markdown and PNG files.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    own, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    set_up_logging(args.log_level)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a bar in a file is noise
    logger.info("%s", device_report())
    try:
        checkpoint = find_checkpoint(args.checkpoint)
        run = read_run_config(checkpoint, overrides)
        device = choose_device(args.device)
        model, processor = load_model(checkpoint, device, args.dtype and getattr(torch, args.dtype))
        texts = validation_texts(run, processor, args.limit)
        examples = validation_examples(run, processor, args.limit or EXAMPLES_PER_SOURCE)
        depths = sorted(set(args.num_steps))
        if model.config.get_text_config().num_core_layers == 0:
            logger.warning(
                "%s has no core (num_core_layers is 0), so its depth cannot vary: evaluated once", checkpoint
            )
            depths = [None]
        output = make_folder(args.output or Path(args.checkpoint) / "evaluation")
        rows = depth_table(
            model,
            depths,
            texts,
            examples,
            Collator(processor),
            token_byte_lengths(tokenizer_of(processor)),
            args.batch_size,
            modalities=("text", *MODALITIES),
            writer=None if args.no_texts else Writer(processor, args.max_new_tokens),
        )
        sys.stdout.write(markdown_table(rows))
        about = {"checkpoint": str(checkpoint), "data": dataclasses.asdict(run.data), "limit": args.limit}
        paths = save_depth_table(rows, output, about)
        sys.stdout.write("\nwritten to " + ", ".join(map(str, paths)) + "\n")
    except (ValueError, OSError) as error:
        logger.debug("Where it failed:", exc_info=True)
        parser.error(str(error))
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line, without the overrides of the data."""
    parser = arguments.OneLineParser(
        prog="evaluate.py",
        description="Loss, bits per byte, exact answers, word errors, BLEU and time of a model at several depths, by "
        "source and by modality. The data are those of the run; --config FILE and --data.KEY VALUE change them as in "
        "pretrain.py.",
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run (its newest complete checkpoint)")
    parser.add_argument(
        "--num-steps", type=arguments.core_steps, nargs="+", default=DEFAULT_DEPTHS, help="times the core is applied"
    )
    parser.add_argument("--batch-size", type=arguments.batch_rows, default=8, help="rows in a forward pass")
    parser.add_argument(
        "--limit",
        type=arguments.row_limit,
        help=f"rows per source; default: all for the loss, and {EXAMPLES_PER_SOURCE} questions of each source with "
        "answers",
    )
    parser.add_argument("--no-texts", action="store_true", help="write no answers: neither word errors nor BLEU")
    parser.add_argument(
        "--max-new-tokens",
        type=arguments.new_tokens,
        help="most tokens of an answer; default: twice as many as its reference has",
    )
    parser.add_argument("--output", type=Path, help="folder for the files; default: evaluation in the given folder")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the checkpoint's")
    return parser


def make_folder(folder: Path) -> Path:
    """The folder, made if missing, in which a file could be written just now.

    Raises:
        ValueError: none could.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): name another folder with --output."
        ) from error


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of this command, and those that `configs` reads: --config and --data.KEY, with their values."""
    own, overrides, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.partition("=")[0] != "--config" and not argument.startswith("--data."):
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest:
            overrides.append(rest.pop(0))
    return own, overrides


def read_run_config(checkpoint: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the run that a checkpoint belongs to, with overrides.

    Raises:
        ValueError: there is none beside the checkpoint, or an override is wrong.
    """
    path = find_run_config(checkpoint)
    if path is not None:
        return load_run_config(path, overrides)
    if not any(override.partition("=")[0] == "--config" for override in overrides):
        raise ValueError(
            f"Neither {checkpoint} nor its parent folder has the config.yaml of a run: "
            "name the data with --config FILE."
        )
    return load_run_config(*first_config(overrides))


def find_run_config(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a checkpoint belongs to, if there is one: beside it, or a folder above."""
    paths = (folder / "config.yaml" for folder in (checkpoint, checkpoint.absolute().parent))
    return next(filter(Path.is_file, paths), None)


def first_config(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The path of the first --config, and the other overrides."""
    rest = list(overrides)
    index = next(i for i, override in enumerate(rest) if override.partition("=")[0] == "--config")
    _, has_value, path = rest.pop(index).partition("=")
    if not has_value:
        if index == len(rest):
            raise ValueError("--config: the value is missing")
        path = rest.pop(index)
    return path, rest


def validation_texts(
    run: RunConfig, processor: PreTrainedTokenizerBase | ProcessorMixin, limit: int | None
) -> dict[str, Dataset]:
    """The packed validation rows by source; where the run names none, those that it split off its training data."""
    validation = build_validation(run.data, processor, seed=run_seed(run))
    return {
        name: rows if limit is None else Subset(rows, range(min(limit, len(rows)))) for name, rows in validation.items()
    }


def validation_examples(
    run: RunConfig, processor: PreTrainedTokenizerBase | ProcessorMixin, limit: int
) -> dict[str, Sequence[dict]]:
    """Questions not trained on, by source: of the validation sources, else of the train sources new ones, where they
    are generated, or those that were split off.
    """
    return {
        source.label: build_examples(source, run.data, processor, limit, seed=run_seed(run))
        for source in run.data.validation or run.data.train
        if source.has_answers and not source.streaming
    }


def run_seed(run: RunConfig) -> int:
    """The seed that the run splits and generates its data with."""
    return run.resolved["training"]["seed"]


if __name__ == "__main__":
    sys.exit(main())
