"""Training steps by width and threads: the gain of a second thread on an idle machine, and its cost on a busy one.

python -m benchmarks.threads
python -m benchmarks.threads --busy
OMP_WAIT_POLICY=passive python -m benchmarks.threads --busy
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks import timing
from inference.arguments import OneLineParser
from inference.devices import cpu_model, usable_cores
from model import MegaTransformerForCausalLM, MegaTransformerTextConfig

CPU = torch.device("cpu")
BUSY_LOOP = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    args = build_parser().parse_args(argv)
    set_up_logging(args.log_level)
    rows = []
    with busy_core(args.busy):
        for width in args.widths:
            model = build_model(width)
            step = training_step(model, args)
            seconds = timing.interleave(
                {threads: with_threads(step, threads) for threads in args.threads}, args.rounds, args.warmup, CPU
            )
            rows += rows_of(width, sum(weight.numel() for weight in model.parameters()), seconds)
    header = ["width", "parameters, million", "threads", "ms per update", f"speed / that of {args.threads[0]}"]
    sys.stdout.write(f"{setting(args)}\n\n{timing.markdown_table(header, rows)}")
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.threads", description="Time of a training step by width and threads.")
    parser.add_argument("--widths", type=timing.count, nargs="+", default=[64, 128, 256, 512], help="hidden sizes")
    parser.add_argument("--threads", type=timing.count, nargs="+", default=[1, 2], help="threads; the first: reference")
    parser.add_argument("--busy", action="store_true", help="keep one of the cores busy with something else")
    for name, default, what in (
        ("batch-size", 4, "rows of the batch"),
        ("sequence-length", 128, "tokens of a row"),
        ("rounds", 7, "timed rounds; in each, every number of threads has its turn"),
        ("warmup", 1, "rounds before them that do not count"),
    ):
        parser.add_argument(f"--{name}", type=timing.count, default=default, help=what)
    return parser


def build_model(width: int) -> MegaTransformerForCausalLM:
    """A prelude and a coda of one layer each, and a core of two that is applied twice."""
    torch.manual_seed(0)
    config = MegaTransformerTextConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_prelude_layers=1,
        num_core_layers=2,
        num_coda_layers=1,
        num_attention_heads=max(1, width // 32),
        recurrence={"mean_steps": 2, "backprop_steps": 2},
    )
    return MegaTransformerForCausalLM(config)


def training_step(model: MegaTransformerForCausalLM, args: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward, update, gradients cleared, on the same random tokens at every call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.sequence_length))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_threads(step: Callable[[], None], threads: int) -> Callable[[], None]:
    """The step at a number of threads."""

    def run() -> None:
        torch.set_num_threads(threads)
        step()

    return run


@contextmanager
def busy_core(is_wanted: bool) -> Iterator[None]:
    """Keep the last of the usable cores busy, by a process that computes nothing."""
    if not is_wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY_LOOP % max(os.sched_getaffinity(0))])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rows_of(width: int, num_parameters: int, seconds: dict[int, list[float]]) -> list[list[str]]:
    """The lines of a model."""
    ratios = timing.speed_ratios(seconds, next(iter(seconds)))
    return [
        [
            str(width),
            f"{num_parameters / 1e6:.2f}",
            str(threads),
            f"{1000 * timing.quartiles(values)[1]:.1f}",
            timing.describe_ratio(ratios[threads]),
        ]
        for threads, values in seconds.items()
    ]


def setting(args: argparse.Namespace) -> str:
    """A line that says what was measured, and on which machine."""
    policy, load = os.environ.get("OMP_WAIT_POLICY", "not set"), "one of them busy" if args.busy else "none kept busy"
    return (
        f"Training steps of {args.batch_size} x {args.sequence_length} tokens; {cpu_model()}, {usable_cores()} cores, "
        f"{load}, OMP_WAIT_POLICY {policy}, torch {torch.__version__}; "
        f"rounds: {args.rounds}, medians, quartiles in brackets."
    )


if __name__ == "__main__":
    sys.exit(main())
