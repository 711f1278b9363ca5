"""Which model learns most as models grow: a recurrent one, a plain one, or an untied one, with a core for each step?
All have as many parameters, and are compared after as many updates, as many operations, and as much CPU time.

A YAML file says which run is made at which sizes, and with which seeds; `benchmarks/ladder.yaml` is one. The rows are
kept, so that the command goes on where it stopped.

    python -m benchmarks.ladder benchmarks/ladder.yaml --output docs/ladder/rows.json --plot docs/ladder/ladder.png
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml

from benchmarks.depth_pays import mean_and_interval
from benchmarks.equal_time import (
    DIVERGED,
    ROOT,
    Key,
    Task,
    as_flags,
    cell,
    config_of,
    datasets_of,
    forked,
    run_missing,
    seconds_of_update,
    train,
)
from benchmarks.timing import markdown_table, output_file
from configs import RunConfig
from configs.pretraining import without_weights
from configs.strict_yaml import parse_yaml, read_text
from evaluation.intervals import Interval, interval_of
from evaluation.plots import new_figure
from inference.arguments import OneLineParser
from trainers.dry_run import StepCounts, expected_steps, flops_per_token

RECURRENT, PLAIN, UNTIED = ARMS = ("recurrent", "plain", "untied")
BUDGETS = ("updates", "operations", "time")
"""The measures of which twins have as much as the recurrent model."""
MOST = 0.03
"""The share by which the numbers of parameters of twins may differ."""
DRAWS = 10_000
"""Draws of the bootstrap over seeds."""


@dataclass(frozen=True)
class Ladder:
    """The content of a YAML file of a ladder.

    Args:
        config: The YAML of the run, from the folder of the repository.
        source: Label of the validation source whose loss is compared.
        updates: Updates of the recurrent model.
        sizes: Its widths, `hidden_size`.
        seeds: Seeds of each run.
        flags: Further options of all runs, by dotted names.
    """

    config: str
    source: str
    updates: int
    sizes: list[int]
    seeds: list[int]
    flags: dict[str, Any]

    def task(self) -> Task:
        """The run that all share."""
        flags = [str(item) for name, value in self.flags.items() for item in (f"--{name}", value)]
        return Task(ROOT / self.config, self.source, self.updates, flags=tuple(flags))


def read_ladder(path: Path) -> Ladder:
    """Reads a YAML file.

    Raises:
        ValueError: The file cannot be read, or has not just these keys with values of these kinds.
    """
    try:
        found = parse_yaml(read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read ({reason}); name a YAML file such as benchmarks/ladder.yaml"
        ) from error
    names = [field.name for field in fields(Ladder)]
    if not isinstance(found, dict) or set(found) != set(names):
        raise ValueError(f"{path} has to have the keys {', '.join(names)}, and no others")
    lists = [found["sizes"], found["seeds"], [found["updates"]]]
    if not all(isinstance(it, list) and it and all(type(one) is int and one >= 0 for one in it) for it in lists):
        raise ValueError(f"{path}: updates has to be a whole number, sizes and seeds lists of them")
    if not isinstance(found["flags"], dict):
        raise ValueError(f"{path}: flags is {found['flags']!r}, and has to be a mapping of dotted names to values")
    return Ladder(**found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the table to standard output, and draw it if a file is named.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input, and for sizes without such twins.
    """
    parser = OneLineParser(prog="benchmarks.ladder", description=str(__doc__).splitlines()[0])
    parser.add_argument("ladder", type=Path, help="YAML file of the ladder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the rows; it is gone on with")
    parser.add_argument("--plot", type=output_file, help="PNG of the losses")
    args = parser.parse_args(argv)
    set_up_logging("warning")
    datasets.disable_progress_bars()
    with parser.one_line_errors():
        ladder = read_ladder(args.ladder)
        task = ladder.task()
        options = {(size, arm): flags_of(task, size, arm) for size in ladder.sizes for arm in ARMS}
    keys = [key_of(task, *key) for key in places(ladder)]
    rows = run_missing(keys, args.output, lambda key: run(task, options, key))
    for row in (row for row in rows if DIVERGED in row):
        sys.stderr.write(f"{row['arm']} of width {row['size']}, seed {row['seed']}, is left out: {row[DIVERGED]}\n")
    rows = [row for row in rows if DIVERGED not in row]
    sys.stdout.write(report(rows))
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


def places(ladder: Ladder) -> list[tuple[int, str, str, int]]:
    """Size, arm, budget and seed of all runs; the recurrent model has no budget but its own."""
    return [
        (size, arm, budget, seed)
        for seed in ladder.seeds
        for size in ladder.sizes
        for arm in ARMS
        for budget in BUDGETS
        if arm != RECURRENT or budget == BUDGETS[0]
    ]


def key_of(task: Task, size: int, arm: str, budget: str, seed: int) -> Key:
    """The values that tell the row of a run from others."""
    run = {"size": size, "arm": arm, "budget": budget, "seed": seed, "updates_of_reference": task.updates}
    return {**run, "source": task.source, "flags": list(task.flags)}


# --------------------------------------------------------------------------------------------------------------- twins


def flags_of(task: Task, size: int, arm: str) -> list[Any]:
    """The options of a model of an arm that has as many parameters as the recurrent one of this width.

    The plain model has the same layers, each run once, and wider feed-forward layers for the injection that is not
    there. The untied one executes as many layers as the recurrent one does at its mean depth, and is narrower.

    Raises:
        ValueError: No model of this kind has about as many parameters.
    """
    run = config_of(task, as_flags("model", {"hidden_size": size, "intermediate_size": 3 * size}))
    wanted, model = parameters(run), run.model
    options: dict[str, Any] = {"hidden_size": size, "intermediate_size": 3 * size}
    if arm == PLAIN:
        layers = model.num_prelude_layers + model.num_core_layers
        options |= {"num_core_layers": 0, "num_prelude_layers": layers}
    elif arm == UNTIED:
        options |= {"recurrence.untied_core": True}
        unit = 2 * model.num_attention_heads  # rotations take pairs of a head's features
        widths = range(size - size % unit, 0, -unit)
        fitting = (width for width in widths if parameters(sized(run, options, width, 2 * width)) <= wanted)
        options["hidden_size"] = next(fitting, unit)
    if arm != RECURRENT:
        options["intermediate_size"] = fill(run, options, wanted)
    found = parameters(sized(run, options, options["hidden_size"], options["intermediate_size"]))
    if abs(found / wanted - 1) > MOST:
        raise ValueError(
            f"the {arm} model of width {options['hidden_size']} has {found} parameters, and the recurrent one of width "
            f"{size} has {wanted}; take larger sizes, or fewer steps (model.recurrence.mean_steps)"
        )
    return as_flags("model", options)


def fill(run: RunConfig, options: dict[str, Any], wanted: int) -> int:
    """The `intermediate_size` with which a model has about so many parameters: these grow by as much with each."""
    width = options["hidden_size"]
    few, more = (parameters(sized(run, options, width, size)) for size in (width, 2 * width))
    return max(1, width + round((wanted - few) / (more - few) * width))


def sized(run: RunConfig, options: dict[str, Any], hidden_size: int, intermediate_size: int) -> RunConfig:
    """The run with other options of the model."""
    content = run.model.to_dict() | {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "head_dim": None,
    }
    for name, value in options.items():
        if name.startswith("recurrence."):
            content["recurrence"] = {**content["recurrence"], name.removeprefix("recurrence."): value}
        elif name not in ("hidden_size", "intermediate_size"):
            content[name] = value
    return replace(run, model=type(run.model).from_dict(content))


def parameters(run: RunConfig) -> int:
    """The number of parameters, one that is shared counted once; counted without making any."""
    return without_weights(run).num_parameters()


# ----------------------------------------------------------------------------------------------------------------- runs


def run(task: Task, options: dict[tuple[int, str], list[Any]], key: Key) -> dict:
    """The row of a key, in a process of its own on one core."""
    torch.set_num_threads(1)  # before anything starts threads, which a fork would lack
    datasets_of(task, key["seed"])
    size = key["size"]
    return key | forked(measure, task, options[size, key["arm"]], options[size, RECURRENT], key["budget"], key["seed"])


def measure(task: Task, own: Sequence[Any], reference: Sequence[Any], budget: str, seed: int) -> dict:
    """Trains within a budget; the loss on the validation source, and what the training took."""
    of_update = [operations_of_update(config_of(task, flags)) for flags in (reference, own)]
    with tempfile.TemporaryDirectory() as folder:
        cost: Sequence[float] = (1.0, 1.0)
        if budget == "operations":
            cost = of_update
        elif budget == "time":
            cost = [forked(seconds_of_update, task, flags, seed, folder) for flags in (reference, own)]
        updates = max(1, round(task.updates * cost[0] / cost[1]))
        trainer, clock = train(task, own, seed, updates, folder)
        loss = trainer.evaluate()[f"eval_{task.source}_loss"]
    return {
        "parameters": trainer.model.num_parameters(),
        "updates": updates,
        "operations": updates * of_update[1],
        "cpu_seconds": clock.seconds[-1] - clock.seconds[0],
        "loss": loss,
    }


def operations_of_update(run: RunConfig) -> float:
    """Floating-point operations of forward and backward passes of an update, as `--dry-run` counts them."""
    model, config = without_weights(run), run.model.get_text_config()
    steps = StepCounts(0, 0, 0)
    if config.num_core_layers:
        mean = config.recurrence.mean_steps
        untied = config.recurrence.untied_core
        steps = StepCounts(0, mean, mean) if untied else expected_steps(config.recurrence, run.training.seed)
    tokens = run.training.per_device_train_batch_size * run.training.gradient_accumulation_steps * run.data.block_size
    return tokens * flops_per_token(model, steps, run.data.block_size).training


# --------------------------------------------------------------------------------------------------------------- report

FIGURES: dict[str, tuple[Callable[[dict], float], int]] = {
    "loss": (lambda row: row["loss"], 4),
    "parameters": (lambda row: row["parameters"], 0),
    "updates": (lambda row: row["updates"], 0),
    "operations, 1e12": (lambda row: row["operations"] / 1e12, 2),
    "CPU s": (lambda row: row["cpu_seconds"], 1),
}
"""Columns: what stands in them of a row, and its decimals."""


WORDS = {"updates": "as many updates", "operations": "as many operations", "time": "as much time"}


def lines_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of each curve: those of the recurrent model, and those of a twin within a budget."""
    lines: dict[str, list[dict]] = {}
    for row in rows:
        arm = row["arm"]
        lines.setdefault(arm if arm == RECURRENT else f"{arm}, {WORDS[row['budget']]}", []).append(row)
    return lines


def by_size(rows: Sequence[dict]) -> dict[int, list[dict]]:
    """Rows of each size, the smallest first."""
    return {size: [row for row in rows if row["size"] == size] for size in sorted({row["size"] for row in rows})}


def report(rows: Sequence[dict]) -> str:
    """A table of all sizes, and the power laws that were fitted to them."""
    lines, laws = [], []
    for name, of_line in lines_of(rows).items():
        for size, found in by_size(of_line).items():
            cells = [cell([figure(row) for row in found], digits) for figure, digits in FIGURES.values()]
            lines.append([name, str(size), str(len(found)), *cells])
        if len(by_size(of_line)) > 1:
            exponent, interval = fit(of_line)
            laws.append([name, f"{exponent:.3f} ({interval.low:.3f} to {interval.high:.3f})"])
    tables = markdown_table(["model", "width of the recurrent one", "seeds", *FIGURES], lines)
    law = "\nThe loss as a power of the parameters; the interval is that of a bootstrap over seeds:\n\n"
    return tables + (law + markdown_table(["model", "exponent"], laws) if laws else "")


def fit(rows: Sequence[dict]) -> tuple[float, Interval]:
    """The exponent b of loss = a * parameters ** b by least squares of logarithms, and its interval."""
    groups = list(by_size(rows).values())
    logs = [np.log([[row["parameters"], row["loss"]] for row in group]) for group in groups]
    generator = np.random.default_rng(0)
    draws = [
        exponent(np.concatenate([group[generator.integers(len(group), size=len(group))] for group in logs]))
        for _ in range(DRAWS)
    ]
    return exponent(np.concatenate(logs)), interval_of(np.array(draws))


def exponent(points: np.ndarray) -> float:
    """The slope of the line through points, (points, 2)."""
    x, y = (points - points.mean(0)).T
    return float(x @ y / (x @ x))


def plot(rows: Sequence[dict], path: Path) -> None:
    """The losses against the parameters as PNG, on logarithmic axes: a panel for each budget."""
    lines = lines_of(rows)
    figure = new_figure(4.5 * len(BUDGETS), 4)
    panels = figure.subplots(1, len(BUDGETS), sharey=True)
    for budget, axes in zip(BUDGETS, panels, strict=True):
        for name, marker in zip([RECURRENT, *(f"{arm}, {WORDS[budget]}" for arm in ARMS[1:])], "osD", strict=True):
            groups = by_size(lines.get(name, [])).values()
            points = [(group[0]["parameters"], *mean_and_interval([row["loss"] for row in group])) for group in groups]
            if points:
                sizes, means, halves = zip(*points, strict=True)
                axes.errorbar(sizes, means, yerr=halves, fmt=f"{marker}-", capsize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="parameters", title=WORDS[budget])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("loss (nats per token)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
