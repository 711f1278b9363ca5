"""The command that trains classifiers of media."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation.classifiers import load_classifier
from evaluation.train_classifier import main
from tests.tiny_processor import audio_file

COLOURS = {"red": (200, 40, 40), "blue": (40, 60, 210)}


def write_pictures(folder, count, start=0):
    """An imagefolder: noisy pictures of one colour each, and a column with that."""
    folder.mkdir()
    lines = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 2]
        pixels = np.random.default_rng(start + number).normal(colour, 20, (20, 20, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}", "colour": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_sounds(folder, count):
    """An audiofolder: tones of two frequencies, as text "low" and "high"."""
    folder.mkdir()
    lines = []
    for number in range(count):
        name, frequency = [("low", 300), ("high", 1100)][number % 2]
        random = np.random.default_rng(number)
        time = np.arange(random.integers(1600, 2400)) / 8000
        samples = 0.3 * np.sin(2 * np.pi * frequency * random.uniform(0.9, 1.1) * time)
        (folder / f"{number}.wav").write_bytes(audio_file(samples))
        lines.append(json.dumps({"file_name": f"{number}.wav", "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def run(*argv):
    assert main([str(argument) for argument in argv]) == 0


def test_a_classifier_of_pictures_is_trained_on_a_column_and_measured_on_another_folder(tmp_path, capsys):
    train, other = write_pictures(tmp_path / "train", 48), write_pictures(tmp_path / "other", 10, 100)
    flags = ["--modality", "image", "--label-column", "colour", "--image-size", 16, "--epochs", 12]
    run(train, *flags, "--validation", other, "--output", tmp_path / "colours")
    classifier, content = (
        load_classifier(tmp_path / "colours"),
        json.loads((tmp_path / "colours" / "classifier.json").read_text()),
    )
    assert classifier.config.labels == ["blue", "red"] and classifier.config.image_size == 16
    assert classifier.real_accuracy >= 0.9
    assert (content["num_train"], content["num_held_out"], content["label_column"]) == (48, 10, "colour")
    out = capsys.readouterr().out
    assert "of 10 media held out have the right one of 2 labels" in out and classifier.digest in out
    pictures = [Image.new("RGB", (30, 30), colour) for colour in COLOURS.values()]
    assert classifier.labels(classifier.features(pictures)) == ["red", "blue"]


def test_a_classifier_of_recordings_holds_a_tenth_back(tmp_path, capsys):
    folder = write_sounds(tmp_path / "sounds", 40)
    run(folder, "--modality", "audio", "--epochs", 6, "--output", tmp_path / "height")
    content = json.loads((tmp_path / "height" / "classifier.json").read_text())
    assert (content["num_train"], content["num_held_out"]) == (36, 4)
    assert content["config"]["labels"] == ["high", "low"] and 0.25 < content["config"]["seconds"] <= 0.3
    assert "of 4 media held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--modality", "image"], "nowhere"),
        (["{data}", "--modality", "video"], "argument --modality: invalid choice: 'video'"),
        (["{data}", "--modality", "image", "--label-column", "shape"], "'shape'"),
        (["{data}", "--modality", "image", "--epochs", "0"], "argument --epochs: 0 is less than 1"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, argv, message):
    data = write_pictures(tmp_path / "data", 4)
    with pytest.raises(SystemExit) as stop:
        main([*(argument.format(data=data) for argument in argv), "--output", str(tmp_path / "out")])
    found = capsys.readouterr()
    *warnings, error = found.err.splitlines()  # of rows that cannot be used
    assert stop.value.code == 2 and found.out == "" and error.startswith("evaluation.train_classifier: error: ")
    assert message in found.err and all("skipped a bad row" in line for line in warnings)
