"""Classifiers of written media: they learn labels, are saved whole, and count by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.classifiers import (
    ClassifierConfig,
    LabelledMedia,
    classify_media,
    label_in,
    load_classifier,
    perturbed,
    save_classifier,
    train_classifier,
)
from evaluation.distances import frechet_distance

SHADES = {"dark": 60, "bright": 190, "middle": 125}


def picture(label, seed):
    """20 x 24 pixels, a little of all shades."""
    noise = np.random.default_rng(seed).normal(SHADES[label], 25, (24, 20, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def recording(label, seed):
    """A tone, some samples shorter or longer than the classifier hears."""
    random = np.random.default_rng(seed)
    time = np.arange(random.integers(1200, 2200)) / 4000
    frequency = {"low": 300, "high": 900}[label] * random.uniform(0.9, 1.1)
    return 0.3 * np.sin(2 * np.pi * frequency * time) + random.normal(0, 0.01, len(time)), 4000


def labelled(make, labels, count, start=0):
    names = [labels[number % len(labels)] for number in range(count)]
    return LabelledMedia([make(name, start + number) for number, name in enumerate(names)], names)


PICTURES = ClassifierConfig("image", list(SHADES), image_size=16)
RECORDINGS = ClassifierConfig("audio", ["high", "low"], sampling_rate=4000, seconds=0.4)


@pytest.fixture(scope="module")
def classifiers():
    """One of pictures and one of recordings."""
    torch.manual_seed(0)
    of_pictures = train_classifier(
        PICTURES, labelled(picture, list(SHADES), 96), labelled(picture, list(SHADES), 30, 1000), 6, batch_size=16
    )
    of_recordings = train_classifier(
        RECORDINGS, labelled(recording, ["high", "low"], 64), labelled(recording, ["high", "low"], 20, 1000), 4, 16
    )
    return {"shade": of_pictures, "height": of_recordings}


def test_classifiers_learn_what_they_are_shown(classifiers):
    assert classifiers["shade"].real_accuracy >= 0.95 and classifiers["height"].real_accuracy >= 0.95
    assert classifiers["shade"].real_features.shape == (96, 64) and classifiers["shade"].held_out_features.shape == (
        30,
        64,
    )


def test_training_depends_on_the_seed_alone_and_leaves_the_generator_as_it_was():
    train, held_out = labelled(picture, list(SHADES), 12), labelled(picture, list(SHADES), 6, 50)
    before = torch.get_rng_state()
    one = train_classifier(PICTURES, train, held_out, 1, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    other, third = (train_classifier(PICTURES, train, held_out, 1, seed=seed) for seed in (4, 5))
    assert torch.equal(one.head.weight, other.head.weight) and torch.equal(one.real_features, other.real_features)
    assert not torch.equal(one.head.weight, third.head.weight)


def test_features_are_kept_of_some_media_in_random_order(monkeypatch):
    """Of files that are sorted by what they show, not the first alone."""
    monkeypatch.setattr("evaluation.classifiers.MOST_FEATURES", 8)
    train = labelled(picture, list(SHADES), 30)
    classifier = train_classifier(PICTURES, train, labelled(picture, list(SHADES), 6, 50), 1)
    every = classifier.features(train.media)
    kept = [(row - every).abs().sum(dim=1).argmin().item() for row in classifier.real_features]
    assert len(set(kept)) == 8 and kept != sorted(kept) and max(kept) > 15
    assert len(classifier.held_out_features) == 6


def test_what_is_heard_does_not_depend_on_volume_and_is_around_the_middle(classifiers):
    classifier, (samples, rate) = classifiers["height"], recording("high", 0)
    heard = classifier.prepare((samples, rate))
    assert heard.min() >= -1 and heard.max() == 1
    torch.testing.assert_close(classifier.prepare((samples * 0.2, rate)), heard, atol=1e-3, rtol=0)
    around = np.concatenate((np.zeros(500), samples, np.zeros(500)))
    torch.testing.assert_close(classifier.prepare((around, rate)), heard, atol=1e-3, rtol=0)
    finer = np.interp(np.arange(len(samples) * 2) / 2, np.arange(len(samples)), samples)
    assert classifier.labels(classifier.features([(finer, 2 * rate)])) == ["high"]  # another rate is resampled


def test_media_are_moved_within_an_eighth_and_sounds_in_time_alone():
    torch.manual_seed(0)
    rows = torch.arange(16.0).view(1, 1, 16, 1).expand(40, 1, 16, 24)
    still = perturbed(rows, "audio").round()
    assert torch.equal(still, rows)
    offsets = (perturbed(rows, "image").mean(dim=(1, 3))[:, 8] - 8).round().int()
    assert set(offsets.tolist()) == {-2, -1, 0, 1, 2}


def test_saved_is_loaded_with_its_digest(classifiers, tmp_path):
    digest = save_classifier(classifiers["shade"], tmp_path / "shade", {"data": "somewhere"})
    loaded, media = load_classifier(tmp_path / "shade"), [picture("dark", 7), picture("bright", 8)]
    assert torch.equal(loaded.features(media), classifiers["shade"].features(media))
    assert torch.equal(loaded.held_out_features, classifiers["shade"].held_out_features)
    assert loaded.config == PICTURES and loaded.real_accuracy == classifiers["shade"].real_accuracy
    content = json.loads((tmp_path / "shade" / "classifier.json").read_text())
    assert content["digest"] == loaded.digest == digest and content["data"] == "somewhere"


def test_a_classifier_of_an_earlier_version_is_read(classifiers, tmp_path):
    save_classifier(classifiers["shade"], tmp_path, {})
    content = json.loads((tmp_path / "classifier.json").read_text())
    content["config"]["medium"] = content["config"].pop("modality")
    (tmp_path / "judge.json").write_text(json.dumps(content))
    (tmp_path / "classifier.json").unlink()
    (tmp_path / "classifier.safetensors").rename(tmp_path / "judge.safetensors")
    assert load_classifier(tmp_path).config == PICTURES


def test_a_folder_that_is_no_classifier_is_refused(classifiers, tmp_path):
    with pytest.raises(ValueError, match=r"holds no classifier \(classifier.json is missing\): give a folder that "):
        load_classifier(tmp_path)
    save_classifier(classifiers["shade"], tmp_path, {})
    weights = tmp_path / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"has digest .*, where classifier.json says .*: train the classifier again"):
        load_classifier(tmp_path)


def test_judging_counts_what_was_asked_for(classifiers):
    """Four prompts with a label: two right, one wrong, one without a medium; and one that names none."""
    classifier = classifiers["shade"]
    prompts = ["a dark wall", "Bright!", "something dark", "a dark one", "a wall"]
    media = [picture("dark", 1), picture("bright", 2), picture("bright", 3), None, picture("middle", 4)]
    scores = classify_media(classifier, prompts, media)
    assert (scores.num_examples, scores.accuracy) == (4, 0.5)
    assert scores.real_accuracy == classifier.real_accuracy
    features = classifier.features([medium for medium in media if medium is not None])
    assert scores.frechet_distance == frechet_distance(classifier.real_features, features)
    held_out = classifier.held_out_features[:4]  # as many as were written
    assert scores.real_frechet_distance == frechet_distance(classifier.real_features, held_out)
    assert classify_media(classifier, ["a wall"], [picture("dark", 1)]) is None
    few = classify_media(classifier, ["a dark wall"], [None])
    assert few.accuracy == 0 and few.frechet_distance is None and few.kernel_distance is None


def test_labels_are_found_as_whole_words():
    labels = ["one", "two", "twenty two", "o.k."]
    assert label_in("Say TWO", labels) == "two"
    assert label_in("someone says two", labels) == "two"
    assert label_in("twenty two", labels) == "twenty two"
    assert label_in("one or two", labels) is None and label_in("none", labels) is None
    assert label_in("all is o.k. now", labels) == "o.k."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "video"}, "a classifier of 'video' is unknown; choose image or audio"),
        ({"labels": ["one"]}, "a classifier has labels .*; give at least two"),
        ({"image_size": 8}, "image_size of a classifier is 8; give at least 16"),
        ({"seconds": 0.0}, "seconds of a classifier is 0.0; give at least 0.2"),
    ],
)
def test_classifiers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**{"modality": "image", "labels": ["a", "b"], **options})


def test_media_that_cannot_be_learned():
    train = labelled(picture, ["dark", "bright"], 4)
    with pytest.raises(ValueError, match="0 labelled media; a classifier needs at least two"):
        train_classifier(PICTURES, LabelledMedia(), train)
    with pytest.raises(ValueError, match="label 'pink' is none of dark, bright, middle"):
        train_classifier(PICTURES, train, LabelledMedia(train.media, ["dark", "bright", "pink", "dark"]))
