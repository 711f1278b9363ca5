"""Which objective of training pays? Trains the models of `configs/` on cups, additions and scenes, with each objective
and seed for the same CPU time, and compares what they answer, with all steps and with exits, and at four times the
depth.

The time is that of so many updates of the truncated objective: each run measures first what an update of its own costs
and what one of that, so that rows of several machines can be compared. Each run is a process on one core, and a row of
a JSON file; what that file holds is not run again.

    python -m benchmarks.credit --output docs/credit/rows.json
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, Trainer, TrainerCallback

from benchmarks.depth_pays import mean_and_interval
from benchmarks.timing import count, markdown_table
from configs import load_config
from configs.pretraining import build_pretraining
from dataset_loading import Collator, build_examples
from evaluation.answers import AnswerGenerator, Example, prompt_of, to_model
from evaluation.checks import CHECKS
from evaluation.depth import DepthEvaluator, chunks, evaluating
from inference.arguments import OneLineParser
from inference.output import whole_file

ROOT = Path(__file__).parents[1]
KEY = ("task", "objective", "seed", "updates_of_truncated", "questions")
"""What tells rows from each other."""
PILOT = 40
"""Updates of a run that finds out what one costs; the first two are not counted. It is a whole run with a schedule of
its own, since the depth of an objective may grow within it."""
BATCH = 64
KEPT = 0.99
"""Share of the score that exits have to keep."""
LEARNED = 0.5
"""Score below which there is nothing to keep: few steps are as wrong as many."""
FEW = 0.4
"""Share of the steps at which scores with exits are compared."""
QUIET = (
    *("--training.eval_strategy", "no", "--training.save_strategy", "no", "--training.report_to", "none"),
    *("--training.recurrence_logging_steps", "0", "--training.disable_tqdm", "true"),
    *("--callbacks.samples.every_steps", "1000000000", "--callbacks.media_samples.every_steps", "1000000000"),
)
SCENES = "[{kind: generated, task: scenes, num_rows: %d}]"


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        config: The run's YAML.
        source: Label of the validation source that is scored.
        updates: Updates of the truncated objective, whose time all others have.
        recurrence: Where the options of recurrence are.
        levels: Difficulties that are scored; empty for all.
        flags: Further options of the run.
    """

    config: Path
    source: str
    updates: int
    recurrence: str = "model.recurrence"
    levels: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()


TASKS = {
    "cups": Task(ROOT / "configs/recurrent_cups.yaml", "cups", updates=1000, levels=(4, 5, 6)),
    "addition": Task(
        ROOT / "configs/recurrent_lm.yaml",
        "addition",
        updates=1300,
        flags=(
            "--data.train",
            "[{kind: generated, task: addition, num_rows: 80000, difficulty: [1, 2], loss_on: answer}]",
        ),
    ),
    "scenes": Task(
        ROOT / "configs/recurrent_vlm.yaml",
        "scenes",
        updates=300,
        recurrence="model.text_config.recurrence",
        flags=("--data.train", SCENES % 60000, "--data.validation", SCENES % 200),
    ),
}
TRUNCATED = "truncated"
OBJECTIVES: dict[str, dict[str, Any]] = {
    TRUNCATED: {},
    "full": {"name": "full"},
    "every step": {"name": "every_step"},
    "every step, linear": {"name": "every_step", "exponent": 1},
    "exit distribution": {"name": "exit_distribution"},
    "exit distribution, mean of the batch": {"name": "exit_distribution", "prior": "batch", "prior_steps": 3},
    "fixed point": {"name": "fixed_point"},
    "Jacobian": {"name": "jacobian"},
    "implicit": {"name": "implicit"},
    "distillation": {"name": "distillation"},
    "steps that grow": {"step_schedule": 0.25},
}
"""Titles, and what stands in `training.objective`."""
THRESHOLDS = {
    "kl_divergence": (1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4),
    "latent_difference": (0.5, 0.3, 0.2, 0.1, 0.05, 0.02),
    "probe": (0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.03),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    args = build_parser().parse_args(argv)
    set_up_logging("warning")
    datasets.disable_progress_bars()
    if args.job is not None:
        task, objective, seed = args.job
        args.output.write_text(json.dumps(measure(task, objective, int(seed), args.questions)))
        return 0
    jobs = [(task, name, seed) for seed in args.seeds for task in args.tasks for name in args.objectives]
    rows = run_missing(jobs, args.output, args.questions, run_apart)
    sys.stdout.write(report([row for row in rows if tuple(row[name] for name in KEY) in keys(jobs, args.questions)]))
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.credit", description="Objectives of training, in equal time.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the rows; it is gone on with")
    parser.add_argument("--questions", type=count, default=500, help="questions that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each run")
    parser.add_argument("--tasks", choices=list(TASKS), nargs="+", default=list(TASKS), help="what is learned")
    parser.add_argument(
        "--objectives", choices=list(OBJECTIVES), nargs="+", default=list(OBJECTIVES), help="what is compared"
    )
    parser.add_argument("--job", nargs=3, metavar=("TASK", "OBJECTIVE", "SEED"), help="one run, whose row is written")
    return parser


# ---------------------------------------------------------------------------------------------------------------- rows


def keys(jobs: Sequence[tuple[str, str, int]], questions: int) -> list[tuple]:
    """The values of `KEY` in the rows of jobs."""
    return [(*job, TASKS[job[0]].updates, questions) for job in jobs]


def run_missing(
    jobs: Sequence[tuple[str, str, int]], path: Path, questions: int, run: Callable[[tuple[str, str, int], int], dict]
) -> list[dict]:
    """All rows of a file, after those of jobs that it lacks have been added, each as soon as it is there."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for job, key in zip(jobs, keys(jobs, questions), strict=True):
        if key not in [tuple(row[name] for name in KEY) for row in rows]:
            rows.append(run(job, questions))
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    return rows


def run_apart(job: tuple[str, str, int], questions: int) -> dict:
    """The row of a job, from a process of its own on one core."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = ["--job", *job, "--questions", questions, "--output", file]
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.credit", *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"{job} ended with {process.returncode}:\n{process.stderr[-2000:]}")
        return json.loads(file.read_text())


# -------------------------------------------------------------------------------------------------------------- one run


class Clock(TrainerCallback):
    """CPU seconds at the start and after each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = [time.process_time()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time())


def measure(task_name: str, objective: str, seed: int, questions: int) -> dict:
    """Trains for as long as the truncated objective takes, and answers questions that were not trained on."""
    task = TASKS[task_name]
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, whose memory is not taken for that of the run; forked, which imports nothing anew.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            names = (TRUNCATED, objective) if objective != TRUNCATED else ()
            costs = [pool.submit(seconds_of_update, task, name, seed, folder).result() for name in names]
        updates = max(1, round(task.updates * costs[0] / costs[1])) if costs else task.updates
        before = memory("VmRSS")
        trainer, clock = train(task, objective, seed, updates, folder)
        peak = memory("VmHWM") - before
    row = dict(zip(KEY, (task_name, objective, seed, task.updates, questions), strict=True))
    found = {"updates": updates, "cpu_seconds": clock.seconds[-1] - clock.seconds[0], "peak_mib": peak}
    return row | found | answers(trainer, task, questions)


def seconds_of_update(task: Task, objective: str, seed: int, folder: str) -> float:
    """The mean CPU seconds of an update over a short run."""
    _, clock = train(task, objective, seed, PILOT, folder)
    counted = clock.seconds[2:]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def train(task: Task, objective: str, seed: int, updates: int, folder: str) -> tuple[Trainer, Clock]:
    """A trainer that has trained."""
    options = OBJECTIVES[objective]
    flags = ["--config", task.config, *task.flags, *QUIET, "--training.output_dir", folder, "--training.seed", seed]
    flags += ["--training.max_steps", updates]
    flags += [item for name, value in options.items() for item in (f"--training.objective.{name}", value)]
    if options.get("name") == "exit_distribution":
        flags += [f"--{task.recurrence}.exit_probe", "true"]
    run = load_config(list(map(str, flags)))
    trainer, clock = build_pretraining(run), Clock()
    trainer.add_callback(clock)
    trainer.run = run
    trainer.train()
    return trainer, clock


def memory(name: str) -> float:
    """A figure of /proc/self/status in MiB."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


def answers(trainer: Trainer, task: Task, questions: int) -> dict:
    """Exact match at several depths, and with exits at each threshold, with the share of the steps."""
    run, model, processor = trainer.run, trainer.model, trainer.processing_class
    (source,) = [source for source in run.data.validation if source.label == task.source]
    drawn = build_examples(source, run.data, processor, 2 * questions, run.seed, CHECKS)
    rows = [row for row in drawn if not task.levels or row["difficulty"] in task.levels][:questions]
    mean = model.config.get_text_config().recurrence.mean_steps
    evaluator = DepthEvaluator(model, Collator(processor), None, BATCH, None)
    with evaluating(model):
        score = {
            depth: statistics.mean(answer.is_right for answer in evaluator.answer(rows, depth))
            for depth in sorted({1, max(1, mean // 4), max(1, mean // 2), mean, 2 * mean, 4 * mean})
        }
        exits = [
            {"criterion": name, "threshold": threshold, **with_exits(model, processor, rows, mean, name, threshold)}
            for name, thresholds in THRESHOLDS.items()
            if name != "probe" or model.base_model.exit_probe is not None
            for threshold in thresholds
        ]
    return {"mean_steps": mean, "score": score, "exits": exits}


def with_exits(
    model: PreTrainedModel, processor: Any, rows: Sequence[Example], full: int, criterion: str, threshold: float
) -> dict[str, float]:
    """Greedy answers, whose tokens exit on their own, those of a prompt together: the share that is right, and the mean
    steps of the tokens of an answer as a share of all.
    """
    writer, right, steps = AnswerGenerator(processor), [], []
    for chunk in chunks(rows, BATCH):
        inputs = writer.prompts(chunk)
        targets = [row["labels"][len(prompt_of(row)) :] for row in chunk]
        output = model.generate(
            **to_model(inputs, model),
            num_steps=full,
            exit_criterion=criterion,
            exit_threshold=threshold,
            exit_in_prefill=True,
            do_sample=False,
            return_dict_in_generate=True,
            max_new_tokens=max(map(len, targets)),
            eos_token_id=None,
            pad_token_id=writer.tokenizer.pad_token_id,
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        for target, tokens, taken in zip(targets, new.tolist(), output.exit_steps.tolist(), strict=True):
            right.append(tokens[: len(target)] == list(target))
            steps += taken[: len(target)]
    return {"score": statistics.mean(right), "share": statistics.mean(steps) / full}


# --------------------------------------------------------------------------------------------------------------- report


def least_share(row: dict) -> float:
    """The smallest share of the steps with which exits keep the score; 1 where none does, NaN where it is too low."""
    score = row["score"][str(row["mean_steps"])]
    enough = KEPT * score
    if score < LEARNED:
        return math.nan
    return min((exit["share"] for exit in row["exits"] if exit["score"] >= enough), default=1.0)


def score_at_few_steps(row: dict) -> float:
    """The best score with exits in at most `FEW` of the steps; 0 where none takes so few."""
    return max((exit["score"] for exit in row["exits"] if exit["share"] <= FEW), default=0.0)


FIGURES: dict[str, Callable[[dict], float]] = {
    "score": lambda row: 100 * row["score"][str(row["mean_steps"])],
    f"steps of exits that keep {KEPT:.0%}": lambda row: 100 * least_share(row),
    f"score with exits, {FEW:.0%} of the steps": lambda row: 100 * score_at_few_steps(row),
    "score at 4x the depth": lambda row: 100 * row["score"][str(4 * row["mean_steps"])],
    "MiB": lambda row: row["peak_mib"],
    "updates": lambda row: row["updates"],
    "CPU s": lambda row: row["cpu_seconds"],
}


def report(rows: Sequence[dict]) -> str:
    """A table for each task: means over the seeds, ± half of the 95 % interval; "-" where a seed has no figure."""
    rows, parts = json.loads(json.dumps(list(rows))), []  # keys are text, as they are in a file
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task, lines = [row for row in rows if row["task"] == task], []
        for name in dict.fromkeys(row["objective"] for row in of_task):
            own = [row for row in of_task if row["objective"] == name]
            cells = [cell([figure(row) for row in own]) for figure in FIGURES.values()]
            lines.append([name, str(len(own)), *cells])
        title = f"{task}, at a mean of {of_task[0]['mean_steps']} steps; scores and shares of steps in per cent\n\n"
        parts.append(title + markdown_table(["objective", "seeds", *FIGURES], lines))
    return "\n".join(parts)


def cell(values: Sequence[float]) -> str:
    """Mean and half of the interval."""
    if any(map(math.isnan, values)):
        return "-"
    mean, half = mean_and_interval(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


if __name__ == "__main__":
    sys.exit(main())
