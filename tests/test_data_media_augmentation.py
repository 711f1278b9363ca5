"""Augmentation: a function of (seed, epoch, row), off by default, and never one that makes a text wrong."""

import json
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset_loading import DataConfig, MixtureDataset, SourceConfig, build_datasets, train_tokenizer
from dataset_loading.augmentation import (
    AudioAugmentationConfig,
    AugmentationConfig,
    Augmenter,
    ImageAugmentationConfig,
    TextAugmentationConfig,
    TextNoise,
    change_audio,
    change_image,
    mask_spectrogram,
    torch_seeded_by,
)
from tests.tiny_processor import audio_file, picture, sound, tiny_processor

PROCESSOR = tiny_processor()
VALIDATION = [SourceConfig("generated", task="addition", num_rows=3)]


def changed(image, text="a photo of a dog", seed=0, **options):
    """A picture as it comes out, as an array."""
    rng = np.random.default_rng(seed)
    with torch_seeded_by(rng):
        return np.asarray(change_image(image, text, ImageAugmentationConfig(**options), rng)).astype(int)


def heard(samples, text="zero", seed=0, **options):
    rng = np.random.default_rng(seed)
    with torch_seeded_by(rng):
        return change_audio(samples, 8000, text, AudioAugmentationConfig(**options), rng)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_mirrored_with_the_probability_that_is_asked_for():
    image = picture(12, 8)
    pixels = np.asarray(image).astype(int)
    assert (changed(image, flip=1) == pixels[:, ::-1]).all()
    mirrored = [(changed(image, seed=seed, flip=0.3) != pixels).any() for seed in range(300)]
    assert 60 < sum(mirrored) < 120


STRONG = {
    "crop": {"crop": 0.3},
    "flip": {"flip": 1.0},
    "colour": {"colour": 0.5},
}
WRONG = {
    "a circle left of a square": ("crop", "flip"),
    "The Right hand": ("crop", "flip"),
    "a bird above the house": ("crop",),
    "what is under the table?": ("crop",),
    "a red car": (),
    "a dark room": ("colour",),
    "a grey-green frog": ("colour",),
    "how many dogs are there? 3": ("crop",),
    "a small boat": ("crop",),
    "a sign that says stop": ("crop", "flip"),
    "a photo of a dog": (),
    "a leftover of a reddish dish": (),
}


@pytest.mark.parametrize("text", WRONG)
def test_no_change_makes_a_caption_wrong(text):
    """Whole words decide, in any case."""
    image = picture(16, 12)
    pixels = np.asarray(image).astype(int)
    for name, options in STRONG.items():
        differs = any((changed(image, text, seed, **options) != pixels).any() for seed in range(10))
        assert differs == (name not in WRONG[text]), name


def test_crops_keep_the_size_and_take_a_part():
    """Of a slope, a crop has a smaller range of values, and never less than the part that is asked for."""
    values = np.linspace(0, 255, 40).astype(np.uint8)
    image = picture(40, 40)
    image.putdata([(int(values[column]), int(values[row]), 0) for row in range(40) for column in range(40)])
    areas = []
    for seed in range(40):
        pixels = changed(image, seed=seed, crop=0.25)
        assert pixels.shape == (40, 40, 3)
        areas.append(np.ptp(pixels[20, :, 0]) * np.ptp(pixels[:, 20, 1]) / 255**2)
    assert 0.18 < min(areas) < 0.5 and 0.6 < max(areas) <= 1


def test_colours_change_by_no_more_than_asked():
    image = picture(8, 8)
    image.paste((100, 100, 100), (0, 0, 8, 8))
    greys = [changed(image, seed=seed, colour=0.2)[0, 0].tolist() for seed in range(30)]
    assert all(len(set(grey)) == 1 for grey in greys)  # of grey, saturation changes nothing
    assert 79 <= min(grey[0] for grey in greys) < 90 and 110 < max(grey[0] for grey in greys) <= 121


# ---------------------------------------------------------------------------------------------------------- recordings


def test_speed_changes_length_and_pitch():
    tone = np.sin(2 * np.pi * 400 * np.arange(8000) / 8000).astype(np.float32)
    for factor in (0.8, 1.25):
        samples = heard(tone, speed=[factor])
        assert abs(len(samples) - 8000 / factor) <= 2
        peak = np.abs(np.fft.rfft(samples)).argmax() * 8000 / len(samples)
        assert abs(peak - 400 * factor) < 2


def test_noise_has_the_ratio_that_is_asked_for():
    samples = sound(20000)
    ratios = []
    for seed in range(20):
        noise = heard(samples, seed=seed, noise_snr=10) - samples
        ratios.append(10 * np.log10((samples**2).sum() / (noise**2).sum()))
    assert 9.9 < min(ratios) < 15 and 25 < max(ratios) < 30.1
    assert not heard(np.zeros(100, dtype=np.float32), noise_snr=10).any()  # of silence there is no ratio


def test_volume_and_silence_in_front():
    samples = sound(2000) + 1
    gains = [20 * np.log10(heard(samples, seed=seed, volume=6)[0] / samples[0]) for seed in range(30)]
    assert -6.01 < min(gains) < -3 and 3 < max(gains) < 6.01
    for seed in range(5):
        later = heard(samples, seed=seed, shift=0.1)
        added = len(later) - 2000
        assert 0 <= added <= 800 and not later[:added].any() and np.array_equal(later[added:], samples)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("C4 E4 G4", ("speed", "masks")),
        ("F#5", ("speed", "masks")),
        ("What is the highest note?", ("speed", "masks")),
        ("How many notes are there?", ("speed", "masks")),
        ("Is it loud?", ("volume", "noise")),
        ("how long is it?", ("speed", "masks", "shift")),
        ("she said seven of us went to b", ()),
    ],
)
def test_no_change_makes_what_is_heard_wrong(text, wrong):
    samples = sound(4000)
    for name, value in {"speed": [0.8], "volume": 6.0, "noise_snr": 0.0, "shift": 0.2}.items():
        result = heard(samples, text, **{name: value})
        is_same = len(result) == len(samples) and np.allclose(result, samples)
        assert is_same == (name.removesuffix("_snr") in wrong), name
    config = AugmentationConfig(audio=AudioAugmentationConfig(time_masks=1, frequency_masks=1))
    masked = Augmenter(config, PROCESSOR.tokenizer, {"audio": 8000}).mask(
        "audio", torch.ones(16, 50), text, np.random.default_rng(1)
    )
    assert bool((masked == 1).all()) == ("masks" in wrong)


def test_masks_hide_bands_and_stretches():
    config = AudioAugmentationConfig(time_masks=2, time_mask_frames=30, frequency_masks=1, frequency_mask_bins=4)
    shares = []
    for seed in range(50):
        with torch_seeded_by(np.random.default_rng(seed)):
            hidden = mask_spectrogram(torch.ones(16, 40), config) == 0
        bins, frames = hidden.all(1), hidden.all(0)
        assert torch.equal(hidden, bins[:, None] | frames[None])
        assert bins.sum() <= 3 and len(list(groupby(bins.tolist()))) <= 3
        assert frames.sum() <= 20 and len(list(groupby(frames.tolist()))) <= 5
        shares.append(hidden.float().mean())
    assert 0.1 < np.mean(shares) < 0.5


# --------------------------------------------------------------------------------------------------------------- texts

WORDS = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 200, 400)


def hide(text, seed=0, label_from=0, **options):
    """Which tokens are hidden, the ids, and what is shown."""
    ids = np.array([WORDS.bos_token_id, *WORDS(text).input_ids, WORDS.eos_token_id], dtype=np.int32)
    is_label = np.arange(len(ids)) >= max(1, label_from)
    shown = TextNoise(TextAugmentationConfig(**options), WORDS)(ids, is_label, np.random.default_rng(seed))
    assert set(shown[shown != ids].tolist()) <= {WORDS.pad_token_id}
    return shown != ids, ids


def test_words_are_hidden_whole_and_as_often_as_asked():
    text = "the quick brown fox jumps over the lazy dog and xyz " * 40
    hidden, ids = hide(text, word_drop=0.3)
    tokens = WORDS.convert_ids_to_tokens(ids[1:-1].tolist())
    starts = [place for place, token in enumerate(tokens) if token.startswith("Ġ")]
    of_words = [set(hidden[1:-1][start:stop].tolist()) for start, stop in pairwise(starts)]
    assert all(len(word) == 1 for word in of_words) and max(map(len, tokens)) < 8 < len("Ġandxyz") + 2
    assert 0.22 < np.mean([word == {True} for word in of_words]) < 0.38
    assert not hidden[0] and not hidden[-1]


def test_questions_and_special_tokens_are_never_hidden():
    hidden, ids = hide("the quick brown fox", label_from=3, word_drop=1.0)
    assert hidden.tolist() == [False] * 3 + [True] * (len(ids) - 4) + [False]


def test_labels_stay_and_epochs_differ():
    source = SourceConfig("generated", task="stories", num_rows=30)
    options = AugmentationConfig(text=TextAugmentationConfig(word_drop=0.5))
    config = DataConfig(train=[source], validation=VALIDATION, block_size=64, augmentation=options)
    plain = build_datasets(DataConfig(train=[source], validation=VALIDATION, block_size=64), WORDS).train
    noisy = build_datasets(config, WORDS)
    for index in range(3):
        assert torch.equal(noisy.train[index]["labels"], plain[index]["labels"])
        first = noisy.train[index]["input_ids"]
        different = first != plain[index]["input_ids"]
        assert 5 < different.sum() < 55 and (first[different] == WORDS.pad_token_id).all()
    noisy.train.set_epoch(1)
    assert not torch.equal(noisy.train[2]["input_ids"], first)
    source.augment = False
    untouched = build_datasets(config, WORDS).train
    assert torch.equal(untouched[2]["input_ids"], plain[2]["input_ids"])


# ---------------------------------------------------------------------------------------------------------------- rows


def folder(path, kind, texts):
    path.mkdir()
    for number in range(len(texts)):
        if kind == "imagefolder":
            picture(24, 16, number).save(path / f"{number}.png")
        else:
            (path / f"{number}.wav").write_bytes(audio_file(sound(3000 + 100 * number, number)))
    ending = "png" if kind == "imagefolder" else "wav"
    rows = [{"file_name": f"{number}.{ending}", "text": text} for number, text in enumerate(texts)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(kind, path=str(path))


EVERYTHING = AugmentationConfig(
    image=ImageAugmentationConfig(crop=0.5, flip=0.5, colour=0.3),
    audio=AudioAugmentationConfig(
        speed=[0.8, 0.9, 1.1], noise_snr=10, volume=6, shift=0.1, time_masks=1, frequency_masks=1
    ),
    text=TextAugmentationConfig(word_drop=0.2),
)


def media(row):
    return torch.cat([tensor.flatten() for tensors in row["media"].values() for tensor in tensors])


@pytest.mark.parametrize("kind", ["imagefolder", "audiofolder"])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_a_function_of_seed_epoch_and_index(tmp_path, kind, packing):
    """In any order, in workers that stay alive too; validation and the generators of the process stay what they are."""
    source = folder(tmp_path / "it", kind, [f"thing {number}" for number in range(8)])
    other = folder(tmp_path / "other", kind, ["another"] * 2)
    fields = {"train": [source], "validation": [other], "block_size": 80, "packing": packing}
    plain = build_datasets(DataConfig(**fields), PROCESSOR)
    config = DataConfig(**fields, augmentation=EVERYTHING)
    first, second = (build_datasets(config, PROCESSOR, seed=seed) for seed in (0, 1))
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    rows = {}
    for epoch in (0, 1, 0):
        first.train.set_epoch(epoch)
        for index in reversed(range(len(first.train))):
            row = media(first.train[index])
            assert torch.equal(row, rows.setdefault((epoch, index), row))
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    for index in range(min(len(built.train) for built in (first, second, plain))):
        variants = [rows[0, index], rows[1, index], media(second.train[index]), media(plain.train[index])]
        assert not any(torch.equal(variants[0], variant) for variant in variants[1:])
        assert packing or len(first.train[index]["input_ids"]) <= first.train.lengths[index]
    loader = DataLoader(first.train, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        first.train.set_epoch(epoch)
        for index, row in enumerate(loader):  # a worker has one thread, and may add up in another order
            torch.testing.assert_close(media(row), rows[epoch, index], atol=1e-5, rtol=1e-5)
    for name in plain.validation:
        pairs = zip(plain.validation[name], first.validation[name], strict=True)
        assert all(torch.equal(media(ours), media(theirs)) for ours, theirs in pairs)


def test_room_is_left_for_recordings_that_get_longer(tmp_path, caplog):
    """Packed by the most tokens they may have, so that no row overflows, and none is left out."""
    source = folder(tmp_path / "it", "audiofolder", [f"thing {number}" for number in range(8)])
    config = DataConfig(train=[source], validation=VALIDATION, block_size=90, augmentation=EVERYTHING)
    rows = build_datasets(config, PROCESSOR).train
    for epoch in range(20):
        rows.set_epoch(epoch)
        texts = [PROCESSOR.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows]
        assert sorted("".join(texts).split("<|end|>")[:-1]) == [f"thing {number}" for number in range(8)]
    assert "bad row" not in caplog.text


def test_a_row_that_comes_twice_in_an_epoch_differs(tmp_path):
    source = folder(tmp_path / "it", "imagefolder", ["thing"] * 3)
    config = DataConfig(train=[source], validation=VALIDATION, augmentation=EVERYTHING, packing=False)
    rows = build_datasets(config, PROCESSOR).train
    mixture = MixtureDataset([rows, torch.utils.data.TensorDataset(torch.zeros(9))], [1, 1], seed=0)
    drawn = [media(row) for row in (mixture[index] for index in range(len(mixture))) if isinstance(row, dict)]
    assert len(drawn) == 9
    assert not any(torch.equal(one, other) for place, one in enumerate(drawn) for other in drawn[:place])


def test_generated_media_are_as_their_task_makes_them():
    sources = [SourceConfig("generated", task=task, num_rows=4) for task in ("scenes", "melody_questions")]
    fields = {"train": sources, "validation": VALIDATION, "packing": False}
    plain = build_datasets(DataConfig(**fields), PROCESSOR).train
    rows = build_datasets(DataConfig(**fields, augmentation=EVERYTHING), PROCESSOR).train
    for index in range(len(plain)):
        assert torch.equal(media(rows[index]), media(plain[index]))
        assert torch.equal(rows[index]["input_ids"], plain[index]["input_ids"])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ImageAugmentationConfig, {"crop": 0.0}, "crop is 0.0"),
        (ImageAugmentationConfig, {"colour": 1.1}, "colour is 1.1; give 0 to 1"),
        (AudioAugmentationConfig, {"speed": [0.4]}, "speed has 0.4"),
        (AudioAugmentationConfig, {"noise_snr": 101}, "noise_snr is 101"),
        (AudioAugmentationConfig, {"time_mask_frames": 0}, "time_mask_frames is 0; give at least 1"),
        (TextAugmentationConfig, {"word_drop": 1.6}, "word_drop is 1.6; give 0 to 1"),
    ],
)
def test_options_out_of_range_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_no_change_pushes_the_end_of_a_recording_beyond_what_is_read():
    """Its text would say what is not heard any more."""
    config = AugmentationConfig(audio=AudioAugmentationConfig(speed=[0.5], shift=1.0))
    augmenter = Augmenter(config, PROCESSOR.tokenizer, {"audio": 8000}, {"audio": 16000})
    for length, longest in ((16000, 16000), (12000, 16000), (4000, 16000)):
        samples = np.linspace(0.1, 0.5, length, dtype=np.float32)
        for seed in range(5):
            changed = augmenter.change("audio", samples, "good morning", np.random.default_rng(seed))
            assert length <= len(changed) <= longest
            assert length < 8000 or np.array_equal(changed[-length:], samples)  # else it would be slowed down
