"""Pictures and sound written at several depths: counted by hand, with a model that writes what the test tells it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import PreTrainedConfig

from evaluation.answers import AnswerGenerator
from evaluation.classifiers import ClassifierConfig, ClassifierScores
from evaluation.distances import FeatureDistances
from evaluation.intervals import wilson_interval
from evaluation.media_generation import MediaGenerator, MediaSample, RoundTrip, media_table, modality_of
from evaluation.plots import plot_source, save_contact_sheet, spectrogram_levels
from evaluation.results import save_media_table
from evaluation.tables import media_markdown
from tests.tiny_processor import tiny_processor

GREY = [Image.new("RGB", (16, 16), (value, value, value)) for value in range(0, 200, 10)]


def level(picture):
    return picture.getpixel((0, 0))[0]


def bright(picture):
    return {"bright": level(picture) >= 100, "all": level(picture) >= 100}


def loud(recording):
    samples, rate = recording
    assert rate == 8000
    return {"loud": bool(np.abs(samples).max() > 0.5), "all": bool(np.abs(samples).max() > 0.5)}


class Painter(torch.nn.Module):
    """Writes GREY[core steps + seed], nothing for seed 3, or as loud a sound; and reads how bright a picture is."""

    device, dtype, config = torch.device("cpu"), torch.float32, PreTrainedConfig()

    def __init__(self):
        super().__init__()
        self.calls = []

    def generate(self, input_ids, attention_mask, do_sample, eos_token_id, pad_token_id, **options):
        assert not do_sample and not self.training and (input_ids[attention_mask == 0] == pad_token_id).all()
        self.calls.append({"rows": len(input_ids), **options})
        if "generation_mode" not in options:
            answers = [tiny_processor().tokenizer("p1", add_special_tokens=False).input_ids for _ in input_ids]
            return torch.cat((input_ids, torch.tensor(answers)), dim=1)
        depth, kind = options.get("num_steps") or 0, options["generation_mode"]
        segments, images, audio = [], [], []
        for seed in options["flow_seeds"]:
            media = images if kind == "image" else audio
            segments.append([] if seed == 3 else [("text", [5]), (kind, len(media))])
            if seed != 3:
                media.append(GREY[depth + seed] if kind == "image" else torch.full((400,), (depth + seed) / 10))
        steps = torch.tensor([[depth, 0], [1, 1]])[: len(input_ids)]
        return SimpleNamespace(images=images, audio=audio, segments=segments, sampling_rate=8000, exit_steps=steps)


def examples(kind, count, check):
    """Prompts p0, p1, ..., of several lengths."""
    reference = GREY[15] if kind == "image" else (np.full(400, 0.9, np.float32), 8000)
    return [
        {"prompt_ids": [1, *range(5, 6 + number)], "media": {}, "modality": f"written_{kind}", "prompt": f"p{number}",
         "reference": reference, "check": check}
        for number in range(count)
    ]  # fmt: skip


def cells_of(text):
    """The columns of a table in Markdown, by their names."""
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return dict(zip(header, map(list, zip(*lines, strict=True)), strict=True))


def table(depths=(4, 8), classifiers=None, options=None, round_trip=None, networks=None, **sources):
    model, writer = Painter(), MediaGenerator(AnswerGenerator(tiny_processor(), 8), options)
    found = media_table(model, list(depths), sources, writer, classifiers, round_trip, 2, networks)
    assert model.training  # as it was
    return found, model


def test_checks_are_counted_by_source_and_depth():
    """At depth r, seed s gives level 10 (r + s), of which 100 and more is bright; the fourth is missing, and not."""
    found, _ = table(pictures=examples("image", 5, bright), sounds=examples("audio", 2, loud))
    shallow, deep = found.rows
    assert (shallow.num_steps, deep.num_steps) == (4, 8)
    assert shallow.sources["pictures"].checks == {"bright": 0.0, "all": 0.0}
    assert deep.sources["pictures"].checks == {"bright": 2 / 5, "all": 2 / 5}
    assert shallow.sources["sounds"].checks == {"loud": 0.0, "all": 0.0}
    assert deep.sources["sounds"].checks["all"] == 1.0
    assert found.real == {"pictures": {"bright": 1.0, "all": 1.0}, "sounds": {"loud": 1.0, "all": 1.0}}
    scores = deep.sources["pictures"]
    assert scores.modality == "image" and scores.num_examples == 5 and scores.milliseconds > 0
    assert scores.classified == {} and scores.round_trip is None and scores.mean_steps is None


def test_seeds_are_those_of_the_examples_whatever_the_batches():
    _, model = table(depths=[4], options={"guidance_scale": 1.5}, pictures=examples("image", 5, None))
    first, *calls = model.calls
    assert first["flow_seeds"] == [0]  # before the clock runs
    assert [call["flow_seeds"] for call in calls] == [[0, 1], [2, 3], [4]]
    assert all(call["guidance_scale"] == 1.5 and call["num_steps"] == 4 for call in calls)


def test_a_model_without_a_core_is_called_without_a_depth():
    found, model = table(depths=[None], pictures=examples("image", 2, bright))
    assert all("num_steps" not in call for call in model.calls)
    assert "| no core |" in media_markdown(found)


def test_exits_are_counted_where_there_are_any():
    """Steps 4 and 1, 1 of the places that were computed, in each full batch; 4 in the last."""
    found, _ = table(depths=[4], options={"exit_criterion": "latent_difference"}, pictures=examples("image", 3, None))
    assert found.rows[0].sources["pictures"].mean_steps == (4 + 1 + 1 + 4) / 4
    assert cells_of(media_markdown(found))["mean steps"] == ["2.50", "-"]


class Coder(Painter):
    """Writes images as tokens: two codes after a start token, of which the first, less 10, is the level; from the
    second row on a code is missing.
    """

    def __init__(self):
        super().__init__()
        self.model = SimpleNamespace(writers={"image": SimpleNamespace(num_places=2)})

    def generate(self, input_ids, max_new_tokens, do_sample, top_k, **options):
        assert max_new_tokens == 3 and do_sample and top_k == 0 and "generation_mode" not in options
        self.drawn = torch.rand(1).item()
        new = [[6, 14, 12] if row == 0 else [6, 14, 3] for row in range(len(input_ids))]
        return torch.cat((input_ids, torch.tensor(new)), dim=1)

    def decode_image_tokens(self, ids):
        codes = ids[0][ids[0] >= 10] - 10
        if len(codes) != 2:
            raise ValueError(f"{len(codes)} codes")
        return [GREY[codes[0]]]


def test_images_that_are_tokens_are_drawn_by_plain_generate():
    model, writer = Coder(), MediaGenerator(AnswerGenerator(tiny_processor(), 8))
    before = torch.get_rng_state()
    media, steps = writer.write(model, examples("image", 2, None), 4, [5, 6])
    assert [medium and level(medium) for medium in media] == [40, None] and steps is None
    drawn = model.drawn
    writer.write(model, examples("image", 1, None), 4, [5])
    assert model.drawn == drawn and torch.equal(torch.get_rng_state(), before)
    writer.write(model, examples("image", 1, None), 4, [6])
    assert model.drawn != drawn


class Stub(torch.nn.Module):
    """Says how bright pictures are; its features are their levels."""

    config = ClassifierConfig("image", ["p0", "p1"])
    digest, real_accuracy = "abc", 0.75
    real_features = torch.tensor([[0.0, 1.0], [10.0, 2.0], [20.0, 0.0]])
    held_out_features = real_features + 1

    def features(self, media):
        return torch.tensor([[float(level(medium)), 1.0] for medium in media])

    def labels(self, features):
        return ["p0" if row[0] < 45 else "p1" for row in features]


def test_classifiers_classify_media_of_their_kind():
    found, _ = table(
        classifiers={"stub": Stub()}, pictures=examples("image", 3, None), sounds=examples("audio", 2, None)
    )
    shallow, deep = (row.sources["pictures"].classified["stub"] for row in found.rows)
    assert (shallow.num_examples, shallow.accuracy) == (2, 1.0)  # levels 40 and 50; no label is p2
    assert deep.accuracy == 0.5 and deep.real_accuracy == 0.75 and deep.digest == "abc"
    assert isinstance(deep, ClassifierScores) and deep.frechet_distance > shallow.frechet_distance > 0
    assert all(row.sources["sounds"].classified == {} for row in found.rows)


class Compared:
    """A network that says how many pictures it was given, and how bright the first are."""

    def distances(self, references, written):
        return FeatureDistances("abc", level(references[0]) / 10, None, len(written) / 10, level(written[0]) / 100)


def test_networks_compare_pictures_with_their_references():
    """The fourth is missing."""
    found, _ = table(
        networks={"net": Compared()}, pictures=examples("image", 5, None), sounds=examples("audio", 2, loud)
    )
    assert found.rows[0].sources["sounds"].distances == {}
    cells = cells_of(media_markdown(found).split("\n\n")[1])
    assert (cells["net Frechet"], cells["net KID"]) == (["15.000", "15.000", "-"], ["0.400", "0.400", "0.400"])


def test_what_is_written_is_read_back():
    """The model reads p1 in every picture; the fourth has none."""
    reader = RoundTrip(AnswerGenerator(tiny_processor(), 8), "what is it?")
    found, model = table(depths=[4], round_trip=reader, pictures=examples("image", 4, None))
    scores = found.rows[0].sources["pictures"].round_trip
    assert scores.num_examples == 4 and scores.exact_match == 1 / 4
    assert scores.character_error_rate == (1 + 0 + 1 + 2) / 8
    calls = [call for call in model.calls if "generation_mode" not in call]
    assert [call["rows"] for call in calls] == [2, 1] and calls[0]["pixel_values"].shape[0] == 2
    asked = reader.example("image", GREY[0], "p1")
    text = tiny_processor().tokenizer.decode(asked["prompt_ids"])
    assert text.endswith("<|image_end|>what is it?<|assistant|>")
    assert len(asked["input_ids"]) == len(asked["prompt_ids"]) + 2


def test_media_of_several_kinds_are_no_source():
    with pytest.raises(ValueError, match="examples ask for text, written_image; give those of one kind of medium"):
        modality_of([{"modality": "text"}, {"modality": "written_image"}])
    with pytest.raises(ValueError, match="Source 'none' has 0 rows to write media for"):
        table(none=[])


# The report


def test_the_table_has_a_line_for_each_depth_and_one_for_real_media():
    found, _ = table(
        classifiers={"stub": Stub()},
        round_trip=RoundTrip(AnswerGenerator(tiny_processor(), 8)),
        pictures=examples("image", 5, bright),
        sounds=examples("audio", 2, loud),
    )
    for row in found.rows:
        for scores in row.sources.values():
            scores.milliseconds = 2.0
    parts = media_markdown(found).split("\n\n")
    assert parts[0] == "Drawn for pictures (5):" and parts[2] == "Played for sounds (2):"
    none, half, whole = (
        f"{50 * right:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        for right, (low, high) in ((right, wilson_interval(right, 2)) for right in (0, 1, 2))
    )
    errors = "50.0 % (0.0 to 100.0)"  # of two texts: one right, one empty
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in parts[3].splitlines()]
    assert cells[0] == ["steps", "all", "loud", "round trip", "round trip WER", "ms"]
    assert cells[2:] == [
        ["4", none, none, half, errors, "2.0"],
        ["8", whole, whole, half, errors, "2.0"],
        ["real", "100.0 %", "100.0 %", "-", "-", "-"],
    ]
    header, _, shallow, deep, real = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in parts[1].splitlines()
    )
    assert header[:6] == ["steps", "all", "bright", "stub classifier", "stub Frechet", "stub KID"]
    shares = [[cell.split(" (")[0] for cell in line[:4]] for line in (shallow, deep)]
    assert shares == [["4", "0.0 %", "0.0 %", "100.0 %"], ["8", "40.0 %", "40.0 %", "50.0 %"]]
    assert deep[3] == half
    classified = found.rows[1].sources["pictures"].classified["stub"]
    assert deep[4] == f"{classified.frechet_distance:.3f}" and real[4] == f"{classified.real_frechet_distance:.3f}"
    assert deep[5] == f"{classified.kernel_distance:.3f}" and real[5] == f"{classified.real_kernel_distance:.3f}"
    assert real[:4] == ["real", "100.0 %", "100.0 %", "75.0 %"] and real[-3:] == ["-", "-", "-"]


def test_curves_are_checks_classifiers_and_what_is_read_back_against_depth():
    """Dotted: what real media reach."""
    reader = RoundTrip(AnswerGenerator(tiny_processor(), 8))
    found, _ = table(classifiers={"stub": Stub()}, round_trip=reader, pictures=examples("image", 5, bright))
    axes = Figure().subplots()
    plot_source([row.sources["pictures"] for row in found.rows], [4, 8], found.real["pictures"], axes)
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_linestyle() != ":"}
    assert curves == {"all": [0, 0.4], "bright": [0, 0.4], "stub classifier": [1, 0.5], "round trip": [0.2, 0.2]}
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [1, 1, 0.75]
    assert all(list(line.get_xdata()) == [4, 8] for line in axes.lines if line.get_linestyle() != ":")


def test_files_hold_all_of_it(tmp_path):
    found, _ = table(pictures=examples("image", 5, bright), **{"my sounds": examples("audio", 2, loud)})
    paths = save_media_table(found, tmp_path / "out", {"checkpoint": "x"})
    names = [path.name for path in paths]
    assert names == ["media.json", "media.md", "media.png", "media_pictures.png", "media_my_sounds.png"]
    content = json.loads(paths[0].read_text())
    assert content["checkpoint"] == "x" and content["real"]["pictures"]["bright"] == 1.0
    assert content["rows"][1]["sources"]["pictures"]["checks"]["bright"] == 2 / 5
    assert paths[1].read_text() == media_markdown(found)
    for path in paths[2:]:
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def colours_of(path):
    """Pixels of each RGB."""
    with Image.open(path) as picture:
        return {colour: count for count, colour in picture.convert("RGB").getcolors(2**24)}


def test_contact_sheets_show_each_medium_in_a_frame_of_its_verdict(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ((250, 10, 20), (10, 20, 250)))
    sample = MediaSample("a wall", red, {1: blue, 2: None}, {1: True, 2: False})
    save_contact_sheet([sample], tmp_path / "one.png")
    found = colours_of(tmp_path / "one.png")
    assert found[(250, 10, 20)] > 5000 and abs(found[(250, 10, 20)] - found[(10, 20, 250)]) < 0.1 * found[(10, 20, 250)]
    assert found[(42, 157, 42)] > 100 and found[(214, 39, 40)] > 100  # the frames, green and red
    save_contact_sheet([MediaSample("a wall", red, {1: blue})], tmp_path / "two.png")
    assert (42, 157, 42) not in colours_of(tmp_path / "two.png")


def test_spectrograms_show_tones_where_they_are():
    time = np.arange(4000) / 8000
    levels = spectrogram_levels(np.sin(2 * np.pi * 1000 * time).astype(np.float32), 8000)
    assert (levels.argmax(axis=0) == 1000 / (8000 / 256)).all()
    assert levels.max() - levels.min() <= 7.001
    assert np.isfinite(spectrogram_levels(np.zeros(100, np.float32), 8000)).all()
