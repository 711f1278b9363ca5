"""Calculating with numbers, and putting their digits in order."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from .base import GeneratedTask

_QUESTIONS = ("What is {}?", "Compute {}.", "How much is {}?")
_EXPRESSION = re.compile(r"\d[\d*+-]*")


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


class Reversal(GeneratedTask):
    """Write `difficulty` digits from the last to the first."""

    name = "reversal"
    default_difficulty = (2, 6)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        digits = "".join(rng.choices("0123456789", k=difficulty))
        return {"prompt": digits, "answer": digits[::-1]}

    def check(self, prompt: str, answer: str) -> bool:
        pairs = enumerate(prompt, start=1)
        return len(prompt) == len(answer) and all(answer[-place] == digit for place, digit in pairs)


class Sorting(GeneratedTask):
    """Write `difficulty` digits from the smallest to the largest."""

    name = "sorting"
    default_difficulty = (2, 6)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        digits = "".join(rng.choices("0123456789", k=difficulty))
        return {"prompt": digits, "answer": "".join(sorted(digits))}

    def check(self, prompt: str, answer: str) -> bool:
        return Counter(prompt) == Counter(answer) and all(one <= other for one, other in pairwise(answer))


@dataclass(frozen=True)
class _Instruction:
    """One thing to do with numbers, in several wordings."""

    wordings: tuple[str, ...]
    """With {a}, and {b} where there are two numbers."""
    answer: Callable[[int, int], str]
    """Of a and b; a is the larger one."""
    is_right: Callable[[str, str, str], bool]
    """Whether an answer is right for a and b as they are written."""


_INSTRUCTIONS = {
    "addition": _Instruction(
        ("What is {a} plus {b}?", "Add {a} and {b}.", "How much are {a} and {b} together?"),
        lambda a, b: str(a + b),
        lambda answer, a, b: int(answer) - int(b) == int(a) and answer == str(int(answer)),
    ),
    "subtraction": _Instruction(
        ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."),
        lambda a, b: str(a - b),
        lambda answer, a, b: int(answer) + int(b) == int(a) and answer == str(int(answer)),
    ),
    "larger": _Instruction(
        ("Which is larger, {b} or {a}?", "Is {a} or {b} larger?", "Name the larger of {b} and {a}."),
        lambda a, b: str(a),
        lambda answer, a, b: answer in (a, b) and int(a) <= int(answer) >= int(b),
    ),
    "reversal": _Instruction(
        ("Reverse the digits of {a}.", "Read {a} backwards."),
        lambda a, b: str(a)[::-1],
        lambda answer, a, b: list(answer) == list(reversed(a)),
    ),
    "sorting": _Instruction(
        ("Sort the digits of {a}.", "Put the digits of {a} in order."),
        lambda a, b: "".join(sorted(str(a))),
        lambda answer, a, b: Counter(answer) == Counter(a) and all(x <= y for x, y in pairwise(answer)),
    ),
}
_PATTERNS = [
    (name, re.compile(re.escape(wording).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")))
    for name, instruction in _INSTRUCTIONS.items()
    for wording in instruction.wordings
]


class Instructions(GeneratedTask):
    """Calculate, compare, reverse or sort, with numbers of up to `difficulty` digits; answers are written as usual."""

    name = "instructions"
    default_difficulty = (1, 2)
    is_chat = True

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        smallest = 10 ** (difficulty - 1) if difficulty > 1 else 0
        a = rng.randrange(max(smallest, 1), 10**difficulty)
        b = rng.randrange(a)
        instruction = _INSTRUCTIONS[rng.choice(list(_INSTRUCTIONS))]
        return {"prompt": rng.choice(instruction.wordings).format(a=a, b=b), "answer": instruction.answer(a, b)}

    def check(self, prompt: str, answer: str) -> bool:
        name, a, b = _read(prompt)
        return answer.isascii() and answer.isdigit() and _INSTRUCTIONS[name].is_right(answer, a, b)

    def identity(self, prompt: str) -> str:
        """What is to be done with which numbers, whatever the wording."""
        name, a, b = _read(prompt)
        return f"{name} {a} {b}"


def _read(prompt: str) -> tuple[str, str, str]:
    """What is to be done, a, and b or ""."""
    for name, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt):
            return name, match["a"], match.groupdict().get("b", "")
    raise ValueError(f"{prompt!r} is no instruction of this task")


class Calculator(GeneratedTask):
    """Expressions with `difficulty` operators, too hard to solve by heart.

    The assistant first says `calculator(EXPRESSION)`, which is the call that `inference.chat` carries out; a message of
    the tool holds the result, which the assistant repeats.
    """

    name = "calculator"
    default_difficulty = (1, 3)
    is_chat = True

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        expression = str(number := rng.randrange(100))
        total, product = 0, number  # what stands before the last + or -, and the product that is open
        for _ in range(difficulty):
            operator, number = rng.choice("+-*"), rng.randrange(100)
            if operator == "*":
                product *= number
            else:
                total, product = total + product, number if operator == "+" else -number
            expression += f"{operator}{number}"
        return {"prompt": rng.choice(_QUESTIONS).format(expression), "answer": str(total + product)}

    def replies(self, row: dict[str, str]) -> list[dict[str, str]]:
        return [
            {"role": "assistant", "content": f"calculator({self.identity(row['prompt'])})"},
            {"role": "tool", "content": row["answer"]},
            {"role": "assistant", "content": row["answer"]},
        ]

    def identity(self, prompt: str) -> str:
        """The expression, whatever the question around it."""
        return _EXPRESSION.search(prompt)[0]

    def check(self, prompt: str, answer: str) -> bool:
        products = self.identity(prompt).replace("-", "+-1*").split("+")
        return answer == str(sum(prod(map(int, product.split("*"))) for product in products))
