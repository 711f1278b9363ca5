"""Options of `augmentation.py`; the docstring under a field is its `--help` text."""

import math
from dataclasses import dataclass, field


@dataclass
class ImageAugmentationConfig:
    """Changes of pictures. What would falsify the text that goes with a picture is left out for it."""

    crop: float = 1.0
    """Smallest part of the area that a random crop keeps, scaled to full size then; above 0, at most 1 (no crop)."""
    flip: float = 0.0
    """Probability of mirroring left and right, at least 0, at most 1."""
    vertical_flip: float = 0.0
    """Probability of mirroring top and bottom, at least 0, at most 1."""
    colour: float = 0.0
    """Largest change of brightness, contrast and saturation, as a part of them, at least 0, at most 1."""
    hue: float = 0.0
    """Largest change of hue, as a part of the colour circle, at least 0, at most 0.5."""
    trivial: float = 0.0
    """Probability of one random operation of random strength (TrivialAugment), at least 0, at most 1."""
    erasing: float = 0.0
    """Probability of erasing a rectangle, at least 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; give a part of the area above 0 and at most 1, which is no crop")
        for name, most in {
            "hue": 0.5,
            **dict.fromkeys(("flip", "vertical_flip", "colour", "trivial", "erasing"), 1),
        }.items():
            _check_between(name, getattr(self, name), most)


@dataclass
class AudioAugmentationConfig:
    """Changes of recordings. What would falsify the text that goes with a recording is left out for it."""

    speed: list[float] = field(default_factory=list)
    """Factors of speed, and so of pitch, of which one is drawn, 0.5 to 2 each; e.g. [0.9, 1.0, 1.1]."""
    noise_snr: float | None = None
    """Least signal-to-noise ratio of white noise that is added, in dB, at least -20, at most 100; up to 20 dB more are
    drawn. null: no noise."""
    volume: float = 0.0
    """Largest change of the volume in dB, at least 0, at most 60."""
    shift: float = 0.0
    """Longest silence in seconds that is put in front, at least 0, at most 10."""
    time_masks: int = 0
    """Stretches of time that are hidden in the spectrogram (SpecAugment), at least 0."""
    time_mask_frames: int = 20
    """Longest of them, in frames, at least 1; no more than half of the recording."""
    frequency_masks: int = 0
    """Bands of frequencies that are hidden in the spectrogram, at least 0."""
    frequency_mask_bins: int = 8
    """Widest of them, in mel bins, at least 1."""

    def __post_init__(self) -> None:
        for factor in self.speed:
            if not 0.5 <= factor <= 2:
                raise ValueError(f"speed has {factor}; give factors from 0.5 to 2, e.g. [0.9, 1.0, 1.1]")
        if self.noise_snr is not None and not -20 <= self.noise_snr <= 100:
            raise ValueError(f"noise_snr is {self.noise_snr}; give -20 to 100 dB, or null for no noise")
        _check_between("volume", self.volume, 60)
        _check_between("shift", self.shift, 10)
        for name, least in {
            "time_masks": 0,
            "time_mask_frames": 1,
            "frequency_masks": 0,
            "frequency_mask_bins": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")


@dataclass
class TextAugmentationConfig:
    """Holes in texts: learned tokens that the model does not see, while what is to be predicted stays the same."""

    word_drop: float = 0.0
    """Probability with which a word is hidden, at least 0, at most 1."""
    span_corruption: float = 0.0
    """Part of the tokens that is hidden in spans, at least 0, at most 0.5."""
    span_length: float = 3.0
    """Mean length of a span in tokens, at least 1."""

    def __post_init__(self) -> None:
        _check_between("word_drop", self.word_drop, 1)
        _check_between("span_corruption", self.span_corruption, 0.5)
        if not 1 <= self.span_length < math.inf:
            raise ValueError(f"span_length is {self.span_length}; give at least 1 token")


@dataclass
class AugmentationConfig:
    """Changes of train rows, other ones in each epoch; validation is never changed."""

    image: ImageAugmentationConfig = field(default_factory=ImageAugmentationConfig)
    """Of pictures."""
    audio: AudioAugmentationConfig = field(default_factory=AudioAugmentationConfig)
    """Of recordings."""
    text: TextAugmentationConfig = field(default_factory=TextAugmentationConfig)
    """Of texts."""


def _check_between(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}; give 0 to {most}")
