"""Instructions in plain English: "What is 38 plus 45?" has the answer "83"."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from .synthetic_task import GeneratedTask


@dataclass(frozen=True)
class _Instruction:
    """One thing to do with numbers, in several wordings."""

    wordings: tuple[str, ...]
    """With {a}, and {b} where there are two numbers."""
    answer: Callable[[int, int], str]
    """Of a and b; a is the larger one."""
    is_right: Callable[[str, str, str], bool]
    """Whether an answer is right for a and b as they are written."""


def _is_plain(number: str) -> bool:
    """Whether it has no zeros in front."""
    return number == "0" or number[0] != "0"


_INSTRUCTIONS = {
    "addition": _Instruction(
        ("What is {a} plus {b}?", "Add {a} and {b}.", "How much are {a} and {b} together?"),
        lambda a, b: str(a + b),
        lambda answer, a, b: int(answer) - int(b) == int(a) and _is_plain(answer),
    ),
    "subtraction": _Instruction(
        ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."),
        lambda a, b: str(a - b),
        lambda answer, a, b: int(answer) + int(b) == int(a) and _is_plain(answer),
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
_PATTERNS = {
    name: [
        re.compile(re.escape(wording).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{b\}", r"(?P<b>\d+)"))
        for wording in instruction.wordings
    ]
    for name, instruction in _INSTRUCTIONS.items()
}


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
    for name, patterns in _PATTERNS.items():
        for match in filter(None, (pattern.fullmatch(prompt) for pattern in patterns)):
            return name, match["a"], match.groupdict().get("b", "")
    raise ValueError(f"{prompt!r} is no instruction of this task")
