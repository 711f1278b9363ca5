"""Shared parts of comparisons of ways to train for the same CPU time: tasks, the clock, the file of rows.

The time is that of so many updates of the way that is the reference: each run measures first, in short pilots, what an
update of its own costs and what one of the reference, so that rows of several machines can be compared. Each run is a
process on one core, forked from one that holds the data of its task and seed, and a row of a JSON file; what that file
holds is not run again.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.depth_pays import mean_and_interval
from benchmarks.timing import count, markdown_table
from configs import RunConfig, load_config
from configs.pretraining import build_pretraining
from dataset_loading import RunDatasets, build_examples
from evaluation.answers import Example
from evaluation.checks import CHECKS
from inference.arguments import OneLineParser
from inference.output import whole_file

ROOT = Path(__file__).parents[1]
PILOT = 40
"""Updates of a run that finds out what one costs; the first two are not counted. It is a whole run with a schedule of
its own, since the depth of an objective may grow within it."""
BATCH = 64
"""Questions that are answered at a time."""
DIVERGED = "diverged"
"""The key under which the row of a run whose loss was not finite says where, in place of figures."""
QUIET = (
    *("--training.eval_strategy", "no", "--training.save_strategy", "no", "--training.report_to", "none"),
    *("--training.recurrence_logging_steps", "0", "--training.disable_tqdm", "true"),
    *("--callbacks.samples.every_steps", "1000000000", "--callbacks.media_samples.every_steps", "1000000000"),
)

Key = dict[str, Any]
"""Keys of a row: the task, what is compared, the seed, the updates of the reference, the questions."""


@dataclass(frozen=True)
class Task:
    """A task that is learned.

    Args:
        config: The run's YAML.
        source: Label of the validation source that is scored.
        updates: Updates of the reference, whose time all others have.
        levels: Difficulties that are scored; empty for all.
        flags: Further options of the run.
    """

    config: Path
    source: str
    updates: int
    levels: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()


def build_parser(name: str, description: str, tasks: Iterable[str], way: str, ways: Iterable[str]) -> OneLineParser:
    """The options of a comparison of ways to train; `way` is what they are called, such as "objective"."""
    parser = OneLineParser(prog=f"benchmarks.{name}", description=description)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the rows; it is gone on with")
    parser.add_argument("--questions", type=count, default=500, help="questions that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each run")
    parser.add_argument("--tasks", choices=list(tasks), nargs="+", default=list(tasks), help="what is learned")
    parser.add_argument(f"--{way}s", choices=list(ways), nargs="+", default=list(ways), help="what is compared")
    return parser


# ---------------------------------------------------------------------------------------------------------------- rows


def run_missing(keys: Sequence[Key], path: Path, run: Callable[[Key], dict]) -> list[dict]:
    """The rows of these keys, after those that the file lacks have been added to it, each as soon as it is there. The
    row of a run that diverged says where, and has no figures.
    """
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for key in keys:
        if not any(has_key(row, key) for row in rows):
            try:
                rows.append(run(key))
            except FloatingPointError as error:
                rows.append(key | {DIVERGED: str(error).partition(". ")[0]})
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    return [row for row in rows if any(has_key(row, key) for key in keys)]


def has_key(row: dict, key: Key) -> bool:
    """Whether a row is that of a key."""
    return key.items() <= {name: row[name] for name in key}.items()


def run_apart(measure: Callable[..., dict], tasks: Mapping[str, Task], key: Key) -> dict:
    """The row of a key, which `measure` makes of its task, of what is compared, of seed and questions, in a process of
    its own on one core.
    """
    torch.set_num_threads(1)  # before anything starts threads, which a fork would lack
    name, way, seed, _, questions = key.values()
    datasets_of(tasks[name], seed)
    return forked(measure, name, way, seed, questions)


def forked(run: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in another process, which has all that this one has."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(run, *args).result()


# -------------------------------------------------------------------------------------------------------------- one run


class Clock(TrainerCallback):
    """CPU seconds at the start and after each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = [time.process_time()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time())


def train_as_long(
    task: Task, own: Sequence[Any], reference: Sequence[Any] | None, seed: int
) -> tuple[Trainer, dict[str, float]]:
    """A trainer that has trained for as long as the reference takes, and the updates, the CPU seconds and the most MiB
    that this took. `own` and `reference` are flags; without the latter it makes as many updates.
    """
    with tempfile.TemporaryDirectory() as folder:
        updates = task.updates
        if reference is not None:
            # In processes of their own, whose memory is not taken for that of the run.
            theirs, ours = (forked(seconds_of_update, task, flags, seed, folder) for flags in (reference, own))
            updates = max(1, round(task.updates * theirs / ours))
        before = memory("VmRSS")
        trainer, clock = train(task, own, seed, updates, folder)
        peak = memory("VmHWM") - before
    seconds = clock.seconds[-1] - clock.seconds[0]
    return trainer, {"updates": updates, "cpu_seconds": seconds, "peak_mib": peak}


def as_flags(section: str, options: dict[str, Any]) -> list[Any]:
    """Options by name, below a section, as arguments of a command line."""
    return [item for name, value in options.items() for item in (f"--{section}.{name}", value)]


def seconds_of_update(task: Task, flags: Sequence[Any], seed: int, folder: str) -> float:
    """The mean CPU seconds of an update over a short run."""
    _, clock = train(task, flags, seed, PILOT, folder)
    counted = clock.seconds[2:]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def train(task: Task, flags: Sequence[Any], seed: int, updates: int, folder: str) -> tuple[Trainer, Clock]:
    """A trainer that has trained."""
    of_run = as_flags("training", {"output_dir": folder, "seed": seed, "max_steps": updates})
    run = config_of(task, (*of_run, *flags))
    trainer, clock = build_pretraining(run, datasets=datasets_of(task, seed)), Clock()
    trainer.add_callback(clock)
    trainer.run = run
    trainer.train()
    return trainer, clock


@functools.lru_cache(maxsize=1)
def datasets_of(task: Task, seed: int) -> RunDatasets:
    """Those of all runs of a task with this seed."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_pretraining(config_of(task, as_flags("training", {"output_dir": folder, "seed": seed})))
    return RunDatasets(trainer.train_dataset, trainer.eval_dataset, [])


def config_of(task: Task, flags: Sequence[Any]) -> RunConfig:
    """The resolved config of a run with these options."""
    return load_config(list(map(str, ("--config", task.config, *task.flags, *QUIET, *flags))))


def memory(name: str) -> float:
    """A figure of /proc/self/status in MiB."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


def questions_of(trainer: Trainer, task: Task, questions: int) -> list[Example]:
    """Questions of the difficulties that are scored; the run did not train on them."""
    run = trainer.run
    (source,) = [source for source in run.data.validation if source.label == task.source]
    drawn = build_examples(source, run.data, trainer.processing_class, 2 * questions, run.seed, CHECKS)
    return [row for row in drawn if not task.levels or row["difficulty"] in task.levels][:questions]


# --------------------------------------------------------------------------------------------------------------- report


def tables(
    rows: Sequence[dict],
    way: str,
    figures: Mapping[str, Callable[[dict], float]],
    title: Callable[[dict], str],
    digits: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """A table for each task: means over the seeds, ± half of the 95 % interval; "-" where a seed has no figure. Runs
    that diverged are left out of the means, and counted in a column if there are any.

    Args:
        rows: The rows, of any task and seed.
        way: The name of what is compared, under which rows hold it.
        figures: Columns, and what stands in them of a row whose keys are text, as they are in a file.
        title: What stands above a table, of a row of that.
        digits: Decimal places of columns that have not one.
    """
    rows, parts = json.loads(json.dumps(list(rows))), []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task, lines = [row for row in rows if row["task"] == task], []
        done = [row for row in of_task if DIVERGED not in row]
        for name in dict.fromkeys(row[way] for row in of_task):
            own, all_seeds = ([row for row in some if row[way] == name] for some in (done, of_task))
            cells = [cell([of(row) for row in own], digits.get(column, 1)) for column, of in figures.items()]
            lost = [str(len(all_seeds) - len(own))] if len(done) < len(of_task) else []
            lines.append([name, str(len(all_seeds)), *lost, *cells])
        columns = [way, "seeds", *([DIVERGED] if len(done) < len(of_task) else []), *figures]
        parts.append(f"{title(done[0]) if done else task}\n\n{markdown_table(columns, lines)}")
    return "\n".join(parts)


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean and half of the interval; "-" where there is no value, or one is none."""
    if not values or any(map(math.isnan, values)):
        return "-"
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"
