"""What depth buys a trained model: `python -m evaluation runs/recurrent_lm --num-steps 1 2 4 8 16`. Or how well a codec
reconstructs, next to what needs no training: `python -m evaluation runs/vocoder`.
"""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from configs import RunConfig, read_run_config
from configs.runs import split_overrides
from dataset_loading import build_collator, build_examples, build_validation
from dataset_loading.codec_data import build_codec_datasets
from inference import arguments
from inference.checkpoints import find_checkpoint, is_codec
from inference.decoding import FLOW_OPTIONS, add_flow_arguments
from inference.devices import choose_device, choose_threads, device_report
from inference.loading import add_loading_arguments, load_as_asked, load_codec
from inference.output import whole_folder, writable_folder, write_result
from inference.prompts import prompt_limit
from model import codec_media, tokenizer_of
from model.chat import TARGET_PREFIX
from model.exit_criteria import EXIT_CRITERIA

from .answers import AnswerGenerator
from .checks import CHECKS
from .classifiers import load_classifier
from .controls import check_controls, control_tables, controls_markdown, save_controls
from .depth import check_lengths, depth_table, possible_depths
from .distances import FeatureNetwork
from .efficiency import Setting, as_examples, efficiency_markdown, efficiency_table, exit_settings
from .media_generation import MediaGenerator, RoundTrip, media_table
from .metrics import token_byte_lengths
from .reconstruction import reconstruction_table
from .results import save_depth_table, save_efficiency, save_media_table
from .tables import markdown_table, media_markdown

logger = logging.getLogger("evaluation")  # __name__ is __main__ when run with -m

DEFAULT_DEPTHS = [1, 2, 4, 8, 16]
EXAMPLES_PER_SOURCE = 256
FOR_CODECS = ("checkpoint", "limit", "device", "log_level")
"""Options that codecs have a use for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint at several depths; writes a table to standard output, and JSON, Markdown and PNG files.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    own, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    for name in ("exit_threshold", "velocity_threshold"):
        if getattr(args, name) is not None and args.exit_criterion in (None, "none"):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} has no effect without --exit-criterion: name one, or leave it out.")
    set_up_logging(args.log_level)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a bar in a file is noise
    logger.info("%s", device_report())
    with parser.one_line_errors():
        checkpoint = find_checkpoint(args.checkpoint)
        run = read_run_config(checkpoint, overrides)
        if is_codec(checkpoint):
            for name, value in vars(args).items():
                if name not in FOR_CODECS and value != parser.get_default(name):
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"{flag} is for language models, and this is a codec: leave it out.")
            evaluate_codec(checkpoint, run, args)
        else:
            evaluate(checkpoint, run, args)
    return 0


def evaluate(checkpoint: Path, run: RunConfig, args: argparse.Namespace) -> None:
    """Write tables of what a language model says, and of the media that it writes, at each depth.

    Raises:
        ValueError: The model cannot be loaded, data cannot be read or have too long examples, or a folder cannot be
            written.
    """
    model, processor = load_as_asked(checkpoint, args)
    classifiers = load_named(args.classifier, load_classifier)
    networks = load_named(args.feature_network, FeatureNetwork)
    texts = validation_texts(run, processor, args.limit)
    limit = args.limit or EXAMPLES_PER_SOURCE
    # Questions not trained on: of the validation sources, else of the train sources new ones, where they are generated,
    # or those that were split off.
    questions = {
        source.label: build_examples(source, run.data, processor, limit, run.seed, CHECKS)
        for source in run.data.validation or run.data.train
        if source.has_answers and not source.streaming
    }
    examples, prompts = split_by_answer(questions)
    depths = possible_depths(model, args.num_steps, checkpoint)
    if args.controls:
        check_controls(depths, texts, examples)
    if args.efficiency:
        settings, said = efficiency_settings(model, depths, args), examples_to_say(examples, run, processor, args.limit)
    if prompts and not args.no_media and len(args.exit_threshold or ()) > 1:
        raise ValueError("several --exit-threshold are for --efficiency, and media take one: give one, or --no-media.")
    writer = AnswerGenerator(processor, args.max_new_tokens)
    limit = prompt_limit(model, args.max_prompt_tokens)
    check_lengths({**examples, **prompts}, limit)
    output = writable_folder(args.output or Path(args.checkpoint) / "evaluation")
    collate = build_collator(processor, model.config.is_encoder_decoder)
    rows = depth_table(
        model,
        depths,
        texts,
        examples,
        collate,
        token_byte_lengths(tokenizer_of(processor)),
        args.batch_size,
        writer=None if args.no_texts else writer,
    )
    write_result(markdown_table(rows))
    about = {"checkpoint": str(checkpoint), "data": dataclasses.asdict(run.data), "limit": args.limit}
    with whole_folder(output) as made:
        names = [path.name for path in save_depth_table(rows, made, about)]
    if args.controls:
        tables = control_tables(model, depths, texts, examples, collate, args.batch_size)
        write_result(f"\n{controls_markdown(tables)}")
        with whole_folder(output) as made:
            names += [path.name for path in save_controls(tables, made, about)]
    if args.efficiency:
        table = efficiency_table(model, settings, said, writer, args.batch_size, has_answers=bool(examples))
        write_result(f"\n{efficiency_markdown(table)}")
        with whole_folder(output) as made:
            names += [path.name for path in save_efficiency(table, made, about)]
    if prompts and not args.no_media:
        generator = MediaGenerator(writer, generate_options(args))
        reader = None if args.round_trip is None else RoundTrip(writer, args.round_trip)
        table = media_table(model, depths, prompts, generator, classifiers, reader, args.batch_size, networks)
        write_result(f"\n{media_markdown(table)}")
        how = {"generate": generate_options(args), "classifiers": [str(folder) for folder in args.classifier]}
        how["feature_networks"] = [str(path) for path in args.feature_network]
        with whole_folder(output) as made:
            names += [path.name for path in save_media_table(table, made, {**about, **how})]
    write_result("\nwritten to " + ", ".join(str(output / name) for name in names) + "\n")


def efficiency_settings(
    model: PreTrainedModel, depths: Sequence[int | None], args: argparse.Namespace
) -> list[Setting]:
    """All depths, and exits at the largest, where a depth can vary; ValueError for a threshold outside its range."""
    settings, criterion = [Setting(depth) for depth in depths], args.exit_criterion or "kl_divergence"
    if depths == [None] or criterion == "none" or model.config.get_text_config().recurrence.untied_core:
        return settings
    return settings + exit_settings(depths[-1], criterion, args.exit_threshold)


def examples_to_say(
    examples: dict[str, Sequence[dict]],
    run: RunConfig,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    limit: int | None,
) -> dict[str, Sequence[dict]]:
    """Questions whose answers are said behind them; where there are none, validation texts, each a row of its own.

    Raises:
        ValueError: All answers are tags, or no text is left.
    """
    said = {name: rows for name, rows in examples.items() if not any(row.get("is_tagged") for row in rows)}
    if said:
        return said
    if examples:
        raise ValueError(
            "--efficiency needs answers that are said behind their questions, and all sources have loss_on: tags; "
            "leave it out."
        )
    unpacked = dataclasses.replace(run, data=dataclasses.replace(run.data, packing=False))
    return as_examples(validation_texts(unpacked, processor, limit))


def evaluate_codec(checkpoint: Path, run: RunConfig, args: argparse.Namespace) -> None:
    """Write a table of how well a codec reconstructs the validation media of its run."""
    model = load_codec(checkpoint, choose_device(args.device))
    choose_threads(model)
    train, validation = build_codec_datasets(run.data, codec_media(model.config), seed=run.seed)
    write_result(reconstruction_table(model, train, validation, args.limit))


def build_parser() -> arguments.OneLineParser:
    """The command line, without the overrides of the data."""
    parser = arguments.OneLineParser(
        prog="evaluation",
        renamed={"--judge": "--classifier", "--read-back": "--round-trip"},
        description="Loss, bits per byte, exact answers, word errors, BLEU and time of a model at several depths, by "
        "source and by modality; and how much of the images and audio that it generates is right. Of a codec, how well "
        "it reconstructs: an autoencoder beside principal components, a vocoder beside Griffin and Lim's iteration. "
        "The data are those of the run; --config FILE and --data.KEY VALUE change them as in pretrain.py.",
    )
    add_loading_arguments(parser)
    parser.add_argument(
        "--num-steps", type=arguments.core_steps, nargs="+", default=DEFAULT_DEPTHS, help="times the core is applied"
    )
    parser.add_argument("--batch-size", type=arguments.batch_rows, default=8, help="rows in a forward pass")
    parser.add_argument(
        "--limit",
        type=arguments.row_limit,
        help=f"rows per source; default: all for the loss and of codecs, and {EXAMPLES_PER_SOURCE} questions of each "
        "source with answers",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="say how much of the gap between fewer core steps and the most of --num-steps is the readout, the number "
        "of applications, and distinct steps",
    )
    parser.add_argument(
        "--efficiency",
        action="store_true",
        help="count the operations of answers that are said token by token, at the depths of --num-steps and with "
        "exits by --exit-criterion, kl_divergence if none is named, at each --exit-threshold",
    )
    parser.add_argument("--no-texts", action="store_true", help="write no answers: neither word errors nor BLEU")
    parser.add_argument(
        "--max-new-tokens",
        type=arguments.new_tokens,
        help="most tokens of an answer; default: twice as many as its reference has",
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=arguments.prompt_tokens,
        help="most tokens of a question with its answer; default: as many as the model has positions",
    )
    add_media_arguments(parser)
    parser.add_argument("--output", type=Path, help="folder for the files; default: evaluation in the given folder")
    return parser


def add_media_arguments(parser: arguments.OneLineParser) -> None:
    """Add the options of the images and audio that the model generates."""
    parser.add_argument("--no-media", action="store_true", help="generate neither images nor audio")
    parser.add_argument(
        "--classifier", type=Path, nargs="+", default=[], help="folders that evaluation.train_classifier has written"
    )
    parser.add_argument(
        "--feature-network",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="networks by torch.jit.save, whose features of images, of -1 to 1, are compared with references'",
    )
    parser.add_argument(
        "--round-trip",
        nargs="?",
        const="",
        metavar="QUESTION",
        help="let the model read what it generated, with this question or none, and compare that with its prompt",
    )
    add_flow_arguments(parser)
    parser.add_argument(
        "--exit-criterion",
        choices=["none", *EXIT_CRITERIA],
        help="what ends positions early, also for --efficiency",
    )
    parser.add_argument(
        "--exit-threshold",
        type=arguments.finite,
        nargs="+",
        help="value of the criterion; several for --efficiency; default: the model's, and some around the criterion's",
    )
    parser.add_argument(
        "--velocity-threshold",
        type=arguments.finite,
        help="threshold for images and audio, for which the criterion is the change of the velocity of the flow head; "
        "default: that of `generate`",
    )
    parser.add_argument(
        "--cache-policy",
        choices=["full", "ring", "last", "first", "residual"],
        help="which steps of past positions are read while media are generated; default: the model's",
    )


def generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` that were named, for media."""
    names = (*FLOW_OPTIONS, "exit_criterion", "exit_threshold", "velocity_threshold", "cache_policy")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return options | ({"exit_threshold": options["exit_threshold"][0]} if "exit_threshold" in options else {})


def validation_texts(
    run: RunConfig, processor: PreTrainedTokenizerBase | ProcessorMixin, limit: int | None
) -> dict[str, Dataset]:
    """The packed validation rows by source; where the run names none, those that it split off its training data."""
    validation = build_validation(run.data, processor, seed=run.seed)
    return {
        name: rows if limit is None else Subset(rows, range(min(limit, len(rows)))) for name, rows in validation.items()
    }


def load_named(paths: Sequence[Path], load: Callable[[Path], Any]) -> dict[str, Any]:
    """What is in folders or files, by their names; ValueError if two have the same."""
    names = [path.name for path in paths]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two of {', '.join(map(str, paths))} are called {twice[0]!r}: rename one of these.")
    return {path.name: load(path) for path in paths}


def split_by_answer(examples: dict[str, Sequence[dict]]) -> tuple[dict[str, Sequence[dict]], dict[str, Sequence[dict]]]:
    """The examples whose answer is text, and those whose answer is a medium, by source; a source with several kinds of
    media is divided by them.
    """
    texts, media = {}, {}
    for name, rows in examples.items():
        by_modality: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            modality = row.get("modality", "text")
            by_modality.setdefault(modality if modality.startswith(TARGET_PREFIX) else "text", []).append(number)
        kinds = [modality for modality in by_modality if modality != "text"]
        for modality, numbers in by_modality.items():
            if modality == "text":
                texts[name] = rows if not kinds else Subset(rows, numbers)
            else:
                media[name if len(kinds) == 1 else f"{name} {modality}"] = Subset(rows, numbers)
    return texts, media


if __name__ == "__main__":
    sys.exit(main())
