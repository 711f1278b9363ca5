"""Images of coloured shapes: captions such as "a small red circle left of a large blue square", questions about them,
and shapes to draw, such as "a large green square at the top left" or "three small red circles".
"""

import math
import random
import re
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from PIL import Image

from .base import GeneratedMediaTask, Role, normal_noise

COLOURS = {
    "red": (225, 45, 40),
    "green": (45, 165, 60),
    "blue": (50, 85, 230),
    "yellow": (240, 215, 45),
    "purple": (175, 60, 205),
    "white": (240, 240, 240),
}
"""Names and RGB values, each of which varies a little from object to object."""
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (0.122, 0.135), "large": (0.2, 0.215)}
"""Smallest and largest radius as a part of the image's side; a shape is two radii wide and high."""
RELATIONS = ("left of", "right of", "above", "below")
_MARGIN, _GAP = 1 / 64, 1 / 16  # between a shape and the border, and between two shapes, as parts of the side
_STEEPEST = 0.4  # of two objects in a relation, the distance across it as a part of the distance along it
_GRAIN = 2.5  # standard deviation of the noise on a pixel
_MOST_OF_BOTH_SIZES = 4  # objects; more fit only if all are small
_SCENE = re.compile(r"(\d+)x\1 #([0-9a-f]{6}) slope (\S+) (\S+) grain (\d+): (.+)")
_THING = re.compile(r"(\w+) #([0-9a-f]{6}) at (\S+) (\S+) radius (\S+)")
_SCENE_CAPTION = re.compile(r"a (\w+ \w+ \w+)(?: (left of|right of|above|below) a (\w+ \w+ \w+))?")
POSITIONS = {
    "at the top left": (0, 0),
    "at the top": (1, 0),
    "at the top right": (2, 0),
    "at the left": (0, 1),
    "in the middle": (1, 1),
    "at the right": (2, 1),
    "at the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}
"""The thirds of an image, from the left and from the top."""
NUMBERS = ("a", "two", "three", "four")
HELD_OUT = frozenset([f"a {' '.join(words)}" for words in product(SIZES, COLOURS, SHAPES, POSITIONS)][::7])
"""Captions of single objects that are in test alone: every seventh combination of all, so that training shows any two
of the words together.
"""
_PLAY = 1 / 20  # how far an object is from a quarter, the half or three quarters of the side, as a part of the side
_DRAWING_CAPTION = re.compile(rf"({'|'.join(NUMBERS)}) (\w+ \w+ \w+?)(s?)(?: ({'|'.join(POSITIONS)}))?")


class Thing(NamedTuple):
    """An object as it is drawn: x to the right and y down to its centre, and its radius, in pixels; RGB of 0 to 255."""

    shape: str
    x: float
    y: float
    radius: float
    fill: tuple[int, int, int]


class Scene(NamedTuple):
    """What the description of a scene says."""

    size: int  # pixels of a side
    background: tuple[int, int, int]
    slope: tuple[float, float]  # by how much the background is brighter at the right and at the lower border
    grain: int  # seed of the noise
    things: list[Thing]


class SceneTask(GeneratedMediaTask):
    """What tasks about scenes share: how a scene is written down, drawn, and given to train, validation or test."""

    modality = "image"
    directions = ("image -> text",)
    size = 32
    """Pixels of a side."""

    def render(self, medium: str) -> Image.Image:
        scene = parse_scene(medium)
        middles = np.arange(scene.size) + 0.5  # of the pixels, from left to right and from top to bottom
        across, down = scene.slope
        light = (across * middles + down * middles[:, None]) / scene.size - (across + down) / 2
        canvas = np.array(scene.background) + light[..., None]  # (height, width, 3)
        for thing in scene.things:
            rows, columns = (  # in which something of the shape may be, and some more
                slice(max(0, int(place - thing.radius) - 2), int(place + thing.radius) + 3)
                for place in (thing.y, thing.x)
            )
            distance = _distance(thing.shape, middles[columns] - thing.x, middles[rows, None] - thing.y, thing.radius)
            coverage = np.clip(0.5 - distance, 0, 1)  # the part of a pixel that lies inside
            canvas[rows, columns] += coverage[..., None] * (np.array(thing.fill) - canvas[rows, columns])
        canvas += normal_noise(scene.grain, _GRAIN, canvas.shape)
        return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))

    def item_size(self, medium: str) -> tuple[int, int]:
        side = parse_scene(medium).size
        return side, side

    def identity(self, prompt: str, medium: str) -> str:
        """The kinds of the objects, wherever they lie and whatever is asked, so that no such set is in two roles.

        For a single object it is the whole description, since there are too few kinds to share: all roles have all.
        """
        kinds = kinds_of(parse_scene(medium))
        return ", ".join(sorted(kinds)) if len(kinds) > 1 else medium

    def _write(self, rng: random.Random, things: list[tuple[str, str, float, float, float]]) -> str:
        """The description of objects given as (colour, shape, x, y, radius), with the rest drawn at random."""
        background = [rng.randrange(15, 75)] * 3
        slope = f"{rng.uniform(-15, 15):.1f} {rng.uniform(-15, 15):.1f}"
        parts = []
        for colour, shape, x, y, radius in things:
            shade = rng.uniform(0.85, 1.0)
            fill = [round(value * shade) for value in COLOURS[colour]]
            parts.append(f"{shape} #{_hexadecimal(rng, fill)} at {x:.2f} {y:.2f} radius {radius:.2f}")
        start = f"{self.size}x{self.size} #{_hexadecimal(rng, background)} slope {slope} grain {rng.randrange(2**31)}"
        return f"{start}: {'; '.join(parts)}"


class Scenes(SceneTask):
    """Captions of one object (difficulty 1), or of two and how they lie (difficulty 2).

    A scene has one caption: of two sizes the small object comes first, otherwise the one at the left or above.
    """

    name = "scenes"
    directions = ("image -> text", "text -> image")
    default_difficulty = (2, 2)
    max_difficulty = 2

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        kinds = [(rng.choice(tuple(SIZES)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES)) for _ in range(difficulty)]
        kinds.sort(key=lambda kind: kind[0], reverse=True)  # small ones first
        radii = [rng.uniform(*SIZES[size]) * self.size for size, _, _ in kinds]
        captions = [f"a {' '.join(kind)}" for kind in kinds]
        if difficulty == 1:
            low, high = self.size * _MARGIN + radii[0], self.size * (1 - _MARGIN) - radii[0]
            answer, places = captions[0], [(rng.uniform(low, high), rng.uniform(low, high))]
        else:
            relation = rng.choice(RELATIONS if kinds[0][0] != kinds[1][0] else ("left of", "above"))
            answer, places = f"{captions[0]} {relation} {captions[1]}", self._place_two(rng, radii, relation)
        things = [
            (colour, shape, *place, radius)
            for (_, colour, shape), place, radius in zip(kinds, places, radii, strict=True)
        ]
        rng.shuffle(things)  # so that the order in the medium tells nothing
        return {"prompt": "", "answer": answer, "medium": self._write(rng, things)}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        """Whether the caption is true and complete; the objects may be named in the other order too."""
        caption, scene = _SCENE_CAPTION.fullmatch(answer), parse_scene(medium)
        if caption is None:
            return False
        said = [kind for kind in (caption[1], caption[3]) if kind is not None]
        return any(
            [kind for kind, _ in order] == said and _relation(*(thing for _, thing in order)) == caption[2]
            for order in permutations(zip(kinds_of(scene), scene.things, strict=True))
        )

    def attributes(self, answer: str) -> dict[str, str]:
        """size1, colour1, shape1, and of two objects relation, size2, colour2, shape2."""
        found = {}
        first, relation, second = re.match(rf"(.*?)(?:\b({'|'.join(RELATIONS)})\b(.*))?$", answer, re.DOTALL).groups()
        for number, part in enumerate((first, second or ""), start=1):
            for name, values in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES)):
                word = next((word for word in part.split() if word in values), None)
                found |= {f"{name}{number}": word} if word else {}
        return found | ({"relation": relation} if relation else {})

    def _place_two(self, rng: random.Random, radii: list[float], relation: str) -> list[tuple[float, float]]:
        """Centres (x, y) of two objects, clearly farther apart along the relation than across it."""
        near, far = radii if relation in ("left of", "above") else reversed(radii)  # the left or upper one first
        low, high, gap = self.size * _MARGIN, self.size * (1 - _MARGIN), self.size * _GAP
        free = high - low - gap - 2 * near - 2 * far
        before, after = sorted((rng.uniform(0, free), rng.uniform(0, free)))
        along = low + before + near, low + after + 2 * near + gap + far
        most = (along[1] - along[0]) * _STEEPEST
        first = rng.uniform(low + near, high - near)
        across = first, rng.uniform(max(low + far, first - most), min(high - far, first + most))
        places = list(zip(along, across, strict=True))
        if relation in ("above", "below"):
            places = [(x, y) for y, x in places]
        return places if relation in ("left of", "above") else places[::-1]


class SceneQuestions(SceneTask):
    """Questions about `difficulty` objects: how many, which colour, which shape, how two of them lie."""

    name = "scene_questions"
    default_difficulty = (1, 4)
    max_difficulty = 9

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        colours = rng.sample(tuple(COLOURS), 3)  # few, so that objects have equals
        sizes = tuple(SIZES) if difficulty <= _MOST_OF_BOTH_SIZES else ("small",)
        rows = math.ceil(math.sqrt(difficulty))
        things = []
        for cell in rng.sample(range(rows**2), difficulty):
            radius = rng.uniform(*SIZES[rng.choice(sizes)]) * self.size
            play = self.size * (1 / rows - _GAP) / 2 - radius
            x, y = ((place + 0.5) * self.size / rows + rng.uniform(-play, play) for place in divmod(cell, rows))
            things.append((rng.choice(colours), rng.choice(SHAPES), x, y, radius))
        of_colours = [(f"{colour} things", sum(thing[0] == colour for thing in things)) for colour in colours]
        of_shapes = [(f"{shape}s", sum(thing[1] == shape for thing in things)) for shape in SHAPES]
        numbers = [(f"How many {what} are there?", str(number)) for what, number in of_colours + of_shapes]
        asked = [numbers, _questions_of_colour_and_shape(things), _questions_of_relation(things)]
        prompt, answer = rng.choice(rng.choice([questions for questions in asked if questions]))
        return {"prompt": prompt, "answer": answer, "medium": self._write(rng, things)}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        scene = parse_scene(medium)
        names = [kind.partition(" ")[2] for kind in kinds_of(scene)]  # without the size
        things = list(zip(names, scene.things, strict=True))
        if counted := re.fullmatch(r"How many (\w+)(?: things)? are there\?", prompt):
            word = counted[1].removesuffix("s")
            return answer == str(sum(word in name.split() for name, _ in things))
        if asked := re.fullmatch(r"What (colour|shape) is the (\w+)(?: thing)?\?", prompt):
            (name,) = [name for name, _ in things if asked[2] in name.split()]
            return f"{answer} {asked[2]}" == name if asked[1] == "colour" else f"{asked[2]} {answer}" == name
        asked = re.fullmatch(r"Is the (\w+ \w+) left of, right of, above or below the (\w+ \w+)\?", prompt)
        (one,), (other,) = ([thing for name, thing in things if name == words] for words in asked.groups())
        return answer == _relation(one, other)

    def attributes(self, answer: str) -> dict[str, str]:
        """One of count, colour, shape and relation."""
        answer = answer.strip()
        if answer.isdecimal():
            return {"count": answer}
        kinds = {"colour": COLOURS, "shape": SHAPES, "relation": RELATIONS}
        return {name: answer for name, values in kinds.items() if answer in values}


def parse_scene(medium: str) -> Scene:
    """The scene that a task has described in a line; raises ValueError for a line that describes none."""
    found = _SCENE.fullmatch(medium)
    things = [_THING.fullmatch(part) for part in found[6].split("; ")] if found else [None]
    if None in things:
        raise ValueError(f"medium {medium!r} is not a scene; take one that a task of scenes has drawn")
    return Scene(
        size=int(found[1]),
        background=_rgb(found[2]),
        slope=(float(found[3]), float(found[4])),
        grain=int(found[5]),
        things=[Thing(part[1], float(part[3]), float(part[4]), float(part[5]), _rgb(part[2])) for part in things],
    )


def kinds_of(scene: Scene) -> list[str]:
    """The names of the objects, such as "small red circle", read from how they are drawn."""
    middle = (SIZES["small"][1] + SIZES["large"][0]) / 2 * scene.size
    kinds = []
    for thing in scene.things:
        colour = min(COLOURS, key=lambda name: math.dist(COLOURS[name], thing.fill))
        kinds.append(f"{'large' if thing.radius > middle else 'small'} {colour} {thing.shape}")
    return kinds


def _relation(one: Thing, other: Thing | None = None) -> str | None:
    """How the first of two lies to the second; None of one alone."""
    if other is None:
        return None
    right, down = one.x - other.x, one.y - other.y
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far points lie outside of a shape around the origin, in pixels; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius
    return np.maximum((2 * np.abs(x) - y - radius) / math.sqrt(5), y - radius)  # a triangle with its point at the top


def _questions_of_colour_and_shape(things: list[tuple]) -> list[tuple[str, str]]:
    """About objects that one word names."""
    colours, shapes = [thing[0] for thing in things], [thing[1] for thing in things]
    questions = []
    for colour, shape in zip(colours, shapes, strict=True):
        if shapes.count(shape) == 1:
            questions.append((f"What colour is the {shape}?", colour))
        if colours.count(colour) == 1:
            questions.append((f"What shape is the {colour} thing?", shape))
    return questions


def _questions_of_relation(things: list[tuple]) -> list[tuple[str, str]]:
    """About pairs of objects that two words name and that lie clearly in one of the four directions."""
    names = [f"{colour} {shape}" for colour, shape, *_ in things]
    questions = []
    for (one, (*_, x1, y1, _)), (other, (*_, x2, y2, _)) in permutations(zip(names, things, strict=True), 2):
        near, far = sorted((abs(x1 - x2), abs(y1 - y2)))
        if names.count(one) == names.count(other) == 1 and near <= _STEEPEST * far:
            places = ("left of", x1 - x2), ("right of", x2 - x1), ("above", y1 - y2), ("below", y2 - y1)
            answer = min(places, key=lambda place: place[1])[0]
            questions.append((f"Is the {one} left of, right of, above or below the {other}?", answer))
    return questions


def _hexadecimal(rng: random.Random, colour: list[int]) -> str:
    """A colour near the given one, such as "e12d28"."""
    return "".join(f"{min(255, max(0, value + rng.randrange(-10, 11))):02x}" for value in colour)


def _rgb(hexadecimal: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(hexadecimal))


class Drawings(SceneTask):
    """One object and where it is (difficulty 1), or as many equal ones as the difficulty says.

    Of a single object, test has one in seven combinations of size, colour, shape and position, and training and
    validation share the others.
    """

    name = "drawings"
    directions = ("text -> image", "image -> text")
    default_difficulty = (1, 1)
    max_difficulty = len(NUMBERS)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        size, colour, shape = rng.choice(tuple(SIZES)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        radii = [rng.uniform(*SIZES[size]) * self.size for _ in range(difficulty)]
        answer = f"{NUMBERS[difficulty - 1]} {size} {colour} {shape}"
        if difficulty == 1:
            position = rng.choice(tuple(POSITIONS))
            answer += f" {position}"
            places = [tuple(self._place(rng, third, radii[0]) for third in POSITIONS[position])]
        else:
            answer += "s"
            places = self._quarters(rng, radii)
        things = [(colour, shape, *place, radius) for place, radius in zip(places, radii, strict=True)]
        return {"prompt": "", "answer": answer, "medium": self._write(rng, things)}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        caption, scene = _DRAWING_CAPTION.fullmatch(answer), parse_scene(medium)
        if caption is None:
            return False
        number, kind, plural, position = caption.groups()
        kinds = kinds_of(scene)
        if kinds != [kind] * (NUMBERS.index(number) + 1) or bool(plural) != (len(kinds) > 1):
            return False
        if len(kinds) > 1:
            return position is None
        return POSITIONS.get(position) == tuple(int(3 * place / scene.size) for place in scene.things[0][1:3])

    def attributes(self, answer: str) -> dict[str, str]:
        """number, size, colour, shape, and of a single object position, such as "top left"."""
        words = answer.split()
        values = {"number": NUMBERS, "size": SIZES, "colour": COLOURS, "shape": (*SHAPES, *(f"{it}s" for it in SHAPES))}
        found = {name: next((word for word in words if word in known), None) for name, known in values.items()}
        position = next((it for it in sorted(POSITIONS, key=len, reverse=True) if answer.strip().endswith(it)), None)
        found |= {"shape": found["shape"] and found["shape"].removesuffix("s")}
        found |= {"position": position and position.split("the ")[1]}
        return {name: value for name, value in found.items() if value}

    def role_of(self, row: dict[str, str]) -> Role:
        """The part of a row: single objects are split by combinations, and several equal ones as elsewhere."""
        if not row["answer"].startswith("a "):
            return super().role_of(row)
        if row["answer"] in HELD_OUT:
            return "test"
        return "validation" if super().role_of(row) == "validation" else "train"

    def _place(self, rng: random.Random, third: int, radius: float) -> float:
        """Across or down, in the middle of a third, or as near to it as an object of that radius can be."""
        middle, play, edge = self.size * (third + 1) / 4, self.size * _PLAY, self.size * _MARGIN + radius
        return rng.uniform(max(middle - play, edge), min(middle + play, self.size - edge))

    def _quarters(self, rng: random.Random, radii: list[float]) -> list[tuple[float, float]]:
        """Centres (x, y) in different quarters of the image."""
        places = []
        for quarter, radius in zip(rng.sample(range(4), len(radii)), radii, strict=True):
            play = self.size * (1 / 2 - _GAP) / 2 - radius
            middles = (self.size * (2 * half + 1) / 4 for half in divmod(quarter, 2))
            places.append(tuple(middle + rng.uniform(-play, play) for middle in middles))
        return places
