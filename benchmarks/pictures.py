"""The CPU time that metrics and pictures add to a training step: two trainers of one run, with all callbacks and with
none, take turns step by step.

python -m benchmarks.pictures
python -m benchmarks.pictures --config configs/recurrent_vlm.yaml --steps 1000
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from benchmarks import timing
from configs import load_config
from configs.pretraining import build_pretraining
from inference import arguments
from inference.devices import cpu_model

NAMES = ("without", "with")


class TurnCallback(TrainerCallback):
    """Lets a trainer make one step at a time, and notes its seconds on the processor: from the beginning of a step to
    that of the next, with data and logs.

    Args:
        own: Whether it is this trainer's turn.
        other: The same of the other trainer.
    """

    def __init__(self, own: threading.Semaphore, other: threading.Semaphore) -> None:
        self.own, self.other = own, other
        self.seconds: list[float] = []
        self.start: float | None = None
        self.is_alone = False  # the other trainer has ended

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Let the other go on until it is this trainer's turn again."""
        if self.start is not None:
            self.seconds.append(time.process_time() - self.start)
            self.other.release()
        while not (self.is_alone or self.own.acquire(timeout=1)):
            pass
        self.start = time.process_time()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = arguments.OneLineParser(prog="benchmarks.pictures", description="What metrics and pictures cost.")
    parser.add_argument("--config", type=Path, default=Path("configs/recurrent_lm.yaml"), help="YAML of a run")
    parser.add_argument("--steps", type=timing.count, default=1500, help="optimizer steps of each trainer")
    parser.add_argument("--output", type=timing.output_file, help="JSON file for the seconds of every step")
    args = timing.parsed(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainers = {name: build_trainer(args.config, args.steps, Path(folder, name)) for name in NAMES}
        except (ValueError, OSError) as error:
            parser.error(str(error))
        remove_callbacks(trainers["without"])
        seconds = take_turns(trainers)
    timing.save(args.output, args, seconds=seconds)
    sys.stdout.write(report(seconds))
    return 0


def build_trainer(config: Path, num_steps: int, folder: Path) -> Trainer:
    """The trainer of a run without samples, evaluations and checkpoints."""
    options = {
        "training.max_steps": num_steps + 1,  # the last step has no end that counts
        "training.output_dir": folder,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.load_best_model_at_end": "false",
        "training.disable_tqdm": "true",
        "training.report_to": "tensorboard",
        "callbacks.samples.prompts": "[]",
        "callbacks.media_samples.num_examples": 0,
        "callbacks.generated_samples.num_examples": 0,
    }
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return build_pretraining(load_config(["--config", str(config), *flags]))


def remove_callbacks(trainer: Trainer) -> None:
    """Take away all that is watched and shown, the trainer's own probe of recurrence as well."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__module__.startswith("callbacks."):
            trainer.remove_callback(callback)
    trainer.args.recurrence_logging_steps = 0


def take_turns(trainers: dict[str, Trainer]) -> dict[str, list[float]]:
    """Train all, one step each in turn; seconds on the processor of each step, by name."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    turns = TurnCallback(first, second), TurnCallback(second, first)

    def train(trainer: Trainer, turn: TurnCallback, other: TurnCallback) -> None:
        trainer.add_callback(turn)
        try:
            trainer.train()
        finally:
            other.is_alone = True

    with ThreadPoolExecutor() as pool:
        for future in list(map(partial(pool.submit, train), trainers.values(), turns, reversed(turns))):
            future.result()
    return {name: turn.seconds for name, turn in zip(trainers, turns, strict=True)}


def report(seconds: dict[str, list[float]]) -> str:
    """The table, in Markdown."""
    lines = ["| metrics and pictures | ms per step | median step, ms | longest step, ms |", "|---|---:|---:|---:|"]
    for name, values in seconds.items():
        figures = statistics.fmean(values), statistics.median(values), max(values)
        lines.append(" | ".join([f"| {name}", *(f"{1000 * value:.1f}" for value in figures)]) + " |")
    share = sum(seconds["with"]) / sum(seconds["without"]) - 1
    machine = f"{torch.get_num_threads()} of {cpu_model()}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"{share:+.2%} over {len(seconds['with'])} steps, {machine}", ""])


if __name__ == "__main__":
    sys.exit(main())
