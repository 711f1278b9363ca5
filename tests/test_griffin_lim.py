"""Log-mel spectrograms to sound without training, against sounds that they were made of and torchaudio's iteration."""

import pytest
import torch
from torchaudio.functional import griffinlim

from model import MegaTransformerFeatureExtractor, waveform_of
from model.feature_extraction_megatransformer import magnitudes_of, window_and_filters
from tests.tiny_codecs import voice

RATE, N_FFT, HOP, BINS = 8000, 256, 80, 64
EXTRACTOR = MegaTransformerFeatureExtractor(BINS, RATE, N_FFT, HOP)


def log_mel_of(sound: torch.Tensor) -> torch.Tensor:
    return EXTRACTOR.preprocess_one(sound.numpy())


def test_a_tone_comes_back_at_its_pitch():
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(4000) / RATE)
    sound = waveform_of(log_mel_of(tone), RATE, N_FFT, HOP)
    assert sound.dtype == torch.float32 and sound.shape == (4000,)
    spectrum = torch.fft.rfft(sound).abs()
    assert int(spectrum.argmax()) * RATE / 4000 == pytest.approx(440, abs=8)
    assert float(sound.std()) == pytest.approx(float(tone.std()), rel=0.2)


def test_a_voice_has_the_spectrogram_that_it_was_made_of():
    log_mel = log_mel_of(voice())
    again = log_mel_of(waveform_of(log_mel, RATE, N_FFT, HOP))
    assert again.shape == log_mel.shape
    assert float((again - log_mel)[:, 2:-2].abs().mean()) < 0.12
    few = log_mel_of(waveform_of(log_mel, RATE, N_FFT, HOP, num_iterations=1))
    assert float((few - log_mel).abs().mean()) > 1.2 * float((again - log_mel).abs().mean())


def test_magnitudes_make_the_bands_that_they_were_found_from():
    """Powers that are not negative; the bands in which no frequency lies say nothing."""
    log_mel = log_mel_of(voice())
    magnitudes = magnitudes_of(log_mel, RATE, N_FFT)
    assert magnitudes.shape == (N_FFT // 2 + 1, log_mel.shape[1]) and (magnitudes >= 0).all()
    _, filters = window_and_filters(RATE, N_FFT, BINS)
    has_any = filters.sum(dim=0) > 0
    bands = (filters.T @ magnitudes.square())[has_any]
    torch.testing.assert_close(bands.log10(), (2 * log_mel - 3)[has_any], atol=0.1, rtol=0)


def test_phases_are_as_consistent_as_torchaudio_finds_them():
    """How far the magnitudes of the sound are from those that were asked for."""
    magnitudes = magnitudes_of(log_mel_of(voice()), RATE, N_FFT)
    window = torch.hann_window(N_FFT)
    theirs = griffinlim(magnitudes, window, N_FFT, HOP, N_FFT, 1.0, 32, 0.99, None, True)
    ours = waveform_of(log_mel_of(voice()), RATE, N_FFT, HOP)
    distances = [
        float((torch.stft(sound, N_FFT, HOP, window=window, return_complex=True).abs() - magnitudes)[:, 2:-2].norm())
        for sound in (ours, theirs)
    ]
    assert distances[0] < 1.1 * distances[1]


def test_the_same_spectrogram_is_the_same_sound():
    log_mel = log_mel_of(voice(0.2))
    first = waveform_of(log_mel, RATE, N_FFT, HOP)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(waveform_of(log_mel, RATE, N_FFT, HOP), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_extremes():
    """Silence and what is louder than sound can be are finite; one frame has no samples."""
    for value in (-2.5, 2.5):
        assert torch.isfinite(waveform_of(torch.full((BINS, 8), value), RATE, N_FFT, HOP)).all()
    assert float(waveform_of(torch.full((BINS, 8), -2.5), RATE, N_FFT, HOP).abs().max()) < 1e-3
    assert waveform_of(torch.zeros(BINS, 1), RATE, N_FFT, HOP).shape == (0,)
    with pytest.raises(ValueError, match=r"hop_length \(130\) is more than half of n_fft \(256\)"):
        waveform_of(torch.zeros(BINS, 8), RATE, N_FFT, 130)
