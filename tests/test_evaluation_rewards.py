"""Rewards where the answer is known."""

import pytest

from evaluation.rewards import close_answer, exact_answer

ANSWERS = ["123", "123", "123", "123", "123", "123"]
COMPLETIONS = [" 123", "124", "1234", "", [{"role": "assistant", "content": "123 "}], "12"]


def test_exact_answer():
    assert exact_answer(completions=COMPLETIONS, answer=ANSWERS, prompts=ANSWERS) == [1, 0, 0, 0, 1, 0]


def test_close_answer():
    """Half of 2/3, 3/4, 0 and 2/3; nothing but the answer is above a half."""
    rewards = close_answer(completions=COMPLETIONS, answer=ANSWERS, prompts=ANSWERS)
    assert rewards == pytest.approx([1, 1 / 3, 3 / 8, 0, 1, 1 / 3])
