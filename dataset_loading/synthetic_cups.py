"""Tracking a ball: "3bda=" has the answer "5" if the moves b, d and a bring the ball from cup 3 to cup 5."""

import random

from .synthetic_task import GeneratedTask

MOVES = {"a": "23451", "b": "21453", "c": "54213", "d": "34512"}
"""Where a ball under cup 1, 2, 3, 4, 5 is after a move. The moves together reach every order of the cups; none leaves
a ball where it is."""


class Cups(GeneratedTask):
    """Follow a ball through `difficulty` moves of five cups; the answer is the cup.

    The moves do not commute and generate all permutations of five, whose word problem no circuit of constant depth and
    polynomial size is known to solve (Barrington 1989): a transformer needs layers, or steps, that grow with the number
    of moves (Merrill and Sabharwal 2023, "The Parallelism Tradeoff"). Nothing has to be looked up, and each number of
    moves uses the same rule.
    """

    name = "cups"
    default_difficulty = (1, 8)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        start, moves = rng.choice("12345"), "".join(rng.choices("abcd", k=difficulty))
        cup = start
        for move in moves:
            cup = MOVES[move][int(cup) - 1]
        return {"prompt": f"{start}{moves}=", "answer": cup}

    def check(self, prompt: str, answer: str) -> bool:
        """Backwards: the cup from which the moves lead to `answer`."""
        cup = answer
        for move in reversed(prompt[1:-1]):
            if len(cup) != 1 or cup not in MOVES[move]:
                return False
            cup = str(MOVES[move].index(cup) + 1)
        return cup == prompt[0]
