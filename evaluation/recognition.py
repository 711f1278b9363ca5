"""What an image of a scene shows and which notes a melody has, read from pixels and samples alone, so that media that
a model has generated are read like the rest.

Scenes:

    1. The background is a plane of colour, near most pixels of the border.
    2. An object is a connected part that differs from it; its own colour is that of its clearest pixels.
    3. Between the two, each pixel is covered from 0 to 1. The covered area is that of a shape of some radius; the
       shape whose drawing there is most like what is seen is taken.

Melodies: a note begins where the loudness rises out of a pause, and ends where it has fallen. Its pitch is the
frequency whose multiples together are strongest in the spectrum of what lies between.

The file shares no code with what draws and plays, and knows of it only the names below and what they look like.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

COLOURS = {
    "red": (208, 42, 37),
    "green": (42, 153, 56),
    "blue": (46, 79, 213),
    "yellow": (222, 199, 42),
    "purple": (162, 56, 190),
    "white": (222, 222, 222),
}
"""RGB in the middle of the shades that bear a name."""
LARGE_RADIUS = 1 / 6
"""Of the image's side: from this radius on an object is large, below it small."""
UNCLEAR = "unclear"
"""Shape of an object that is like none of them."""

_CONTRAST = 50  # distance in RGB from the background from which a pixel may belong to an object
_LEAST_BACKGROUND = 0.2  # of the image
_LEAST_AREA = 0.01  # of the image; the smallest object has three times as much
_WORST_FIT = 0.25  # squared difference from the best shape, as a part of the area; a circle as a square has 0.18
_FINE = 8  # points along a pixel at which a shape is looked up

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


class SeenObject(NamedTuple):
    """An object as it is seen."""

    size: str
    colour: str
    shape: str
    place: tuple[float, float]
    """Middle of its bounding box: x to the right and y down, as parts of the image's width and height."""


class Shape(NamedTuple):
    """A shape of radius 1: 2 wide and 2 high, around the origin, y down."""

    area: float
    centroid: float
    """y of its centre of mass; x is 0."""
    covers: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Whether points (x, y) lie within it."""


SHAPES = {
    "circle": Shape(math.pi, 0, lambda x, y: x**2 + y**2 <= 1),
    "square": Shape(4, 0, lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 1),
    "triangle": Shape(2, 1 / 3, lambda x, y: (np.abs(x) <= (y + 1) / 2) & (y <= 1)),
}


def read_scene(image: Image.Image) -> list[SeenObject]:
    """The objects of an image, from top to bottom. Specks, and noise, are none."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)  # (height, width, 3)
    background = background_of(pixels)
    differs = np.linalg.norm(pixels - background, axis=-1)
    parts = [part for part in connected_parts(differs > _CONTRAST) if part.mean() >= _LEAST_AREA]
    return sorted((recognize_object(pixels, background, part) for part in parts), key=lambda it: it.place[1])


def background_of(pixels: np.ndarray) -> np.ndarray:
    """The colour behind each pixel, as large as the image: a plane, fitted to what is near it."""
    height, width, _ = pixels.shape
    down, across = (grid / grid.size for grid in np.ogrid[:height, :width])
    terms = np.stack(np.broadcast_arrays(1.0, across, down), axis=-1).reshape(-1, 3)
    flat = pixels.reshape(-1, 3)
    is_border = np.ones((height, width), dtype=bool)
    is_border[1:-1, 1:-1] = False
    plane = np.broadcast_to(np.median(pixels[is_border], axis=0), flat.shape)
    for _ in range(3):
        distance = np.linalg.norm(flat - plane, axis=-1)
        near = distance <= max(_CONTRAST, np.quantile(distance, _LEAST_BACKGROUND))  # something is, whatever is shown
        plane = terms @ np.linalg.lstsq(terms[near], flat[near], rcond=None)[0]
    return plane.reshape(pixels.shape)


def connected_parts(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask, (height, width) of bool each, whose pixels touch with their sides."""
    left, parts = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        waiting, part = [left.pop()], np.zeros_like(mask)
        while waiting:
            y, x = waiting.pop()
            part[y, x] = True
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    waiting.append(neighbour)
        parts.append(part)
    return parts


def recognize_object(pixels: np.ndarray, background: np.ndarray, part: np.ndarray) -> SeenObject:
    """What one part of an image shows."""
    fill = colour_of(pixels, background, part)
    coverage = coverage_of(pixels, background, fill) * grown(part)
    height, width = part.shape
    down, across = (grid + 0.5 for grid in np.ogrid[:height, :width])
    area = coverage.sum()
    middle_x, middle_y = (coverage * across).sum() / area, (coverage * down).sum() / area
    fits = []
    for name, shape in SHAPES.items():
        radius = math.sqrt(area / shape.area)
        x, y = middle_x, middle_y - shape.centroid * radius
        drawn = drawing_of(shape, x, y, radius, part.shape)
        fits.append((((coverage - drawn) ** 2).sum() / area, name, radius, (float(x / width), float(y / height))))
    misfit, name, radius, place = min(fits)
    size = "large" if radius / math.sqrt(width * height) >= LARGE_RADIUS else "small"
    colour = min(COLOURS, key=lambda it: math.dist(COLOURS[it], fill))
    return SeenObject(size, colour, name if misfit <= _WORST_FIT else UNCLEAR, place)


def colour_of(pixels: np.ndarray, background: np.ndarray, part: np.ndarray) -> np.ndarray:
    """RGB of an object's inside: where it differs most from the background."""
    differs = np.linalg.norm(pixels - background, axis=-1)
    is_inside = part & (differs >= 0.8 * np.quantile(differs[part], 0.9))
    return np.median(pixels[is_inside], axis=0)


def coverage_of(pixels: np.ndarray, background: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """How much of each pixel has a colour instead of the background, (height, width) from 0 to 1."""
    way = fill - background
    return (((pixels - background) * way).sum(axis=-1) / (way**2).sum(axis=-1)).clip(0, 1)


def grown(part: np.ndarray) -> np.ndarray:
    """A mask with the pixels around it, where soft edges are."""
    wide = np.pad(part, 1)
    height, width = part.shape
    return np.any([wide[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def drawing_of(shape: Shape, x: float, y: float, radius: float, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel a shape covers, (height, width), in pixels, by counting points."""
    height, width = size
    across = ((np.arange(width * _FINE) + 0.5) / _FINE - x) / radius
    down = ((np.arange(height * _FINE) + 0.5) / _FINE - y) / radius
    points = shape.covers(across, down[:, None])
    return points.reshape(height, _FINE, width, _FINE).mean(axis=(1, 3))


# ---------------------------------------------------------------------------------------------------------------- notes


def read_notes(waveform: np.ndarray, sampling_rate: int) -> list[str]:
    """The names of the notes in their order, such as ["C4", "F#5"]; A4 has 440 Hz.

    Args:
        waveform: (samples,).
        sampling_rate: Samples per second.
    """
    waveform = np.asarray(waveform, dtype=np.float64)
    skipped = round(_WINDOW / 2 * sampling_rate)  # in which a note is still rising
    notes = []
    for start, end in find_notes(loudness_of(waveform, sampling_rate)):
        first, last = round(start * _HOP * sampling_rate), round(end * _HOP * sampling_rate)
        if (end - start) * _HOP >= _SHORTEST:
            notes.append(note_name(pitch_of(waveform[first + skipped : last], sampling_rate)))
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


def pitch_of(tone: np.ndarray, sampling_rate: int) -> float:
    """The candidate in Hz whose multiples are strongest."""
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
