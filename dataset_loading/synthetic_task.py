"""The interface of a generated task, and how its instances are divided among train, validation and test."""

import random
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import Literal

Role = Literal["train", "validation", "test"]


class GeneratedTask(ABC):
    """A task with a number for its difficulty and answers that code can check.

    A new task is a subclass in a `synthetic_*.py` file and an entry in the registry of `synthetic.py`.
    """

    name: str
    """Name in configs."""
    default_difficulty: tuple[int, int]
    """Smallest and largest difficulty where a config gives none."""

    @abstractmethod
    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        """Draw {"prompt", "answer"} of a difficulty, using no randomness but `rng`."""

    @abstractmethod
    def check(self, prompt: str, answer: str) -> bool:
        """Whether `answer` is right, computed from `prompt` alone and without the code of `sample`."""

    def identity(self, prompt: str) -> str:
        """A text that is the same for prompts that ask the same thing; train and test share none."""
        return prompt


def split_of(identity: str) -> Role:
    """The part an instance belongs to: of ten, eight are "train", one "validation", one "test".

    The digest depends on nothing but the text (`hash()` would differ between processes).
    """
    tenth = int.from_bytes(blake2b(identity.encode(), digest_size=8).digest()) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")
