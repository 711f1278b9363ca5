"""Balls to draw and to play: what is drawn and played is where the moves lead, and no long question is in two roles."""

import re
from collections import Counter
from itertools import product

import pytest

from dataset_loading import MEDIA_TASKS
from dataset_loading.tasks.registry import generate_row
from evaluation.checks import CHECKS
from tests.test_data_melodies import tones_heard
from tests.test_data_scenes import things_seen

TASKS = ("cup_pictures", "cup_tunes")
STARTS = {"V": 0, "W": 1, "X": 2, "Y": 3, "Z": 4}
ROTATIONS = {"a": lambda cup: (cup + 1) % 5, "d": lambda cup: (cup + 2) % 5}
TABLES = {"b": (1, 0, 3, 4, 2), "c": (4, 3, 1, 0, 2)}


def draw(name, role, count, difficulty=(1, 6)):
    return [generate_row(MEDIA_TASKS[name], difficulty, role, (0, 0), index) for index in range(count)]


def end_of(question: str) -> int:
    """Where the ball is, 0 to 4, told apart from the tasks' own tables: two of the moves are rotations."""
    start, moves = re.fullmatch("[a-d]*([V-Z])([a-d]*)=", question).groups()
    cup = STARTS[start]
    for move in moves:
        cup = ROTATIONS[move](cup) if move in ROTATIONS else TABLES[move][cup]
    return cup


def test_pictures_show_where_the_moves_lead():
    task, places = MEDIA_TASKS["cup_pictures"], Counter()
    for row in draw("cup_pictures", "train", 100):
        ((kind, x, y),) = things_seen(task.render(row["medium"]))
        assert kind == "large red circle"
        place = ((8, 8), (24, 8), (16, 16), (8, 24), (24, 24))[end_of(row["answer"])]
        assert abs(x - place[0]) < 1 and abs(y - place[1]) < 1
        places[place] += 1
    assert len(places) == 5


def test_tunes_play_where_the_moves_lead():
    task, notes = MEDIA_TASKS["cup_tunes"], Counter()
    for row in draw("cup_tunes", "train", 60):
        waveform, rate = task.render(row["medium"])
        ((heard, _, _),) = tones_heard(waveform, rate)
        note = ("C4", "E4", "G4", "B4", "D5")[end_of(row["answer"])]
        assert heard == note and len(waveform) == round(0.27 * rate)
        notes[note] += 1
    assert len(notes) == 5


@pytest.mark.parametrize("name", TASKS)
def test_checks_tell_right_from_wrong(name):
    """Both the task's own, of what was written down, and evaluation's, of what is seen and heard."""
    task, rows = MEDIA_TASKS[name], draw(name, "test", 12)
    for one, other in product(rows, rows):
        is_right = end_of(one["answer"]) == end_of(other["answer"])
        assert task.check(one["medium"], "", other["answer"]) == is_right
        assert CHECKS[name](other["answer"], task.render(one["medium"]))["all"] == is_right
    assert CHECKS[name]("abc=", task.render(rows[0]["medium"])) == {}
    assert task.attributes("aXa=") == {"cup": "4"}


@pytest.mark.parametrize("name", TASKS)
def test_questions_of_four_moves_and_more_are_in_one_role(name):
    rows = [draw(name, role, 300, (4, 6)) for role in ("train", "test")]
    questions = [{re.search("[V-Z].*", row["answer"])[0] for row in part} for part in rows]
    assert not set.intersection(*questions) and min(map(len, questions)) > 100
