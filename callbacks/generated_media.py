"""Images and audio that the model generates during training, next to their references, at several depths."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, TrainerState

from model import draw_codes
from model.chat import TARGET_PREFIX

from .media_samples import spectrogram_image
from .reporting import (
    Example,
    PeriodicCallback,
    Reporter,
    aside,
    check_samples,
    depths_of,
    image_pixels,
    inputs_of,
    verbatim,
)

logger = logging.getLogger(__name__)

_LINE = 2  # pixels between two cells of a grid
_PARTS = 3  # of the places of a medium, in each of which the latents are watched


@dataclass
class GeneratedMediaConfig:
    """Images and audio generated for fixed prompts of the validation sources."""

    num_examples: int = 4
    """Prompts of each source, at least 0; 0: no samples."""

    every_steps: int = 500
    """Optimizer steps between samples, at least 1; there are some at the end as well."""

    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8])
    """Core steps per position, each at least 1, one sample for each. A model without a core gives one sample."""

    largest_drift: float = 2.0
    """An alarm is logged where generated latents are this many times larger or smaller than those of the references, in
    the first, the middle or the last third of their positions; above 1.
    """

    def __post_init__(self) -> None:
        check_samples("generated_samples", self, num_examples=0, every_steps=1)
        if not 1 < self.largest_drift < math.inf:
            raise ValueError(f"generated_samples.largest_drift is {self.largest_drift}, must be above 1 and finite.")


@dataclass
class Sample:
    """What was written for a prompt."""

    item: Any | None
    """A PIL image, or (samples, rate); None: nothing."""
    latents: torch.Tensor | None
    """(places, latent size)."""


class GeneratedMediaCallback(PeriodicCallback):
    """Shows a grid for each source, with a line for each prompt: the reference, and what is written at
    each depth. Of sound it has spectrograms, and players, too. The prompts are listed as text.

    The root mean square of latents, divided by that of the references', is logged by depth and third of the places:
    where it leaves 1, what is written drifts away from what was learned.

    Args:
        examples: Examples by source and modality, each with `prompt_ids`, `media` and `targets` (tensors
            by kind), `modality` ("written_image" or "written_audio"), `prompt`, and `reference` (PIL image, or samples
            and their rate).
    """

    def __init__(
        self,
        config: GeneratedMediaConfig,
        processor: ProcessorMixin,
        examples: Mapping[str, Sequence[Example]],
        reporter: Reporter,
    ) -> None:
        super().__init__(config.every_steps, reporter)
        self.config = config
        self.processor = processor
        self.examples = {source: rows[: config.num_examples] for source, rows in examples.items()}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the references be heard."""
        for source, rows in self.examples.items():
            for number, example in enumerate(rows):
                self.add_player(f"{source}_{number}/reference", example["reference"])

    def write(self, model: PreTrainedModel, state: TrainerState) -> dict[str, str | float]:
        """The prompts and how large the latents are; media of all prompts and depths are shown."""
        depths, report = depths_of(model, self.config.num_steps), {}
        for source, rows in self.examples.items():
            seeded = list(enumerate(rows))
            written = {depth: [self.sample(model, row, depth, seed) for seed, row in seeded] for depth in depths}
            prompts = (f"{number}: {row['prompt']}" for number, row in seeded)  # line by line as in the grid
            report[f"generated_samples/{source}"] = verbatim("\n".join(prompts))
            report |= self.drifts(source, rows, written, model, state)
            self.show(source, rows, written)
        return report

    def sample(self, model: PreTrainedModel, example: Example, depth: int | None, seed: int) -> Sample:
        """What the model writes for one prompt. They go one by one: a few, and none is padded."""
        kind = target_modality(example)
        inputs = inputs_of(example, model, self.processor, depth)
        if kind == "image" and getattr(model, "decode_image_tokens", None):
            with aside(model, seed):
                return Sample(draw_codes(model, inputs)[0], None)
        with aside(model):
            # All ranks generate the same, in step.
            output = model.generate(**inputs, generation_mode=kind, flow_seeds=[seed], synced_gpus=False)
        media = output.images if kind == "image" else output.audio
        if not media:
            return Sample(None, None)
        medium = media[0] if kind == "image" else (media[0].float().cpu().numpy(), output.sampling_rate)
        return Sample(medium, output.latents[kind][0])

    # ------------------------------------------------------------------------------------------------------- the drift

    def drifts(
        self,
        source: str,
        rows: Sequence[Example],
        written: Mapping[int | None, Sequence[Sample]],
        model: PreTrainedModel,
        state: TrainerState,
    ) -> Iterator[tuple[str, float]]:
        """How many times as large as those of the references latents are, by name; logs an alarm for too much."""
        real = size_by_part([target_latents(row, model) for row in rows])  # codes as tokens have no latents to compare
        for depth, samples in written.items():
            sizes = size_by_part([sample.latents for sample in samples if sample.latents is not None])
            for part in sorted(sizes.keys() & real.keys()):
                ratio, name = sizes[part] / real[part], f"generated_samples/{source}/latents_{part}_of_{_PARTS}"
                yield name if depth is None else f"{name}_steps_{depth}", ratio
                if not 1 / self.config.largest_drift < ratio < self.config.largest_drift:
                    logger.warning(
                        "step %d: what is written for %s at depth %s drifts: in part %d of %d of its places, the "
                        "latents are %.2f times as large as those of the references",
                        *(state.global_step, source, depth, part, _PARTS, ratio),
                    )

    # ------------------------------------------------------------------------------------------------------- what shows

    def show(self, source: str, rows: Sequence[Example], written: Mapping[int | None, Sequence[Sample]]) -> None:
        """The grid of a source, and players of its sounds."""
        if not self.reporter.backends:
            return
        lines = []
        for number, row in enumerate(rows):
            media = [row["reference"], *(samples[number].item for samples in written.values())]
            lines.append([self.cell(medium) for medium in media])
        self.reporter.image(f"generated_samples/{source}", grid_of(lines))
        for depth, samples in written.items():
            for number, sample in enumerate(samples):
                label = "audio" if depth is None else f"steps_{depth}"
                self.add_player(f"{source}_{number}/{label}", sample.item)

    def cell(self, medium: Any | None) -> np.ndarray | None:
        """(height, width, 3) of uint8: an image, or the spectrogram of a waveform, as the model learns them."""
        if isinstance(medium, tuple):
            return image_pixels(
                spectrogram_image(self.processor.modalities[f"{TARGET_PREFIX}audio"].preprocess(medium))
            )
        return None if medium is None else np.asarray(medium.convert("RGB"))

    def add_player(self, name: str, medium: Any | None) -> None:
        """A player, if the medium is a waveform."""
        if isinstance(medium, tuple):
            samples, rate = medium
            self.reporter.audio(f"generated_samples/{name}", samples, rate)


def is_generated(example: Example) -> bool:
    """Whether the answer is a medium."""
    return example.get("modality", "text").startswith(TARGET_PREFIX)


def target_modality(example: Example) -> str:
    """That of the medium, "image" or "audio"."""
    return example["modality"].removeprefix(TARGET_PREFIX)


def target_latents(example: Example, model: PreTrainedModel) -> torch.Tensor:
    """(places, latent size) of what should be written."""
    (target,) = example["targets"][example["modality"]]
    codec = model.model.writers[target_modality(example)].codec
    with torch.no_grad():
        return codec.encode(target[None].to(model.device))[0]


def size_by_part(media: Sequence[torch.Tensor]) -> dict[int, float]:
    """The root mean square of latents in each part of their places, from 1 on, without parts that have none."""
    parts = zip(*(latents.float().tensor_split(_PARTS) for latents in media), strict=True)
    joined = {number: torch.cat(part) for number, part in enumerate(parts, start=1)}
    return {number: part.square().mean().sqrt().item() for number, part in joined.items() if part.numel()}


def grid_of(lines: Sequence[Sequence[np.ndarray | None]]) -> np.ndarray:
    """Images of any sizes in lines and columns, on grey, (height, width, 3); a missing one is black."""
    cells = [cell for line in lines for cell in line if cell is not None]
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    grid = np.full((len(lines) * (height + _LINE), len(lines[0]) * (width + _LINE), 3), 128, dtype=np.uint8)
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            top, left = row * (height + _LINE), column * (width + _LINE)
            cell = np.zeros((height, width, 3), dtype=np.uint8) if cell is None else cell
            grid[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return grid[:-_LINE, :-_LINE]
