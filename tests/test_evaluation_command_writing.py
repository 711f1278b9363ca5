"""`python -m evaluation` on a model that writes images and sound."""

import json

import pytest
import torch
import yaml
from PIL import Image

from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets, build_examples
from evaluation.__main__ import main, split_by_answer
from evaluation.checks import CHECKS, check_scene
from evaluation.classifiers import ClassifierConfig, LabelledMedia, load_classifier, save_classifier, train_classifier
from tests.tiny_artist import CODES, artist_processor, save_artist, tiny_artist, write_codes

SOURCES = [
    {"kind": "generated", "task": "drawings", "num_rows": 40},
    {"kind": "generated", "task": "tunes", "num_rows": 40, "difficulty": [2, 3]},
    {"kind": "generated", "task": "scenes", "num_rows": 40, "direction": ["image -> text", "text -> image"]},
    {"kind": "generated", "task": "addition", "num_rows": 40, "difficulty": [1, 1]},
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as pretrain.py leaves it."""
    folder = save_artist(tmp_path_factory.mktemp("run"))
    config = {"data": {"block_size": 256, "train": SOURCES}, "training": {"output_dir": "unused", "seed": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A classifier of colours that has seen a few plain pictures."""
    colours = {"red": (220, 40, 40), "blue": (50, 80, 220)}
    media = LabelledMedia([Image.new("RGB", (32, 32), colour) for colour in colours.values()] * 2, list(colours) * 2)
    folder = tmp_path_factory.mktemp("classifiers") / "colours"
    save_classifier(train_classifier(ClassifierConfig("image", list(colours)), media, media, num_epochs=1), folder, {})
    return folder


def run(folder, output, *flags):
    argv = [folder, "--num-steps", 1, 3, "--limit", 4, "--max-new-tokens", 4, "--output", output, *flags]
    assert main([str(argument) for argument in argv]) == 0
    return json.loads((output / "depth.json").read_text())["rows"]


def test_what_is_written_is_checked_by_source_and_depth(run_folder, classifier_folder, tmp_path, capsys):
    """Against one by one; the exact scores of texts are of those sources, and of those rows, that answer with text."""
    network = torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten()))  # 12 features
    torch.jit.save(network, tmp_path / "pixels.pt")
    flags = ["--classifier", classifier_folder, "--round-trip", "--guidance-scale", 1.5, "--num-flow-steps", 3]
    flags += ["--feature-network", tmp_path / "pixels.pt"]
    rows = run(run_folder, tmp_path, *flags)
    out = capsys.readouterr().out
    assert set(rows[0]["sources"]) == {"drawings", "tunes", "scenes", "addition"}
    assert set(rows[0]["exact_match"]) == set(rows[0]["generated"]) == {"scenes", "addition"}
    assert rows[0]["exact_match"]["scenes"]["num_examples"] == 2

    content = json.loads((tmp_path / "media.json").read_text())
    assert content["generate"] == {"guidance_scale": 1.5, "num_flow_steps": 3}
    assert [row["num_steps"] for row in content["rows"]] == [1, 3]
    deep = content["rows"][1]["sources"]
    assert {name: scores["num_examples"] for name, scores in deep.items()} == {"drawings": 4, "tunes": 4, "scenes": 2}
    assert set(deep["tunes"]["checks"]) == {"note1", "note2", "note3", "length", "all"}
    assert content["real"]["drawings"]["all"] == content["real"]["tunes"]["all"] == 1.0
    assert deep["drawings"]["classified"]["colours"]["digest"] == load_classifier(classifier_folder).digest
    assert deep["drawings"]["distances"]["pixels.pt"]["kernel_distance"] > 0
    assert deep["tunes"]["classified"] == deep["tunes"]["distances"] == {}
    assert deep["drawings"]["round_trip"]["num_examples"] == 4

    model, processor = tiny_artist(), artist_processor()
    data = DataConfig(train=[SourceConfig(**source) for source in SOURCES], block_size=256)
    right = []
    for seed, example in enumerate(build_examples(data.train[0], data, processor, 4, seed=5)):
        output = model.generate(
            torch.tensor([example["prompt_ids"]]),
            num_steps=3,
            generation_mode="image",
            flow_seeds=[seed],
            guidance_scale=1.5,
            num_flow_steps=3,
        )
        right.append(check_scene(example["prompt"], output.images[0]))
    for name in ("number", "colour", "all"):
        assert deep["drawings"]["checks"][name] == sum(found[name] for found in right) / 4
    assert "Drawn for drawings (4):" in out and "Played for tunes (4):" in out and " round trip | " in out
    for name in ("drawings", "tunes", "scenes"):
        assert (tmp_path / f"media_{name}.png").stat().st_size > 5000


def test_exits_read_the_last_steps_where_that_is_asked_for(run_folder, tmp_path):
    options = {"exit_criterion": "latent_difference", "velocity_threshold": 0.9, "cache_policy": "last"}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    drawings = "--data.validation", json.dumps([SOURCES[0]])
    run(run_folder, tmp_path, "--no-texts", "--batch-size", 1, "--num-steps", 4, *flags, *drawings)
    content = json.loads((tmp_path / "media.json").read_text())
    assert content["generate"] == options

    model, processor = tiny_artist(), artist_processor()
    data = DataConfig(train=[SourceConfig(**SOURCES[0])], block_size=256)
    steps = []
    for seed, example in enumerate(build_examples(data.train[0], data, processor, 4, seed=5)):
        prompt = torch.tensor([example["prompt_ids"]])
        output = model.generate(prompt, num_steps=4, generation_mode="image", flow_seeds=[seed], **options)
        steps += [float(step) for step in output.exit_steps.flatten() if step >= 0]
    (found,) = content["rows"][0]["sources"].values()
    assert found["mean_steps"] == pytest.approx(sum(steps) / len(steps))


def test_images_that_are_tokens(tmp_path, monkeypatch, capsys):
    """Against drawing them one by one, from the number of the example."""
    write_codes(monkeypatch)
    folder = save_artist(tmp_path / "run", CODES)
    source = {"kind": "generated", "task": "drawings", "num_rows": 40, "direction": "text -> image"}
    config = {"data": {"block_size": 256, "train": [source]}, "training": {"output_dir": "unused", "seed": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    deep = run(folder, tmp_path / "out", "--no-texts", "--batch-size", 1)[1]
    content = json.loads((tmp_path / "out" / "media.json").read_text())

    model, processor = tiny_artist(image=CODES), artist_processor(CODES)
    data, pictures = DataConfig(train=[SourceConfig(**source)], block_size=256), []
    rows = build_datasets(data, processor, seed=5).validation["drawings"]
    batch = Collator(processor)([rows[number] for number in range(len(rows))])
    with torch.no_grad():
        loss = model(**{name: value for name, value in batch.items() if name != "modality_ids"}, num_steps=3).loss
    assert deep["modalities"]["written_image"]["losses"]["loss"] == pytest.approx(float(loss), rel=1e-4)
    examples = build_examples(data.train[0], data, processor, 4, seed=5)
    for seed, example in enumerate(examples):
        ids = torch.tensor([example["prompt_ids"]])
        torch.manual_seed(seed)
        drawn = model.generate(ids, num_steps=3, do_sample=True, top_k=0, max_new_tokens=17)[:, ids.shape[1] :]
        pictures += model.decode_image_tokens(drawn)
    right = [check_scene(example["prompt"], picture) for example, picture in zip(examples, pictures, strict=True)]
    found = content["rows"][1]["sources"]["drawings"]["checks"]
    assert found == {name: sum(one[name] for one in right) / 4 for name in right[0]}
    assert "Drawn for drawings (4):" in capsys.readouterr().out


def test_without_media_none_are_written(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluation.__main__.media_table", None)
    run(run_folder, tmp_path, "--no-media", "--no-texts")
    assert "Drawn" not in capsys.readouterr().out and not (tmp_path / "media.json").exists()


def test_rows_are_divided_by_what_answers_them():
    kinds = ["image", "written_image", "written_audio", "written_image"]
    mixed = [{"modality": kind, "number": number} for number, kind in enumerate(kinds)]
    texts, media = split_by_answer({"mixed": mixed, "plain": [{"number": 0}], "drawn": mixed[1:2]})
    assert {name: [row["number"] for row in rows] for name, rows in texts.items()} == {"mixed": [0], "plain": [0]}
    assert {name: [row["number"] for row in rows] for name, rows in media.items()} == {
        "mixed written_image": [1, 3],
        "mixed written_audio": [2],
        "drawn": [1],
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--classifier", "nowhere"],
            "nowhere holds no classifier (classifier.json is missing): give a folder that",
        ),
        (["--num-flow-steps", "0"], "argument --num-flow-steps: 0 is less than 1"),
        (["--guidance-scale", "-1"], "argument --guidance-scale: -1 is less than 0: give a number, 0 or more."),
        (["--exit-threshold", "0.1"], "--exit-threshold has no effect without --exit-criterion"),
        (
            ["--exit-criterion", "cosine", "--exit-threshold", "0.1", "0.2"],
            "several --exit-threshold are for --efficiency, and media take one: give one, or --no-media.",
        ),
        (
            ["--efficiency", "--exit-criterion", "cosine", "--exit-threshold", "3"],
            "exit_threshold of cosine must be above 0 and at most 2.0, got 3.0",
        ),
        (["--velocity-threshold", "0.1"], "--velocity-threshold has no effect without --exit-criterion"),
    ],
)
def test_bad_arguments_are_one_line(run_folder, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([str(run_folder), "--output", str(tmp_path / "out"), *argv])
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == "" and found.err.count("\n") == 1
    assert message in found.err and not (tmp_path / "out").exists()


def test_every_generated_task_that_is_written_has_a_check():
    from dataset_loading import MEDIA_TASKS

    written = {name for name, task in MEDIA_TASKS.items() if any("text ->" in it for it in task.directions)}
    assert written == set(CHECKS)
