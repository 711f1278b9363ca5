"""Pictures to draw: "a large green square at the top left", or "three small red circles"."""

import random
import re
from itertools import product

from .synthetic_scenes import COLOURS, SHAPES, SIZES, SceneTask, Thing, kinds_of, read_medium
from .synthetic_task import Role

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
"""The thirds of a picture, from the left and from the top."""
NUMBERS = ("a", "two", "three", "four")
HELD_OUT = frozenset([f"a {' '.join(words)}" for words in product(SIZES, COLOURS, SHAPES, POSITIONS)][::7])
"""Captions of single objects that are in test alone: every seventh combination of all, so that training shows any two
of the words together.
"""

_PLAY = 1 / 20  # how far an object is from a quarter, the half or three quarters of the side, as a part of the side
_MARGIN, _GAP = 1 / 64, 1 / 16  # between an object and the border, and between two objects, as parts of the side
_CAPTION = re.compile(rf"({'|'.join(NUMBERS)}) (\w+ \w+ \w+?)(s?)(?: ({'|'.join(POSITIONS)}))?")


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
        caption, picture = _CAPTION.fullmatch(answer), read_medium(medium)
        if caption is None:
            return False
        number, kind, plural, position = caption.groups()
        kinds = kinds_of(picture)
        if kinds != [kind] * (NUMBERS.index(number) + 1) or bool(plural) != (len(kinds) > 1):
            return False
        return position == (_position_of(picture.things[0], picture.size) if len(kinds) == 1 else None)

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
        """Of a single object, test has whole combinations; of several that are equal, as elsewhere."""
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
        """Centres (x, y) in different quarters of the picture."""
        places = []
        for quarter, radius in zip(rng.sample(range(4), len(radii)), radii, strict=True):
            play = self.size * (1 / 2 - _GAP) / 2 - radius
            middles = (self.size * (2 * half + 1) / 4 for half in divmod(quarter, 2))
            places.append(tuple(middle + rng.uniform(-play, play) for middle in middles))
        return places


def _position_of(thing: Thing, side: int) -> str:
    thirds = tuple(int(3 * place / side) for place in (thing.x, thing.y))
    return next(name for name, it in POSITIONS.items() if it == thirds)
