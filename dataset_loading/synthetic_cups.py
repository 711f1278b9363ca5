"""Tracking a ball: "ccaXbda=" has the answer "3", the cup to which the moves b, d and a bring a ball from cup X."""

import random
import re

from .synthetic_task import GeneratedTask

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
        question = re.search("[V-Z].*", prompt)[0]
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
