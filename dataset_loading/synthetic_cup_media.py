"""Balls to draw and to play: "ccaXbda=" asks for the cup to which the moves bring a ball, as a picture or as a note."""

import random

from .synthetic_cups import Cups
from .synthetic_drawings import POSITIONS
from .synthetic_melodies import Tunes
from .synthetic_scenes import SIZES, SceneTask, kinds_of, read_medium
from .synthetic_task import Role, split_of

PLACES = dict(
    zip(
        "12345",
        ("at the top left", "at the top right", "in the middle", "at the bottom left", "at the bottom right"),
        strict=True,
    )
)
"""Where the ball is drawn for each cup."""
NOTES_OF_CUPS = {"1": "C4", "2": "E4", "3": "G4", "4": "B4", "5": "D5"}
"""The note that is played for each cup."""

_CUPS = Cups()


class _CupMedia:
    """What the two share: their answers are questions of `cups`."""

    default_difficulty = _CUPS.default_difficulty
    max_difficulty = None

    def attributes(self, answer: str) -> dict[str, str]:
        """cup, the moves' end."""
        return {"cup": next((cup for cup in PLACES if _CUPS.check(answer, cup)), "")}

    def role_of(self, row: dict[str, str]) -> Role:
        """That of the question as a text."""
        return split_of(_CUPS.identity(row["answer"]))


class CupPictures(_CupMedia, SceneTask):
    """Draw a red ball where the `difficulty` moves of `cups` bring it: the text that is given takes as many steps of
    thought as there are moves, and nothing else in the picture depends on them.
    """

    name = "cup_pictures"
    directions = ("text -> image",)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        asked = _CUPS.sample(rng, difficulty)
        radius = rng.uniform(*SIZES["large"]) * self.size
        x, y = (self.size * (third + 1) / 4 for third in POSITIONS[PLACES[asked["answer"]]])
        medium = self._write(rng, [("red", "circle", x, y, radius)])
        return {"prompt": "", "answer": asked["prompt"], "medium": medium}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        picture = read_medium(medium)
        if kinds_of(picture) != ["large red circle"]:
            return False
        place = tuple(int(3 * at / picture.size) for at in (picture.things[0].x, picture.things[0].y))
        cup = next((cup for cup, words in PLACES.items() if POSITIONS[words] == place), "")
        return _CUPS.check(answer, cup)


class CupTunes(_CupMedia, Tunes):
    """Play the note of the cup to which the `difficulty` moves of `cups` bring the ball."""

    name = "cup_tunes"
    directions = ("text -> audio",)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        asked = _CUPS.sample(rng, difficulty)
        medium = self._write(rng, [NOTES_OF_CUPS[asked["answer"]]])
        return {"prompt": "", "answer": asked["prompt"], "medium": medium}

    def check(self, medium: str, prompt: str, answer: str) -> bool:
        notes = self.identity(prompt, medium)
        return _CUPS.check(answer, next((cup for cup, note in NOTES_OF_CUPS.items() if note == notes), ""))
