"""Log-mel spectrograms to audio: magnitudes and phases of each frame, put together by an inverse Fourier transform.

Source: Siuzdak 2023 (Vocos), arXiv 2306.00814.
"""

from functools import partial

import torch
from torch import nn

from .configuration_codecs import MegaTransformerVocoderConfig
from .feature_extraction_megatransformer import FLOOR, LOG_MEAN, LOG_STD, window_and_filters
from .reconstruction import ConvNeXtBlock, ReconstructionModel, ReconstructionOutput

QUIET = 1e-7
"""Smallest power in the loss on spectrograms."""
PERIODS = (2, 3, 5, 7, 11)
"""Periods at which discriminators fold audio, to see samples so far apart. Source: HiFi-GAN, arXiv 2010.05646."""


class MegaTransformerVocoder(ReconstructionModel):
    """Log-mel spectrograms, as `MegaTransformerFeatureExtractor` makes them, to audio."""

    config: MegaTransformerVocoderConfig
    _auto_class = "AutoModel"
    main_input_name = "waveforms"
    input_modalities = ("audio",)

    def __init__(self, config: MegaTransformerVocoderConfig):
        super().__init__(config)
        width, side = config.hidden_size, config.kernel_size
        self.embed = nn.Conv1d(config.num_mel_bins, width, side, padding=side // 2)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config, dimensions=1) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.n_fft + 2)
        views = [{"view": partial(fold, period=period), "channels": 1, "kernel": (5, 1)} for period in PERIODS]
        views += [{"view": partial(log_spectrogram, n_fft=size), "channels": 1} for size in config.stft_sizes]
        self.discriminators = self.build_discriminators(views)
        self.post_init()

    def loss_weights(self) -> dict[str, float]:
        return {"stft": self.config.stft_loss_weight, "mel": self.config.mel_loss_weight}

    def log_mel(self, waveforms: torch.FloatTensor) -> torch.Tensor:
        """(waveforms, samples) -> (waveforms, mel bins, frames): what the feature extractor gives, with a gradient."""
        config = self.config
        _, filters = window_and_filters(config.sampling_rate, config.n_fft, config.num_mel_bins)
        mel = filters.T.to(waveforms.device) @ power_spectrogram(waveforms, config.n_fft, config.hop_length)
        return (mel.clamp(min=FLOOR).log10() - LOG_MEAN) / LOG_STD

    def decode(self, log_mels: torch.FloatTensor) -> torch.Tensor:
        """(waveforms, mel bins, frames) -> float32 (waveforms, (frames - 1) * hop_length); ValueError for another
        shape.
        """
        config = self.config
        if log_mels.ndim != 3 or log_mels.shape[1] != config.num_mel_bins or not log_mels.shape[2]:
            raise ValueError(
                f"log_mels has shape {tuple(log_mels.shape)}, expected (clips, {config.num_mel_bins} mel bins, frames)"
            )
        if log_mels.shape[2] == 1:
            return log_mels.new_zeros(len(log_mels), 0, dtype=torch.float32)
        hidden = self.embed(log_mels.to(self.embed.weight.dtype))  # (clips, hidden, frames)
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        values = self.head(self.last_norm(hidden.transpose(1, 2))).transpose(1, 2).float()
        log_magnitude, phase = values.chunk(2, dim=1)  # (clips, frequencies, frames) each
        # A sound within -1 .. 1 has no magnitude above half of n_fft.
        spectrum = torch.polar(log_magnitude.exp().clamp(max=config.n_fft / 2), phase)
        window = torch.hann_window(config.n_fft, device=spectrum.device)
        return torch.istft(spectrum, config.n_fft, config.hop_length, window=window)

    def forward(self, waveforms: torch.FloatTensor, step: int | None = None) -> ReconstructionOutput:
        """Audio, float (waveforms, samples) at the configured rate, to log-mel spectrograms and back, and how well it
        came through; samples behind the last whole frame are left out. `step` as in `compare`. ValueError: waveforms
        are shorter than a frame.
        """
        hop = self.config.hop_length
        if waveforms.ndim != 2 or waveforms.shape[1] < hop:
            raise ValueError(
                f"waveforms has shape {tuple(waveforms.shape)}, expected (clips, samples), at least hop_length ({hop}) "
                "samples"
            )
        waveforms = waveforms.float()[:, : waveforms.shape[1] // hop * hop]
        log_mels = self.log_mel(waveforms)
        made = self.decode(log_mels)
        losses = {
            "stft": stft_loss(made, waveforms, self.config.stft_sizes),
            "mel": (self.log_mel(made) - log_mels).abs().mean(),
        }
        return self.compare(made, waveforms, losses, step)


def power_spectrogram(waveforms: torch.Tensor, n_fft: int, hop_length: int) -> torch.Tensor:
    """(waveforms, samples) -> (waveforms, n_fft // 2 + 1, frames), under a Hann window; silence around the waveform."""
    window = torch.hann_window(n_fft, device=waveforms.device)
    spectrum = torch.stft(waveforms.float(), n_fft, hop_length, window=window, pad_mode="constant", return_complex=True)
    return spectrum.real.square() + spectrum.imag.square()


def stft_loss(made: torch.Tensor, waveforms: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Mean over window sizes of |S - S'| / |S| (spectral convergence, over the batch) and mean |log S - log S'|, where
    S are magnitudes. Source: Yamamoto et al. 2019 (Parallel WaveGAN), arXiv 1910.11480.
    """
    losses = []
    for size in sizes:
        ours, theirs = (
            power_spectrogram(sound, size, size // 4).clamp(min=QUIET).sqrt() for sound in (made, waveforms)
        )
        losses += [(theirs - ours).norm() / theirs.norm(), (theirs.log() - ours.log()).abs().mean()]
    return torch.stack(losses).sum() / len(sizes)


def fold(waveforms: torch.Tensor, period: int) -> torch.Tensor:
    """(waveforms, samples) -> (waveforms, 1, rows, period)."""
    padded = nn.functional.pad(waveforms, (0, -waveforms.shape[1] % period))
    return padded.view(len(waveforms), 1, -1, period)


def log_spectrogram(waveforms: torch.Tensor, n_fft: int) -> torch.Tensor:
    """(waveforms, samples) -> (waveforms, 1, frequencies, frames), the logarithms of magnitudes."""
    power = power_spectrogram(waveforms, n_fft, n_fft // 4)
    return (power.clamp(min=QUIET).log10() / 2).unsqueeze(1)
