"""Whether a medium shows what its prompt asks for, where that can be read from it exactly."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image

from .recognition import COLOURS, SHAPES, SeenObject, read_notes, read_scene

RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("a", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
"""Thirds of an image."""
MOVES_OF_CUPS = {"a": "23451", "b": "21453", "c": "54213", "d": "34512"}
"""The cups to which a move brings a ball from cup 1, 2, 3, 4, 5."""
PLACES_OF_CUPS = (("top", "left"), ("top", "right"), ("middle", "middle"), ("bottom", "left"), ("bottom", "right"))
NOTES_OF_CUPS = ("C4", "E4", "G4", "B4", "D5")

_OBJECT = re.compile(
    rf"(?:\b({'|'.join(NUMBERS)}) )?(?:\b(small|large) )?\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b"
)
_RELATION = re.compile(rf"\b(?:{'|'.join(RELATIONS)})\b")
_NOTE = re.compile(r"\b[A-G]#?\d\b")
_MOST_ORDERS = 4  # objects in all orders; more are taken as they are seen


@dataclass
class Request:
    """What a prompt asks to be drawn."""

    objects: list[tuple[str | None, str, str]]
    """Size, or None for any, colour and shape of each object."""
    relation: str | None
    """How the first object lies to the second."""
    third: tuple[str, str] | None
    """Row and column of the first object."""


def read_request(prompt: str) -> Request:
    """What "a small red circle left of two blue squares" asks for, or "a large green square at the top left"."""
    prompt = prompt.lower()
    objects = [
        (size, colour, shape)
        for number, size, colour, shape in (found.groups() for found in _OBJECT.finditer(prompt))
        for _ in range(NUMBERS.index(number or "a") + 1)
    ]
    relation = _RELATION.search(prompt)
    words = set(re.findall("[a-z]+", _RELATION.sub("", prompt)))
    third = next((it for it in ROWS if it in words), None), next((it for it in COLUMNS if it in words), None)
    has_third = third != (None, None)
    return Request(
        objects, relation and relation[0], (third[0] or "middle", third[1] or "middle") if has_third else None
    )


def check_scene(prompt: str, image: Image.Image) -> dict[str, bool]:
    """Whether an image shows what a prompt asks for: "number" of objects, "size", "colour" and "shape" of all of them,
    "position" or "relation" where the prompt says one, and "all" of these. Empty where it asks for no object.

    The objects are taken in the order in which most is right.
    """
    request = read_request(prompt)
    if not request.objects:
        return {}
    seen = read_scene(image)
    orders = orders_of(seen, len(request.objects))
    found, _ = max((compare_objects(request, order) for order in orders), key=lambda result: sum(result[1]))
    right = {"number": len(seen) == len(request.objects), **found}
    return {**right, "all": all(right.values())}


def orders_of(seen: Sequence[SeenObject], count: int) -> Iterator[tuple[SeenObject | None, ...]]:
    """What may be meant by the first, second, ... object of a prompt; None for one that is not there."""
    if len(seen) > _MOST_ORDERS:
        seen = [*seen[:count]]
        yield (*seen, *[None] * (count - len(seen)))
        return
    yield from permutations([*seen, *[None] * max(0, count - len(seen))], count)


def compare_objects(request: Request, order: Sequence[SeenObject | None]) -> tuple[dict[str, bool], list[bool]]:
    """Whether all objects are right, by attribute; and what is right one by one."""
    single: list[bool] = []
    right: dict[str, bool] = {}
    for place, name in enumerate(("size", "colour", "shape")):
        pairs = [
            it is not None and it[place] == kind[place]
            for kind, it in zip(request.objects, order, strict=True)
            if kind[place] is not None
        ]
        single += pairs
        right |= {name: all(pairs)} if pairs else {}
    if request.third is not None:
        right["position"] = order[0] is not None and third_of(order[0].place) == request.third
    if request.relation is not None:
        right["relation"] = None not in order[:2] and relation_of(*order[:2]) == request.relation
    return right, [*single, *(right[name] for name in ("position", "relation") if name in right)]


def third_of(place: tuple[float, float]) -> tuple[str, str]:
    """Row and column of a place in an image."""
    x, y = place
    return ROWS[min(int(3 * y), 2)], COLUMNS[min(int(3 * x), 2)]


def relation_of(one: SeenObject, other: SeenObject) -> str:
    """How the first of two lies to the second: by the direction in which they are farther apart."""
    right, down = one.place[0] - other.place[0], one.place[1] - other.place[1]
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def check_notes(prompt: str, waveform: tuple[np.ndarray, int]) -> dict[str, bool]:
    """Whether a waveform, as samples and their rate, has the notes that a prompt names, in their order: "note1", ...,
    "length", and "all" of these. Empty where it names none.
    """
    asked = _NOTE.findall(prompt)
    if not asked:
        return {}
    heard = read_notes(*waveform)
    right = {f"note{number}": heard[number - 1 : number] == [note] for number, note in enumerate(asked, start=1)}
    return {**right, "length": len(heard) == len(asked), "all": heard == asked}


def follow(prompt: str) -> int | None:
    """The cup to which the moves after the capital letter of "ccaXbda=" bring the ball; None if there is no letter."""
    start = re.search("[V-Z]", prompt)
    if start is None:
        return None
    cup = "VWXYZ".index(start[0]) + 1
    for move in re.findall("[a-d]", prompt[start.end() :]):
        cup = int(MOVES_OF_CUPS[move][cup - 1])
    return cup


def check_cup_image(prompt: str, image: Image.Image) -> dict[str, bool]:
    """Whether an image shows one ball, "number", in the place of the cup that a prompt asks for, "position", and "all"
    of these. Empty where it asks for none.
    """
    cup = follow(prompt)
    if cup is None:
        return {}
    seen = read_scene(image)
    right = {"number": len(seen) == 1, "position": {third_of(it.place) for it in seen} == {PLACES_OF_CUPS[cup - 1]}}
    return {**right, "all": all(right.values())}


def check_cup_tune(prompt: str, waveform: tuple[np.ndarray, int]) -> dict[str, bool]:
    """The same of a waveform and its notes: "length", "note1" and "all"."""
    cup = follow(prompt)
    return {} if cup is None else check_notes(NOTES_OF_CUPS[cup - 1], waveform)


Check = Callable[[str, Any], dict[str, bool]]
CHECKS: dict[str, Check] = {
    "scenes": check_scene,
    "drawings": check_scene,
    "melodies": check_notes,
    "tunes": check_notes,
    "cup_pictures": check_cup_image,
    "cup_tunes": check_cup_tune,
}
"""By generated task. A check takes a prompt, and an image or (samples, rate)."""
