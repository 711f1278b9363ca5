"""Chained lookup: "b=3 a=b c=a ? c" has the answer 3, three assignments away."""

import random
from itertools import product
from string import ascii_lowercase

from .synthetic_task import GeneratedTask

_SYMBOLS = list(ascii_lowercase)
_LONG_SYMBOLS = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
_USUAL_ASSIGNMENTS = 12


class ChainedLookup(GeneratedTask):
    """Follow `difficulty` assignments from the symbol asked for to a digit.

    Up to difficulty 8 every prompt has 12 assignments (beyond, difficulty + 4). In some prompts the chain goes on past
    the symbol asked for, and the rest are chains of other lengths that end in other digits. So neither the length of
    the prompt nor being the end of a chain tells the number of hops.
    """

    name = "chained_lookup"
    default_difficulty = (1, 4)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        count = max(_USUAL_ASSIGNMENTS, difficulty + 4)
        lengths = [difficulty + rng.randrange(3)]
        left = count - lengths[0]
        for _ in range(rng.randrange(3)):  # up to three chains besides the one asked for
            if left > 1:
                lengths.append(rng.randrange(1, left))
                left -= lengths[-1]
        lengths.append(left)
        symbols = rng.sample(_SYMBOLS if count <= len(_SYMBOLS) else _LONG_SYMBOLS, count)
        digits = rng.sample("0123456789", len(lengths))
        assignments, asked, first = [], symbols[difficulty - 1], 0
        for length, value in zip(lengths, digits, strict=True):
            for symbol in symbols[first : first + length]:
                assignments.append(f"{symbol}={value}")
                value = symbol
            first += length
        rng.shuffle(assignments)
        return {"prompt": f"{' '.join(assignments)} ? {asked}", "answer": digits[0]}

    def check(self, prompt: str, answer: str) -> bool:
        assignments, _, asked = prompt.partition(" ? ")
        values = dict(assignment.split("=") for assignment in assignments.split())
        while asked in values:
            asked = values[asked]
        return asked == answer

    def identity(self, prompt: str) -> str:
        """The order of the assignments does not matter."""
        assignments, _, asked = prompt.partition(" ? ")
        return f"{' '.join(sorted(assignments.split()))} ? {asked}"
