"""The vocoder: its spectrograms, its inverse transform and its loss against closed forms."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from model import MegaTransformerFeatureExtractor, MegaTransformerVocoder, MegaTransformerVocoderConfig
from model.vocoder import fold, stft_loss
from tests.tiny_codecs import VOCODER, tiny_vocoder, voice


def test_its_spectrogram_is_that_of_the_feature_extractor():
    extractor = MegaTransformerFeatureExtractor(64, 8000, 256, 80)
    for seconds in (0.02, 0.1, 0.333):
        sound = voice(seconds)
        ours = tiny_vocoder().log_mel(torch.stack([torch.zeros_like(sound), sound]))
        torch.testing.assert_close(ours[1], extractor.preprocess_one(sound.numpy()), atol=2e-4, rtol=0)
        assert float((ours[0] + 2.5).abs().max()) < 1e-5  # silence


def test_magnitudes_and_phases_of_a_sound_are_that_sound():
    """With a head that knows them, decoding is exact."""
    sound = voice(0.3)[: 80 * 30]
    spectrum = torch.stft(sound, 256, 80, window=torch.hann_window(256), pad_mode="constant", return_complex=True)

    class Knows(nn.Module):
        def forward(self, hidden):
            return torch.cat([spectrum.abs().log(), spectrum.angle()]).T[None]

    vocoder = tiny_vocoder()
    vocoder.head = Knows()
    made = vocoder.decode(torch.zeros(1, 64, 31))
    assert made.shape == (1, 2400) and made.dtype == torch.float32
    torch.testing.assert_close(made[0], sound, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_samples_are_those_between_the_middles_of_frames(frames):
    made = tiny_vocoder().decode(torch.randn(3, 64, frames))
    assert made.shape == (3, (frames - 1) * 80)


def test_a_clip_in_a_batch_is_the_clip_alone():
    log_mels = torch.randn(3, 64, 9)
    vocoder = tiny_vocoder()
    torch.testing.assert_close(vocoder.decode(log_mels)[1:2], vocoder.decode(log_mels[1:2]))


def test_the_loss_on_spectrograms_of_a_louder_sound():
    """|2 S - S| / |S| = 1 and |ln 2 S - ln S| = ln 2, in each size of window."""
    noise = torch.randn(2, 2000)
    assert float(stft_loss(2 * noise, noise, [64, 256])) == pytest.approx(1 + math.log(2), abs=1e-3)
    assert float(stft_loss(noise, noise, [64])) == 0


def test_the_loss_is_the_sum_of_its_parts():
    vocoder = tiny_vocoder(stft_loss_weight=0.5, mel_loss_weight=3.0)
    sound = voice(0.2)[None, :1650]  # ten samples behind the last frame
    out = vocoder(sound)
    assert out.reconstruction.shape == (1, 1600)
    made, log_mel = vocoder.decode(vocoder.log_mel(sound[:, :1600])), vocoder.log_mel(sound[:, :1600])
    torch.testing.assert_close(out.reconstruction, made)
    mel = (vocoder.log_mel(made) - log_mel).abs().mean()
    torch.testing.assert_close(out.losses["mel"], mel)
    torch.testing.assert_close(out.loss, 0.5 * out.losses["stft"] + 3 * mel)


def test_every_weight_gets_a_gradient_and_learns_a_sound():
    vocoder = tiny_vocoder().train()
    sounds = torch.stack([voice(0.2, pitch) for pitch in (100, 150, 200, 250)])
    optimizer = torch.optim.AdamW(vocoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = vocoder(sounds).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().sum() > 0 for parameter in vocoder.parameters())
    assert losses[-1] < 0.6 * losses[0]


def test_folded_sound_has_samples_of_a_period_apart_below_each_other():
    folded = fold(torch.arange(7.0)[None], 3)
    assert folded.tolist() == [[[[0, 1, 2], [3, 4, 5], [6, 0, 0]]]]


def test_discriminators_see_it_in_several_ways():
    vocoder = tiny_vocoder(adversarial_weight=0.5, adversarial_start=10).train()
    assert len(vocoder.discriminators) == 5 + len(VOCODER["stft_sizes"])
    sounds = voice(0.2)[None]
    assert set(vocoder(sounds, step=9).losses) == {"stft", "mel"}
    losses = vocoder(sounds, step=10).losses
    assert set(losses) == {"stft", "mel", "generator", "features", "discriminator"}
    out = vocoder(sounds)
    parts = out.losses["stft"] + out.losses["mel"] + out.losses["discriminator"]
    torch.testing.assert_close(out.loss, parts + 0.5 * (out.losses["generator"] + out.losses["features"]))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in vocoder.parameters())
    assert set(vocoder.eval()(sounds).losses) == {"stft", "mel"}


def test_saved_with_its_code_it_loads_anywhere(tmp_path):
    vocoder = tiny_vocoder()
    vocoder.save_pretrained(tmp_path / "vocoder")
    log_mels = torch.randn(1, 64, 5)
    name = json.loads((tmp_path / "vocoder/config.json").read_text())["auto_map"]["AutoModel"]
    exported = get_class_from_dynamic_module(name, str(tmp_path / "vocoder"))
    assert exported is not MegaTransformerVocoder
    for source in (AutoModel, exported):
        loaded = source.from_pretrained(tmp_path / "vocoder").eval()
        torch.testing.assert_close(loaded.decode(log_mels), vocoder.decode(log_mels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop_length": 129}, r"hop_length \(129\) must be at most half of n_fft \(256\)"),
        ({"n_fft": 255}, "must be even"),
        ({"num_mel_bins": 200}, r"num_mel_bins \(200\) must be at most"),
        ({"stft_sizes": []}, r"stft_sizes is \[\]"),
        ({"stft_sizes": [4096]}, "longer than a clip of 1600 samples"),
        ({"kernel_size": 4}, r"kernel_size \(4\) must be odd"),
        ({"initializer_range": 0}, "must be greater than 0"),
        ({"hidden_sise": 3}, "unknown key 'hidden_sise'"),
    ],
)
def test_bad_settings_are_value_errors_that_name_them(options, message):
    with pytest.raises(ValueError, match=message):
        MegaTransformerVocoderConfig(**{**VOCODER, **options})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"log_mels has shape \(1, 63, 4\), expected \(clips, 64 mel bins, frames\)"):
        tiny_vocoder().decode(torch.zeros(1, 63, 4))
    with pytest.raises(ValueError, match=r"waveforms has shape \(1, 79\)"):
        tiny_vocoder()(torch.zeros(1, 79))
