"""Short melodies: their notes in order, such as "C4 E4 G4", and questions about them."""

import math
import random
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .base import GeneratedMediaTask, normal_noise

NOTES = tuple(f"{letter}{octave}" for octave in (4, 5) for letter in "CDEFGAB")
"""The white keys from middle C (262 Hz) to the B almost two octaves above (988 Hz)."""
TIMBRES = {
    "flute": ((1.0, 0.4, 0.2, 0.1), 1.0),
    "reed": ((1.0, 0.15, 0.7, 0.15, 0.4, 0.1, 0.2), 1.0),
    "organ": ((1.0, 0.7, 0.4, 0.5, 0.2, 0.2), 0.0),
    "string": ((1.0, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2), 6.0),
}
"""Strengths of the partials at 1, 2, 3, ... times the frequency, and how fast a tone fades (1/s)."""
_KEYS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_ATTACK, _RELEASE = 0.01, 0.03  # seconds in which a tone rises and ends
_TONE_PART = 0.75  # part of a beat; the rest is a pause, so that a note that comes twice is heard twice
_HIGHEST_PART = 0.47  # of the sampling rate; partials above would fold down
_MELODY = re.compile(r"(\d+) Hz (\w+) volume (\S+) noise (\S+) seed (\d+) lasts (\S+): (.+)")
_TONE = re.compile(r"(\S+) Hz at (\S+) for (\S+)")


class Tone(NamedTuple):
    """A tone of a frequency in Hz, its start and how long it lasts in seconds."""

    frequency: float
    start: float
    seconds: float


class Melody(NamedTuple):
    """What the description of a melody says."""

    sampling_rate: int
    timbre: str
    volume: float  # of the loudest a tone can be, at most 1
    noise: float  # standard deviation
    seed: int  # of the noise
    seconds: float
    tones: list[Tone]


class MelodyTask(GeneratedMediaTask):
    """What tasks about melodies share: how a melody is written down, played, and given to train, validation or test."""

    modality = "audio"
    directions = ("audio -> text",)
    default_difficulty = (3, 5)
    sampling_rate = 8000
    """Samples per second."""

    def render(self, medium: str) -> tuple[np.ndarray, int]:
        melody = parse_melody(medium)
        wave = normal_noise(melody.seed, melody.noise, round(melody.seconds * melody.sampling_rate))
        for tone in melody.tones:
            first, played = round(tone.start * melody.sampling_rate), _play(tone, melody)
            wave[first : first + len(played)] += played
        steps = np.rint(np.clip(wave, -1, 1) * 32767)  # those of 16 bits, as in a file
        return (steps / 32767).astype(np.float32), melody.sampling_rate

    def item_size(self, medium: str) -> float:
        melody = parse_melody(medium)
        return round(melody.seconds * melody.sampling_rate) / melody.sampling_rate

    def identity(self, prompt: str, medium: str) -> str:
        """The notes in their order, however they are played and whatever is asked."""
        return " ".join(notes_of(parse_melody(medium)))

    def _write(self, rng: random.Random, notes: list[str]) -> str:
        """The description of notes, with the rest drawn at random."""
        beat, tuning = rng.uniform(0.2, 0.3), 2 ** (rng.uniform(-10, 10) / 1200)  # a hundredth of a semitone is 1/1200
        start, tones = rng.uniform(0.02, 0.15), []
        for number, note in enumerate(notes):
            begin = start + number * beat + rng.uniform(0, 0.01)
            tones.append(f"{frequency_of_note(note) * tuning:.2f} Hz at {begin:.3f} for {_TONE_PART * beat:.3f}")
        seconds = start + len(notes) * beat + rng.uniform(0.02, 0.15)
        volume, noise = rng.uniform(0.25, 0.9), rng.uniform(0.0005, 0.005)
        return (
            f"{self.sampling_rate} Hz {rng.choice(tuple(TIMBRES))} volume {volume:.2f} noise {noise:.4f} "
            f"seed {rng.randrange(2**31)} lasts {seconds:.3f}: {'; '.join(tones)}"
        )


class Melodies(MelodyTask):
    """Write down the `difficulty` notes of a melody."""

    name = "melodies"
    directions = ("audio -> text", "text -> audio")

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        notes = rng.choices(NOTES, k=difficulty)
        return {"prompt": "", "answer": " ".join(notes), "medium": self._write(rng, notes)}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        return answer == " ".join(notes_of(parse_melody(medium)))

    def attributes(self, answer: str) -> dict[str, str]:
        """note1, note2, ... and length, their number."""
        notes = answer.split()
        return {f"note{number}": note for number, note in enumerate(notes, start=1)} | {"length": str(len(notes))}


class Tunes(Melodies):
    """Play `difficulty` notes, all melodies alike, so that nothing but the notes decides how they sound.

    A note begins every fifth of a second, and the whole is a number of 40 ms long.
    """

    name = "tunes"
    directions = ("text -> audio", "audio -> text")
    default_difficulty = (4, 4)
    max_difficulty = 8

    def _write(self, rng: random.Random, notes: list[str]) -> str:
        beat, start, rest = 0.2, 0.04, 0.03
        tones = [
            f"{frequency_of_note(note):.2f} Hz at {start + number * beat:.3f} for {_TONE_PART * beat:.3f}"
            for number, note in enumerate(notes)
        ]
        seconds = start + len(notes) * beat + rest
        return f"{self.sampling_rate} Hz flute volume 0.50 noise 0.0000 seed 0 lasts {seconds:.3f}: {'; '.join(tones)}"


class MelodyQuestions(MelodyTask):
    """Questions about `difficulty` notes: the highest, the lowest, their number, if the last is above the first."""

    name = "melody_questions"

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        notes = rng.choices(NOTES, k=difficulty)
        places = [NOTES.index(note) for note in notes]
        questions = [
            ("What is the highest note?", NOTES[max(places)]),
            ("What is the lowest note?", NOTES[min(places)]),
            ("How many notes are there?", str(difficulty)),
            ("Is the last note higher than the first?", "yes" if places[-1] > places[0] else "no"),
        ]
        prompt, answer = rng.choice(questions)
        return {"prompt": prompt, "answer": answer, "medium": self._write(rng, notes)}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        melody = parse_melody(medium)
        frequencies = [tone.frequency for tone in melody.tones]
        ordered = [note for _, note in sorted(zip(frequencies, notes_of(melody), strict=True))]
        right = {
            "What is the highest note?": ordered[-1],
            "What is the lowest note?": ordered[0],
            "How many notes are there?": str(len(frequencies)),
            "Is the last note higher than the first?": "yes" if frequencies[-1] > frequencies[0] else "no",
        }
        return answer == right.get(prompt)

    def attributes(self, answer: str) -> dict[str, str]:
        """One of count, rises and note."""
        answer = answer.strip()
        if answer in ("yes", "no"):
            return {"rises": answer}
        return {"count": answer} if answer.isdecimal() else {"note": answer}


def parse_melody(medium: str) -> Melody:
    """The melody that a task has described in a line; raises ValueError for a line that describes none."""
    found = _MELODY.fullmatch(medium)
    tones = [_TONE.fullmatch(part) for part in found[7].split("; ")] if found else [None]
    if None in tones:
        raise ValueError(f"medium {medium!r} is not a melody; take one that a task of melodies has drawn")
    return Melody(
        sampling_rate=int(found[1]),
        timbre=found[2],
        volume=float(found[3]),
        noise=float(found[4]),
        seed=int(found[5]),
        seconds=float(found[6]),
        tones=[Tone(*map(float, tone.groups())) for tone in tones],
    )


def frequency_of_note(note: str) -> float:
    """The frequency of a note in Hz, in equal temperament with A4 at 440 Hz."""
    semitones = _KEYS.index(note[:-1]) - _KEYS.index("A") + 12 * (int(note[-1]) - 4)
    return 440 * 2 ** (semitones / 12)


def notes_of(melody: Melody) -> list[str]:
    """The names of the notes, read from the frequencies."""
    semitones = [round(12 * math.log2(tone.frequency / 440)) + 57 for tone in melody.tones]  # above C0
    return [f"{_KEYS[semitone % 12]}{semitone // 12}" for semitone in semitones]


def _play(tone: Tone, melody: Melody) -> np.ndarray:
    """A tone as samples within the volume."""
    strengths, fading = TIMBRES[melody.timbre]
    heard = [
        strength
        for number, strength in enumerate(strengths, start=1)
        if number * tone.frequency < _HIGHEST_PART * melody.sampling_rate
    ]
    loudness = _loudness(tone.seconds, fading, melody.sampling_rate)
    turns = np.full(len(loudness), np.exp(2j * np.pi * tone.frequency / melody.sampling_rate))
    turns[:1] = 1
    swinging = turns.cumprod()  # cos + i sin of the fundamental; a partial is a power of it
    return np.polyval([*reversed(heard), 0], swinging).imag * loudness * (melody.volume / sum(strengths))


@lru_cache(maxsize=8)  # the tones of a melody last equally long
def _loudness(lasts: float, fading: float, sampling_rate: int) -> np.ndarray:
    """That of a tone, sample by sample."""
    seconds = np.arange(round(lasts * sampling_rate)) / sampling_rate
    return np.minimum(seconds / _ATTACK, (lasts - seconds) / _RELEASE).clip(0, 1) * np.exp(-fading * seconds)
