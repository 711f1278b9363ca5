"""Random changes of train rows: pictures, recordings, spectrograms, texts.

A change that would falsify the text of a conversation is left out for it. Which it would is told by English words; for
texts of other languages switch off what could do harm.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchaudio.functional as AF
from PIL import Image
from torchaudio.transforms import FrequencyMasking, TimeMasking
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from .augmentation_options import (
    AudioAugmentationConfig,
    AugmentationConfig,
    ImageAugmentationConfig,
    TextAugmentationConfig,
)

_SIDES = "left|right|leftmost|rightmost|east|west|eastern|western|clockwise|counterclockwise"
_HEIGHTS = (
    "above|below|top|bottom|upper|lower|up|down|over|under|beneath|underneath|upside|north|south|northern|southern|sky|"
    "highest|lowest"
)
_WRITING = "text|word|words|letter|letters|says|say|reads|read|written|writing|sign|number|numbers|digit|digits"
_COUNTS = "how many|count|number|several|one|two|three|four|five|six|seven|eight|nine|ten|corner|edge|border|all|every"
_EXTENTS = "large|larger|largest|small|smaller|smallest|big|bigger|biggest|tiny|huge|tall|short|size|close|far"
_COLOURS = (
    "colou?r|colou?rs|colou?red|red|green|blue|yellow|orange|purple|violet|pink|brown|black|white|gr[ae]y|cyan|magenta|"
    "turquoise|beige|gold|golden|silver|crimson|dark|bright"
)
_MUSIC = (
    "note|notes|pitch|pitches|melody|tempo|octave|chord|chords|rises|rising|highest|lowest|how long|how fast|how many|"
    "[a-g][#b]?[0-8]"
)
_LOUDNESS = "loud|louder|quiet|quieter|noise|noisy|volume|how loud"

_MAGNITUDES = 31


def _words(*alternatives: str) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


# Words of a text that forbid a change of what it is about.
FORBIDDEN_BY = {
    "crop": _words(_SIDES, _HEIGHTS, _COUNTS, _EXTENTS, _WRITING),
    "flip": _words(_SIDES, _WRITING),
    "vertical_flip": _words(_HEIGHTS, _WRITING),
    "colour": _words("dark", "bright", "black", "white", r"gr[ae]y"),
    "hue": _words(_COLOURS),
    "trivial": _words(_SIDES, _HEIGHTS, _COUNTS, _EXTENTS, _WRITING, _COLOURS),
    "erasing": _words(_SIDES, _HEIGHTS, _COUNTS, _WRITING),
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

    Of what is written only the cut, the side, the volume and the start are changed: a model writes what it is shown.

    Args:
        sampling_rates: by kind of recordings.
        max_samples: how many are read, by kind; nothing makes a recording longer. None: all are.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        tokenizer: PreTrainedTokenizerFast,
        sampling_rates: Mapping[str, int],
        max_samples: Mapping[str, int] | None = None,
    ):
        self.config, self.sampling_rates, self.max_samples = config, sampling_rates, max_samples or {}
        self.of_images = {
            "image": config.image,
            "written_image": ImageAugmentationConfig(crop=config.image.crop, flip=config.image.flip),
        }
        self.of_recordings = {
            "audio": config.audio,
            "written_audio": AudioAugmentationConfig(volume=config.audio.volume, shift=config.audio.shift),
        }
        self.text = TextNoise(config.text, tokenizer)

    @property
    def stretch(self) -> float:
        """How many times as long a recording may become."""
        return max([1.0, *(1 / factor for factor in self.config.audio.speed)])

    @property
    def silence(self) -> float:
        """How many seconds longer it may become then."""
        return self.config.audio.shift

    def change(self, kind: str, medium: Any, text: str, rng: np.random.Generator) -> Any:
        """A medium as loaded, changed; further kinds stay as they are.

        Args:
            text: of the conversation, which the change must not falsify.
        """
        with torch_seeded_by(rng):
            if kind in self.of_images:
                return change_image(medium, text, self.of_images[kind], rng)
            if kind in self.of_recordings:
                rate, most = self.sampling_rates[kind], self.max_samples.get(kind)
                return change_audio(medium, rate, text, self.of_recordings[kind], rng, most)
        return medium

    def mask(self, kind: str, tensor: torch.Tensor, text: str, rng: np.random.Generator) -> torch.Tensor:
        """A preprocessed medium with parts hidden: 0, which is about the mean of what the processor gives."""
        with torch_seeded_by(rng):
            if kind == "image" and may_change("erasing", text):
                return v2.RandomErasing(self.config.image.erasing, scale=(0.02, 0.2))(tensor)
            if kind == "audio" and may_change("masks", text):
                return mask_spectrogram(tensor, self.config.audio)
        return tensor


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
    """A picture of the same size."""
    if config.crop < 1 and may_change("crop", text):
        image = v2.RandomResizedCrop(image.size[::-1], scale=(config.crop, 1.0))(image)
    if rng.random() < config.flip and may_change("flip", text):
        image = v2.functional.horizontal_flip(image)
    if rng.random() < config.vertical_flip and may_change("vertical_flip", text):
        image = v2.functional.vertical_flip(image)
    colour = config.colour if may_change("colour", text) else 0.0
    hue = config.hue if may_change("hue", text) else 0.0
    if colour or hue:
        image = v2.ColorJitter(brightness=colour, contrast=colour, saturation=colour, hue=hue)(image)
    if rng.random() < config.trivial and may_change("trivial", text):
        # One operation of any strength (Müller and Hutter 2021, arXiv 2103.10158). v2.TrivialAugmentWide moves pictures
        # of any size by up to 32 pixels: small ones out of sight.
        magnitude = int(rng.integers(_MAGNITUDES))
        image = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=_MAGNITUDES)(image)
    return image


def change_audio(
    waveform: np.ndarray,
    sampling_rate: int,
    text: str,
    config: AudioAugmentationConfig,
    rng: np.random.Generator,
    max_samples: int | None = None,
) -> np.ndarray:
    """A recording, longer by `Augmenter.stretch` and `Augmenter.silence` at most.

    Args:
        max_samples: what is read of it; a change that would push its end beyond is left out, or as small as it has to
            be.
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
    """Hides tokens from the model: they become padding in what it is shown, while the labels stay.

    Only tokens that are labels are hidden, so that a question never has a hole, and no special ones. `word_drop`
    (Bowman et al. 2016, arXiv 1511.06349) hides words one by one, `span_corruption` spans of tokens.
    """

    def __init__(self, config: TextAugmentationConfig, tokenizer: PreTrainedTokenizerFast):
        self.config, self.hidden = config, tokenizer.pad_token_id
        vocabulary = tokenizer.get_vocab()
        self.begins_word, self.is_special = np.zeros((2, max(vocabulary.values()) + 1), dtype=bool)
        self.begins_word[[index for token, index in vocabulary.items() if token.startswith(_BLANKS)]] = True
        self.is_special[list(tokenizer.added_tokens_decoder)] = True

    @property
    def is_on(self) -> bool:
        return self.config.word_drop > 0 or self.config.span_corruption > 0

    def __call__(self, tokens: np.ndarray, is_label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Tokens (tokens,) with holes, where `is_label` allows them."""
        may_hide = is_label & ~self.is_special[tokens]
        words = np.cumsum(self.begins_word[tokens] | ~may_hide)
        hidden = rng.random(len(tokens) + 1)[words] < self.config.word_drop
        hidden |= self._in_spans(len(tokens), rng)
        return np.where(hidden & may_hide, self.hidden, tokens)

    def _in_spans(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """bool (length,): alternating runs, hidden ones of the mean length that is asked for, seen ones so much longer
        that the part that is hidden is right.
        """
        part, mean = self.config.span_corruption, self.config.span_length
        if part == 0:
            return np.zeros(length, dtype=bool)
        seen = mean * (1 - part) / part
        count = int(length / (seen + mean)) + 1
        runs = np.stack([rng.geometric(1 / seen, 2 * count + 8), rng.geometric(1 / mean, 2 * count + 8)], axis=1)
        return np.resize(np.repeat(np.tile([False, True], len(runs)), runs.flatten()), length)


_BLANKS = ("Ġ", "Ċ", "ĉ", "▁", " ", "\n", "\t")  # how tokens begin that begin a word, byte-level ones and others
