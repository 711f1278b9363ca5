"""Recordings to the log-mel spectrograms that the audio encoder reads."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.utils.import_utils import is_torchaudio_available

from .media import MAX_SECONDS, load_audio
from .media_sources import read_source
from .processor_inputs import IDLE_AUDIO_OPTIONS, check_number, check_whole, read_options

if is_torchaudio_available():
    from torchaudio.functional import melscale_fbanks

FLOOR = 1e-8
"""Smallest power: noise of 80 dB below full scale."""
LOG_MEAN, LOG_STD = -3.0, 2.0
"""Shift and scale of log10 power, so that speech has mean 0 and deviation 1, roughly. Constants instead of each clip's
own statistics: a frame's values then depend on nothing but the sound around it, however long the clip is."""
LARGEST_FRAME, LARGEST_RATE, LONGEST = 65536, 768_000, 86_400.0
"""Most samples of a frame, samples per second, and seconds of a clip."""
SILENCE = (math.log10(FLOOR) - LOG_MEAN) / LOG_STD
"""What a frame without sound has everywhere."""


class MegaTransformerFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms: (log10(max(mel, 1e-8)) + 3) / 2, where mel is power by the window's energy.

    Frame i is centred on sample i * hop_length; beyond its ends a clip is silent. A clip of n samples has n //
    hop_length + 1 frames.

    Args:
        feature_size: Number of mel bins.
        sampling_rate: Samples per second; recordings of another rate are resampled.
        n_fft: Samples in a frame, under a Hann window.
        hop_length: Samples from a frame to the next.
        subsampling: Frames that become one token, a power of two.
        max_seconds: Longer recordings are cut.

    Raises:
        ValueError: for frames that nothing can be computed from; for recordings, see `load_audio`.
    """

    model_input_names = ["input_features", "input_features_mask"]
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        n_fft: int = 400,
        hop_length: int = 160,
        subsampling: int = 4,
        max_seconds: float = MAX_SECONDS,
        padding_value: float = 0.0,
        **kwargs: Any,
    ):
        whole = {"feature_size": feature_size, "n_fft": n_fft, "hop_length": hop_length, "subsampling": subsampling}
        for name, value in whole.items():
            check_whole(name, value, LARGEST_FRAME)
        check_whole("sampling_rate", sampling_rate, LARGEST_RATE)
        check_number("max_seconds", max_seconds, 1e-3, LONGEST)
        check_number("padding_value", padding_value, -1e6, 1e6)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.auto_map = {"AutoFeatureExtractor": "feature_extraction_megatransformer.MegaTransformerFeatureExtractor"}
        self.padding_side = None  # `pad` has no choice; pipelines pad texts by the tokenizer's then
        self.n_fft, self.hop_length = n_fft, hop_length
        self.subsampling, self.max_seconds = subsampling, max_seconds
        if feature_size > n_fft // 2:
            raise ValueError(f"feature_size is {feature_size} and n_fft {n_fft}; give at most n_fft / 2 mel bins")

    @property
    def max_samples(self) -> int:
        """Samples of the longest clip."""
        return math.ceil(self.max_seconds * self.sampling_rate)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of that many samples at our rate, after it is cut."""
        return min(num_samples, self.max_samples) // self.hop_length + 1

    def num_tokens(self, num_samples: int) -> int:
        """Placeholders of a clip of that many samples at our rate."""
        return -(-self.num_frames(num_samples) // self.subsampling)

    def num_samples(self, seconds: float) -> int:
        """Samples at our rate of a recording of that duration, before it is cut."""
        return math.ceil(seconds * self.sampling_rate - 1e-6)

    def preprocess_one(self, audio: Any) -> torch.Tensor:
        """Anything `load_audio` takes to float (mel bins, frames)."""
        waveform = torch.from_numpy(load_audio(audio, self.sampling_rate, self.max_seconds))
        window, filters = window_and_filters(self.sampling_rate, self.n_fft, self.feature_size)
        frames = F.pad(waveform, (self.n_fft // 2, self.n_fft // 2)).unfold(0, self.n_fft, self.hop_length)
        spectrum = torch.fft.rfft(frames * window).numpy()  # (frames, frequencies)
        power = np.square(spectrum.real) + np.square(spectrum.imag)  # numpy reads the parts much faster than torch
        mel = (torch.from_numpy(power) @ filters).T
        return (mel.clamp(min=FLOOR).log10() - LOG_MEAN) / LOG_STD

    def pad(self, clips: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch, with `padding_value` after the end of each.

        Returns:
            input_features: float (clips, mel bins, frames) of the longest.
            input_features_mask: int64 (clips, frames), 1 for what is no padding.
        """
        lengths = torch.tensor([clip.shape[-1] for clip in clips])
        longest = int(lengths.max())
        padded = [F.pad(clip, (0, longest - clip.shape[-1]), value=self.padding_value) for clip in clips]
        mask = torch.arange(longest) < lengths[:, None]
        return {"input_features": torch.stack(padded), "input_features_mask": mask.long()}

    def __call__(
        self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """A recording or a list of them to a batch (`pad`).

        Args:
            sampling_rate: That of arrays which come without one; by default ours.

        Raises:
            TypeError, ValueError: for options that ask for something; they belong to the extractor itself.
        """
        read_options(kwargs, (), IDLE_AUDIO_OPTIONS, [self], "set it on the feature extractor")
        clips = self.fetch_audio(raw_speech if isinstance(raw_speech, list) else [raw_speech], sampling_rate)
        return BatchFeature(self.pad([self.preprocess_one(clip) for clip in clips]), return_tensors)

    def fetch_audio(self, audio: Any, sampling_rate: int | None = None) -> Any:
        """Waveforms of the same nesting at our rate; transformers' own would download addresses."""
        if isinstance(audio, list):
            return [self.fetch_audio(clip, sampling_rate) for clip in audio]
        if isinstance(audio, (np.ndarray, torch.Tensor)) and sampling_rate is not None:
            audio = (audio, sampling_rate)
        return load_audio(read_source(audio, "audio"), self.sampling_rate, self.max_seconds)


@lru_cache(maxsize=16)
def window_and_filters(sampling_rate: int, n_fft: int, num_mel_bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Hann window (n_fft,), and filters (frequencies, mel bins) that divide by its energy."""
    if not is_torchaudio_available():
        raise ImportError("mel filters come from torchaudio, which is not installed; pip install torchaudio")
    window = torch.hann_window(n_fft)
    filters = melscale_fbanks(n_fft // 2 + 1, 0.0, sampling_rate // 2, num_mel_bins, sampling_rate)
    return window, filters / window.square().sum()
