"""Addition of two numbers of the same length: "38+45=" has the answer "38", which is 83 read from its last digit."""

import random

from .synthetic_task import GeneratedTask


class Addition(GeneratedTask):
    """Add two numbers of `difficulty` digits.

    The answer is written last digit first, the order in which the carries are known, so that a digit follows from
    what is written already (Lee et al. 2023, "Teaching Arithmetic to Small Transformers").
    """

    name = "addition"
    default_difficulty = (1, 4)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        smallest = 10 ** (difficulty - 1) if difficulty > 1 else 0
        first, second = rng.randrange(smallest, 10**difficulty), rng.randrange(smallest, 10**difficulty)
        return {"prompt": f"{first}+{second}=", "answer": str(first + second)[::-1]}

    def check(self, prompt: str, answer: str) -> bool:
        first, second = prompt.removesuffix("=").split("+")
        width, carry, digits = max(len(first), len(second)), 0, ""
        for one, other in zip(reversed(first.zfill(width)), reversed(second.zfill(width)), strict=True):
            carry, digit = divmod(int(one) + int(other) + carry, 10)
            digits += str(digit)
        return answer == digits + ("1" if carry else "")

    def identity(self, prompt: str) -> str:
        """a+b and b+a are one instance."""
        return "+".join(sorted(prompt.removesuffix("=").split("+")))
