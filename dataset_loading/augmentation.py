"""Random changes of train rows: images, waveforms, spectrograms, texts, and CFG dropout.

A change that would falsify the text of a conversation is left out for it. English words tell which changes would; for
texts of other languages switch off what could do harm.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchaudio.functional as AF
from PIL import Image
from torchaudio.transforms import FrequencyMasking, TimeMasking
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from model.chat import NULL_TOKEN, special_id

from .packing.media_reader import MediaReader

_SIDES = "left|right|leftmost|rightmost|east|west|eastern|western|clockwise|counterclockwise"
_HEIGHTS = (
    "above|below|top|bottom|upper|lower|up|down|over|under|beneath|underneath|upside|north|south|northern|southern|sky|"
    "highest|lowest"
)
_WRITING = "text|word|words|letter|letters|says|say|reads|read|written|writing|sign|number|numbers|digit|digits"
_COUNTS = "how many|count|number|several|one|two|three|four|five|six|seven|eight|nine|ten|corner|edge|border|all|every"
_EXTENTS = "large|larger|largest|small|smaller|smallest|big|bigger|biggest|tiny|huge|tall|short|size|close|far"
_MUSIC = (
    "note|notes|pitch|pitches|melody|tempo|octave|chord|chords|rises|rising|highest|lowest|how long|how fast|how many|"
    "[a-g][#b]?[0-8]"
)
_LOUDNESS = "loud|louder|quiet|quieter|noise|noisy|volume|how loud"
_BLANKS = ("Ġ", "Ċ", "ĉ", "▁", " ", "\n", "\t")  # how tokens begin that begin a word, byte-level ones and others


@dataclass
class ImageAugmentationConfig:
    """Changes of images. A change that would falsify the text of a conversation is left out for it."""

    crop: float = 1.0
    """Smallest part of the area that a random crop keeps, scaled to full size then; above 0, at most 1 (no crop)."""
    flip: float = 0.0
    """Probability of mirroring left and right, at least 0, at most 1."""
    colour: float = 0.0
    """Largest change of brightness, contrast and saturation, as a part of them, at least 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; give a part of the area above 0 and at most 1, which is no crop")
        for name in ("flip", "colour"):
            _check_between(name, getattr(self, name), 1)


@dataclass
class AudioAugmentationConfig:
    """Changes of audio. A change that would falsify the text of a conversation is left out for it."""

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
    """Longest of them in frames, at least 1; all together hide no more than half of the audio."""
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

    def __post_init__(self) -> None:
        _check_between("word_drop", self.word_drop, 1)


@dataclass
class AugmentationConfig:
    """Changes of train rows, other ones in each epoch; validation is never changed."""

    image: ImageAugmentationConfig = field(default_factory=ImageAugmentationConfig)
    """Changes of images."""
    audio: AudioAugmentationConfig = field(default_factory=AudioAugmentationConfig)
    """Changes of audio."""
    text: TextAugmentationConfig = field(default_factory=TextAugmentationConfig)
    """Holes in texts."""


def _check_between(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}; give 0 to {most}")


def _words(*alternatives: str) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


# Words of a text that forbid a change.
FORBIDDEN_BY = {
    "crop": _words(_SIDES, _HEIGHTS, _COUNTS, _EXTENTS, _WRITING),
    "flip": _words(_SIDES, _WRITING),
    "colour": _words("dark", "bright", "black", "white", r"gr[ae]y"),
    "speed": _words(_MUSIC),
    "masks": _words(_MUSIC),
    "noise": _words(_LOUDNESS),
    "volume": _words(_LOUDNESS),
    "shift": _words("how long", "seconds", "silence"),
}


def may_change(change: str, text: str) -> bool:
    """Whether a text stays true."""
    return not FORBIDDEN_BY[change].search(text)


class Augmenter:
    """Changes media before and after they are preprocessed, and hides parts of texts.

    Generated targets get crops, flips, gains and shifts alone, since a model generates what it is shown.

    Args:
        sampling_rates: Rates in Hz by modality, of those that are audio.
        max_samples: Most samples by modality that are read, beyond which no change makes a waveform longer; None: no
            bound.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        tokenizer: PreTrainedTokenizerFast,
        sampling_rates: Mapping[str, int],
        max_samples: Mapping[str, int] | None = None,
    ):
        self.config, self.sampling_rates, self.max_samples = config, sampling_rates, max_samples or {}
        self.image_options = {
            "image": config.image,
            "written_image": ImageAugmentationConfig(crop=config.image.crop, flip=config.image.flip),
        }
        self.audio_options = {
            "audio": config.audio,
            "written_audio": AudioAugmentationConfig(volume=config.audio.volume, shift=config.audio.shift),
        }
        self.text = TextNoise(config.text, tokenizer)

    @property
    def stretch(self) -> float:
        """How many times as long audio may become."""
        return max([1.0, *(1 / factor for factor in self.config.audio.speed)])

    @property
    def silence(self) -> float:
        """How many seconds longer it may become then."""
        return self.config.audio.shift

    def change(self, kind: str, medium: Any, text: str, rng: np.random.Generator) -> Any:
        """An item as loaded, changed so that it does not falsify the text of its conversation; items of further
        modalities stay as they are.
        """
        with torch_seeded_by(rng):
            if kind in self.image_options:
                return change_image(medium, text, self.image_options[kind], rng)
            if kind in self.audio_options:
                rate, most = self.sampling_rates[kind], self.max_samples.get(kind)
                return change_audio(medium, rate, text, self.audio_options[kind], rng, most)
        return medium

    def mask(self, kind: str, tensor: torch.Tensor, text: str, rng: np.random.Generator) -> torch.Tensor:
        """A preprocessed item; of audio with parts set to 0, which is about the mean of what the processor gives."""
        if kind != "audio" or not may_change("masks", text):
            return tensor
        with torch_seeded_by(rng):
            return mask_spectrogram(tensor, self.config.audio)


@contextmanager
def torch_seeded_by(rng: np.random.Generator) -> Iterator[None]:
    """Torch's generator of the CPU seeded for a row, and as it was before afterwards; `torch.manual_seed` would seed
    those of GPUs as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        yield


def change_image(
    image: Image.Image, text: str, config: ImageAugmentationConfig, rng: np.random.Generator
) -> Image.Image:
    """An image changed at random, of the same size."""
    if config.crop < 1 and may_change("crop", text):
        image = v2.RandomResizedCrop(image.size[::-1], scale=(config.crop, 1.0))(image)
    if rng.random() < config.flip and may_change("flip", text):
        image = v2.functional.horizontal_flip(image)
    if config.colour and may_change("colour", text):
        image = v2.ColorJitter(brightness=config.colour, contrast=config.colour, saturation=config.colour)(image)
    return image


def change_audio(
    waveform: np.ndarray,
    sampling_rate: int,
    text: str,
    config: AudioAugmentationConfig,
    rng: np.random.Generator,
    max_samples: int | None = None,
) -> np.ndarray:
    """A waveform (samples,) changed at random, longer by `Augmenter.stretch` and `Augmenter.silence` at most.

    Args:
        max_samples: Samples that are read of it. A change that would push its end beyond them is left out or reduced.
    """
    samples = torch.from_numpy(waveform)
    most = float("inf") if max_samples is None else max(max_samples, len(waveform))
    if config.speed and may_change("speed", text):
        changed = AF.speed(samples, sampling_rate, float(rng.choice(config.speed)))[0]
        samples = changed if len(changed) <= most else samples
    if config.shift and may_change("shift", text):
        silence = min(int(rng.uniform(0, config.shift) * sampling_rate), most - len(samples))
        samples = torch.nn.functional.pad(samples, (silence, 0))
    if config.volume and may_change("volume", text):
        samples = AF.gain(samples, rng.uniform(-config.volume, config.volume))
    if config.noise_snr is not None and may_change("noise", text) and samples.any():
        snr = torch.tensor(config.noise_snr + rng.uniform(0, 20), dtype=samples.dtype)
        samples = AF.add_noise(samples, torch.randn_like(samples), snr)
    return samples.numpy()


def mask_spectrogram(spectrogram: torch.Tensor, config: AudioAugmentationConfig) -> torch.Tensor:
    """(mel bins, frames) with bands and stretches set to 0 (SpecAugment, Park et al. 2019, arXiv 1904.08779)."""
    bands = FrequencyMasking(config.frequency_mask_bins)
    most = max(1, spectrogram.shape[1] // (2 * max(1, config.time_masks)))
    stretches = TimeMasking(min(config.time_mask_frames, most))
    masked = spectrogram[None]
    for _ in range(config.frequency_masks):
        masked = bands(masked)
    for _ in range(config.time_masks):
        masked = stretches(masked)
    return masked[0]


class TextNoise:
    """Hides tokens from the model: they become padding in its input, while the labels stay.

    Only tokens that are labels are hidden, so that a question never has a hole, and no special ones. Words are hidden
    one by one (Bowman et al. 2016, arXiv 1511.06349).
    """

    def __init__(self, config: TextAugmentationConfig, tokenizer: PreTrainedTokenizerFast):
        self.config, self.hidden = config, tokenizer.pad_token_id
        vocabulary = tokenizer.get_vocab()
        self.begins_word, self.is_special = np.zeros((2, max(vocabulary.values()) + 1), dtype=bool)
        self.begins_word[[index for token, index in vocabulary.items() if token.startswith(_BLANKS)]] = True
        self.is_special[list(tokenizer.added_tokens_decoder)] = True

    @property
    def is_on(self) -> bool:
        return self.config.word_drop > 0

    def __call__(self, tokens: np.ndarray, is_label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Tokens (tokens,) with holes, where `is_label` allows them."""
        may_hide = is_label & ~self.is_special[tokens]
        words = np.cumsum(self.begins_word[tokens] | ~may_hide)
        hidden = rng.random(len(tokens) + 1)[words] < self.config.word_drop
        return np.where(hidden & may_hide, self.hidden, tokens)


class CFGDropout:
    """CFG dropout: replaces each token of a prompt by the null token, so that all other tokens keep their positions.

    A model learns so to generate media unconditionally, too, and guidance goes from what it would generate then to what
    it generates for a prompt. Source: Ho and Salimans 2022, arXiv 2207.12598.

    Special tokens stay, such as those of roles, and of the start and end of media. Media that accompany a text in the
    prompt stay as well. A prompt of media alone loses them, and their placeholders become null tokens.

    Args:
        probability: Probability with which a conversation with a generated target loses what precedes the first one.
        reader: The reader of its media.
    """

    def __init__(self, probability: float, reader: MediaReader):
        self.probability, tokenizer = probability, reader.tokenizer
        self.null, self.written = special_id(tokenizer, NULL_TOKEN), reader.written
        self.is_special, self.is_placeholder, self.is_target = np.zeros(
            (3, max(tokenizer.get_vocab().values()) + 1), dtype=bool
        )
        self.is_special[[*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]] = True
        self.is_placeholder[list(reader.encoder.placeholders.values())] = True
        self.is_target[[reader.encoder.placeholders[name] for name in reader.written]] = True

    def __call__(
        self, tokens: np.ndarray, media: Sequence[tuple[str, torch.Tensor]], rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[tuple[str, torch.Tensor], ...]]:
        """Tokens (tokens,) and media of a conversation, as they are or without their prompt."""
        first = next((number for number, (kind, _) in enumerate(media) if kind in self.written), None)
        if first is None or rng.random() >= self.probability:
            return tokens, tuple(media)
        is_prompt = np.arange(len(tokens)) < self.is_target[tokens].argmax()
        is_text = is_prompt & ~self.is_special[tokens]
        if is_text.any():
            return np.where(is_text, self.null, tokens), tuple(media)
        return np.where(is_prompt & self.is_placeholder[tokens], self.null, tokens), tuple(media[first:])
