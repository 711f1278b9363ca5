"""Scores of reconstructions, against closed forms, numpy, and the loss that the vocoder is trained with."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from evaluation import reconstruction
from evaluation.reconstruction import (
    AudioScores,
    ImageScores,
    PrincipalComponents,
    mean_scores,
    reconstruction_scores,
    stft_distance,
)
from model.vocoder import stft_loss
from tests.tiny_codecs import pictures, voice


def test_scores_of_pictures():
    """An error of 0.1 in a range of 2 is 20 log10(20) dB; what is out of range is cut."""
    images = pictures(3).clamp(-0.8, 0.8)
    scores = ImageScores()(images + 0.1, {"pixel_values": images})
    assert scores.shape == (3, 2)
    assert scores[:, 0].tolist() == pytest.approx([20 * math.log10(20)] * 3, abs=1e-3)
    assert (scores[:, 1] < 1).all()
    white = torch.ones(1, 3, 16, 16)
    assert ImageScores()(3 * white, {"pixel_values": white})[0].tolist() == [math.inf, 1]


def test_each_picture_has_scores_of_its_own():
    images = pictures(2)
    made = torch.stack([images[0] + 0.01 * pictures(1)[0], pictures(1, seed=1)[0]])
    better, worse = ImageScores()(made, {"pixel_values": images})
    assert (better > worse).all() and better[1] > 0.95 and worse[1] < 0.5


def test_a_sound_twice_as_loud():
    sound = voice(0.4)
    assert stft_distance(2 * sound, sound) == pytest.approx(1 + math.log(2), abs=0.05)  # softest parts are cut
    assert stft_distance(sound, sound) == 0


def test_the_distance_is_the_loss_of_a_clip():
    made, sound = voice(0.3, pitch=130), voice(0.3)
    expected = float(stft_loss(made[None], sound[None], [128, 256, 512, 1024]))
    assert stft_distance(made, sound) == pytest.approx(expected, rel=1e-4)


def test_clips_end_where_they_end():
    """What is behind the length of a clip has no part in its scores."""
    sounds = torch.stack([voice(0.2), voice(0.2, pitch=200)])
    scores = AudioScores(11025, lambda waveforms: waveforms.abs())
    batch = {"waveforms": sounds, "lengths": torch.tensor([1600, 900])}
    made = sounds * torch.tensor([[1.0], [0.5]])
    whole = scores(made, batch)
    assert scores.names == ("mel_l1", "mr_stft", "si_sdr") and whole.shape == (2, 3)
    assert whole[0, :2].tolist() == [0, 0]
    assert float(whole[1, 0]) == pytest.approx(float(sounds[1, :900].abs().mean()) / 2, rel=1e-5)
    made[1, 900:] = 7
    torch.testing.assert_close(scores(made, batch), whole)


def test_distortion_whatever_the_volume():
    """Noise at right angles to a sound, of a tenth of its length, leaves 20 dB; silence has no ratio."""
    sound, noise = voice(0.4), torch.randn(3200, generator=torch.Generator().manual_seed(1))
    noise -= (noise @ sound) / (sound @ sound) * sound
    made = 3 * (sound + 0.1 * sound.norm() * noise / noise.norm())
    batch = {"waveforms": torch.stack([sound, sound * 0]), "lengths": torch.tensor([3200, 3200])}
    found = AudioScores(11025, lambda waveforms: waveforms)(torch.stack([made, made]), batch)[:, 2]
    assert found[0].item() == pytest.approx(20, abs=1e-3) and found[1].isnan()


def test_pesq_where_it_is_installed(monkeypatch):
    """NaN for what it cannot rate; the mean is that of the others, and failures are counted among clips long enough."""

    class Refusal(Exception):
        pass

    def pesq(made, waveform, rate, mode):
        assert (rate, mode) == (8000, "nb")
        if not made.any():
            raise Refusal
        return torch.tensor(3.5)

    monkeypatch.setattr(reconstruction, "PesqError", Refusal)
    monkeypatch.setattr("torchmetrics.functional.audio.pesq.perceptual_evaluation_speech_quality", pesq)
    scores = AudioScores(8000, lambda waveforms: waveforms)
    sounds = torch.stack([voice(0.5), voice(0.5), 0 * voice(0.5)])
    found = scores(sounds, {"waveforms": sounds, "lengths": torch.tensor([4000, 3000, 4000])})
    assert found[:, 3].isnan().tolist() == [False, True, True]
    means = mean_scores(EvalPrediction(found.numpy(), None), scores.names)
    assert means["pesq"] == 3.5 and means["pesq_failed"] == 0.5
    assert set(means) == {"mel_l1", "mr_stft", "si_sdr", "pesq", "pesq_failed"}
    assert "pesq" not in mean_scores(EvalPrediction(found[1:].numpy(), None), scores.names)
    assert "pesq" not in AudioScores(22050, lambda waveforms: waveforms).names


def test_no_pesq_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(reconstruction, "PesqError", None)
    scores = AudioScores(8000, lambda waveforms: waveforms)
    sounds = voice(0.5)[None]
    found = scores(sounds, {"waveforms": sounds, "lengths": torch.tensor([4000])})
    assert scores.names == ("mel_l1", "mr_stft", "si_sdr") and found.shape == (1, 3)


def test_pesq_of_the_package_itself():
    """As much as it gives for what is like the original; less for noise; none for silence, which it refuses."""
    pytest.importorskip("pesq")
    sound = voice(1.0)
    noisy = sound + 0.05 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    sounds = torch.stack([sound, sound, 0 * sound])
    batch = {"waveforms": sounds, "lengths": torch.tensor([8000] * 3)}
    same, worse, silent = AudioScores(8000, lambda waveforms: waveforms)(torch.stack([sound, noisy, sound]), batch)
    assert 4.4 < same[3] < 4.6 and 1 < worse[3] < 3.5 and same[4] == worse[4] == 0
    assert silent[3].isnan() and silent[4] == 1


def test_principal_components_lose_the_least():
    """As much as the singular values that are left out."""
    vectors = torch.randn(80, 48) @ torch.diag(torch.linspace(3, 0.1, 48)) + 5
    components = PrincipalComponents(vectors.view(80, 3, 4, 4), 12)
    made = components(vectors.view(80, 3, 4, 4))
    assert made.shape == (80, 3, 4, 4)
    values = np.linalg.svd((vectors - vectors.mean(dim=0)).numpy(), compute_uv=False)
    error = float((made.flatten(1) - vectors).square().sum())
    assert error == pytest.approx(float((values[12:] ** 2).sum()), rel=1e-3)
    with pytest.raises(ValueError, match="80 media do not have 81 principal components"):
        PrincipalComponents(vectors, 81)


def test_scores_of_a_way_to_reconstruct():
    dataset = list(pictures(5))

    def collate(tensors):
        return {"pixel_values": torch.stack(tensors)}

    found = reconstruction_scores(lambda images: images * 0.9, dataset, collate, ImageScores())
    alone = ImageScores()(torch.stack(dataset) * 0.9, {"pixel_values": torch.stack(dataset)}).mean(dim=0)
    assert [found["psnr"], found["ssim"]] == pytest.approx(alone.tolist(), rel=1e-5)
    assert found["milliseconds"] > 0
