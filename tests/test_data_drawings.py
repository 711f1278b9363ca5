"""Tasks whose media are drawn and played: what their texts say is what is there, and what is held out never trains."""

import re
from collections import Counter
from itertools import combinations, product

import pytest

from dataset_loading import MEDIA_TASKS
from dataset_loading.tasks.base import split_of
from dataset_loading.tasks.registry import generate_row
from tests.test_data_melodies import FREQUENCIES, tones_heard
from tests.test_data_scenes import COLOURS, SHAPES, SIZES, things_seen

DRAWINGS, TUNES, MELODIES = (MEDIA_TASKS[name] for name in ("drawings", "tunes", "melodies"))
ROLES = ("train", "validation", "test")
ROWS, COLUMNS = ("at the top", "", "at the bottom"), ("left", "", "right")


def draw(task, role, count, difficulty, seed=0):
    return [generate_row(task, difficulty, role, (seed, 0), index) for index in range(count)]


def position_named(x: float, y: float) -> str:
    """In words, of a place in a picture of 32 x 32."""
    row, column = ROWS[int(y * 3 / 32)], COLUMNS[int(x * 3 / 32)]
    if not row:
        return f"at the {column}" if column else "in the middle"
    return f"{row} {column}".strip()


# ------------------------------------------------------------------------------------------------------------ drawings


@pytest.mark.parametrize("role", ["train", "test"])
def test_captions_of_one_object_are_what_is_seen(role):
    """From the pixels alone."""
    for row in draw(DRAWINGS, role, 150, (1, 1)):
        picture = DRAWINGS.render(row["medium"])
        ((kind, x, y),) = things_seen(picture)
        if "triangle" in kind:  # whose centre of mass lies a third of its radius below the middle of its height
            y -= (6.6 if "large" in kind else 4.1) / 3
        assert row["answer"] == f"a {kind} {position_named(x, y)}" and row["prompt"] == ""
        assert picture.size == DRAWINGS.item_size(row["medium"]) == (32, 32)


def test_captions_of_several_objects_are_what_is_seen():
    for row in draw(DRAWINGS, "train", 150, (2, 4)):
        things = things_seen(DRAWINGS.render(row["medium"]))
        ((kind, count),) = Counter(kind for kind, _, _ in things).items()
        assert row["answer"] == f"{['two', 'three', 'four'][count - 2]} {kind}s" and count == row["difficulty"]


def test_positions_are_clear_and_objects_are_inside():
    """A sixteenth of the side or more from where one position ends and another begins."""
    for row in draw(DRAWINGS, "train", 500, (1, 4)):
        places = re.findall(r"at (\S+) (\S+) radius ([\d.]+)", row["medium"])
        for x, y, radius in (tuple(map(float, place)) for place in places):
            assert all(radius + 0.4 <= it <= 31.6 - radius for it in (x, y))
            if len(places) == 1:
                assert all(abs(it - border) > 1 for it in (x, y) for border in (32 / 3, 64 / 3))


def test_one_in_seven_combinations_is_held_out():
    """Test has those alone, training and validation share the others, and any two words are trained together."""
    found = {role: {row["answer"] for row in draw(DRAWINGS, role, 4000, (1, 1))} for role in ROLES}
    said = {role: {re.fullmatch(r"a (\w+) (\w+) (\w+) (.+)", it).groups() for it in found[role]} for role in ROLES}
    words = (SIZES, COLOURS, SHAPES, [position_named(*place) for place in product((5, 16, 27), repeat=2)])
    assert said["train"] | said["test"] == set(product(*words)) and len(said["train"]) == 324 - 47
    assert not said["train"] & said["test"] and len(said["test"]) == 47
    assert said["validation"] <= said["train"] and len(said["validation"]) > 250
    for one, other in combinations(range(4), 2):
        pairs = {(it[one], it[other]) for it in said["train"]}
        assert pairs == set(product(words[one], words[other]))


def test_pictures_of_roles_differ_and_equal_objects_share_no_number():
    media = [{row["medium"] for row in draw(DRAWINGS, role, 300, (1, 1))} for role in ROLES]
    assert len(set.union(*media)) == 900
    captions = [{row["answer"] for row in draw(DRAWINGS, role, 600, (2, 4))} for role in ROLES]
    assert len(set.union(*captions)) == sum(map(len, captions)) == 36 * 3


def test_answers_pass_the_check_and_other_answers_do_not():
    rows = draw(DRAWINGS, "train", 300, (1, 4))
    answers = {row["answer"] for row in rows} | {"", "a small red circle", "at the top", "two small red circle"}
    for row in rows:
        assert DRAWINGS.check(row["medium"], "", row["answer"])
        assert not any(DRAWINGS.check(row["medium"], "", other) for other in answers - {row["answer"]})


def test_attributes_are_named_and_those_of_broken_answers_are_what_can_be_read():
    whole = {"number": "a", "size": "large", "colour": "green", "shape": "square", "position": "top left"}
    assert DRAWINGS.attributes("a large green square at the top left") == whole
    assert DRAWINGS.attributes("a large green square at the top") == whole | {"position": "top"}
    assert DRAWINGS.attributes("red circle in the middle") == {"colour": "red", "shape": "circle", "position": "middle"}
    several = {"number": "three", "size": "small", "colour": "red", "shape": "circle"}
    assert DRAWINGS.attributes("three small red circles") == several
    assert DRAWINGS.attributes("") == DRAWINGS.attributes("at top") == {}


# --------------------------------------------------------------------------------------------------------------- tunes


@pytest.mark.parametrize("role", ["train", "test"])
def test_tunes_are_the_notes_that_are_heard_alike_in_whole_tokens(role):
    for row in draw(TUNES, role, 100, (1, 8)):
        wave, rate = TUNES.render(row["medium"])
        tones = tones_heard(wave, rate)
        assert " ".join(note for note, _, _ in tones) == row["answer"], row["medium"]
        assert len(wave) / rate == TUNES.item_size(row["medium"])
        assert (len(wave) // 80 + 1) % 4 == 0  # frames of 10 ms, 4 to a token
        for number, (_, start, stop) in enumerate(tones):
            assert abs(start - (320 + 1600 * number)) <= 160 and abs(stop - start - 1200) <= 200


def test_a_tune_is_a_function_of_its_notes():
    media = {}
    for row in draw(TUNES, "train", 200, (1, 2)):
        media.setdefault(row["answer"], set()).add(row["medium"])
    assert max(map(len, media.values())) == 1 and len(media) > 50
    hertz = [float(it) for it in re.findall(r"([\d.]+) Hz at", *media["A4"])] if "A4" in media else [440]
    assert hertz == pytest.approx([FREQUENCIES["A4"]], abs=0.01)


def test_tunes_hold_out_the_melodies_that_melodies_hold_out():
    """Sources of both tasks in one run leak nothing."""
    for role in ROLES:
        for task in (TUNES, MELODIES):
            assert {split_of(row["answer"]) for row in draw(task, role, 50, (4, 4))} == {role}
