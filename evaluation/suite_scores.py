"""Scores of a suite of tasks: each centred by its chance level, their mean, and differences between depths, with
intervals of 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .intervals import Interval, difference_interval, interval_of, sums_of_draws, wilson_interval
from .tables import depth_name, format_table


@dataclass(frozen=True)
class TaskScores:
    """One task at one depth."""

    scores: np.ndarray
    """A score for each example, in [0, 1], (examples,)."""
    chance: float
    """The score of a guess, below 1."""
    number: int
    """The place of the task in the suite, which seeds its draws: they are the same at all depths."""

    def centred(self, score: Any) -> Any:
        """Scores, or an interval of them, such that a guess has 0 and what is right has 1."""
        return (score - self.chance) / (1 - self.chance)

    @property
    def mean(self) -> float:
        """The centred score of all examples."""
        return float(self.centred(self.scores.mean()))

    @cached_property
    def draws(self) -> np.ndarray:
        """The centred scores of draws of as many examples with replacement, (draws,)."""
        return self.centred(sums_of_draws(self.scores[:, None], self.number)[:, 0] / len(self.scores))

    @property
    def is_binary(self) -> bool:
        """Whether each example is right or wrong."""
        return bool(np.isin(self.scores, (0, 1)).all())

    @property
    def interval(self) -> Interval:
        """The interval of `mean`: Wilson's, or a bootstrap's where examples have scores between 0 and 1."""
        if not self.is_binary:
            return interval_of(self.draws)
        ends = wilson_interval(int(self.scores.sum()), len(self.scores))
        return Interval(*map(self.centred, ends))

    def change_from(self, other: TaskScores) -> tuple[float, Interval]:
        """How much more this has than the same examples have at another depth, and the interval of the pairs."""
        if not (self.is_binary and other.is_binary):
            return self.mean - other.mean, interval_of(self.draws - other.draws)
        gained, lost = (int((sign * (self.scores - other.scores) > 0).sum()) for sign in (1, -1))
        ends = difference_interval(gained, lost, len(self.scores))
        return self.mean - other.mean, Interval(*(end / (1 - self.chance) for end in ends))


Found = Mapping[int | None, Mapping[str, TaskScores]]
"""Scores by depth and name of the task; the tasks and their examples are the same at all depths."""


def suite_content(found: Found) -> dict[str, Any]:
    """The scores as they stand in suite.json: `rows`, one for each depth, and `differences` of the deepest from each
    other depth. The score of a suite is the mean of its tasks' centred scores, its interval a bootstrap over the
    examples of each task.
    """
    *others, deepest = found
    return {
        "rows": [
            {
                "num_steps": depth,
                **_of_suite([task.mean for task in tasks.values()], [task.draws for task in tasks.values()]),
                "tasks": {name: _of_task(task) for name, task in tasks.items()},
            }
            for depth, tasks in found.items()
        ],
        "differences": [{"num_steps": [depth, deepest], **_gained(found[depth], found[deepest])} for depth in others],
    }


def _of_suite(scores: Sequence[float], draws: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean of tasks, and its interval from their draws, of which large tasks may have fewer."""
    fewest = min(map(len, draws))
    return _estimate(float(np.mean(scores)), interval_of(np.mean([it[:fewest] for it in draws], axis=0)))


def _of_task(task: TaskScores) -> dict[str, Any]:
    raw = {"uncentred": float(task.scores.mean()), "chance": task.chance, "num_examples": len(task.scores)}
    return _estimate(task.mean, task.interval) | raw


def _gained(before: Mapping[str, TaskScores], after: Mapping[str, TaskScores]) -> dict[str, Any]:
    """The gain of the tasks, and of their mean, from one depth to another."""
    changes = {name: task.change_from(before[name]) for name, task in after.items()}
    draws = [task.draws - before[name].draws for name, task in after.items()]
    whole = _of_suite([change for change, _ in changes.values()], draws)
    return {**whole, "tasks": {name: _estimate(*change) for name, change in changes.items()}}


def _estimate(score: float, interval: Interval) -> dict[str, Any]:
    return {"score": score, "interval": interval}


def suite_markdown(content: Mapping[str, Any]) -> str:
    """A line for each depth, then one for each difference, in per cent."""
    rows, differences = content["rows"], content["differences"]
    names = list(rows[0]["tasks"])
    body = [[depth_name(row["num_steps"]), *_cells(row, names, "")] for row in rows]
    text = "Centred scores in per cent: 0 is chance, 100 is right.\n\n" + format_table(["steps", "suite", *names], body)
    if differences:
        body = [["{} to {}".format(*row["num_steps"]), *_cells(row, names, "+")] for row in differences]
        text += "\nGained on the same examples:\n\n" + format_table(["steps", "suite", *names], body)
    return text


def _cells(row: Mapping[str, Any], names: Sequence[str], sign: str) -> list[str]:
    parts = [row, *(row["tasks"][name] for name in names)]
    return [
        f"{100 * it['score']:{sign}.1f} ({100 * it['interval'][0]:{sign}.1f} to {100 * it['interval'][1]:{sign}.1f})"
        for it in parts
    ]
