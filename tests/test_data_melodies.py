"""Generated sounds: the notes that are heard are those of the answer, and melodies held out never occur in training."""

import re
from collections import Counter
from itertools import combinations, groupby, pairwise, product

import numpy as np
import pytest

from dataset_loading import MEDIA_TASKS, get_task
from dataset_loading.tasks.base import split_of
from dataset_loading.tasks.melodies import TIMBRES, frequency_of_note
from dataset_loading.tasks.registry import generate_row, generate_rows

MELODIES, QUESTIONS = MEDIA_TASKS["melodies"], MEDIA_TASKS["melody_questions"]
ROLES = ("train", "validation", "test")
# Equal temperament, as tables print it.
OCTAVE = {"C": 261.63, "D": 293.66, "E": 329.63, "F": 349.23, "G": 392.00, "A": 440.00, "B": 493.88}
FREQUENCIES = {f"{letter}{4 + up}": hertz * 2**up for letter, hertz in OCTAVE.items() for up in (0, 1)}
MEDIUM = (
    "8000 Hz flute volume 0.80 noise 0.0010 seed 7 lasts 1.000: 440.00 Hz at 0.100 for 0.200; "
    "261.63 Hz at 0.400 for 0.200; 493.88 Hz at 0.700 for 0.200"
)


def draw(task, role, count, difficulty, seed=0):
    return [generate_row(task, difficulty, role, (seed, 0), index) for index in range(count)]


# ------------------------------------------------------------ listening


def tones_heard(wave: np.ndarray, sampling_rate: int) -> list[tuple[str, int, int]]:
    """Each note, by its strongest frequency, with the samples where it rises above the noise and sinks back into it."""
    frame = sampling_rate // 200
    loud = np.sqrt(np.mean(wave[: len(wave) // frame * frame].reshape(-1, frame) ** 2, axis=1)) > 0.012
    tones, start = [], 0
    for is_loud, group in groupby(loud):
        stop = start + len(list(group))
        if is_loud:
            spectrum = np.abs(np.fft.rfft(wave[start * frame : stop * frame], 2**15))
            heard = np.argmax(spectrum) * sampling_rate / 2**15
            note = min(FREQUENCIES, key=lambda name: abs(np.log(FREQUENCIES[name] / heard)))
            tones.append((note, start * frame, stop * frame))
        start = stop
    return tones


@pytest.mark.parametrize("role", ["train", "test"])
def test_answers_are_the_notes_that_are_heard(role):
    for row in draw(MELODIES, role, 150, (1, 6)):
        wave, sampling_rate = MELODIES.render(row["medium"])
        assert wave.dtype == np.float32 and wave.ndim == 1 and sampling_rate == 8000 and np.abs(wave).max() <= 1
        assert len(wave) / sampling_rate == MELODIES.item_size(row["medium"])
        tones = tones_heard(wave, sampling_rate)
        assert " ".join(note for note, _, _ in tones) == row["answer"], row["medium"]
        assert all(800 < stop - start < 2000 for _, start, stop in tones)
        assert all(after[1] - before[2] >= 240 for before, after in pairwise(tones))
        assert tones[0][1] >= 80 and len(wave) - tones[-1][2] >= 480  # silence at both ends


def test_answers_to_questions_are_what_is_heard():
    for row in draw(QUESTIONS, "train", 150, (2, 6)):
        notes = [note for note, _, _ in tones_heard(*QUESTIONS.render(row["medium"]))]
        ordered = sorted(notes, key=FREQUENCIES.get)
        rises = FREQUENCIES[notes[-1]] > FREQUENCIES[notes[0]]
        answers = {
            "How many notes are there?": str(len(notes)),
            "What is the highest note?": ordered[-1],
            "What is the lowest note?": ordered[0],
            "Is the last note higher than the first?": "yes" if rises else "no",
        }
        assert row["answer"] == answers[row["prompt"]] and len(notes) == row["difficulty"]


def test_notes_have_the_frequencies_of_a_table():
    assert {note: frequency_of_note(note) for note in FREQUENCIES} == pytest.approx(FREQUENCIES, rel=2e-5)


def test_instruments_are_a_little_out_of_tune_all_notes_of_a_melody_alike():
    spread = set()
    for row in draw(MELODIES, "train", 300, (3, 5)):
        hertz = np.array([float(number) for number in re.findall(r"([\d.]+) Hz at", row["medium"])])
        cents = 1200 * np.log2(hertz / [FREQUENCIES[note] for note in row["answer"].split()])
        assert np.ptp(cents) < 0.2 and abs(cents).max() < 10.2
        spread.add(round(cents[0]))
    assert spread == set(range(-10, 11))


def test_a_tone_computed_by_hand():
    """Partials with the strengths of the flute, by their projections on sines; silence before and after."""
    wave, sampling_rate = MELODIES.render(MEDIUM)
    assert (len(wave), sampling_rate) == (8000, 8000)
    tone = wave[1000:2000].astype(float)  # 0.125 to 0.25 s: 55 periods of 440 Hz, without attack and release
    seconds = np.arange(len(tone)) / sampling_rate
    strengths = [2 * abs(np.mean(tone * np.exp(-2j * np.pi * 440 * number * seconds))) for number in range(1, 6)]
    fading = np.exp(-(seconds + 0.025)).mean()
    assert strengths == pytest.approx([0.8 * fading * part / 1.7 for part in (1, 0.4, 0.2, 0.1, 0)], abs=0.003)
    ends = np.abs(np.concatenate([wave[800:816], wave[2384:2400]]))
    assert ends.max() < 0.3 * 0.8 < np.abs(wave[900:2000]).max()  # no clicks
    for silence in (wave[:800], wave[2400:3200], wave[7200:]):
        assert silence.std() == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("timbre", TIMBRES)
def test_samples_are_noise_and_the_sines_of_all_partials_to_the_step_of_16_bits(timbre):
    wave, (strengths, fading) = np.random.RandomState(7).normal(0, 0.001, 8000), TIMBRES[timbre]
    for hertz, first in ((440.0, 800), (261.63, 3200), (493.88, 5600)):
        seconds = np.arange(1600) / 8000
        tone = sum(
            strength * np.sin(2 * np.pi * number * hertz * seconds)
            for number, strength in enumerate(strengths, start=1)
        )
        swell = np.clip(np.minimum(seconds / 0.01, (0.2 - seconds) / 0.03), 0, 1)
        wave[first : first + 1600] += 0.8 / sum(strengths) * tone * swell * np.exp(-fading * seconds)
    made, _ = MELODIES.render(MEDIUM.replace("flute", timbre))
    assert np.abs(32767 * (made.astype(float) - wave)).max() < 0.51


def test_nothing_lies_above_the_highest_frequency_that_the_rate_holds():
    """A partial above half the rate would come back below it, out of tune."""
    for timbre in ("flute", "reed", "organ", "string"):
        medium = MEDIUM.replace("flute", timbre).replace("0.0010", "0.0000").replace("440.00", "987.77")
        wave, _ = MELODIES.render(medium)
        tone = wave[800:2400] * np.hanning(1600)
        spectrum = np.abs(np.fft.rfft(tone, 2**15)) / 800
        frequencies = np.arange(len(spectrum)) * 8000 / 2**15
        partials = np.abs(frequencies[:, None] - 987.77 * np.arange(1, 4)).min(axis=1) < 60
        assert spectrum[~partials].max() < 0.02 * spectrum.max()


# ------------------------------------------------------------ what is held out


def test_no_melody_is_in_two_roles_of_both_tasks():
    melodies = {role: set(draw_notes(MELODIES, role, 20_000 if role == "train" else 2000)) for role in ROLES}
    asked = {role: set(draw_notes(QUESTIONS, role, 1000)) for role in ROLES}
    for one, other in combinations(ROLES, 2):
        assert not (melodies[one] | asked[one]) & (melodies[other] | asked[other])
    every = {" ".join(notes) for notes in product(FREQUENCIES, repeat=2)}
    for role in ROLES:
        expected = {notes for notes in every if split_of(notes) == role}
        assert {notes for notes in melodies[role] if len(notes.split()) == 2} == expected
        assert len(expected) > 10


def draw_notes(task, role, count):
    """The melodies of rows with two to four notes, by the frequencies of the medium."""
    media = generate_rows(task, (2, 4), role, (0, 0), count)["medium"]
    nearest = {}
    for medium in media:
        hertz = [float(number) for number in re.findall(r"([\d.]+) Hz at", medium)]
        for value in hertz:
            if value not in nearest:
                nearest[value] = min(FREQUENCIES, key=lambda name: abs(np.log(FREQUENCIES[name] / value)))
        yield " ".join(nearest[value] for value in hertz)


def test_notes_and_neighbours_of_melodies_that_are_held_out_are_trained():
    pairs = {
        pair
        for melody in generate_rows(MELODIES, (3, 5), "train", (0, 0), 20_000)["answer"]
        for pair in pairwise(melody.split())
    }
    assert pairs == set(product(FREQUENCIES, repeat=2))


# ------------------------------------------------------------ answers


@pytest.mark.parametrize("task", [MELODIES, QUESTIONS], ids=lambda task: task.name)
def test_answers_pass_the_check_and_other_answers_do_not(task):
    rows = draw(task, "train", 300, (1, 4))
    answers = {row["answer"] for row in rows} | {"", "C", "c4", "C4 ", "H4"}
    for row in rows:
        assert task.check(row["medium"], row["prompt"], row["answer"])
        assert not any(task.check(row["medium"], row["prompt"], other) for other in answers - {row["answer"]})


def test_answers_computed_by_hand():
    assert MELODIES.check(MEDIUM, "", "A4 C4 B4")
    assert not any(MELODIES.check(MEDIUM, "", other) for other in ("C4 A4 B4", "A4 C4", "A5 C4 B4", "A4 C4 B4 B4"))
    for prompt, answer in {
        "What is the highest note?": "B4",
        "What is the lowest note?": "C4",
        "How many notes are there?": "3",
        "Is the last note higher than the first?": "yes",
    }.items():
        assert QUESTIONS.check(MEDIUM, prompt, answer)
        assert not any(QUESTIONS.check(MEDIUM, prompt, other) for other in ("A4", "2", "no", ""))


def test_attributes():
    assert MELODIES.attributes("C4 E4") == {"note1": "C4", "note2": "E4", "length": "2"}
    assert MELODIES.attributes(" ") == {"length": "0"}
    assert QUESTIONS.attributes(" 3") == {"count": "3"}
    assert QUESTIONS.attributes("no") == {"rises": "no"}
    assert QUESTIONS.attributes("B5") == {"note": "B5"}


def test_no_answer_to_a_question_comes_much_more_often_than_others():
    rows = draw(QUESTIONS, "train", 3000, (3, 5))
    for name, fewest in {"count": 200, "rises": 300, "note": 100}.items():
        counts = Counter(row["answer"] for row in rows if name in QUESTIONS.attributes(row["answer"]))
        assert min(number for _, number in counts.most_common(2 if name == "rises" else 3)) > fewest, counts


# ------------------------------------------------------------ rows


@pytest.mark.parametrize("task", [MELODIES, QUESTIONS], ids=lambda task: task.name)
def test_rows_depend_on_seed_role_and_index_alone(task):
    rows = generate_rows(task, (2, 4), "train", (5, 1), 30)
    assert set(rows.column_names) == {"prompt", "answer", "difficulty", "medium"}
    assert list(rows) == [generate_row(task, (2, 4), "train", (5, 1), index) for index in range(30)]
    assert list(generate_rows(task, (2, 4), "train", (5, 1), 30, workers=2)) == list(rows)
    others = [generate_rows(task, (2, 4), role, seed, 30) for role, seed in [("test", (5, 1)), ("train", (5, 2))]]
    assert all(list(other["medium"]) != list(rows["medium"]) for other in others)
    sounds = [task.render(medium)[0].tobytes() for medium in rows["medium"]]
    assert sounds == [task.render(medium)[0].tobytes() for medium in rows["medium"]] and len(set(sounds)) == 30


def test_melodies_have_as_many_notes_as_their_difficulty():
    for row in draw(MELODIES, "train", 100, (1, 7)):
        assert len(row["answer"].split()) == row["medium"].count(" Hz at ") == row["difficulty"]


def test_a_medium_that_is_no_melody_is_refused():
    with pytest.raises(ValueError, match="medium 'C4 E4 G4' is not a melody"):
        MELODIES.render("C4 E4 G4")
    with pytest.raises(ValueError, match="is not a melody"):
        MELODIES.render(MEDIUM.replace(" at ", " from "))
    assert get_task("melodies") is MELODIES
