"""How well a trained codec reconstructs, beside what needs no training: `python evaluate_codec.py runs/vocoder`."""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel

from configs import CODEC_CONFIGS, RunConfig
from dataset_loading.codec_data import build_codec_datasets
from evaluate import read_run_config, run_seed, split_overrides
from evaluation.reconstruction import PictureScores, PrincipalComponents, SoundScores, reconstruction_scores
from evaluation.report import format_table
from inference import arguments
from inference.checkpoints import blamed_on, check_files, weight_files
from inference.devices import choose_device, choose_threads, device_report
from inference.loading import check_loading
from inference.terminal import write_result
from model import MegaTransformerVocoder, codec_media, waveform_of
from model.weight_files import build_skeleton, check_finite, check_fit, declared_weights
from pretrain import MODELS

logger = logging.getLogger("evaluate_codec")

MOST_MEDIA_FOR_COMPONENTS = 20_000


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a codec on the validation media of its run; writes a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    own, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    set_up_logging(args.log_level)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logger.info("%s", device_report())
    try:
        run = read_run_config(args.checkpoint, overrides)
        model = load_codec(args.checkpoint, run).to(choose_device(args.device))
        choose_threads(model)
        write_result(table_of(model, run, args.limit))
    except (ValueError, OSError) as error:
        logger.debug("Where it failed:", exc_info=True)
        parser.error(str(error))
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line, without the overrides of the data."""
    parser = arguments.OneLineParser(
        prog="evaluate_codec.py",
        description="How well a codec reconstructs media: an autoencoder beside principal components, a vocoder beside "
        "Griffin and Lim's iteration. The data are those of the run; --config FILE and --data.KEY VALUE change them as "
        "in pretrain.py.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--limit", type=arguments.row_limit, help="media of each source; default: all")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser


def load_codec(folder: Path, run: RunConfig) -> PreTrainedModel:
    """The model in a folder, ready for evaluation.

    Raises:
        ValueError: it is no codec, its weights do not fit its configuration, or a file is damaged.
    """
    if not isinstance(run.model, CODEC_CONFIGS):
        raise ValueError(f"{folder} holds a {run.model.model_type}, which is no codec; use evaluate.py")
    check_files(folder)
    model_class, config_class = MODELS[type(run.model)], type(run.model)
    with blamed_on(f"The codec in {folder} is damaged", "use another checkpoint."):
        config = config_class.from_pretrained(folder, local_files_only=True)
        declared = declared_weights(folder / name for name in weight_files(folder))
        check_fit(folder, build_skeleton(model_class, config, declared), declared)
        model, report = model_class.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    check_loading(folder, report)
    check_finite(folder, model)
    return model.eval()


def table_of(model: PreTrainedModel, run: RunConfig, limit: int | None) -> str:
    """Scores of the codec and of the other way, for each source, as Markdown."""
    media = codec_media(model.config)
    train, validation = build_codec_datasets(run.data, media, seed=run_seed(run))
    if media.name == "image":
        scores, ways = PictureScores(), ways_of_pictures(model, train)
    else:
        log_mel = model.log_mel
        scores, ways = SoundScores(media.sampling_rate, log_mel), ways_of_sound(model)
    lines = []
    for source, dataset in validation.items():
        part = dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))
        for name, reconstruct in ways.items():
            found = reconstruction_scores(reconstruct, part, media.collate_codec_inputs, scores, model.device)
            if media.name == "audio":
                seconds = sum(len(part[number]) for number in range(len(part))) / media.sampling_rate / len(part)
                found["x real time"] = 1000 * seconds / found["milliseconds"]
            lines.append((source, name, found))
    names = list(dict.fromkeys(key for *_, found in lines for key in found))
    body = [[source, name, *(f"{found.get(key, float('nan')):.3f}" for key in names)] for source, name, found in lines]
    return format_table(["source", "way", *names], body)


def ways_of_pictures(model: PreTrainedModel, train: Dataset) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The autoencoder, also with refined latents if it refines them, and as many principal components of train pictures
    as it has numbers.
    """
    num_numbers = model.num_tokens * model.latent_size
    pictures = torch.stack([train[number] for number in range(min(len(train), MOST_MEDIA_FOR_COMPONENTS))])
    components = PrincipalComponents(pictures, num_numbers)
    name = f"autoencoder, {num_numbers} of {pictures[0].numel()} numbers"
    ways = {name: lambda pixels: model(pixels).reconstruction}
    if count := model.num_refinement_steps:
        ways[f"{name}, refined in {count} steps"] = lambda pixels: model.decode(
            model.refine(pixels, model.encode(pixels))
        )
    return ways | {f"{num_numbers} principal components": lambda pixels: components(pixels.cpu())}


def ways_of_sound(model: MegaTransformerVocoder) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The vocoder, and Griffin and Lim's iteration; both from log-mel spectrograms."""
    config = model.config

    def griffin_lim(waveforms: torch.Tensor) -> torch.Tensor:
        (log_mel,) = model.log_mel(waveforms)
        return waveform_of(log_mel, config.sampling_rate, config.n_fft, config.hop_length)[None]

    return {"vocoder": lambda waveforms: model.decode(model.log_mel(waveforms)), "Griffin-Lim": griffin_lim}


if __name__ == "__main__":
    sys.exit(main())
