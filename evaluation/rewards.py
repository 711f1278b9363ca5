"""Rewards for what a model has written, where the answer is known. `finetune.py` takes them by name, as
`evaluation.rewards:exact_answer`.

Each gets by keyword the completions, texts or conversations, and the columns of their rows, and returns a number for
each completion.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

Completion = str | Sequence[dict[str, Any]]


def exact_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the answer, 0 for anything else; blanks at both ends do not count."""
    return [float(completion_text(text) == right.strip()) for text, right in zip(completions, answer, strict=True)]


def close_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for the answer, else half the share of signs that are right in their places; blanks at both ends do not count.

    A model that is seldom right learns from it where `exact_answer` says nothing.
    """
    rewards = []
    for text, right in zip(completions, answer, strict=True):
        signs = list(zip_longest(completion_text(text), right.strip()))
        share = sum(one == other for one, other in signs) / max(len(signs), 1)
        rewards.append(1.0 if share == 1 else share / 2)
    return rewards


def completion_text(completion: Completion) -> str:
    """The text of a completion, of a conversation that of its last message."""
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
