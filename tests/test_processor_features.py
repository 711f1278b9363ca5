"""Pictures as pixels and recordings as log-mel spectrograms."""

import math

import numpy as np
import pytest
import torch
from torchaudio.transforms import MelSpectrogram
from transformers import AutoFeatureExtractor, AutoImageProcessor
from transformers.audio_utils import mel_filter_bank
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from model import MediaError, MegaTransformerFeatureExtractor, MegaTransformerImageProcessor
from tests.tiny_processor import audio_file, image_file, picture, sound

# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("patch_size, pixel_shuffle, max_side", [(4, 2, 64), (16, 1, 512), (7, 3, 100), (8, 1, 8)])
def test_sizes_are_whole_tokens_within_the_limit_and_keep_the_aspect(patch_size, pixel_shuffle, max_side):
    processor = MegaTransformerImageProcessor(patch_size, pixel_shuffle, max_side=max_side)
    unit = patch_size * pixel_shuffle
    for height in (1, 3, 8, 20, 32, 63, 64, 65, 100, 1000, 60_000):
        for width in (1, 5, 31, 64, 100, 333, 60_000):
            new_height, new_width = processor.target_size(height, width)
            shrink = max(1, height / max_side, width / max_side)
            for new, old in ((new_height, height / shrink), (new_width, width / shrink)):
                assert new % unit == 0 and unit <= new <= max_side
                assert abs(new - old) <= unit / 2 or new == unit or new + unit > max_side
            assert processor.num_tokens(height, width) == new_height * new_width / unit**2
            assert processor.target_size(new_height, new_width) == (new_height, new_width)


def test_a_fixed_size_is_that_of_every_picture():
    processor = MegaTransformerImageProcessor(4, 2, size={"height": 32, "width": 16})
    assert processor.num_tokens(1000, 3) == 4 * 2
    assert processor.preprocess_one(picture(100, 7)).shape == (3, 32, 16)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"patch_size": 4, "pixel_shuffle": 2, "max_side": 7}, "max_side is 7, but a token covers 8"),
        ({"patch_size": 4, "size": {"height": 32, "width": 30}}, "'width': 30}, but a token covers 4"),
        ({"patch_size": 4, "size": {"height": 0, "width": 32}}, "height is 0; give a whole number of 1 to 16384"),
        ({"patch_size": 4, "size": {"height": 32}}, "needs height and width"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": "x"}, "patch_size is 'x'; give a whole number of 1 to 16384"),
        ({"patch_size": 2**31}, "patch_size is 2147483648"),
        ({"pixel_shuffle": True}, "pixel_shuffle is True"),
        ({"size": [32, 32]}, "size is .*, but needs height and width"),
        ({"size": {"height": 2**20, "width": 2**20}}, "height is 1048576"),
        ({"max_pixels": None}, "max_pixels is None"),
        ({"image_mean": [0.5]}, "image_mean is .*; give three numbers"),
        ({"image_mean": 0.5}, "image_mean is 0.5; give three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is 0.0; give a number of 1e-06 to 1000000.0"),
        ({"image_std": [float("nan"), 0.5, 0.5]}, "image_std is nan"),
        ({"pixel_shuffle": 0}, "pixel_shuffle is 0"),
    ],
)
def test_sizes_that_hold_no_whole_tokens_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        MegaTransformerImageProcessor(**options)


def test_pixels_are_normalised_and_in_their_places():
    image = picture(24, 16)
    tensor = MegaTransformerImageProcessor(8, image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 4)).preprocess_one(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 24) and tensor.is_contiguous()
    for x, y, channel in ((0, 0, 0), (23, 15, 2), (5, 9, 1)):
        value = image.getpixel((x, y))[channel] / 255
        expected = (value - (0.1, 0.2, 0.3)[channel]) / (1, 2, 4)[channel]
        assert tensor[channel, y, x].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [(100, 37), (9, 200), (32, 48)])
def test_pictures_are_resized_as_those_of_siglip(size):
    image = picture(*size)
    theirs = SiglipImageProcessorPil(size={"height": 32, "width": 48})(image, return_tensors="pt")["pixel_values"][0]
    ours = MegaTransformerImageProcessor(8, size={"height": 32, "width": 48}).preprocess_one(image)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_batch_of_pictures_is_padded_with_zeros():
    processor = MegaTransformerImageProcessor(8)
    images = [picture(16, 24, seed=1), picture(32, 8, seed=2)]
    batch = processor(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 24, 32) and batch["image_sizes"].tolist() == [[24, 16], [8, 32]]
    for image, padded, (height, width) in zip(images, batch["pixel_values"], [(24, 16), (8, 32)], strict=True):
        assert torch.equal(padded[:, :height, :width], processor.preprocess_one(image))
        assert padded.count_nonzero() == padded[:, :height, :width].count_nonzero() > 0


def test_pictures_come_as_lists_of_lists_paths_and_bytes(tmp_path):
    picture(seed=1).save(tmp_path / "a.png")
    processor = MegaTransformerImageProcessor(8)
    batch = processor([[tmp_path / "a.png", image_file(picture(seed=2))], [picture(seed=3)]])
    for number, pixels in enumerate(batch["pixel_values"], start=1):
        assert torch.equal(pixels, processor.preprocess_one(picture(seed=number)))
    assert processor(picture())["pixel_values"].shape[0] == 1


def test_nothing_is_fetched_and_no_option_ignored():
    processor = MegaTransformerImageProcessor(8, max_pixels=511)
    for call in (processor, processor.fetch_images):
        with pytest.raises(MediaError, match="never fetched"):
            call(["https://a.b/c.png"])
        with pytest.raises(MediaError, match="32 x 16 pixels, of which 1 to 511"):
            call([picture()])
    with pytest.raises(ValueError, match=r"do_resize is False, .*; set it on the image processor"):
        processor(picture(8, 8), do_resize=False)
    with pytest.raises(TypeError, match="'max_pixel' is no option of this call; did you mean 'max_pixels'"):
        processor(picture(8, 8), max_pixel=511)


def test_an_image_processor_is_saved_with_its_code(tmp_path):
    processor = MegaTransformerImageProcessor(8, 2, max_side=96, image_mean=(0.1, 0.2, 0.3))
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MegaTransformerImageProcessor and loaded.to_dict() == processor.to_dict()
    assert (tmp_path / "image_processing_megatransformer.py").is_file() and (tmp_path / "media.py").is_file()


# --------------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("rate, n_fft, hop, bins", [(8000, 256, 80, 32), (16000, 400, 160, 80), (16000, 512, 200, 64)])
def test_spectrograms_against_a_short_time_fourier_transform(rate, n_fft, hop, bins):
    """Ten lines from the definition, with the filters of another library."""
    waveform = torch.from_numpy(sound(rate // 2)) * torch.linspace(0, 1, rate // 2)
    window = torch.hann_window(n_fft)
    padded = torch.nn.functional.pad(waveform, (n_fft // 2, n_fft // 2))
    frames = padded.unfold(0, n_fft, hop) * window
    power = torch.fft.rfft(frames).abs() ** 2 / (window**2).sum()
    filters = mel_filter_bank(n_fft // 2 + 1, bins, 0, rate / 2, rate, norm=None, mel_scale="htk")
    mel = power @ torch.from_numpy(filters).float()
    expected = (torch.log10(mel.clamp(min=1e-8)) + 3) / 2
    extractor = MegaTransformerFeatureExtractor(bins, rate, n_fft, hop)
    features = extractor.preprocess_one(waveform)
    assert features.dtype == torch.float32 and features.shape == (bins, len(expected))
    torch.testing.assert_close(features, expected.T, atol=2e-4, rtol=0)


@pytest.mark.parametrize("rate, n_fft, hop, bins", [(8000, 512, 80, 64), (16000, 400, 160, 80), (11025, 401, 100, 20)])
def test_spectrograms_are_those_of_torchaudio(rate, n_fft, hop, bins):
    options = {"hop_length": hop, "n_mels": bins, "pad_mode": "constant", "normalized": "window"}
    waveform = torch.from_numpy(sound(rate // 2)) * torch.linspace(0, 1, rate // 2)
    mel = MelSpectrogram(rate, n_fft, **options)(waveform)
    features = MegaTransformerFeatureExtractor(bins, rate, n_fft, hop).preprocess_one(waveform)
    torch.testing.assert_close(features, (torch.log10(mel.clamp(min=1e-8)) + 3) / 2, atol=1e-5, rtol=0)


def test_a_tone_is_in_the_bin_of_its_pitch_and_grows_with_its_loudness():
    extractor = MegaTransformerFeatureExtractor(32, 8000, 256, 80)
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 4000 / 700), 34) / 2595) - 1)  # mel scale of HTK
    for pitch in (300, 1000, 3000):
        tone = 0.1 * np.sin(2 * np.pi * pitch * np.arange(4000) / 8000)
        features = extractor.preprocess_one(tone)[:, 10:-10]
        nearest = np.abs(edges[1:-1] - pitch).argmin()
        assert abs(features.mean(1).argmax().item() - nearest) <= 1
        louder = extractor.preprocess_one(10 * tone)[:, 10:-10]
        assert (louder - features)[nearest].mean().item() == pytest.approx(1, abs=0.01)  # log10(10^2) / 2


def test_silence_is_the_floor():
    features = MegaTransformerFeatureExtractor(16, 8000, 256, 80).preprocess_one(np.zeros(800, np.float32))
    assert torch.all(features == (math.log10(1e-8) + 3) / 2)


def test_frames_and_tokens_are_known_before():
    extractor = MegaTransformerFeatureExtractor(16, 8000, 256, 80, subsampling=4, max_seconds=1.5)
    for samples in (1, 79, 80, 81, 319, 320, 4000, 11999, 12000, 12001, 20000):
        frames = extractor.preprocess_one(sound(samples)).shape[1]
        assert extractor.num_frames(samples) == frames
        assert extractor.num_tokens(samples) == math.ceil(math.ceil(frames / 2) / 2)
        assert extractor.num_samples(samples / 8000) == samples


def test_frames_of_recordings_of_any_rate_and_length_are_known_before():
    for max_seconds in (1.5, 0.30001, 0.12345, 1.1):
        extractor = MegaTransformerFeatureExtractor(4, 8000, 32, 1, max_seconds=max_seconds)
        for rate in (7919, 8000, 11025, 44100):
            for samples in (1, 999, 12345, 30000):
                frames = extractor.preprocess_one((sound(samples), rate)).shape[1]
                assert extractor.num_frames(extractor.num_samples(samples / rate)) == frames
    for rate in (7919, 11025, 44100, 48000):
        for samples in range(1, 100_000, 37):
            assert extractor.num_samples(samples / rate) == -(-samples * 8000 // rate)


def test_a_clip_does_not_depend_on_what_it_is_padded_with():
    extractor = MegaTransformerFeatureExtractor(16, 8000, 256, 80)
    clips = [sound(4000, seed=1), 0.01 * sound(8000, seed=2)]
    batch = extractor(clips, sampling_rate=8000, return_tensors="pt")
    assert batch["input_features"].shape == (2, 16, 101)
    assert batch["input_features_mask"].tolist() == [[1] * 51 + [0] * 50, [1] * 101]
    assert torch.equal(batch["input_features"][0, :, :51], extractor.preprocess_one(clips[0]))
    assert not batch["input_features"][0, :, 51:].any()
    longer = extractor.preprocess_one(np.concatenate([clips[0], 0.5 * sound(4000, seed=3)]))
    torch.testing.assert_close(longer[:, :48], extractor.preprocess_one(clips[0])[:, :48])


def test_recordings_of_other_rates_and_from_files(tmp_path):
    extractor = MegaTransformerFeatureExtractor(16, 8000, 256, 80)
    tone = 0.3 * np.sin(2 * np.pi * 700 * np.arange(16000) / 16000).astype(np.float32)
    (tmp_path / "a.wav").write_bytes(audio_file(tone, 16000, subtype="FLOAT"))
    expected = extractor.preprocess_one(tone[::2].copy())  # 700 Hz is far below 4 kHz
    for given, rate in (
        (tone, 16000),
        ([tmp_path / "a.wav"], None),
        ([tmp_path / "a.wav"], 16000),
        ((tone, 16000), None),
    ):
        features = extractor(given, sampling_rate=rate)["input_features"][0]
        loud = expected > -1
        torch.testing.assert_close(features[loud][50:-50], expected[loud][50:-50], atol=0.1, rtol=0)


def test_no_recording_is_fetched_and_no_option_ignored():
    extractor = MegaTransformerFeatureExtractor(16, 8000, 256, 80)
    for call in (extractor, extractor.fetch_audio):
        with pytest.raises(MediaError, match="never fetched"):
            call(["https://a.b/c.wav"])
    with pytest.raises(TypeError, match="'do_normalize' is no option of this call; choose from return_tensors"):
        extractor(sound(), do_normalize=True)
    with pytest.raises(ValueError, match=r"hop_length is 81, .*; set it on the feature extractor"):
        extractor(sound(), hop_length=81)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"n_fft": 0}, "n_fft is 0"),
        ({"hop_length": 0}, "hop_length is 0"),
        ({"feature_size": 0}, "feature_size is 0"),
        ({"feature_size": 201, "n_fft": 400}, "feature_size is 201"),
        ({"max_seconds": 0}, "max_seconds is 0; give a number of 0.001 to"),
        ({"subsampling": 0}, "subsampling is 0"),
        ({"sampling_rate": 0}, "sampling_rate is 0; give a whole number of 1 to 768000"),
        ({"sampling_rate": "16k"}, "sampling_rate is '16k'"),
        ({"n_fft": 2**31}, "n_fft is 2147483648; give a whole number of 1 to 65536"),
        ({"hop_length": 2.5}, "hop_length is 2.5"),
        ({"max_seconds": float("nan")}, "max_seconds is nan"),
        ({"max_seconds": float("inf")}, "max_seconds is inf"),
        ({"padding_value": []}, r"padding_value is \[\]"),
    ],
)
def test_frames_that_cannot_be_computed_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        MegaTransformerFeatureExtractor(**options)


def test_a_feature_extractor_is_saved_with_its_code(tmp_path):
    extractor = MegaTransformerFeatureExtractor(16, 8000, 256, 80, max_seconds=3)
    extractor.preprocess_one(sound())
    extractor.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is MegaTransformerFeatureExtractor and loaded.to_dict() == extractor.to_dict()
    assert (tmp_path / "feature_extraction_megatransformer.py").is_file() and (tmp_path / "media.py").is_file()
