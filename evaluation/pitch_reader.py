"""The notes of a melody, read from its samples alone, so that what a model has played is read like the rest.

A note begins where the loudness rises out of a pause, and ends where it has fallen. Its pitch is the frequency whose
multiples together are strongest in the spectrum of what lies between.
"""

from __future__ import annotations

import math

import numpy as np

KEYS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")

_WINDOW, _HOP = 0.02, 0.004  # seconds of which the loudness is taken, and from one to the next
_SILENCE = 0.12  # of the loudness of the loud parts: below, nothing sounds
_FALL, _RISE = 0.35, 2.0  # a note ends at this part of its loudest; the next begins at so many times the quietest since
_SHORTEST = 0.04  # seconds of a note; what is shorter is a click
_LOWEST_OCTAVE, _OCTAVES = 3, 4  # that are searched: C3 (131 Hz) to B6
_PER_SEMITONE = 20  # frequencies that are tried
_PARTIALS, _FADING = 8, 0.8  # multiples that count, and how much less each counts than the one below
_HIGHEST_PART = 0.47  # of the sampling rate, up to which multiples count
_BINS = 2**15  # of the spectrum: a quarter of a hertz at 8 kHz


def read_notes(waveform: np.ndarray, sampling_rate: int) -> list[str]:
    """The names of the notes in their order, such as ["C4", "F#5"]; A4 has 440 Hz.

    Args:
        waveform: (samples,).
        sampling_rate: in Hz.
    """
    waveform = np.asarray(waveform, dtype=np.float64)
    skipped = round(_WINDOW / 2 * sampling_rate)  # in which a note is still rising
    notes = []
    for start, end in find_notes(loudness_of(waveform, sampling_rate)):
        first, last = round(start * _HOP * sampling_rate), round(end * _HOP * sampling_rate)
        if (end - start) * _HOP >= _SHORTEST:
            notes.append(note_name(frequency_of(waveform[first + skipped : last], sampling_rate)))
    return notes


def loudness_of(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Root of the mean power around each place, `_HOP` seconds from one to the next."""
    window, hop = round(_WINDOW * sampling_rate), round(_HOP * sampling_rate)
    power = np.concatenate(([0], np.cumsum(np.pad(waveform, window // 2) ** 2)))
    starts = np.arange(0, len(power) - window, hop)
    return np.sqrt(np.maximum(power[starts + window] - power[starts], 0) / window)


def find_notes(loudness: np.ndarray) -> list[tuple[int, int]]:
    """First place of each note, and the first one after it."""
    if not len(loudness):
        return []
    silence = _SILENCE * np.quantile(loudness, 0.95)
    notes, start, loudest, quietest = [], None, 0.0, 0.0
    for place, value in enumerate([*loudness, 0.0]):
        if start is None:
            quietest = min(quietest, value)
            if value > max(silence, _RISE * quietest):
                start, loudest = place, value
        else:
            loudest = max(loudest, value)
            if value <= max(silence, _FALL * loudest):
                notes.append((start, place))
                start, quietest = None, value
    return notes


def frequency_of(tone: np.ndarray, sampling_rate: int) -> float:
    """In Hz, of the candidates the one whose multiples are strongest."""
    bins = max(_BINS, 2 ** math.ceil(math.log2(len(tone))))
    spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone)), bins))
    semitones = np.arange(-0.5, 12 * _OCTAVES - 0.5, 1 / _PER_SEMITONE) + 12 * (_LOWEST_OCTAVE + 1)
    candidates = 440 * 2 ** ((semitones - 69) / 12)
    strength = np.zeros(len(candidates))
    for number in range(1, _PARTIALS + 1):
        partial = number * candidates
        found = np.interp(partial * bins / sampling_rate, np.arange(len(spectrum)), spectrum)
        strength += np.where(partial < _HIGHEST_PART * sampling_rate, _FADING ** (number - 1) * found, 0)
    return float(candidates[strength.argmax()])


def note_name(frequency: float) -> str:
    """That of the nearest key."""
    semitone = round(69 + 12 * math.log2(frequency / 440))  # 60 is C4
    return f"{KEYS[semitone % 12]}{semitone // 12 - 1}"
