"""Subtraction of two numbers of the same length: "83-45=" has the answer "83", which is 38 read from its last digit."""

import random

from .synthetic_task import GeneratedTask


class Subtraction(GeneratedTask):
    """Subtract two numbers of `difficulty` digits, the smaller from the larger.

    The answer is written last digit first, as in `Addition`: a borrow is known only from the right.
    """

    name = "subtraction"
    default_difficulty = (1, 2)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        smallest = 10 ** (difficulty - 1) if difficulty > 1 else 0
        pair = rng.randrange(smallest, 10**difficulty), rng.randrange(smallest, 10**difficulty)
        first, second = max(pair), min(pair)
        return {"prompt": f"{first}-{second}=", "answer": str(first - second)[::-1]}

    def check(self, prompt: str, answer: str) -> bool:
        """Adds: whether answer and second number give the first."""
        first, second = map(int, prompt.removesuffix("=").split("-"))
        is_number = answer.isascii() and answer.isdigit() and (answer == "0" or answer[-1] != "0")
        return is_number and int(answer[::-1]) + second == first
