"""Does depth pay? Trains on `configs/recurrent_cups.yaml`, with each of several seeds, and compares:

- the recurrent model, its depth drawn anew for each micro-batch;
- the same model trained at one step, for as many updates, and for as much time;
- its plain twin: no core, the same number of unique parameters;
- a plain model that executes as many layers as the recurrent one does at its mean depth.

All see the same data in the same batches. Accuracy is the exact match on questions not
trained on, 1000 of them, with as many of each number of moves.

What `--runs` holds already, trained in the same way, is only judged again.

    python -m benchmarks.depth_pays --output docs/depth_pays
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs import flatten_keys, one_line_errors, read_yaml, resolve

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "recurrent_cups.yaml"
MEAN_STEPS = 8
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
DIFFICULTIES = range(1, 7)
NUM_QUESTIONS = 1000
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, for 2 to 5 seeds


@dataclass(frozen=True)
class Contestant:
    """A model and how it is trained."""

    name: str
    title: str
    flags: tuple[str, ...] = ()
    depth: int | None = None
    """Steps at which it is judged; None without a core."""
    time_of: str | None = None
    """Trained as long as the contestant of this name, whatever number of updates that makes."""


AT_ONE_STEP = (
    *("--model.recurrence.mean_steps", "1", "--model.recurrence.backprop_steps", "1"),
    *("--model.recurrence.step_distribution", "fixed"),
)
NO_CORE = ("--model.num_core_layers", "0")
CONTESTANTS = (
    Contestant("recurrent", f"recurrent, mean of {MEAN_STEPS} steps", depth=MEAN_STEPS),
    Contestant("one_step", "the same at 1 step, same updates", AT_ONE_STEP, depth=1),
    # The width of the feed-forward layer makes up for the injection, which a plain model does not have.
    Contestant(
        "twin",
        "plain twin, same unique parameters",
        (*NO_CORE, "--model.num_prelude_layers", "1", "--model.intermediate_size", "235"),
    ),
    Contestant("deep", "plain, same executed layers", (*NO_CORE, "--model.num_prelude_layers", str(MEAN_STEPS))),
    Contestant("one_step_long", "the same at 1 step, same time", AT_ONE_STEP, depth=1, time_of="recurrent"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train all contestants with all seeds, and write the table, the figures behind it, and the picture.

    Raises:
        SystemExit: with code 2 after one line on standard error, if a folder holds a run that was trained otherwise.
    """
    args = build_parser().parse_args(argv)
    set_up_logging()
    pairs = [(contestant, seed) for seed in args.seeds for contestant in CONTESTANTS]
    jobs = [Job(*pair, args.runs, args.max_steps) for pair in pairs if not pair[0].time_of]
    results = compete_all(jobs, args.workers)
    timed = [(*pair, args.runs, updates_in_the_same_time(*pair, results)) for pair in pairs if pair[0].time_of]
    results |= compete_all([Job(*job) for job in timed], args.workers)
    by_name = {contestant.name: [results[contestant, seed] for seed in args.seeds] for contestant in CONTESTANTS}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps({"seeds": args.seeds, "results": by_name}, indent=1) + "\n")
    text = report(by_name)
    (args.output / "table.md").write_text(text)
    plot(by_name, args.output / "depth_pays.png")
    sys.stdout.write(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/depth_pays"), help="folder for table and picture")
    parser.add_argument("--runs", type=Path, default=Path("runs/depth_pays"), help="folder for the trained models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="models trained at a time, a core each"
    )
    parser.add_argument("--max-steps", type=int, help="updates; default: those of the config")
    return parser


# ----------------------------------------------------------------------------------------------------- train, evaluate


@dataclass(frozen=True)
class Job:
    """A contestant with a seed.

    Args:
        runs: Holds the folders of all jobs.
        max_steps: Updates; None for those of the config.
    """

    contestant: Contestant
    seed: int
    runs: Path
    max_steps: int | None

    @property
    def folder(self) -> Path:
        """Where its run is."""
        return self.runs.absolute() / f"{self.contestant.name}-{self.seed}"

    @property
    def state_file(self) -> Path:
        """What training leaves at its end."""
        return self.folder / "trainer_state.json"

    @property
    def flags(self) -> list[str]:
        """Arguments of `pretrain.py`."""
        flags = ["--config", CONFIG, *self.contestant.flags, "--training.output_dir", self.folder]
        flags += ["--training.seed", self.seed, "--training.eval_strategy", "no"]
        flags += ["--callbacks.samples.every_steps", 10**9]
        flags += ["--training.max_steps", self.max_steps] if self.max_steps else []
        return [str(flag) for flag in flags]

    def check_folder(self) -> None:
        """Refuse a finished run that was trained otherwise.

        Raises:
            ValueError: names the folder and what differs.
        """
        if not self.state_file.exists():
            return
        there, here = flatten_keys(read_yaml(self.folder / "config.yaml")), flatten_keys(resolve(self.flags))
        there["updates"] = json.loads(self.state_file.read_text())["global_step"]
        here["updates"] = here["training.max_steps"]
        for key in here | there:
            if there.get(key) != here.get(key):
                raise ValueError(
                    f"{self.folder} holds another run: {key} is {there.get(key)!r} there and {here.get(key)!r} here; "
                    "remove the folder, or choose another with --runs"
                )


def compete_all(jobs: Sequence[Job], workers: int) -> dict[tuple[Contestant, int], dict]:
    """The results of all jobs, by contestant and seed. All folders are checked before the first job begins."""
    with one_line_errors():
        for job in jobs:
            job.check_folder()
    with ThreadPoolExecutor(workers) as pool:
        return {(job.contestant, job.seed): result for job, result in zip(jobs, pool.map(compete, jobs), strict=True)}


def compete(job: Job) -> dict:
    """Train one contestant, unless it is there already, and evaluate it.

    Returns:
        seconds, updates, and accuracy[depth][number of moves]; depth is "plain" without a core.
    """
    if not job.state_file.exists():
        run("pretrain.py", *job.flags)
    depths = [job.contestant.depth] if job.contestant.depth == 1 else DEPTHS
    run("-m", "evaluation", job.folder, "--num-steps", *depths, "--batch-size", 64, "--limit", NUM_QUESTIONS)
    table = json.loads((job.folder / "evaluation" / "depth.json").read_text())
    state = json.loads(job.state_file.read_text())
    return {
        "seconds": next(entry["train_runtime"] for entry in reversed(state["log_history"]) if "train_runtime" in entry),
        "updates": state["global_step"],
        "accuracy": {
            str(row["num_steps"] or "plain"): {
                level: share for exact in row["exact_match"].values() for level, share in exact["by_difficulty"].items()
            }
            for row in table["rows"]
        },
    }


def run(*command: object) -> None:
    """A script or a module of this repository, on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{process.stderr[-2000:]}")


def updates_in_the_same_time(contestant: Contestant, seed: int, results: dict) -> int:
    """How many updates its short twin would have made in the time of the contestant named by `time_of`."""
    by_name = {other.name: result for (other, its_seed), result in results.items() if its_seed == seed}
    short = next(by_name[other.name] for other in CONTESTANTS if other.flags == contestant.flags and not other.time_of)
    return round(short["updates"] * by_name[contestant.time_of]["seconds"] / short["seconds"])


# --------------------------------------------------------------------------------------------------------------- report


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t (0 for a single value)."""
    if len(values) == 1:
        return values[0], 0.0
    quantile = T_QUANTILES.get(len(values), 2.571)
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def accuracies(result: dict, depth: int | None) -> list[float]:
    """Of one trained model at one depth, by number of moves."""
    by_level = result["accuracy"][str(depth or "plain")]
    return [by_level[str(level)] for level in DIFFICULTIES]


def percent(values: Sequence[float]) -> str:
    mean, half = mean_and_interval(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def steps_needed(results: Sequence[dict], level: int, accuracy: float = 0.9) -> int | None:
    """The smallest depth tried at which the mean accuracy over the seeds reaches `accuracy`."""
    for depth in DEPTHS:
        if statistics.mean(result["accuracy"][str(depth)][str(level)] for result in results) >= accuracy:
            return depth
    return None


def report(by_name: dict[str, list[dict]]) -> str:
    """Three tables: all contestants; accuracy of the recurrent model by moves and steps; the steps that are needed."""
    lines = [
        "Exact match in per cent over all questions, mean over seeds ± half of the 95 % interval.\n",
        "| model | accuracy | 1 to 2 moves | 3 to 4 moves | 5 to 6 moves | updates | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for contestant in CONTESTANTS:
        results = by_name[contestant.name]
        rows = [accuracies(result, contestant.depth) for result in results]
        groups = [percent([statistics.mean(row[part]) for row in rows]) for part in GROUPS]
        updates, seconds = (statistics.mean(result[name] for result in results) for name in ("updates", "seconds"))
        lines.append(f"| {contestant.title} | {' | '.join(groups)} | {updates:.0f} | {seconds:.0f} |")
    recurrent = by_name["recurrent"]
    lines += [
        "\nThe recurrent model by number of moves, at each number of steps:\n",
        f"| steps | {' | '.join(map(str, DIFFICULTIES))} |",
        "|---:|" + "---:|" * len(DIFFICULTIES),
    ]
    for depth in DEPTHS:
        columns = zip(*(accuracies(result, depth) for result in recurrent), strict=True)
        lines.append(f"| {depth} | {' | '.join(f'{100 * statistics.mean(column):.1f}' for column in columns)} |")
    needed = [steps_needed(recurrent, level) for level in DIFFICULTIES]
    lines.append(f"| needed for 90 % | {' | '.join(str(steps or '-') for steps in needed)} |")
    return "\n".join(lines) + "\n"


GROUPS = (slice(None), slice(0, 2), slice(2, 4), slice(4, 6))


def plot(by_name: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against the number of moves: left all contestants, right the recurrent model at each depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    left, right = figure.subplots(1, 2, sharey=True)
    for contestant in CONTESTANTS:
        rows = [accuracies(result, contestant.depth) for result in by_name[contestant.name]]
        means, halves = zip(*map(mean_and_interval, zip(*rows, strict=True)), strict=True)
        left.errorbar(DIFFICULTIES, means, halves, marker="o", capsize=3, label=contestant.title)
    for depth in DEPTHS:
        rows = [accuracies(result, depth) for result in by_name["recurrent"]]
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        right.plot(DIFFICULTIES, means, marker="o", label=f"{depth} step{'s' * (depth > 1)}")
    for axes, title in ((left, "models"), (right, "the recurrent model by steps taken")):
        axes.axhline(0.2, color="grey", linestyle=":")  # guessing
        axes.set_xlabel("moves")
        axes.set_title(title)
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    left.set_ylabel("exact match")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
