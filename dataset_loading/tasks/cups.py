"""Tracking a ball: "ccaXbda=" asks for the cup to which the moves b, d and a bring a ball from cup X, as a digit, as an
image or as a note.
"""

import random
import re

from .base import GeneratedTask, Role, split_of
from .melodies import Tunes
from .scenes import POSITIONS, SIZES, SceneTask, kinds_of, parse_scene

CUPS = {"V": "1", "W": "2", "X": "3", "Y": "4", "Z": "5"}
"""The letter that puts a ball under a cup, and the digit that answers with it."""
MOVES = {"a": "23451", "b": "21453", "c": "54213", "d": "34512"}
"""Where a ball under cup 1, 2, 3, 4, 5 is after a move. The moves together reach every order of the cups; none leaves
a ball where it is."""
NUM_MOVES = 6
"""Moves in a prompt, those before the letter included."""
MOST_SHARED_MOVES = 3
"""Up to here there are 5 * (4 + 16 + 64) = 420 questions in all, too few to divide them among train and validation."""


class Cups(GeneratedTask):
    """Follow a ball through `difficulty` moves of five cups; the answer is the cup.

    The capital letter puts the ball under a cup, so moves before it do not count. They fill the prompt up to six
    moves: all are equally long up to there, and of one move there are as many different ones as of six. Start and
    answer are written differently: a digit is always an answer, after which the text ends.

    **The same questions of one to three moves occur in train, validation and test**, after other moves that do not
    count: right answers to them may have been learned by heart. A question of four moves or more occurs in one of them
    only, whatever is in front of it.

    The moves do not commute and generate all permutations of five, whose word problem no circuit of constant depth and
    polynomial size is known to solve (Barrington 1989): a transformer needs layers, or steps, that grow with the number
    of moves (Merrill and Sabharwal 2023, "The Parallelism Tradeoff"). Nothing has to be looked up, and each number of
    moves uses the same rule.
    """

    name = "cups"
    default_difficulty = (1, 6)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        start, moves = rng.choice("VWXYZ"), rng.choices("abcd", k=max(difficulty, NUM_MOVES))
        cup = CUPS[start]
        for move in moves[-difficulty:]:
            cup = MOVES[move][int(cup) - 1]
        moves.insert(-difficulty, start)
        return {"prompt": f"{''.join(moves)}=", "answer": cup}

    def identity(self, prompt: str) -> str:
        """The letter and the moves after it; of few moves the whole prompt, as there are too few questions to share."""
        question = _question(prompt)
        return question if len(question) - len("X=") > MOST_SHARED_MOVES else prompt

    def check(self, prompt: str, answer: str) -> bool:
        """Backwards: whether the moves lead to `answer` from the cup that is met on the way."""
        cup = answer
        for move in reversed(prompt[:-1]):
            if move in CUPS:
                return cup == CUPS[move]
            if len(cup) != 1 or cup not in MOVES[move]:
                return False
            cup = str(MOVES[move].index(cup) + 1)
        return False


class RetoldCups(Cups):
    """The answer tells the question again without the moves that do not count, and then the cup.

    A decoder that writes it reads each of these moves once more, and so has a state for each of them. One that writes
    the cup alone reads all moves of its source from one place.
    """

    name = "retold_cups"

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        row = super().sample(rng, difficulty)
        return row | {"answer": _question(row["prompt"]) + row["answer"]}

    def check(self, prompt: str, answer: str) -> bool:
        return super().check(prompt, answer[-1:]) and answer[:-1] == _question(prompt)


def _question(prompt: str) -> str:
    """The letter and what follows."""
    return re.search("[V-Z].*", prompt)[0]


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
        """The part of the question as a text."""
        return split_of(_CUPS.identity(row["answer"]))


class CupImages(_CupMedia, SceneTask):
    """Draw a red ball where the `difficulty` moves of `cups` bring it: the text that is given takes as many steps of
    thought as there are moves, and nothing else in the image depends on them.
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
        scene = parse_scene(medium)
        if kinds_of(scene) != ["large red circle"]:
            return False
        place = tuple(int(3 * at / scene.size) for at in scene.things[0][1:3])
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
