"""Small networks that name what an image shows or who says what, trained on labels of real media in about a minute.

They classify what a model has drawn or played: by the label asked for, and by the distance of their features from
those of real media. Next to each figure stands that of real media held out from the classifier.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.audio_utils import mel_filter_bank

from .distances import FeatureDistances, compare_features, digest_of, pixels_of
from .intervals import Interval, wilson_interval

logger = logging.getLogger(__name__)

CHANNELS = (24, 48, 64, 64)
"""Of the network's blocks, each of which halves height and width; the last are the features."""
WINDOW, HOP = 0.032, 0.01
"""Seconds of a frame, and from one to the next."""
NUM_MEL_BINS = 40
RANGE = 6.0
"""Powers of ten below the loudest of a waveform that are heard."""
SHIFT = 1 / 8
"""Of width and height, by which media are moved in training at most; sounds in time alone."""
NOISE = 0.05
"""Standard deviation of what is added in training."""
LEAST_ROWS = 8
"""Of a batch; and batches of an epoch, where there are few media."""
MOST_FEATURES = 2000
"""Media whose features are kept to measure distances from."""


@dataclass
class ClassifierConfig:
    """What a classifier is given and what it may say.

    Raises:
        ValueError: an unknown kind, fewer than two labels, or sizes that are none.
    """

    modality: str
    """"image" or "audio"."""
    labels: list[str]
    image_size: int = 32
    """Pixels of a side; images of another size are scaled."""
    sampling_rate: int = 8000
    """In Hz; waveforms at another rate are resampled."""
    seconds: float = 1.0
    """Of a waveform, around its middle."""

    def __post_init__(self) -> None:
        if self.modality not in ("image", "audio"):
            raise ValueError(f"a classifier of {self.modality!r} is unknown; choose image or audio")
        if len(self.labels) < 2:
            raise ValueError(f"a classifier has labels {self.labels}; give at least two, of which it can choose")
        for name, least in (("image_size", 16), ("sampling_rate", 1000), ("seconds", 0.2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of a classifier is {getattr(self, name)}; give at least {least}")


@dataclass
class ClassifierScores(FeatureDistances):
    """What a classifier says of generated media, with distances of its features from those of the real media that it
    was trained on; the real distances are those of as many real media held out from it. Shares in [0, 1].
    """

    num_examples: int
    """Media whose prompt names exactly one of its labels."""
    accuracy: float
    """Of these: those it gives the label asked for; media that were not written count as wrong."""
    real_accuracy: float
    """Of real media held out from it, with their own labels."""
    interval: Interval | None = None
    """That of 95 % of the accuracy."""


class Classifier(nn.Module):
    """Convolutions on an image or a log-mel spectrogram; the mean over all places are the features.

    Args:
        config: what it is given, and may say.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        channels = (3 if config.modality == "image" else 1, *CHANNELS)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2))
                for inner, outer in pairwise(channels)
            )
        )
        self.head = nn.Linear(CHANNELS[-1], len(config.labels))
        self.register_buffer("real_features", torch.zeros(0, CHANNELS[-1]))
        self.register_buffer("held_out_features", torch.zeros(0, CHANNELS[-1]))
        self.real_accuracy = float("nan")
        self.digest = ""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(media, channels, height, width) -> features (media, CHANNELS[-1])."""
        return self.blocks(inputs).mean(dim=(2, 3))

    def prepare(self, medium: Image.Image | tuple[np.ndarray, int]) -> torch.Tensor:
        """One medium as (channels, height, width), within -1 and 1."""
        return self._image(medium) if self.config.modality == "image" else self._audio(*medium)

    @torch.no_grad()
    def features(self, media: Sequence[Any], batch_size: int = 128) -> torch.Tensor:
        """(media, CHANNELS[-1])."""
        self.eval()
        parts = [media[start : start + batch_size] for start in range(0, len(media), batch_size)]
        found = [self(torch.stack([self.prepare(medium) for medium in part])) for part in parts]
        return torch.cat(found) if found else torch.zeros(0, CHANNELS[-1])

    @torch.no_grad()
    def labels(self, features: torch.Tensor) -> list[str]:
        """What it calls media with these features."""
        return [self.config.labels[index] for index in self.head(features).argmax(dim=-1).tolist()]

    def _image(self, image: Image.Image) -> torch.Tensor:
        size = self.config.image_size, self.config.image_size
        return pixels_of(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))

    def _audio(self, waveform: np.ndarray, rate: int) -> torch.Tensor:
        """The log-mel spectrogram, relative to its loudest place, so that the volume does not count."""
        config, samples = self.config, torch.as_tensor(waveform, dtype=torch.float32)
        if rate != config.sampling_rate:
            import torchaudio

            samples = torchaudio.functional.resample(samples, rate, config.sampling_rate)
        length = round(config.seconds * config.sampling_rate)
        missing = length - len(samples)
        samples = F.pad(samples, (missing // 2, missing - missing // 2))  # negative where it is too long
        size, hop = round(WINDOW * config.sampling_rate), round(HOP * config.sampling_rate)
        window = torch.hann_window(size)
        power = torch.stft(samples, size, hop, window=window, pad_mode="constant", return_complex=True).abs() ** 2
        filters = mel_filter_bank(
            size // 2 + 1, NUM_MEL_BINS, 0, config.sampling_rate / 2, config.sampling_rate, dtype=np.float32
        )
        levels = (torch.from_numpy(filters).T @ power).clamp(min=1e-10).log10()
        return ((levels - levels.max()) / (RANGE / 2) + 1).clamp(min=-1)[None]


# ------------------------------------------------------------------------------------------------------------- training


@dataclass
class LabelledMedia:
    """Media, images or (samples, rate), with a label each."""

    media: list[Any] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def train_classifier(
    config: ClassifierConfig,
    train: LabelledMedia,
    held_out: LabelledMedia,
    num_epochs: int = 15,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Classifier:
    """A classifier, trained; its accuracy on what is held out is its `real_accuracy`.

    Args:
        batch_size: Most media of a batch; fewer where there are few media, so that there are enough updates.

    Raises:
        ValueError: too few media, or a label that the configuration does not name.
    """
    targets = label_indices(config, train)
    label_indices(config, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(config)
        inputs = torch.stack([classifier.prepare(medium) for medium in train.media])
        rows = min(batch_size, max(LEAST_ROWS, len(inputs) // LEAST_ROWS), len(inputs))
        fit(classifier, inputs, targets, num_epochs, rows, learning_rate)
        classifier.real_features = classifier.features(some_of(train.media))
        classifier.held_out_features = classifier.features(some_of(held_out.media))
    classifier.real_accuracy = share_of_equals(classifier.labels(classifier.features(held_out.media)), held_out.labels)
    return classifier


def some_of(media: Sequence[Any]) -> list[Any]:
    """The first `MOST_FEATURES` of them in a random order: files are often sorted by what they show."""
    return [media[index] for index in torch.randperm(len(media))[:MOST_FEATURES].tolist()]


def fit(
    classifier: Classifier,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Cross-entropy with AdamW, a learning rate that rises and falls, and media moved a little."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.01)
    updates = num_epochs * (len(inputs) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=updates)
    for epoch in range(num_epochs):
        classifier.train()
        losses = []
        for rows in torch.randperm(len(inputs)).unfold(0, batch_size, batch_size):  # whole batches
            logits = classifier.head(classifier(perturbed(inputs[rows], classifier.config.modality)))
            loss = F.cross_entropy(logits, targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        logger.info("epoch %d: loss %.4f", epoch + 1, sum(losses) / len(losses))


def perturbed(inputs: torch.Tensor, modality: str) -> torch.Tensor:
    """Each medium of a batch moved by a few places, its border repeated, and with noise."""
    media, _, height, width = inputs.shape
    down, across = round(SHIFT * height) if modality == "image" else 0, round(SHIFT * width)
    wide = F.pad(inputs, (across, across, down, down), mode="replicate")
    tops, lefts = torch.randint(2 * down + 1, (media,)).tolist(), torch.randint(2 * across + 1, (media,)).tolist()
    moved = [it[:, top : top + height, left : left + width] for it, top, left in zip(wide, tops, lefts, strict=True)]
    return torch.stack(moved) + NOISE * torch.randn_like(inputs)


def label_indices(config: ClassifierConfig, data: LabelledMedia) -> torch.LongTensor:
    """(media,), places of their labels among those of the configuration."""
    if len(data.media) < 2:
        raise ValueError(
            f"{len(data.media)} labelled media; a classifier needs at least two, to learn and to be measured"
        )
    unknown = sorted(set(data.labels) - set(config.labels))
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is none of {', '.join(config.labels)}; give all of them in training")
    return torch.tensor([config.labels.index(label) for label in data.labels])


def share_of_equals(found: Sequence[str | None], asked: Sequence[str]) -> float:
    """Share in [0, 1]."""
    return sum(one == other for one, other in zip(found, asked, strict=True)) / len(asked)


# ---------------------------------------------------------------------------------------------------------------- files


def save_classifier(classifier: Classifier, folder: Path, about: dict[str, Any]) -> str:
    """Write classifier.safetensors and classifier.json into a folder, made if missing; returns the weights' digest.

    Args:
        about: What it was trained on; stands in the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    save_file(weights, folder / "classifier.safetensors")
    classifier.digest = digest_of(folder / "classifier.safetensors")
    figures = {"real_accuracy": classifier.real_accuracy, "digest": classifier.digest}
    content = {"config": asdict(classifier.config), **figures, **about}
    (folder / "classifier.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return classifier.digest


def load_classifier(folder: Path) -> Classifier:
    """The classifier that `save_classifier` has written, of this version or of earlier ones, which called it judge.

    Raises:
        ValueError: there is none, or its weights are not those it was saved with.
    """
    names = [name for name in ("classifier", "judge") if (folder / f"{name}.json").is_file()]
    paths = [folder / f"{(*names, 'classifier')[0]}.{suffix}" for suffix in ("json", "safetensors")]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds no classifier ({missing[0].name} is missing): give a folder that "
            "evaluation.train_classifier wrote"
        )
    content, digest = json.loads(paths[0].read_bytes()), digest_of(paths[1])
    if digest != content["digest"]:
        raise ValueError(
            f"{paths[1]} has digest {digest}, where {paths[0].name} says {content['digest']}: train the classifier "
            "again"
        )
    renamed = {"modality" if key == "medium" else key: value for key, value in content["config"].items()}
    classifier = Classifier(ClassifierConfig(**renamed))
    state = load_file(paths[1])
    for name in ("real_features", "held_out_features"):
        setattr(classifier, name, torch.zeros_like(state[name]))  # as many as there are
    classifier.load_state_dict(state)
    classifier.real_accuracy, classifier.digest = content["real_accuracy"], digest
    return classifier.eval()


# -------------------------------------------------------------------------------------------------------------- judging


def classify_media(
    classifier: Classifier, prompts: Sequence[str], media: Sequence[Any | None]
) -> ClassifierScores | None:
    """What a classifier says of written media; None where no prompt names one of its labels.

    Args:
        prompts: what was asked for.
        media: what was written; None where nothing was.
    """
    asked = [label_in(prompt, classifier.config.labels) for prompt in prompts]
    if not any(asked):
        return None
    features = classifier.features([medium for medium in media if medium is not None])
    names = iter(classifier.labels(features))
    found = [None if medium is None else next(names) for medium in media]
    pairs = [(name, label) for name, label in zip(found, asked, strict=True) if label is not None]
    accuracy = share_of_equals(*zip(*pairs, strict=True))
    real, held_out = classifier.real_features, classifier.held_out_features[: max(len(features), 2)]
    return ClassifierScores(
        digest=classifier.digest,
        num_examples=len(pairs),
        accuracy=accuracy,
        real_accuracy=classifier.real_accuracy,
        interval=wilson_interval(round(accuracy * len(pairs)), len(pairs)),
        **compare_features({"": (real, features), "real_": (real, held_out)}),
    )


def label_in(prompt: str, labels: Sequence[str]) -> str | None:
    """The one of the labels that a prompt names as whole words, whatever their case; None for none or several."""
    found = {label for label in labels if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", prompt, re.IGNORECASE)}
    longest = {label for label in found if not any(label != other and label in other for other in found)}
    return longest.pop() if len(longest) == 1 else None
