"""Answers that the model gives during training, to questions and to media, next to what it saw and heard."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerState,
)

from model import tokenizer_of

from .reporting import (
    Example,
    PeriodicCallback,
    Reporter,
    aside,
    check_samples,
    depths_of,
    generate_text,
    image_pixels,
    inputs_of,
    verbatim,
)

logger = logging.getLogger(__name__)


@dataclass
class MediaSamplesConfig:
    """Answers to fixed examples of the validation sources with media or other conversations."""

    num_examples: int = 2
    """Examples of each source, at least 0; 0: no samples."""

    every_steps: int = 500
    """Optimizer steps between samples, at least 1; there is one at the end as well."""

    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8])
    """Core steps per token, each at least 1, one answer for each. A model without a core gives one answer."""

    max_new_tokens: int = 64
    """Most tokens of an answer, at least 1."""

    def __post_init__(self) -> None:
        check_samples("media_samples", self, num_examples=0, every_steps=1, max_new_tokens=1)


class MediaSamplesCallback(PeriodicCallback):
    """Writes prompt, reference and answers at several depths of each example, to the reports and to the log. What
    belongs to them stands next to them: images, spectrograms and players, as the model sees and hears
    them, once when training begins.

    Args:
        processor: that of the model, or its tokenizer if it reads text alone.
        examples: Examples by source, each with `prompt_ids`, `media` (tensors by kind), `prompt`, `answer`, and, for
            the player, `waveforms`, a function that gives them (float, (samples,), at the rate of the processor).
    """

    def __init__(
        self,
        config: MediaSamplesConfig,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        examples: Mapping[str, Sequence[Example]],
        reporter: Reporter,
    ) -> None:
        super().__init__(config.every_steps, reporter)
        self.config = config
        self.processor = processor
        self.examples = {
            f"samples/{source}_{number}": rows[number]
            for source, rows in examples.items()
            for number in range(min(config.num_examples, len(rows)))
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show the media."""
        if not self.reporter.backends:
            return
        for name, example in self.examples.items():
            for number, pixels in enumerate(example["media"].get("image", [])):
                self.reporter.image(f"{name}/image_{number}", image_pixels(self.denormalize(pixels)))
            for number, features in enumerate(example["media"].get("audio", [])):
                self.reporter.image(f"{name}/spectrogram_{number}", image_pixels(spectrogram_image(features)))
            for number, waveform in enumerate(example["waveforms"]()):
                rate = self.processor.feature_extractor.sampling_rate
                self.reporter.audio(f"{name}/audio_{number}", waveform, rate)

    def denormalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(3, height, width) in [0, 1] from what the model gets."""
        statistics = self.processor.image_processor.image_mean, self.processor.image_processor.image_std
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
        return (pixels.cpu().float() * std + mean).clamp(0, 1)

    def write(self, model: PreTrainedModel, state: TrainerState) -> dict[str, str]:
        """One text per example: its prompt, its reference, and an answer for each depth."""
        texts = {}
        for name, example in self.examples.items():
            lines = {"prompt": example["prompt"], "reference": example["answer"]}
            for depth in depths_of(model, self.config.num_steps):
                label = "answer" if depth is None else f"{depth} steps"
                lines[label] = self.answer(model, example, depth)
                if state.is_world_process_zero:
                    logger.info("step %d, %s, %s: %r", state.global_step, name, label, lines[label])
            texts[name] = verbatim("\n".join(f"{label}: {text}" for label, text in lines.items()))
        return texts

    def answer(self, model: PreTrainedModel, example: Example, depth: int | None) -> str:
        """The answer by greedy decoding, without special tokens. Examples go one by one: a few, and none is padded."""
        inputs = inputs_of(example, model, self.processor, depth)
        with aside(model):
            return generate_text(model, tokenizer_of(self.processor), inputs, self.config.max_new_tokens)


def spectrogram_image(features: torch.Tensor) -> torch.Tensor:
    """(1, mel bins, frames) in [0, 1], low tones at the bottom, from (mel bins, frames)."""
    features = features.cpu().float()
    low, high = features.min(), features.max()
    return ((features - low) / (high - low).clamp(min=1e-6)).flip(0)[None]
