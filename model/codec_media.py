"""What codecs are trained on: media of one kind, decoded and cut to what a batch can hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from .configuration_codecs import MegaTransformerImageAutoencoderConfig, MegaTransformerVocoderConfig
from .feature_extraction_megatransformer import MegaTransformerFeatureExtractor
from .media import load_audio
from .media_kinds import WrittenImages


class CodecImages:
    """Pictures for an autoencoder: the square in the middle, in one size."""

    kind = "image"
    sampling_rate = None
    processor = None

    def __init__(self, config: MegaTransformerImageAutoencoderConfig):
        self.images = WrittenImages(config.image_size, config.num_tokens, is_learned=False)

    def load(self, source: Any) -> Any:
        """The picture, decoded."""
        return self.images.load(source)

    def tensor(self, medium: Any, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Float (3, side, side) in -1 .. 1."""
        return self.images.preprocess(medium)

    def collate(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch: pixel_values (images, 3, side, side)."""
        return {"pixel_values": torch.stack(tuple(tensors))}


class CodecSounds:
    """Recordings for a vocoder: clips of one length, cut out anywhere, or whole ones."""

    kind = "audio"

    def __init__(self, config: MegaTransformerVocoderConfig):
        self.sampling_rate, self.max_seconds = config.sampling_rate, config.max_seconds
        self.clip_samples = config.clip_samples
        self.processor = MegaTransformerFeatureExtractor(
            config.num_mel_bins, config.sampling_rate, config.n_fft, config.hop_length, max_seconds=config.max_seconds
        )

    def load(self, source: Any) -> np.ndarray:
        """Samples at the vocoder's rate."""
        return load_audio(source, self.sampling_rate, self.max_seconds)

    def tensor(self, medium: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Float (samples,): all of them or, with `rng`, a clip, behind whose end is silence."""
        waveform = torch.from_numpy(medium)
        if rng is None:
            return waveform
        first = int(rng.integers(max(0, len(waveform) - self.clip_samples) + 1))
        clip = waveform[first : first + self.clip_samples]
        return nn.functional.pad(clip, (0, self.clip_samples - len(clip)))

    def collate(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch: waveforms (clips, samples of the longest), silent behind the end of each, and lengths (clips,)."""
        lengths = torch.tensor([len(tensor) for tensor in tensors])
        longest = int(lengths.max())
        padded = [nn.functional.pad(tensor, (0, longest - len(tensor))) for tensor in tensors]
        return {"waveforms": torch.stack(padded), "lengths": lengths}


def codec_media(config: PreTrainedConfig) -> CodecImages | CodecSounds:
    """Those that a codec of this configuration takes.

    Raises:
        ValueError: for pictures of another number of channels than files have.
    """
    if config.model_type == MegaTransformerVocoderConfig.model_type:
        return CodecSounds(config)
    if config.num_channels != 3:
        raise ValueError(f"num_channels is {config.num_channels}, but pictures are read with 3; set num_channels to 3")
    return CodecImages(config)
