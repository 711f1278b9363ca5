"""What is read from pictures and recordings alone, against what generated tasks say they have put in them."""

import math
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dataset_loading import get_task
from dataset_loading.tasks.registry import generate_row
from dataset_loading.tasks.scenes import parse_scene
from evaluation.checks import CHECKS, check_notes, check_scene, read_request
from evaluation.recognition import UNCLEAR, SeenObject, note_name, read_notes, read_scene


def rows_of(name, difficulty, count):
    """Rows of a task with their media."""
    task = get_task(name)
    rows = [generate_row(task, (difficulty, difficulty), "test", (3, 4), index) for index in range(count)]
    return [(row, task.render(row["medium"])) for row in rows]


def caption_of(row):
    """What there is to see or hear."""
    return row["answer"]


# Scenes


def wrong_captions(task, difficulty, count, change=lambda picture: picture):
    found = [(caption_of(row), change(picture)) for row, picture in rows_of(task, difficulty, count)]
    return [(caption, read_scene(picture)) for caption, picture in found if not check_scene(caption, picture)["all"]]


@pytest.mark.parametrize(("task", "difficulty"), [("scenes", 1), ("scenes", 2), ("drawings", 1), ("drawings", 4)])
def test_real_pictures_are_read(task, difficulty):
    assert wrong_captions(task, difficulty, 200) == []


def test_places_are_those_of_the_objects():
    for row, picture in rows_of("scenes", 1, 40):
        (thing,) = parse_scene(row["medium"]).things
        (seen,) = read_scene(picture)
        assert seen.place == pytest.approx((thing.x / 32, thing.y / 32), abs=0.5 / 32)


def rough(picture):
    """As a model draws: soft, and with more noise than the drawn ones have."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), dtype=float)
    noisy = soft + np.random.default_rng(0).normal(0, 10, soft.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def test_rough_pictures_are_read_as_well():
    assert len(wrong_captions("scenes", 1, 200, rough)) <= 4
    assert len(wrong_captions("scenes", 2, 200, rough)) <= 8


def scene(*things, size=48):
    """Objects drawn by Pillow: (shape, colour, x, y, radius) with numbers as parts of the side."""
    scale = 8
    picture = Image.new("RGB", (size * scale, size * scale), (50, 48, 52))
    draw = ImageDraw.Draw(picture)
    for shape, colour, *numbers in things:
        x, y, radius = (number * size * scale for number in numbers)
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
        else:  # a thin cross
            draw.rectangle((x - radius, y - radius / 6, x + radius, y + radius / 6), fill=colour)
            draw.rectangle((x - radius / 6, y - radius, x + radius / 6, y + radius), fill=colour)
    return picture.resize((size, size), Image.Resampling.BOX)


def test_pictures_of_another_size_and_drawn_by_others_are_read():
    seen = read_scene(scene(("circle", (220, 40, 40), 0.3, 0.25, 0.2), ("triangle", (60, 80, 220), 0.6, 0.8, 0.12)))
    assert [thing[:3] for thing in seen] == [("large", "red", "circle"), ("small", "blue", "triangle")]
    assert seen[0].place == pytest.approx((0.3, 0.25), abs=0.01)
    assert seen[1].place == pytest.approx((0.6, 0.8), abs=0.01)


def test_what_is_no_shape_is_unclear_and_specks_are_nothing():
    (seen,) = read_scene(scene(("cross", (230, 230, 230), 0.5, 0.5, 0.3)))
    assert seen.shape == UNCLEAR and seen.colour == "white"
    assert read_scene(scene(("square", (220, 40, 40), 0.5, 0.5, 0.03))) == []
    assert read_scene(Image.new("RGB", (32, 32), (40, 40, 40))) == []


def test_any_picture_can_be_read():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for picture in (Image.fromarray(noise), Image.new("RGB", (32, 32), (255, 255, 255)), Image.new("L", (20, 33))):
        assert all(isinstance(thing, SeenObject) for thing in read_scene(picture))


# Requests


def test_requests_are_understood():
    request = read_request("Draw a small red circle left of a large blue square, please")
    assert request.objects == [("small", "red", "circle"), ("large", "blue", "square")]
    assert request.relation == "left of" and request.third is None
    assert read_request("A large green square at the top left").third == ("top", "left")
    assert read_request("a white triangle at the bottom").third == ("bottom", "middle")
    assert read_request("a white triangle at the right").third == ("middle", "right")
    assert read_request("a white triangle in the middle").third == ("middle", "middle")
    assert read_request("three yellow circles").objects == [(None, "yellow", "circle")] * 3
    assert read_request("a cat on a chair").objects == []


RED, BLUE = (215, 45, 40), (50, 80, 220)


def verdict(prompt, *things):
    return check_scene(prompt, scene(*things))


def test_each_attribute_is_judged_alone():
    right = ("square", RED, 0.25, 0.25, 0.2)
    prompt = "a large red square at the top left"
    everything = {"number": True, "size": True, "colour": True, "shape": True, "position": True, "all": True}
    assert verdict(prompt, right) == everything
    for name, thing in (
        ("size", ("square", RED, 0.25, 0.25, 0.13)),
        ("colour", ("square", BLUE, 0.25, 0.25, 0.2)),
        ("shape", ("circle", RED, 0.25, 0.25, 0.2)),
        ("position", ("square", RED, 0.5, 0.25, 0.2)),
    ):
        assert verdict(prompt, thing) == {**everything, name: False, "all": False}
    assert verdict(prompt, right, ("circle", BLUE, 0.75, 0.75, 0.12)) == {**everything, "number": False, "all": False}
    assert not any(verdict(prompt).values())


def test_two_objects_are_taken_in_the_better_order():
    prompt = "a small red circle left of a small blue square"
    circle, square = ("circle", RED, 0.2, 0.5, 0.13), ("square", BLUE, 0.7, 0.5, 0.13)
    assert all(verdict(prompt, circle, square).values())
    assert all(verdict(prompt, square, circle).values())
    swapped = verdict(prompt, ("circle", RED, 0.7, 0.5, 0.13), ("square", BLUE, 0.2, 0.5, 0.13))
    assert swapped == {"number": True, "size": True, "colour": True, "shape": True, "relation": False, "all": False}
    one = verdict(prompt, circle)
    assert not any(one[name] for name in ("number", "colour", "shape", "relation", "all"))
    twins = "a small red circle above a small red circle"
    assert all(verdict(twins, ("circle", RED, 0.5, 0.8, 0.13), ("circle", RED, 0.5, 0.2, 0.13)).values())


def test_numbers_of_equal_objects():
    quarters = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75), (0.5, 0.5)]
    things = [("circle", RED, x, y, 0.12) for x, y in quarters]
    assert all(verdict("four small red circles", *things[:4]).values())
    assert not verdict("three small red circles", *things[:4])["number"]
    assert all(verdict("five small red circles", *things).values())  # more than are tried in all orders
    assert not verdict("two small red circles", *things[:1], ("circle", BLUE, 0.75, 0.75, 0.12))["colour"]


def test_a_prompt_that_asks_for_nothing_known_is_not_judged():
    assert check_scene("a cat on a chair", scene()) == {}
    assert check_notes("a waltz", (np.zeros(800), 8000)) == {}


# Notes


@pytest.mark.parametrize(("task", "difficulty"), [("melodies", 1), ("melodies", 4), ("tunes", 4)])
def test_real_melodies_are_read(task, difficulty):
    wrong = [
        (row["answer"], read_notes(*recording))
        for row, recording in rows_of(task, difficulty, 150)
        if read_notes(*recording) != row["answer"].split()
    ]
    assert wrong == []


def tone(frequency, seconds, rate, volume=0.5):
    """A sine that rises and falls within a hundredth of a second."""
    time = np.arange(round(seconds * rate)) / rate
    ends = np.minimum(time, seconds - time) / 0.01
    return volume * np.sin(2 * math.pi * frequency * time) * ends.clip(0, 1)


def test_notes_at_other_rates_on_black_keys_and_out_of_tune():
    """Frequencies of equal temperament as printed in tables."""
    for rate in (16000, 22050):
        pause = np.zeros(round(0.06 * rate))
        parts = [(277.18, 0.2), (440.0, 0.15), (440.0 * 2 ** (30 / 1200), 0.15), (987.77, 0.2), (146.83, 0.2)]
        waveform = np.concatenate([np.concatenate((pause, tone(*part, rate))) for part in parts])
        noise = np.random.default_rng(0).normal(0, 0.01, len(waveform))
        assert read_notes(waveform + noise, rate) == ["C#4", "A4", "A4", "B5", "D3"]
    assert note_name(440 * 2 ** (60 / 1200)) == "A#4"


def test_silence_and_clicks_are_no_notes():
    click = np.zeros(4000)
    click[1000:1010] = 0.9
    assert read_notes(np.zeros(4000), 8000) == read_notes(click, 8000) == read_notes(np.zeros(0), 8000) == []


def test_notes_are_judged_one_by_one():
    rate = 8000
    pause = np.zeros(400)
    waveform = np.concatenate([pause, tone(261.63, 0.15, rate), pause, tone(329.63, 0.15, rate), pause])
    assert check_notes("C4 E4", (waveform, rate)) == {"note1": True, "note2": True, "length": True, "all": True}
    assert check_notes("play C4 G4", (waveform, rate)) == {"note1": True, "note2": False, "length": True, "all": False}
    assert check_notes("C4 E4 G4", (waveform, rate)) == {
        "note1": True, "note2": True, "note3": False, "length": False, "all": False,
    }  # fmt: skip
    assert check_notes("C4", (waveform, rate)) == {"note1": True, "length": False, "all": False}


def test_every_check_belongs_to_a_task_and_knows_its_prompts():
    for name, check in CHECKS.items():
        ((row, medium),) = rows_of(name, get_task(name).default_difficulty[0], 1)
        found = check(caption_of(row), medium)
        assert found["all"] and len(found) > 2
        assert re.search("circle|square|triangle|[A-G][45]|[V-Z][a-d]+=", caption_of(row))
