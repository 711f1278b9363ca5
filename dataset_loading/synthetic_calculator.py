"""Conversations with a tool: the assistant lets a calculator find what "38*45+7" is, and says what it answers."""

import random
import re
from math import prod

from .synthetic_task import GeneratedTask

_QUESTIONS = ("What is {}?", "Compute {}.", "How much is {}?")
_EXPRESSION = re.compile(r"\d[\d*+-]*")


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
