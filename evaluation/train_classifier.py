"""Trains a classifier of media, by which those that a model generates are measured:
`python -m evaluation.train_classifier my/speech --modality audio --label-column speaker --output classifiers/speaker`.
"""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from dataset_loading import DataConfig, SourceConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources.loading import load_rows
from dataset_loading.sources.references import read_reference
from inference import arguments
from inference.devices import choose_threads
from inference.output import whole_folder, writable_folder, write_result
from model import load_audio, load_image

from .classifiers import Classifier, ClassifierConfig, LabelledMedia, save_classifier, train_classifier

EPOCHS = arguments.counted("the number of times all media are seen, 1 or more")
PIXELS = arguments.counted("the number of pixels of a side, 1 or more")
HERTZ = arguments.counted("the number of samples per second, 1 or more")
FOLDERS = {"image": "imagefolder", "audio": "audiofolder"}
VALIDATION_SHARE = 0.1
"""Share of the media that measures the classifier, where no others are named."""
MOST_HEARD = 0.98
"""Share of the waveforms that are heard whole."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train a classifier on the labels of a folder, measure it on media held out, and save it.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    datasets.disable_progress_bars()
    with parser.one_line_errors():
        output = writable_folder(args.output)
        train = labelled_media(args.data, args)
        if args.validation is None:
            train, held_out = hold_out(train, args.seed)
        else:
            held_out = labelled_media(args.validation, args)
        config = classifier_config(train, args)
        with torch.device("meta"):
            choose_threads(Classifier(config))
        classifier = train_classifier(config, train, held_out, args.epochs, seed=args.seed)
        about = {"data": str(args.data), "label_column": args.label_column, "validation": str(args.validation)}
        counts = {"num_train": len(train.media), "num_held_out": len(held_out.media), "seed": args.seed}
        with whole_folder(output) as made:
            digest = save_classifier(classifier, made, {**about, **counts})
    write_result(
        f"{classifier.real_accuracy:.1%} of {len(held_out.media)} media held out have the right one of "
        f"{len(config.labels)} labels; written to {output}, digest {digest}\n"
    )
    return 0


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(
        prog="evaluation.train_classifier",
        renamed={"--medium": "--modality"},
        description="A small network that names what images show, or who says what, for "
        "`python -m evaluation --classifier`.",
    )
    parser.add_argument("data", type=Path, help="folder of media with a metadata.jsonl or .csv")
    parser.add_argument("--modality", choices=tuple(FOLDERS), required=True, help="what the folder holds")
    parser.add_argument("--label-column", default="text", help="column of the metadata with the labels")
    parser.add_argument("--validation", type=Path, help="folder to measure with; default: a tenth of the data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the classifier, whose name it is")
    parser.add_argument("--epochs", type=EPOCHS, default=15, help="times all media are seen")
    parser.add_argument("--image-size", type=PIXELS, default=32, help="pixels of a side that are seen")
    parser.add_argument("--sampling-rate", type=HERTZ, default=8000, help="samples per second heard")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of weights, order and what is held out")
    return parser


def labelled_media(folder: Path, args: argparse.Namespace) -> LabelledMedia:
    """The media of a folder with their labels."""
    source, data = (
        SourceConfig(FOLDERS[args.modality], path=str(folder), answer_column=args.label_column),
        DataConfig(),
    )
    found = LabelledMedia()
    for row in load_rows(source, "train", data, args.seed, BadRows(data.max_invalid_rows)):
        question, answer = (message["content"] for message in json.loads(row["messages"]))
        item = read_reference(question[0], row)
        is_image = args.modality == "image"
        found.media.append(load_image(item) if is_image else (load_audio(item, args.sampling_rate), args.sampling_rate))
        found.labels.append(answer[0]["text"])
    return found


def hold_out(data: LabelledMedia, seed: int) -> tuple[LabelledMedia, LabelledMedia]:
    """What is learned, and what is held out; at least two media."""
    order = np.random.default_rng(seed).permutation(len(data.media)).tolist()
    count = max(2, round(VALIDATION_SHARE * len(order)))
    return tuple(
        LabelledMedia([data.media[number] for number in part], [data.labels[number] for number in part])
        for part in (order[count:], order[:count])
    )


def classifier_config(train: LabelledMedia, args: argparse.Namespace) -> ClassifierConfig:
    """Labels and sizes."""
    sizes: dict[str, Any] = {"image_size": args.image_size}
    if args.modality == "audio":
        seconds = np.quantile([len(samples) / rate for samples, rate in train.media], MOST_HEARD)
        sizes = {"sampling_rate": args.sampling_rate, "seconds": round(max(float(seconds), 0.2), 2)}
    return ClassifierConfig(args.modality, sorted(set(train.labels)), **sizes)


if __name__ == "__main__":
    sys.exit(main())
