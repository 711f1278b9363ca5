"""Which objective of training pays? Trains the models of `configs/` on cups, additions and scenes, with each objective
and seed for the same CPU time, and compares what they answer, with all steps and with exits, and at four times the
depth.

The time is that of so many updates of the truncated objective, as `benchmarks.equal_time` measures it.

    python -m benchmarks.credit --output docs/credit/rows.json
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
from transformers import PreTrainedModel, Trainer

from benchmarks.equal_time import (
    BATCH,
    ROOT,
    Key,
    Task,
    as_flags,
    build_parser,
    questions_of,
    run_apart,
    run_missing,
    tables,
    train_as_long,
)
from dataset_loading import Collator
from evaluation.answers import AnswerGenerator, Example, prompt_of, to_model
from evaluation.depth import DepthEvaluator, chunks, evaluating
from model.exit_criteria import EXIT_CRITERIA

KEY = ("task", "objective", "seed", "updates_of_truncated", "questions")
"""The keys that tell rows from each other."""
KEPT = 0.99
"""Share of the score that exits have to keep."""
LEARNED = 0.5
"""Score below which there is nothing to keep: few steps are as wrong as many."""
FEW = 0.4
"""Share of the steps at which scores with exits are compared."""
SCENES = "[{kind: generated, task: scenes, num_rows: %d}]"


@dataclass(frozen=True)
class RecurrentTask(Task):
    """What is learned.

    Args:
        recurrence: Where the options of recurrence are.
    """

    recurrence: str = "model.recurrence"


TASKS = {
    "cups": RecurrentTask(ROOT / "configs/recurrent_cups.yaml", "cups", updates=1000, levels=(4, 5, 6)),
    "addition": RecurrentTask(
        ROOT / "configs/recurrent_lm.yaml",
        "addition",
        updates=1300,
        flags=(
            "--data.train",
            "[{kind: generated, task: addition, num_rows: 80000, difficulty: [1, 2], loss_on: answer}]",
        ),
    ),
    "scenes": RecurrentTask(
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
    parser = build_parser("credit", "Objectives of training, in equal time.", TASKS, "objective", OBJECTIVES)
    args = parser.parse_args(argv)
    set_up_logging("warning")
    datasets.disable_progress_bars()
    jobs = [(task, name, seed) for seed in args.seeds for task in args.tasks for name in args.objectives]
    keys = [key_of(*job, args.questions) for job in jobs]
    sys.stdout.write(report(run_missing(keys, args.output, partial(run_apart, measure, TASKS))))
    return 0


def key_of(task: str, objective: str, seed: int, questions: int) -> Key:
    """The values that tell the row of a run from others."""
    return dict(zip(KEY, (task, objective, seed, TASKS[task].updates, questions), strict=True))


# -------------------------------------------------------------------------------------------------------------- one run


def measure(task_name: str, objective: str, seed: int, questions: int) -> dict:
    """Trains for as long as the truncated objective takes, and answers questions that were not trained on."""
    task = TASKS[task_name]
    reference = None if objective == TRUNCATED else flags_of(task, TRUNCATED)
    trainer, found = train_as_long(task, flags_of(task, objective), reference, seed)
    return key_of(task_name, objective, seed, questions) | found | answers(trainer, task, questions)


def flags_of(task: RecurrentTask, objective: str) -> list[Any]:
    """The options of a run with an objective."""
    options = OBJECTIVES[objective]
    gate = {"exit_probe": "true"} if options.get("name") == "exit_distribution" else {}
    return as_flags("training.objective", options) + as_flags(task.recurrence, gate)


def answers(trainer: Trainer, task: RecurrentTask, questions: int) -> dict:
    """Exact match at several depths, and with exits at each threshold, with the share of the steps."""
    model, processor = trainer.model, trainer.processing_class
    rows = questions_of(trainer, task, questions)
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
            if EXIT_CRITERIA[name].is_in(model.config.get_text_config())
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
    """A table for each task."""
    return tables(rows, "objective", FIGURES, title_of)


def title_of(row: dict) -> str:
    """The line above the table of a task."""
    return f"{row['task']}, at a mean of {row['mean_steps']} steps; scores and shares of steps in per cent"


if __name__ == "__main__":
    sys.exit(main())
