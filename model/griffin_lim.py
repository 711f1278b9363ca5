"""Log-mel spectrograms to sound without anything that is trained."""

import math

import torch

from .feature_extraction_megatransformer import LOG_MEAN, LOG_STD, window_and_filters

MOMENTUM = 0.99
NUM_UPDATES = 50
"""Of the powers that a mel spectrum is made of."""
TINY = 1e-20
"""Far below the power of silence."""


def waveform_of(
    log_mel: torch.Tensor, sampling_rate: int, n_fft: int, hop_length: int, num_iterations: int = 32
) -> torch.Tensor:
    """The sound of a log-mel spectrogram: its phases are those of a sound whose spectrogram it nearly is.

    Source: Griffin and Lim 1984, with the momentum of Perraudin et al. 2013. The first phases are always the same ones.

    Args:
        log_mel: (mel bins, frames), as `MegaTransformerFeatureExtractor` makes them.
        num_iterations: Times that the phases are replaced.

    Returns:
        float32 (samples,), (frames - 1) * hop_length of them.

    Raises:
        ValueError: for frames that do not overlap by half.
    """
    if 2 * hop_length > n_fft:
        raise ValueError(
            f"hop_length ({hop_length}) is more than half of n_fft ({n_fft}), and frames that overlap less do not make "
            "a sound; lower hop_length"
        )
    if log_mel.shape[1] < 2:
        return log_mel.new_zeros(0, dtype=torch.float32)
    magnitudes = magnitudes_of(log_mel.float(), sampling_rate, n_fft)
    window = torch.hann_window(n_fft, device=log_mel.device)
    turns = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0)).to(log_mel.device)
    phases = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
    before = torch.zeros_like(phases)
    for _ in range(num_iterations):
        waveform = torch.istft(magnitudes * phases, n_fft, hop_length, window=window)
        spectrum = torch.stft(
            waveform, n_fft, hop_length, window=window, pad_mode="constant", return_complex=True
        )  # (frequencies, frames)
        # The direction of spectrum + MOMENTUM * (spectrum - before).
        ahead = spectrum - MOMENTUM / (1 + MOMENTUM) * before
        phases, before = ahead / ahead.abs().clamp(min=1e-16), spectrum
    return torch.istft(magnitudes * phases, n_fft, hop_length, window=window)


def magnitudes_of(log_mel: torch.Tensor, sampling_rate: int, n_fft: int) -> torch.Tensor:
    """The magnitudes of a spectrum that has these mel bands, (mel bins, frames) -> (n_fft // 2 + 1, frames).

    There are more frequencies than bands, and powers are not negative: from powers that are even within each band, the
    multiplicative updates of Lee and Seung 2000, which lessen the Kullback-Leibler divergence of the bands, so that
    quiet ones count as well.
    """
    _, filters = window_and_filters(sampling_rate, n_fft, len(log_mel))  # (frequencies, mel bins)
    filters = filters.to(log_mel.device)
    weights = filters.sum(dim=1, keepdim=True).clamp(min=TINY)
    mel = 10 ** (LOG_STD * log_mel + LOG_MEAN)
    power = filters @ (mel / filters.sum(dim=0).clamp(min=TINY)[:, None]) / weights
    for _ in range(NUM_UPDATES):
        power = power * (filters @ (mel / (filters.T @ power).clamp(min=TINY)) / weights)
    return power.sqrt()
