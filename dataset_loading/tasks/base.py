"""The interface of a generated task, and how its instances are divided among train, validation and test."""

import random
import threading
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import Literal

import numpy as np
from PIL import Image

Role = Literal["train", "validation", "test"]


class GeneratedTask(ABC):
    """A task with a number for its difficulty and answers that code can check.

    A new task is a subclass in a file of this folder and an entry in `registry.py`.
    """

    name: str
    """Name in configs."""
    default_difficulty: tuple[int, int]
    """Smallest and largest difficulty where a config gives none."""
    max_difficulty: int | None = None
    """The largest difficulty there is, if there is one."""
    is_chat = False
    """Whether rows are conversations even where a source has no `prompt`."""

    @abstractmethod
    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        """Draw {"prompt", "answer"} of a difficulty, using no randomness but `rng`."""

    def replies(self, row: dict[str, str]) -> list[dict[str, str]]:
        """Messages that follow the user's question where a row of `sample` is a conversation."""
        return [{"role": "assistant", "content": row["answer"]}]

    @abstractmethod
    def check(self, prompt: str, answer: str) -> bool:
        """Whether `answer` is right, computed from `prompt` alone and without the code of `sample`."""

    def identity(self, prompt: str) -> str:
        """A text that is the same for prompts that ask the same thing; train and test share none."""
        return prompt

    def role_of(self, row: dict[str, str]) -> Role:
        """The part that a row of `sample` belongs to."""
        return split_of(self.identity(row["prompt"]))

    def check_difficulty(self, difficulty: tuple[int, int]) -> None:
        """Raises ValueError for difficulties that the task does not have."""
        if self.max_difficulty is not None and difficulty[1] > self.max_difficulty:
            raise ValueError(
                f"difficulty is {list(difficulty)}, but {self.name!r} has 1 to {self.max_difficulty}; narrow it"
            )


class GeneratedMediaTask(GeneratedTask):
    """A task about an image or a waveform, which rows describe in a line of text, `medium`. `render` makes it."""

    modality: Literal["image", "audio"]
    """What `render` makes."""
    directions: tuple[str, ...]
    """Directions that a source of the task may have, the usual one first. Where the text is given, it is the answer of
    a row, which has no prompt then."""

    @abstractmethod
    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        """Draw {"prompt", "answer", "medium"} of a difficulty, using no randomness but `rng`.

        The prompt may be "". The medium is one line of numbers and names from which the whole item follows.
        """

    @abstractmethod
    def render(self, medium: str) -> Image.Image | tuple[np.ndarray, int]:
        """The image (RGB), or the waveform (float32, mono, within -1 and 1) and its sampling rate in Hz.

        It depends on `medium` alone.

        Raises:
            ValueError: `medium` is not one of this task.
        """

    @abstractmethod
    def item_size(self, medium: str) -> tuple[int, int] | float:
        """(height, width) of the image or seconds of the waveform that `render` makes, without making it."""

    @abstractmethod
    def check(self, medium: str, prompt: str, answer: str) -> bool:
        """Whether `answer` is right, computed from `medium` and `prompt` alone and without the code of `sample`."""

    @abstractmethod
    def identity(self, prompt: str, medium: str) -> str:
        """A text that is the same for items with the same combination; train and test share none."""

    @abstractmethod
    def attributes(self, answer: str) -> dict[str, str]:
        """What an answer says, by name, such as {"colour1": "red"}; of a wrong answer what can be made out of it."""

    def role_of(self, row: dict[str, str]) -> Role:
        return split_of(self.identity(row["prompt"], row["medium"]))


def split_of(identity: str) -> Role:
    """The part an instance belongs to: of ten, eight are "train", one "validation", one "test".

    The digest depends on nothing but the text (`hash()` would differ between processes).
    """
    tenth = int.from_bytes(blake2b(identity.encode(), digest_size=8).digest()) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


class _OfThread(threading.local):
    """A generator for each thread, since seeding one takes a hundredth of the time of making one."""

    def __init__(self):
        self.generator = np.random.RandomState(0)


_RANDOM = _OfThread()


def normal_noise(seed: int, deviation: float, shape: int | tuple[int, ...]) -> np.ndarray:
    """Normally distributed numbers that depend on the arguments alone.

    The stream of RandomState is fixed; that of numpy's Generator may change between versions.
    """
    _RANDOM.generator.seed(seed)
    return _RANDOM.generator.normal(0, deviation, shape)
