"""The digits of a number in another order: "52817" is "71825" reversed, and "12578" sorted."""

import random
from collections import Counter
from itertools import pairwise

from .synthetic_task import GeneratedTask


class _OrderOfDigits(GeneratedTask):
    default_difficulty = (2, 6)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        digits = rng.choices("0123456789", k=difficulty)
        return {"prompt": "".join(digits), "answer": "".join(self.ordered(digits))}

    def ordered(self, digits: list[str]) -> list[str]:
        """The digits of the answer."""
        raise NotImplementedError


class Reversal(_OrderOfDigits):
    """Write `difficulty` digits from the last to the first."""

    name = "reversal"

    def ordered(self, digits: list[str]) -> list[str]:
        return digits[::-1]

    def check(self, prompt: str, answer: str) -> bool:
        pairs = enumerate(prompt, start=1)
        return len(prompt) == len(answer) and all(answer[-place] == digit for place, digit in pairs)


class Sorting(_OrderOfDigits):
    """Write `difficulty` digits from the smallest to the largest."""

    name = "sorting"

    def ordered(self, digits: list[str]) -> list[str]:
        return sorted(digits)

    def check(self, prompt: str, answer: str) -> bool:
        return Counter(prompt) == Counter(answer) and all(one <= other for one, other in pairwise(answer))
