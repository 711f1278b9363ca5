"""Audio: what reads it, and what is to be written of it."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, PreTrainedConfig

from .backbones import Backbone
from .configuration_megatransformer import MegaTransformerAudioConfig, MegaTransformerAudioWriterConfig
from .encoders import MegaTransformerAudioModel
from .feature_extraction_megatransformer import SILENCE, MegaTransformerFeatureExtractor
from .media import MAX_SECONDS, audio_seconds, load_audio
from .modality import Modality, check_count, only_of, processor_of_backbone


class AudioModality(Modality):
    """Waveforms as log-mel spectrograms, for convolutions and a transformer; a pretrained backbone, whose processor is
    not ours and needs the number of tokens of every waveform; or what speaks. A codec takes `clip_samples` of each.
    """

    name = "audio"
    config_class = MegaTransformerAudioConfig
    config_key = "audio_config"
    input_names = ("input_features", "input_features_mask")
    target_names = ("audio_targets", "audio_targets_mask")
    shows_layers = True

    def __init__(self, processor: Any, num_tokens: int | None = None, clip_samples: int | None = None):
        check_count("feature_extractor", processor, MegaTransformerFeatureExtractor, num_tokens)
        self.processor, self.count, self.clip_samples = processor, num_tokens, clip_samples
        self.sampling_rate = processor.sampling_rate
        if num_tokens is None:
            self.max_seconds = processor.max_seconds
        else:
            self.max_seconds = min(MAX_SECONDS, processor.to_dict().get("chunk_length", MAX_SECONDS))

    @classmethod
    def build_encoder(cls, config: MegaTransformerAudioConfig) -> nn.Module:
        return MegaTransformerAudioModel(config) if config.backbone is None else Backbone(config, cls.input_names[0])

    @classmethod
    def dummy_inputs(cls, config: MegaTransformerAudioConfig) -> dict[str, torch.Tensor]:
        bins, frames = config.num_mel_bins, config.subsampling
        if config.backbone is not None:
            bins, frames = config.backbone_config["num_mel_bins"], 2 * config.backbone_config["max_source_positions"]
        return {"input_features": torch.zeros(1, bins, frames)}

    @classmethod
    def build_processor(cls, config: MegaTransformerAudioConfig) -> Any:
        """The feature extractor of an encoder; ValueError for a backbone without one."""
        if config.backbone is not None:
            return processor_of_backbone(AutoFeatureExtractor, config.backbone)
        return MegaTransformerFeatureExtractor(
            feature_size=config.num_mel_bins,
            sampling_rate=config.sampling_rate,
            n_fft=config.n_fft,
            hop_length=config.hop_length,
            subsampling=config.subsampling,
            max_seconds=config.max_seconds,
        )

    def load(self, source: Any) -> np.ndarray:
        return load_audio(source, self.sampling_rate, self.max_seconds, warns_of_cut=self.clip_samples is None)

    def size(self, source: Any) -> float:
        return audio_seconds(source, self.sampling_rate)

    def tokens_of_size(self, size: float) -> int:
        return self.processor.num_tokens(self.processor.num_samples(size)) if self.count is None else self.count

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return -(-preprocessed.shape[1] // self.processor.subsampling) if self.count is None else self.count

    def preprocess(self, medium: Any) -> torch.Tensor:
        """Float (mel bins, frames); of targets whole tokens, the last of which silence fills."""
        if self.count is not None:
            batch = self.processor(self.load(medium), sampling_rate=self.sampling_rate, return_tensors="pt")
            return only_of(batch, "input_features", 3)
        spectrogram = self.processor.preprocess_one(medium)
        if any(self.learned):
            spectrogram = F.pad(spectrogram, (0, -spectrogram.shape[1] % self.processor.subsampling), value=SILENCE)
        return spectrogram

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.count is not None:
            return {"input_features": torch.stack(preprocessed)}
        batch = self.processor.pad(preprocessed)
        return {self.input_names[0]: batch["input_features"], self.input_names[1]: batch["input_features_mask"]}

    @classmethod
    def as_target(cls, num_mel_bins: int, frames_per_token: int, **sizes: Any) -> "AudioModality":
        """Waveforms as they are to be generated, whose end is learned; `sizes` of the frames as
        `MegaTransformerFeatureExtractor` has them.
        """
        recordings = cls(MegaTransformerFeatureExtractor(num_mel_bins, subsampling=frames_per_token, **sizes))
        recordings.become_target((True, True, True))
        return recordings

    @staticmethod
    def target_options(config: MegaTransformerAudioWriterConfig) -> dict[str, Any]:
        """Arguments of `as_target` for what writes them."""
        names = ("num_mel_bins", "frames_per_token", "sampling_rate", "n_fft", "hop_length", "max_seconds")
        return {name: getattr(config, name) for name in names}

    @classmethod
    def of_codec(cls, config: PreTrainedConfig) -> "AudioModality":
        """Waveforms as a vocoder takes them."""
        extractor = MegaTransformerFeatureExtractor(
            config.num_mel_bins, config.sampling_rate, config.n_fft, config.hop_length, max_seconds=config.max_seconds
        )
        return cls(extractor, clip_samples=config.clip_samples)

    def reference(self, medium: Any) -> tuple[np.ndarray, int]:
        """Samples, with which written ones are compared, and their rate."""
        return self.load(medium), self.sampling_rate

    def codec_input(self, medium: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Float (samples,): all of them or, with `rng`, a waveform, cut out anywhere, behind whose end is silence."""
        waveform = torch.from_numpy(medium)
        if rng is None:
            return waveform
        first = int(rng.integers(max(0, len(waveform) - self.clip_samples) + 1))
        clip = waveform[first : first + self.clip_samples]
        return F.pad(clip, (0, self.clip_samples - len(clip)))

    def collate_codec_inputs(self, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch: waveforms (waveforms, samples of the longest), silent behind the end of each, and lengths
        (waveforms,).
        """
        lengths = torch.tensor([len(waveform) for waveform in inputs])
        return {"waveforms": pad_sequence(list(inputs), batch_first=True), "lengths": lengths}
