"""Which member of the family of blocks pays? Trains a small recurrent model, a plain one, and the variants of
`docs/family.md`, all with about the same number of parameters, for the same CPU time, and compares how many questions
they answer rightly, at the depth that they were trained at and at twice that. A further task compares the decoder of a
sequence-to-sequence model that is iterated with one that is not.

The time is that of so many updates of the reference, as `benchmarks.equal_time` measures it.

    python -m benchmarks.family --output docs/family/rows.json --plot docs/family/family.png
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
from transformers import Trainer

from benchmarks.depth_pays import mean_and_interval
from benchmarks.equal_time import (
    BATCH,
    DIVERGED,
    ROOT,
    Key,
    Task,
    as_flags,
    build_parser,
    config_of,
    questions_of,
    run_apart,
    run_missing,
    tables,
    train_as_long,
)
from benchmarks.timing import output_file
from configs.pretraining import collator_of, without_weights
from evaluation.depth import DepthEvaluator, evaluating
from evaluation.plots import new_figure

KEY = ("task", "variant", "seed", "updates_of_reference", "questions")
"""The keys that tell rows from each other."""
REFERENCE = "reference"
PLAIN_DEPTH = "plain"
"""The depth of a model without a core, as rows name it."""
MOST = 0.03
"""How much the numbers of parameters may differ from that of the reference, as a share of that."""


@dataclass(frozen=True)
class Variant:
    """A member of the family.

    Args:
        options: What stands in `model`, by dotted names.
        has_same_updates: Whether it makes as many updates as the reference, and does not train as long.
    """

    options: dict[str, Any]
    has_same_updates: bool = False


CUPS = (
    '[{kind: generated, task: %s, num_rows: %d, difficulty: [1, 6], loss_on: answer, separator: "", weight: 2}, '
    '{kind: generated, task: %s, num_rows: %d, difficulty: [1, 3], loss_on: answer, separator: "", '
    "name: few_moves, seed: 1}]"
)
RETOLD = CUPS % ("retold_cups", 110000, "retold_cups", 55000)
RETOLD_HELD_OUT = (
    '[{kind: generated, task: retold_cups, num_rows: 1000, difficulty: [1, 6], loss_on: answer, separator: ""}]'
)
SORTING = "[{kind: generated, task: sorting, num_rows: %d, difficulty: [4, 8], loss_on: answer}]"
# A core of two layers that runs four times, so that eight layers are executed. What is shared executes as many.
CORE = {"num_prelude_layers": 0, "num_core_layers": 2, "recurrence.mean_steps": 4, "recurrence.backprop_steps": 4}
IN_CORE = {
    "num_core_layers": 4,
    "num_unique_core_layers": 2,
    "recurrence.mean_steps": 2,
    "recurrence.backprop_steps": 2,
}
# The width of the feed-forward layer makes up for the injection, which a plain model does not have.
PLAIN = {"num_core_layers": 0, "num_prelude_layers": 2, "intermediate_size": 213}
STACK = PLAIN | {"num_prelude_layers": 8, "num_unique_prelude_layers": 2}
EXPERTS = {"peer_num_experts": 256, "peer_num_heads": 2, "peer_top_k": 8, "peer_key_dim": 32}
VARIANTS = {
    REFERENCE: Variant({}),
    "plain": Variant(PLAIN),
    **{f"plain, {order}": Variant(STACK | {"layer_sharing": order}) for order in ("sequence", "cycle", "cycle_rev")},
    **{f"core, {order}": Variant(IN_CORE | {"layer_sharing": order}) for order in ("sequence", "cycle", "cycle_rev")},
    "pre-norm": Variant({"norm_placement": "pre"}),
    "post norm": Variant({"norm_placement": "post"}),
    "ReZero": Variant({"norm_placement": "none", "residual": "rezero"}),
    "Admin": Variant({"norm_placement": "post", "residual": "admin"}),
    "loop scale": Variant({"recurrence.loop_scale_steps": 4}),
    "step embedding": Variant({"recurrence.step_embedding": "sinusoidal"}),
    "PEER": Variant({"mlp": "peer", **EXPERTS}),
}
SEQ2SEQ = "cups, source and target"
PART = {"hidden_size": 64, "intermediate_size": 192}
# An encoder so narrow that it cannot look moves up for the decoder, which then follows them (docs/experiments.md).
NARROW = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_prelude_layers": 1}
# With drawn depths 2,500 updates leave it at guessing; with fixed ones they do not.
ITERATED = {"mean_steps": 8, "backprop_steps": 8, "step_distribution": "fixed"}
PLAIN_DECODER = {
    "decoder_config.num_core_layers": 0,
    "decoder_config.num_prelude_layers": 1,
    "decoder_config.intermediate_size": 235,  # as above
}
OF_DECODER = {
    REFERENCE: Variant({}),
    "plain": Variant(PLAIN_DECODER),
    "plain, same updates": Variant(PLAIN_DECODER, has_same_updates=True),
}
TASKS = {
    "cups": Task(
        ROOT / "configs/recurrent_cups.yaml",
        "cups",
        updates=500,
        levels=(4, 5, 6),
        flags=(*as_flags("model", CORE), "--data.train", CUPS % ("cups", 40000, "cups", 20000)),
    ),
    "sorting": Task(
        ROOT / "configs/recurrent_cups.yaml",
        "sorting",
        updates=300,
        flags=(*as_flags("model", CORE), "--data.train", SORTING % 60000, "--data.validation", SORTING % 1000),
    ),
    SEQ2SEQ: Task(
        ROOT / "configs/seq2seq.yaml",
        "retold_cups",
        updates=8000,
        levels=(4, 5, 6),
        flags=(
            *as_flags("model", {"tie_word_embeddings": False}),
            *as_flags("model.encoder_config", NARROW | {"position_embedding": "learned"}),
            *as_flags("model.decoder_config", PART),
            *as_flags("model.decoder_config.recurrence", ITERATED),
            *("--data.block_size", "24", "--data.train", RETOLD, "--data.validation", RETOLD_HELD_OUT),
        ),
    ),
}
CONTESTANTS = {task: OF_DECODER if task == SEQ2SEQ else VARIANTS for task in TASKS}
"""The variants of each task."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the tables to standard output, and draw them if a file is named.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input, and for a variant with more or fewer
            parameters than the reference.
    """
    names = dict.fromkeys(name for variants in CONTESTANTS.values() for name in variants)
    parser = build_parser("family", "Variants of the blocks, in equal time.", TASKS, "variant", names)
    parser.add_argument("--plot", type=output_file, help="PNG of the scores")
    args = parser.parse_args(argv)
    set_up_logging("warning")
    datasets.disable_progress_bars()
    pairs = [(task, name) for task in args.tasks for name in args.variants if name in CONTESTANTS[task]]
    with parser.one_line_errors():
        check_parameters(pairs)
    keys = [key_of(*pair, seed, args.questions) for seed in args.seeds for pair in pairs]
    rows = run_missing(keys, args.output, partial(run_apart, measure, TASKS))
    sys.stdout.write(report(rows))
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


def key_of(task: str, variant: str, seed: int, questions: int) -> Key:
    """The values that tell the row of a run from others."""
    return dict(zip(KEY, (task, variant, seed, TASKS[task].updates, questions), strict=True))


# ---------------------------------------------------------------------------------------------------------- parameters


def check_parameters(pairs: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError for a variant that has not about as many parameters as the reference of its task."""
    for task, name in pairs:
        found, wanted = parameters(task, name), parameters(task, REFERENCE)
        if abs(found / wanted - 1) > MOST:
            raise ValueError(
                f"{name} has {found} parameters in {task}, and {REFERENCE} has {wanted}; bring them within {MOST:.0%}, "
                "for example by its intermediate_size"
            )


@cache
def parameters(task: str, variant: str) -> int:
    """The number of parameters of a model, one that is shared counted once; counted without making any."""
    return without_weights(config_of(TASKS[task], flags_of(task, variant))).num_parameters()


def flags_of(task: str, variant: str) -> list[Any]:
    """The options of a run of a variant."""
    return as_flags("model", CONTESTANTS[task][variant].options)


# -------------------------------------------------------------------------------------------------------------- one run


def measure(task: str, variant: str, seed: int, questions: int) -> dict:
    """Trains for as long as the reference takes, and answers questions that were not trained on."""
    has_own_updates = variant != REFERENCE and not CONTESTANTS[task][variant].has_same_updates
    reference = flags_of(task, REFERENCE) if has_own_updates else None
    trainer, found = train_as_long(TASKS[task], flags_of(task, variant), reference, seed)
    found["parameters"] = trainer.model.num_parameters()
    return key_of(task, variant, seed, questions) | found | answers(trainer, TASKS[task], questions)


def answers(trainer: Trainer, task: Task, questions: int) -> dict:
    """Exact match at the depth of training, and at twice that; at the only one that a model without a core has."""
    model, rows = trainer.model, questions_of(trainer, task, questions)
    config = model.config.get_text_config()
    mean = config.recurrence.mean_steps if config.num_core_layers else None
    evaluator = DepthEvaluator(model, collator_of(model, trainer.processing_class), None, BATCH, None)
    with evaluating(model):
        score = {
            depth or PLAIN_DEPTH: statistics.mean(answer.is_right for answer in evaluator.answer(rows, depth))
            for depth in ([None] if mean is None else [mean, 2 * mean])
        }
    return {"mean_steps": mean, "score": score}


# --------------------------------------------------------------------------------------------------------------- report

SCORE, DEEPER = "score", "score at 2x the depth"
FIGURES: dict[str, Callable[[dict], float]] = {
    SCORE: lambda row: 100 * row["score"][str(row["mean_steps"] or PLAIN_DEPTH)],
    DEEPER: lambda row: 100 * row["score"][str(2 * row["mean_steps"])] if row["mean_steps"] else math.nan,
    "parameters": lambda row: row["parameters"],
    "updates": lambda row: row["updates"],
    "CPU s": lambda row: row["cpu_seconds"],
}


def report(rows: Sequence[dict]) -> str:
    """A table for each task."""
    return tables(rows, "variant", FIGURES, title_of)


def title_of(row: dict) -> str:
    """The line above the table of a task."""
    return f"{row['task']}, the time of {row['updates_of_reference']} updates of the reference; scores in per cent"


def plot(rows: Sequence[dict], path: Path) -> None:
    """The scores as PNG, a panel for each task: means over the seeds, with their intervals."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(5.5 * len(tasks), 5)
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        of_task = [row for row in rows if row["task"] == task and DIVERGED not in row]
        names = list(dict.fromkeys(row["variant"] for row in of_task))
        for title, marker in ((SCORE, "o"), (DEEPER, "x")):
            found = {name: [FIGURES[title](row) for row in of_task if row["variant"] == name] for name in names}
            known = [name for name in names if not any(map(math.isnan, found[name]))]
            if not known:
                continue
            means, halves = zip(*(mean_and_interval(found[name]) for name in known), strict=True)
            axes.errorbar(means, list(map(names.index, known)), xerr=halves, fmt=marker, capsize=3, label=title)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(title=task, xlabel="exact match (per cent)", xlim=(-2, 102))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
