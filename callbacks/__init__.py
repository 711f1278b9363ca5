"""What is watched and written during training, with the trainer's own logs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

from model import tokenizer_of

from .generated_media import GeneratedMediaCallback, GeneratedMediaConfig, is_generated, target_modality
from .kept_batches import repeat_loss
from .media_samples import MediaSamplesCallback, MediaSamplesConfig
from .model_card import ModelCardWriter, model_card, sources_of
from .model_size import ModelSizeCallback, size_table
from .non_finite import NonFiniteCallback, NonFiniteConfig, check_non_finite
from .pictures import PicturesCallback, PicturesConfig
from .reporting import Reporter
from .samples import SamplesCallback, SamplesConfig
from .stability import StabilityCallback, StabilityConfig, StabilityError, intervals_of
from .throughput import ThroughputCallback

__all__ = [
    "CallbacksConfig",
    "GeneratedMediaConfig",
    "MediaSamplesConfig",
    "ModelCardWriter",
    "NonFiniteConfig",
    "PicturesConfig",
    "SamplesConfig",
    "StabilityConfig",
    "StabilityError",
    "add_callbacks",
    "add_codec_callbacks",
    "check_codec_callbacks",
    "model_card",
    "repeat_loss",
    "size_table",
    "sources_of",
]


@dataclass
class CallbacksConfig:
    """What is watched and written during training."""

    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Texts from fixed prompts, at several depths."""

    media_samples: MediaSamplesConfig = field(default_factory=MediaSamplesConfig)
    """Answers to fixed images and audio, at several depths."""

    generated_samples: GeneratedMediaConfig = field(default_factory=GeneratedMediaConfig)
    """Images and audio that are generated for fixed prompts, at several depths."""

    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    """Attention maps, histograms of activations and gradients, exits and trajectories."""

    non_finite: NonFiniteConfig = field(default_factory=NonFiniteConfig)
    """What happens when the loss or the gradient is not finite."""

    stability: StabilityConfig = field(default_factory=StabilityConfig)
    """What is measured of a run's stability, and when that is an alarm."""


def add_callbacks(
    trainer: Trainer,
    config: CallbacksConfig,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    examples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Build the callbacks and add them to a trainer that is not training yet.

    They come after the trainer's own, whose writers they use; only throughput and stability stand in front, so that
    those who report see their figures.

    Args:
        processor: that of the model, or its tokenizer, if it reads text alone.
        examples: questions about media with their answers, by source, see `MediaSamplesCallback`; or prompts with media
            as answers, see `GeneratedMediaCallback`.

    Raises:
        ValueError: What is asked for cannot be done in this run.
    """
    reporter = Reporter(trainer)
    non_finite = build_non_finite(trainer, config.non_finite)
    intervals = intervals_of(config.stability, trainer.args, trainer.model)
    stability = StabilityCallback(config.stability, intervals, non_finite.kept)
    trainer.callback_handler.callbacks[:0] = [ThroughputCallback(), stability]
    trainer.add_callback(ModelSizeCallback(reporter))
    if config.samples.prompts:
        trainer.add_callback(SamplesCallback(config.samples, tokenizer_of(processor), reporter))
    read: dict[str, list[Mapping[str, Any]]] = {}
    generated: dict[str, list[Mapping[str, Any]]] = {}
    for source, row in ((source, row) for source, rows in (examples or {}).items() for row in rows):
        if is_generated(row):
            generated.setdefault(f"{source}_{target_modality(row)}", []).append(row)
        else:
            read.setdefault(source, []).append(row)
    if read and config.media_samples.num_examples:
        trainer.add_callback(MediaSamplesCallback(config.media_samples, processor, read, reporter))
    if generated and config.generated_samples.num_examples:
        trainer.add_callback(GeneratedMediaCallback(config.generated_samples, processor, generated, reporter))
    if reporter.shows_images:
        trainer.add_callback(PicturesCallback(config.pictures, reporter))
    trainer.add_callback(non_finite)


def add_codec_callbacks(trainer: Trainer, config: CallbacksConfig) -> None:
    """Add the callbacks that training of a codec or an exit probe has a use for.

    Raises:
        ValueError: What is asked for cannot be done in this run.
    """
    non_finite = build_non_finite(trainer, config.non_finite)
    trainer.add_callback(ModelSizeCallback(Reporter(trainer)))
    trainer.add_callback(non_finite)


def check_codec_callbacks(config: CallbacksConfig) -> None:
    """Raises ValueError for options of callbacks that nothing reads where a codec or an exit probe is trained."""
    asked = [each.name for each in fields(config) if each.name != "non_finite"]
    asked = [name for name in asked if getattr(config, name) != type(getattr(config, name))()]
    if asked:
        raise ValueError(
            f"callbacks.{asked[0]} is set, but nothing reads it where a codec or an exit probe is trained; leave it out"
        )


def build_non_finite(trainer: Trainer, config: NonFiniteConfig) -> NonFiniteCallback:
    """The callback, where the trainer allows what it is asked for; ValueError otherwise."""
    check_non_finite(config, trainer.args)
    return NonFiniteCallback(config, trainer.roll_back, trainer.losses)
