"""Yardsticks from outside that fit a laptop: a recurrent model and its twins, trained for the same CPU time.

- `characters`: nats per character of a text, with the sizes of nanoGPT's recipe for a CPU (context 64, 0.8 million
  parameters, 2,000 updates of the plain twin).
- `a5`: word problems of A5, tagged, up to 20 elements in training and 30 in the test.
- tasks of reasoning-gym, which is not among our requirements: `pip install reasoning-gym`.

The time is that of so many updates of the first model of each, as `benchmarks.equal_time` measures it.

    python -m benchmarks.yardsticks --output docs/yardsticks/rows.json --train-text a.txt --validation-text b.txt
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer

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
from configs.pretraining import collator_of
from evaluation.depth import DepthEvaluator, chunks, evaluating, row_of
from evaluation.intervals import ratio_interval, wilson_interval

KEY = ("task", "model", "seed", "updates_of_reference", "questions")
"""The keys that tell rows from each other."""
CHARACTERS, A5 = "characters", "a5"
GYM = ("chain_sum", "count_bits", "gcd", "letter_counting", "spell_backward")
"""Tasks of reasoning-gym whose answer is a single short text."""
DRAWN, HELD_OUT = 21_000, 1_000
"""Questions of such a task, of which the same ones are left out, and those of them that are scored."""
LONGEST, LENGTHS = 30, ((1, 5), (6, 10), (11, 20), (21, 30))
"""Elements of the word problems that are scored, and the lengths over which accuracies are averaged."""
MODELS = ("recurrent", "plain", "untied")
Score = Callable[[Trainer, Task, int, int | None], dict[str, Any]]


@dataclass(frozen=True)
class Yardstick:
    """A task and the models that learn it.

    Args:
        task: The task.
        models: What stands in `model`, by name of the model; the first one is the reference of the time.
        score: Scores a trained model at a depth.
    """

    task: Task
    models: Mapping[str, Mapping[str, Any]]
    score: Score


# ------------------------------------------------------------------------------------------------------------ the tasks

NO_CORE = {"num_core_layers": 0, "num_coda_layers": 0}
UNTIED = {"recurrence.untied_core": True}
# In each, the width of the feed-forward layer makes up for the injection, which a plain model does not have.
OF_CHARACTERS = {
    "plain": {**NO_CORE, "num_prelude_layers": 4, "intermediate_size": 341},
    "recurrent": {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "intermediate_size": 320},
}
OF_A5 = {
    "recurrent": {},
    "plain": {**NO_CORE, "num_prelude_layers": 1, "intermediate_size": 470},
    "untied": UNTIED,
}
OF_GYM = {
    "recurrent": {},
    "plain": {**NO_CORE, "num_prelude_layers": 2, "intermediate_size": 427},
    "untied": UNTIED,
}
BYTES = ("--tokenizer.vocab_size", 259, "--model.vocab_size", 259)


def sources(**options: Any) -> str:
    """A list of one source, as a flag has it."""
    return json.dumps([options])


def characters(train: Path, validation: Path) -> Yardstick:
    """The characters of a text: of one byte each, if it is English."""
    size = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64}
    depth = {"recurrence.mean_steps": 3, "recurrence.backprop_steps": 3}
    training = {"per_device_train_batch_size": 12, "learning_rate": 2e-3, "warmup_steps": 100}
    texts = [sources(kind="files", paths=[str(path)], name="text") for path in (train, validation)]
    flags = (
        *(*BYTES, *as_flags("model", size | depth), *as_flags("training", training)),
        *("--data.block_size", 64, "--data.train", texts[0], "--data.validation", texts[1]),
    )
    task = Task(ROOT / "configs/recurrent_lm_files.yaml", "text", updates=2000, flags=flags)
    return Yardstick(task, OF_CHARACTERS, nats_per_token)


def word_problems() -> Yardstick:
    """A5, in a mixture of short and of long problems."""
    size = {"hidden_size": 128, "intermediate_size": 384, "recurrence.mean_steps": 8, "recurrence.backprop_steps": 8}
    problem = {"kind": "generated", "task": "a5_prefixes", "loss_on": "tags"}
    train = [
        {**problem, "num_rows": 200_000, "difficulty": [1, 4], "name": "short", "seed": 1},
        {**problem, "num_rows": 100_000, "difficulty": [1, 20], "weight": 2},
    ]
    flags = (
        *as_flags("model", size),
        *as_flags("training", {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "muon_learning_rate": 1e-2}),
        *("--data.block_size", 64, "--data.train", json.dumps(train)),
        *("--data.validation", sources(**problem, num_rows=1000, difficulty=[LONGEST, LONGEST])),
    )
    task = Task(ROOT / "configs/recurrent_cups.yaml", "a5_prefixes", updates=10_000, flags=flags)
    return Yardstick(task, OF_A5, accuracy_by_length)


def gym(name: str, folder: Path) -> Yardstick:
    """A task of reasoning-gym, whose questions are written to files first."""
    size = {"hidden_size": 128, "intermediate_size": 384, "num_core_layers": 2}
    depth = {"recurrence.mean_steps": 4, "recurrence.backprop_steps": 4}
    asked = {"kind": "files", "prompt_column": "question", "answer_column": "answer", "loss_on": "answer", "name": name}
    flags = (
        *as_flags("model", size | depth),
        *as_flags("training", {"per_device_train_batch_size": 4, "learning_rate": 2e-3}),
        *("--data.block_size", 256),
        *("--data.train", sources(**asked, paths=[str(folder / f"{name}_train.jsonl")])),
        *("--data.validation", sources(**asked, paths=[str(folder / f"{name}_validation.jsonl")])),
    )
    return Yardstick(Task(ROOT / "configs/recurrent_cups.yaml", name, updates=1500, flags=flags), OF_GYM, exact_match)


def write_questions(name: str, folder: Path) -> None:
    """Write questions and answers of a task to NAME_train.jsonl and NAME_validation.jsonl, each question once.

    Raises:
        ValueError: The package is not installed, or has too few different questions.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"{name} is a task of reasoning-gym: pip install reasoning-gym, or choose --tasks.") from error
    drawn = reasoning_gym.create_dataset(name, size=DRAWN, seed=0)
    answers = {row["question"]: row["answer"] for row in drawn}
    lines = [json.dumps({"question": asked, "answer": said}) + "\n" for asked, said in answers.items()]
    if len(lines) < 2 * HELD_OUT:
        raise ValueError(f"{name} has {len(lines)} different questions, too few to hold {HELD_OUT} out; leave it out.")
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("validation", lines[:HELD_OUT]), ("train", lines[HELD_OUT:])):
        (folder / f"{name}_{part}.jsonl").write_text("".join(chosen), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- scores


def evaluator_of(trainer: Trainer) -> DepthEvaluator:
    """An evaluator that passes rows through a trained model."""
    return DepthEvaluator(trainer.model, collator_of(trainer.model, trainer.processing_class), None, BATCH, None)


def nats_per_token(trainer: Trainer, task: Task, questions: int, depth: int | None) -> dict[str, Any]:
    """The loss over the whole validation text, and its interval by a bootstrap over rows."""
    nats, tokens = evaluator_of(trainer).score_texts(trainer.eval_dataset[task.source], depth).tokens.sum(dim=1).T
    interval = ratio_interval(nats.tolist(), tokens.tolist())
    return {"score": float(nats.sum() / tokens.sum()), "interval": interval}


def exact_match(trainer: Trainer, task: Task, questions: int, depth: int | None) -> dict[str, Any]:
    """The share of questions that are answered rightly, in per cent, and its interval."""
    rows = questions_of(trainer, task, questions)
    right = sum(answer.is_right for answer in evaluator_of(trainer).answer(rows, depth))
    return {
        "score": 100 * right / len(rows),
        "interval": [100 * end for end in wilson_interval(right, len(rows))],
    }


def accuracy_by_length(trainer: Trainer, task: Task, questions: int, depth: int | None) -> dict[str, Any]:
    """The share of right products of so many elements, in per cent, from one on; `score` is that of the longest."""
    evaluator, right = evaluator_of(trainer), []
    rows = questions_of(trainer, task, questions)
    for chunk in chunks(rows, BATCH):
        batch = evaluator.batch_of([row_of(row) for row in chunk])
        targets = batch["labels"][:, 1:]
        said = evaluator.forward(batch, depth).logits[:, :-1].argmax(dim=-1)
        right.append((said == targets)[targets != -100].view(len(chunk), LONGEST))
    by_length = (100 * torch.cat(right).double().mean(dim=0)).tolist()
    count = round(by_length[-1] * len(rows) / 100)
    interval = [100 * end for end in wilson_interval(count, len(rows))]
    return {"score": by_length[-1], "interval": interval, "by_length": by_length}


# -------------------------------------------------------------------------------------------------------------- one run


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser(
        "yardsticks", "Yardsticks from outside, in equal time.", (CHARACTERS, A5, *GYM), "model", MODELS
    )
    parser.add_argument("--train-text", type=Path, help="file that `characters` are learned from")
    parser.add_argument("--validation-text", type=Path, help="file that they are scored on")
    parser.add_argument("--folder", type=Path, default=Path("runs/yardsticks"), help="where questions are written to")
    args = parser.parse_args(argv)
    set_up_logging("warning")
    datasets.disable_progress_bars()
    with parser.one_line_errors():
        yardsticks = {name: yardstick_of(name, args) for name in args.tasks}
    pairs = [(task, model) for task, it in yardsticks.items() for model in it.models if model in args.models]
    keys = [key_of(yardsticks, *pair, seed, args.questions) for seed in args.seeds for pair in pairs]
    run_one = partial(run_apart, partial(measure, yardsticks), {name: it.task for name, it in yardsticks.items()})
    sys.stdout.write(report(run_missing(keys, args.output, run_one)))
    return 0


def yardstick_of(name: str, args: argparse.Namespace) -> Yardstick:
    """A task by its name.

    Raises:
        ValueError: What it needs is missing.
    """
    if name == A5:
        return word_problems()
    if name == CHARACTERS:
        for path in (args.train_text, args.validation_text):
            if path is None or not path.is_file():
                raise ValueError(f"{path} is no text: give --train-text and --validation-text, or choose --tasks.")
        return characters(args.train_text.absolute(), args.validation_text.absolute())
    write_questions(name, args.folder.absolute())
    return gym(name, args.folder.absolute())


def key_of(yardsticks: Mapping[str, Yardstick], task: str, model: str, seed: int, questions: int) -> Key:
    """The values that tell the row of a run from others."""
    return dict(zip(KEY, (task, model, seed, yardsticks[task].task.updates, questions), strict=True))


def measure(yardsticks: Mapping[str, Yardstick], task: str, model: str, seed: int, questions: int) -> dict:
    """The row of a model, which trains for as long as the reference takes."""
    yardstick = yardsticks[task]
    own, reference = (as_flags("model", yardstick.models[it]) for it in (model, next(iter(yardstick.models))))
    is_reference = own == reference
    trainer, found = train_as_long(yardstick.task, own, None if is_reference else reference, seed)
    config = trainer.model.config
    mean = config.recurrence.mean_steps if config.num_core_layers else None
    depths = [mean] if mean is None or config.recurrence.untied_core else [mean, 2 * mean]
    with evaluating(trainer.model):
        scores = {depth or "plain": yardstick.score(trainer, yardstick.task, questions, depth) for depth in depths}
    found |= {"parameters": trainer.model.num_parameters(), "mean_steps": mean, "scores": scores}
    return key_of(yardsticks, task, model, seed, questions) | found


# --------------------------------------------------------------------------------------------------------------- report


def at_depth(row: dict, factor: int = 1) -> dict | None:
    """The scores of a row at its mean depth, or at so many times that; None where it has no such depth."""
    return row["scores"].get(str(factor * row["mean_steps"] if row["mean_steps"] else "plain" if factor == 1 else None))


def score_of(row: dict, factor: int = 1) -> float:
    """The score at such a depth; no number where there is none."""
    found = at_depth(row, factor)
    return math.nan if found is None else found["score"]


def mean_accuracy(lengths: tuple[int, int], row: dict) -> float:
    """The mean over products of so many elements, the first and the last length included."""
    first, last = lengths
    return statistics.mean(at_depth(row)["by_length"][first - 1 : last])


def half_interval(row: dict) -> float:
    """Half of the width of the interval that the examples give a single run."""
    low, high = at_depth(row)["interval"]
    return (high - low) / 2


SCORES = {"score": score_of, "± of one run": half_interval, "score at 2x the depth": partial(score_of, factor=2)}
BY_LENGTH = {f"{first} to {last}": partial(mean_accuracy, (first, last)) for first, last in LENGTHS}
COSTS = {name: lambda row, key=key: row[key] for name, key in
         {"parameters": "parameters", "updates": "updates", "CPU s": "cpu_seconds"}.items()}  # fmt: skip
WHAT = {CHARACTERS: "nats per character", A5: "per cent of right products, by their elements"}


def report(rows: Sequence[dict]) -> str:
    """A table for each task."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        scores, digits = (BY_LENGTH if task == A5 else SCORES), dict.fromkeys(SCORES, 4 if task == CHARACTERS else 1)
        own = [row for row in rows if row["task"] == task]
        parts.append(tables(own, "model", scores | COSTS, title_of, digits))
    return "\n".join(parts)


def title_of(row: dict) -> str:
    """The line above the table of a task."""
    what = WHAT.get(row["task"], "per cent of right answers")
    return f"{row['task']}: {what}, in the time of {row['updates_of_reference']} updates of the first model"


if __name__ == "__main__":
    sys.exit(main())
