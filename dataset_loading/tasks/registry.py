"""Generated data: tasks by name, and rows drawn from them, the same on every machine, process and rank."""

import random
from collections.abc import Sequence
from hashlib import blake2b

from datasets import Dataset, Features, Value

from .arithmetic import Addition, Calculator, Instructions, Reversal, Sorting, Subtraction
from .base import GeneratedMediaTask, GeneratedTask, Role
from .cups import CupImages, Cups, CupTunes, RetoldCups
from .melodies import Melodies, MelodyQuestions, Tunes
from .scenes import Drawings, SceneQuestions, Scenes
from .tracking import ChainedLookup, Stories
from .word_problems import A5Prefixes, A5Word, S5Prefixes, S5Word

_TEXT = (ChainedLookup, Addition, Subtraction, Reversal, Sorting, Stories, Instructions, Calculator)
_STATES = (Cups, RetoldCups, A5Word, A5Prefixes, S5Word, S5Prefixes)
_MEDIA = (Scenes, SceneQuestions, Drawings, CupImages, Melodies, MelodyQuestions, Tunes, CupTunes)
TASKS: dict[str, GeneratedTask] = {task.name: task() for task in (*_TEXT, *_STATES)}
"""Tasks of text alone."""
MEDIA_TASKS: dict[str, GeneratedMediaTask] = {task.name: task() for task in _MEDIA}
"""Tasks with images and waveforms, and text about them."""
_ATTEMPTS = (
    1000  # a role holds at least a tenth of the instances, so 1000 misses mean that it holds none (0.9^1000 = 2e-46)
)
_FEATURES = {"prompt": Value("string"), "answer": Value("string"), "difficulty": Value("int64")}


def get_task(name: str) -> GeneratedTask:
    """The task called `name`.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    tasks = TASKS | MEDIA_TASKS
    if name not in tasks:
        raise ValueError(f"generated task {name!r} is unknown; choose one of {', '.join(sorted(tasks))}")
    return tasks[name]


def generate_row(
    task: GeneratedTask, difficulty: tuple[int, int], role: Role, seed: tuple[int, ...], index: int
) -> dict:
    """Row `index` of a role as {"prompt", "answer", "difficulty"}, and "medium" of a task with media.

    The row depends on the arguments alone. Instances are drawn until one falls into the role: roles
    never share one.

    Raises:
        ValueError: The task has no such difficulties, or no instance of them belongs to the role.
    """
    task.check_difficulty(difficulty)
    key = blake2b(f"{task.name} {role} {seed} {index}".encode(), digest_size=16).digest()
    rng = random.Random(int.from_bytes(key))
    for _ in range(_ATTEMPTS):
        level = rng.randrange(difficulty[0], difficulty[1] + 1)
        row = task.sample(rng, level)
        if task.role_of(row) == role:
            return {**row, "difficulty": level}
    raise ValueError(f"task {task.name!r} has no {role} instance of difficulty {list(difficulty)}; widen it")


def generate_rows(
    task: GeneratedTask,
    difficulty: Sequence[int] | None,
    role: Role,
    seed: tuple[int, ...],
    num_rows: int,
    workers: int = 1,
) -> Dataset:
    """Rows 0 to `num_rows` - 1 in memory: columns prompt, answer, difficulty, and medium of a task with media.

    Args:
        difficulty: Smallest and largest difficulty, both included, drawn evenly; None: the task's own.
        seed: Numbers that all become part of the key.
        workers: Processes that share the work; the rows do not depend on it.

    Raises:
        ValueError: The reasons are those of `generate_row`.
    """
    features = _FEATURES | {"medium": Value("string")} if isinstance(task, GeneratedMediaTask) else _FEATURES
    difficulty = tuple(difficulty or task.default_difficulty)
    return Dataset.from_dict({"index": range(num_rows)}).map(
        _generate_batch,
        batched=True,
        fn_kwargs={"name": task.name, "difficulty": difficulty, "role": role, "seed": seed},
        remove_columns="index",
        features=Features(features),
        num_proc=min(workers, num_rows) if workers > 1 else None,
        keep_in_memory=True,
        new_fingerprint=f"generated-{task.name}",
        desc=f"generating {task.name}",
    )


def _generate_batch(
    batch: dict[str, list[int]], name: str, difficulty: tuple[int, int], role: Role, seed: tuple[int, ...]
) -> dict[str, list]:
    rows = [generate_row(get_task(name), difficulty, role, seed, index) for index in batch["index"]]
    return {column: [row[column] for row in rows] for column in rows[0]}
