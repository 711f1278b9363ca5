"""Generated pictures: what is drawn is what is said, and combinations held out never occur in training."""

import colorsys
import math
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, combinations_with_replacement, product

import numpy as np
import pytest

from dataset_loading import MEDIA_TASKS, get_task
from dataset_loading.tasks.registry import generate_row, generate_rows

SCENES, QUESTIONS = MEDIA_TASKS["scenes"], MEDIA_TASKS["scene_questions"]
SIZES, COLOURS = ("small", "large"), ("red", "green", "blue", "yellow", "purple", "white")
AREAS = {"circle": np.pi, "square": 4, "triangle": 2}  # in radii squared
SHAPES = tuple(AREAS)
KINDS = tuple(product(SIZES, COLOURS, SHAPES))
ROLES = ("train", "validation", "test")
MEDIUM = (
    "32x32 #303438 slope 20.0 -6.0 grain 5: circle #e12d28 at 6.00 10.00 radius 3.50; "
    "square #3255e6 at 22.00 12.00 radius 6.50"
)


def draw(task, role, count, difficulty, seed=0):
    return [generate_row(task, difficulty, role, (seed, 0), index) for index in range(count)]


# ------------------------------------------------------------ looking at pixels


def blobs(pixels: np.ndarray) -> list[np.ndarray]:
    """Connected groups of bright pixels as masks (height, width), by flooding."""
    bright, found = pixels.max(axis=-1) > 116, []
    while bright.any():
        group, new = np.zeros_like(bright), [tuple(np.argwhere(bright)[0])]
        while new:
            y, x = new.pop()
            if 0 <= y < len(bright) and 0 <= x < len(bright) and bright[y, x]:
                bright[y, x], group[y, x] = False, True
                new += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        if group.sum() > 3:
            found.append(group)
    return found


def colour_seen(rgb: np.ndarray) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb / 255)
    hues = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.63, "purple": 0.8, "red again": 1.0}
    return "white" if saturation < 0.25 else min(hues, key=lambda name: abs(hues[name] - hue)).split()[0]


def inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Whether points are in a shape around the origin."""
    across, down = abs(x) < radius, abs(y) < radius
    return {
        "circle": x**2 + y**2 < radius**2,
        "square": across & down,
        "triangle": (2 * abs(x) < y + radius) & (y < radius),
    }[shape]


def drawn(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """The part of each of 32 x 32 pixels that a shape covers, by counting points."""
    points = (np.arange(128) + 0.5) / 4
    return inside(shape, points - x, points[:, None] - y, radius).reshape(32, 4, 32, 4).mean(axis=(1, 3))


def shape_and_radius_seen(coverage: np.ndarray) -> tuple[str, float]:
    """The shape whose drawing, with this area and centre of mass, comes closest."""
    area, (rows, columns) = coverage.sum(), np.mgrid[:32, :32] + 0.5
    y, x = (rows * coverage).sum() / area, (columns * coverage).sum() / area
    found = {}
    for shape, unit in AREAS.items():
        radius = np.sqrt(area / unit)
        top = y - radius / 3 if shape == "triangle" else y  # the middle of its height
        found[shape] = ((drawn(shape, x, top, radius) - coverage) ** 2).sum(), radius
    best = min(found, key=found.get)
    return best, found[best][1]


def things_seen(picture) -> list[tuple[str, float, float]]:
    """The kind and the place (x, y) of each object, from the pixels alone."""
    pixels = np.asarray(picture).astype(float)
    background, things = np.median(pixels[pixels.max(axis=-1) <= 116], axis=0), []
    for group in blobs(pixels):
        contrast = pixels - background
        strong = np.sort((contrast**2).sum(axis=-1)[group])[-(group.sum() // 4 + 1)]
        colour = contrast[group & ((contrast**2).sum(axis=-1) >= strong)].mean(axis=0)
        rows, columns = (np.flatnonzero(group.any(axis=axis)) for axis in (1, 0))
        window = np.zeros_like(group)
        window[max(0, rows[0] - 1) : rows[-1] + 2, max(0, columns[0] - 1) : columns[-1] + 2] = True
        coverage = np.clip(contrast @ colour / (colour @ colour), 0, 1) * window
        shape, radius = shape_and_radius_seen(coverage)
        y, x = np.argwhere(group).mean(axis=0)
        things.append((f"{'large' if radius > 5.4 else 'small'} {colour_seen(colour + background)} {shape}", x, y))
    return things


def relation_seen(one: tuple[str, float, float], other: tuple[str, float, float]) -> str:
    right, down = one[1] - other[1], one[2] - other[2]
    if abs(right) > abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"


def caption_seen(things: list[tuple[str, float, float]]) -> str:
    """Of two sizes the small one first, else the one at the left or above."""
    if len(things) == 1:
        return f"a {things[0][0]}"
    one, other = sorted(things, key=lambda thing: thing[0].split()[0] == "large")
    if one[0].split()[0] == other[0].split()[0] and relation_seen(one, other) in ("right of", "below"):
        one, other = other, one
    return f"a {one[0]} {relation_seen(one, other)} a {other[0]}"


def answer_seen(prompt: str, things: list[tuple[str, float, float]]) -> str:
    words = prompt.rstrip("?").split()
    if words[0] == "How":
        return str(sum(words[2].rstrip("s") in kind.split() for kind, _, _ in things))
    if words[0] == "What":
        (kind,) = [kind for kind, _, _ in things if words[4] in kind.split()]
        return kind.split()[("size", "colour", "shape").index(words[1])]
    names = " ".join(words[2:4]), " ".join(words[-2:])
    (one,), (other,) = ([thing for thing in things if thing[0].endswith(name)] for name in names)
    return relation_seen(one, other)


@pytest.mark.parametrize("role", ["train", "test"])
def test_captions_say_what_the_pixels_show(role):
    for row in draw(SCENES, role, 400, (1, 2)):
        picture = SCENES.render(row["medium"])
        assert picture.size == SCENES.item_size(row["medium"]) == (32, 32) and picture.mode == "RGB"
        assert caption_seen(things_seen(picture)) == row["answer"], row["medium"]


def test_answers_are_what_the_pixels_show():
    for row in draw(QUESTIONS, "train", 400, (1, 9)):
        things = things_seen(QUESTIONS.render(row["medium"]))
        assert len(things) == row["difficulty"], row["medium"]
        assert answer_seen(row["prompt"], things) == row["answer"], row


def test_a_picture_drawn_by_hand():
    """The corners have the background, brighter by half the slope or darker; the centres have the colours."""
    pixels = np.asarray(SCENES.render(MEDIUM)).astype(float)
    corners = {(0, 0): 48 - 7, (0, 29): 48 + 13, (29, 0): 48 - 13, (29, 29): 48 + 7}
    for (y, x), red in corners.items():
        found = pixels[y : y + 3, x : x + 3].mean(axis=(0, 1))
        assert found == pytest.approx((red, red + 4, red + 8), abs=4)
    assert pixels[9:11, 5:7].mean(axis=(0, 1)) == pytest.approx((0xE1, 0x2D, 0x28), abs=6)
    assert pixels[8:16, 18:26].mean(axis=(0, 1)) == pytest.approx((0x32, 0x55, 0xE6), abs=2)
    assert pixels[12, 28] == pytest.approx((0x37, 0x4B, 0x95), abs=14)  # half inside: it ends at x = 28.5


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_at_the_edge_are_as_bright_as_the_part_that_is_covered(shape):
    for radius in (3.4, 7.0):
        medium = f"32x32 #202020 slope 0.0 0.0 grain 1: {shape} #e8e8e8 at 16.30 15.80 radius {radius}"
        pixels = np.asarray(SCENES.render(medium)).astype(float)
        covered = (pixels.mean(axis=-1) - 0x20) / 200
        assert pixels[:6].std() == pytest.approx(2.5, rel=0.15)  # the noise, above the shape
        assert np.abs(covered - drawn(shape, 16.3, 15.8, radius)).max() < 0.3
        assert covered.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.08)


def test_each_pixel_is_what_its_middle_says():
    """Pixel by pixel, object by object, as far from it as can be."""
    medium = (
        "32x32 #303438 slope 20.0 -6.0 grain 5: circle #e12d28 at 3.00 10.00 radius 3.50; "
        "square #3255e6 at 27.30 12.00 radius 6.50; triangle #e8e8e8 at 15.70 20.10 radius 6.70; "
        "triangle #2da53c at 15.70 3.10 radius 4.20"
    )
    grain, found = np.random.RandomState(5).normal(0, 2.5, (32, 32, 3)), np.asarray(SCENES.render(medium))
    for row, column in product(range(32), range(32)):
        x, y = column + 0.5, row + 0.5
        colour = np.array([0x30, 0x34, 0x38]) + (20 * x - 6 * y) / 32 - 7
        for outside, fill in (
            (math.hypot(x - 3, y - 10) - 3.5, (0xE1, 0x2D, 0x28)),
            (max(abs(x - 27.3), abs(y - 12)) - 6.5, (0x32, 0x55, 0xE6)),
            (max((2 * abs(x - 15.7) - (y - 20.1) - 6.7) / 5**0.5, y - 20.1 - 6.7), (0xE8, 0xE8, 0xE8)),
            (max((2 * abs(x - 15.7) - (y - 3.1) - 4.2) / 5**0.5, y - 3.1 - 4.2), (0x2D, 0xA5, 0x3C)),
        ):
            covered = min(1, max(0, 0.5 - outside))
            colour = covered * np.array(fill) + (1 - covered) * colour
        assert np.abs(found[row, column] - np.clip(colour + grain[row, column], 0, 255)).max() < 0.501


def test_pictures_are_the_same_in_threads():
    media = [row["medium"] for row in draw(SCENES, "train", 200, (1, 2))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(SCENES.render, media)) == list(map(SCENES.render, media))


def test_objects_lie_inside_and_apart_and_clearly_in_one_direction():
    for row in draw(SCENES, "train", 1000, (2, 2)):
        found = re.findall(r"at (\S+) (\S+) radius ([\d.]+)", row["medium"])
        (x1, y1, r1), (x2, y2, r2) = [tuple(map(float, numbers)) for numbers in found]
        assert all(radius <= place <= 32 - radius for place, radius in ((x1, r1), (y1, r1), (x2, r2), (y2, r2)))
        across, along = sorted((abs(x1 - x2), abs(y1 - y2)))
        assert along > r1 + r2 + 1.9 and across <= along / 2


@pytest.mark.parametrize("difficulty", [1, 2, 4, 9])
def test_objects_of_questions_lie_inside_and_apart(difficulty):
    for row in draw(QUESTIONS, "train", 200, (difficulty, difficulty)):
        found = re.findall(r"at (\S+) (\S+) radius ([\d.]+)", row["medium"])
        things = [tuple(map(float, numbers)) for numbers in found]
        assert len(things) == difficulty
        assert all(radius <= place <= 32 - radius for *places, radius in things for place in places)
        for (x1, y1, r1), (x2, y2, r2) in combinations(things, 2):
            assert max(abs(x1 - x2), abs(y1 - y2)) > r1 + r2 + 1.9


# ------------------------------------------------------------ what is held out


def kinds_said(caption: str) -> list[str]:
    return re.findall("|".join(" ".join(kind) for kind in KINDS), caption)


def combination(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(kinds_said(row["answer"])))


def test_no_combination_of_test_or_validation_is_in_20_000_rows_of_train():
    """Two objects that are a test row are together in no train row, in whatever relation, order and place."""
    train = Counter(map(combination, generate_rows(SCENES, (2, 2), "train", (0, 0), 20_000)))
    held_out = {role: {combination(row) for row in draw(SCENES, role, 1000, (2, 2))} for role in ROLES[1:]}
    assert not train.keys() & held_out["test"] and not train.keys() & held_out["validation"]
    assert not held_out["test"] & held_out["validation"]
    every = {tuple(sorted(map(" ".join, pair))) for pair in combinations_with_replacement(KINDS, 2)}
    assert train.keys() | held_out["test"] | held_out["validation"] == every
    assert min(len(held_out["test"]), len(held_out["validation"])) > 50
    assert len(train) > 0.7 * len(every)


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_every_kind(role):
    rows = draw(SCENES, role, 1500, (1, 2))
    for number in (1, 2):
        assert {kind for row in rows for kind in combination(row) if len(combination(row)) == number} == {
            " ".join(kind) for kind in KINDS
        }


def test_pictures_of_questions_show_no_combination_that_captions_hold_out():
    """Sources of both tasks in one run leak nothing."""
    captions = {role: {combination(row) for row in draw(SCENES, role, 1000, (2, 2))} for role in ROLES}
    for role in ROLES:
        pictures = [QUESTIONS.render(row["medium"]) for row in draw(QUESTIONS, role, 100, (2, 2))]
        kinds = {tuple(sorted(kind for kind, _, _ in things_seen(picture))) for picture in pictures}
        assert len(kinds) > 30
        assert not any(kinds & captions[other] for other in ROLES if other != role)


# ------------------------------------------------------------ answers


@pytest.mark.parametrize("task", [SCENES, QUESTIONS], ids=lambda task: task.name)
def test_answers_pass_the_check_and_other_answers_do_not(task):
    rows = draw(task, "train", 300, (1, 2))
    answers = {row["answer"] for row in rows} | {"", "a", "a small red", "red circle", "a small red circle left of"}
    for row in rows:
        assert task.check(row["medium"], row["prompt"], row["answer"])
        assert not any(task.check(row["medium"], row["prompt"], other) for other in answers - {row["answer"]})


def test_answers_computed_by_hand():
    for caption in (
        "a small red circle left of a large blue square",
        "a large blue square right of a small red circle",
    ):
        assert SCENES.check(MEDIUM, "", caption)
    for caption in (
        "a small red circle",
        "a small red circle right of a large blue square",
        "a small red circle above a large blue square",
        "a large red circle left of a large blue square",
        "a small red circle left of a large blue square above a small red circle",
    ):
        assert not SCENES.check(MEDIUM, "", caption)
    for prompt, answer in {
        "How many red things are there?": "1",
        "How many green things are there?": "0",
        "How many squares are there?": "1",
        "How many triangles are there?": "0",
        "What colour is the square?": "blue",
        "What shape is the red thing?": "circle",
        "Is the blue square left of, right of, above or below the red circle?": "right of",
    }.items():
        assert QUESTIONS.check(MEDIUM, prompt, answer)
        assert not any(QUESTIONS.check(MEDIUM, prompt, other) for other in ("3", "red", "triangle", "below", ""))


def test_attributes_are_named_and_those_of_broken_answers_are_what_can_be_read():
    whole = {"size1": "small", "colour1": "red", "shape1": "circle"}
    assert SCENES.attributes("a small red circle") == whole
    two = {"relation": "left of", "size2": "large", "colour2": "blue", "shape2": "square"}
    assert SCENES.attributes("a small red circle left of a large blue square") == whole | two
    assert SCENES.attributes("small circle above a") == {"size1": "small", "shape1": "circle", "relation": "above"}
    assert SCENES.attributes("below a red\nred square") == {"relation": "below", "colour2": "red", "shape2": "square"}
    assert SCENES.attributes("") == SCENES.attributes("leftish of reddish things") == {}
    answers = {"12": "count", "red": "colour", " circle": "shape", "left of": "relation"}
    assert {answer: QUESTIONS.attributes(answer) for answer in answers} == {
        answer: {name: answer.strip()} for answer, name in answers.items()
    }
    assert QUESTIONS.attributes("left") == QUESTIONS.attributes("") == {}


def test_no_answer_to_a_kind_of_question_comes_much_more_often_than_others():
    rows = draw(QUESTIONS, "train", 3000, (4, 4))
    for name, fewest in {"count": 200, "colour": 70, "shape": 100, "relation": 100}.items():
        counts = Counter(row["answer"] for row in rows if name in QUESTIONS.attributes(row["answer"]))
        assert min(number for _, number in counts.most_common(3)) > fewest, counts


# ------------------------------------------------------------ rows


@pytest.mark.parametrize("task", [SCENES, QUESTIONS], ids=lambda task: task.name)
def test_rows_depend_on_seed_role_and_index_alone(task):
    rows = generate_rows(task, (1, 2), "train", (5, 1), 40)
    assert set(rows.column_names) == {"prompt", "answer", "difficulty", "medium"}
    assert list(rows) == draw_with(task, "train", (5, 1))
    assert list(generate_rows(task, (1, 2), "train", (5, 1), 40, workers=2)) == list(rows)
    assert all(draw_with(task, *other) != list(rows) for other in (("test", (5, 1)), ("train", (5, 2))))
    media = [row["medium"] for row in rows]
    assert [task.render(medium).tobytes() for medium in media] == [task.render(medium).tobytes() for medium in media]
    assert len({task.render(medium).tobytes() for medium in media}) == 40


def draw_with(task, role, seed):
    return [generate_row(task, (1, 2), role, seed, index) for index in range(40)]


def test_a_larger_picture_of_a_task_of_another_size():
    class LargeScenes(type(SCENES)):
        size = 128

    row = LargeScenes().sample(random.Random(3), 2)
    picture = LargeScenes().render(row["medium"])
    assert picture.size == (128, 128)
    small = [(kind, x / 4, y / 4) for kind, x, y in things_seen(picture.resize((32, 32)))]
    assert caption_seen(small) == row["answer"]
    assert SCENES.check(row["medium"], "", row["answer"])


def test_media_and_difficulties_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="medium 'a red circle' is not a scene"):
        SCENES.render("a red circle")
    with pytest.raises(ValueError, match="is not a scene"):
        SCENES.render(MEDIUM.replace("radius", "width"))
    with pytest.raises(ValueError, match=r"difficulty is \[1, 3\], but 'scenes' has 1 to 2"):
        generate_rows(SCENES, (1, 3), "train", (0, 0), 10)
    assert get_task("scenes") is SCENES
