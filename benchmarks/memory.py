"""Resident memory over caches that are dropped, training steps and generations, with Python's collector off: what only
the collector finds would show as growth. Of Linux.

python -m benchmarks.memory
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import gc
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks import timing
from inference.arguments import OneLineParser
from model import MegaTransformerForCausalLM, MegaTransformerTextConfig, RecurrentCache
from model.cache import BLOCK
from trainers import RecurrentTrainer, RecurrentTrainingArguments

NUM_STEPS = 32
VOCABULARY = 256
POLICIES = ({}, {"cache_policy": "ring", "num_kept_steps": 1}, {"cache_policy": "last"}, {"num_beams": 2})
PARTS = 5
HEADER = ["what", "times", "MiB after a tenth", *(f"after {number} of {PARTS} parts" for number in range(1, PARTS + 1))]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    args = build_parser().parse_args(argv)
    set_up_logging(args.log_level)
    model = build_model()
    gc.disable()
    try:
        rows = [
            measure(f"caches of {args.cache_mib} MiB, dropped", args.caches, lambda: fill_cache(model, args.cache_mib)),
            ["training steps", str(args.steps), *map(mebibytes, train(model, args.steps))],
            measure("generations", args.generations, generations(model)),
        ]
    finally:
        gc.enable()
    sys.stdout.write(timing.markdown_table(HEADER, rows))
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.memory", description="Resident memory with Python's collector off.")
    for name, default, what in (
        ("caches", 50, "caches that are filled and dropped"),
        ("cache-mib", 256, "least size of each, in MiB"),
        ("steps", 500, "training steps"),
        ("generations", 200, "calls of generate, of several cache policies and of beams in turn"),
    ):
        parser.add_argument(f"--{name}", type=timing.count, default=default, help=what)
    return parser


def build_model() -> MegaTransformerForCausalLM:
    """A small one, whose cache is large beside what it computes."""
    torch.manual_seed(0)
    config = MegaTransformerTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_prelude_layers=1,
        num_core_layers=1,
        num_coda_layers=1,
        num_attention_heads=2,
        recurrence={"mean_steps": 2, "backprop_steps": 2},
    )
    return MegaTransformerForCausalLM(config).eval()


# ------------------------------------------------------------------------------------------------------- what is done


@torch.no_grad()
def fill_cache(model: MegaTransformerForCausalLM, mebibytes: int) -> RecurrentCache:
    """A cache of at least this size: a row, copied as beam search does it, and a token behind each copy."""
    cache = RecurrentCache(model.config)
    model(torch.ones(1, BLOCK - 1, dtype=torch.long), cache=cache, num_steps=NUM_STEPS)
    rows = -(-mebibytes * timing.MIB // cache.num_bytes)
    cache.batch_repeat_interleave(rows)
    model(torch.ones(rows, 1, dtype=torch.long), cache=cache, num_steps=NUM_STEPS)
    return cache


def generations(model: MegaTransformerForCausalLM) -> Callable[[], Any]:
    """A function that writes 8 tokens behind each of 4 prompts, in another way at each call."""
    ids, ways = torch.randint(VOCABULARY, (4, 16)), cycle(POLICIES)
    model.generation_config.eos_token_id = None
    return lambda: model.generate(ids, max_new_tokens=8, do_sample=False, **next(ways))


class Rows(Dataset):
    """Random rows of 32 tokens."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(VOCABULARY, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class ResidentMemory(TrainerCallback):
    """Notes the resident memory of the process after some steps."""

    def __init__(self, steps: Sequence[int]):
        self.steps = steps
        self.found: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found += [resident_bytes()] * self.steps.count(state.global_step)


def train(model: MegaTransformerForCausalLM, count: int) -> list[int]:
    """Trains so many steps, at drawn depths, and returns the bytes after some of them."""
    memory = ResidentMemory(milestones(count))
    with tempfile.TemporaryDirectory() as folder:
        arguments = RecurrentTrainingArguments(
            output_dir=folder, max_steps=count, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
        )
        trainer = RecurrentTrainer(
            model=model,
            args=arguments,
            train_dataset=Rows(),
            callbacks=[memory],
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for the table
        trainer.train()
    model.eval()
    return memory.found


# ------------------------------------------------------------------------------------------------------- the memory


def measure(what: str, count: int, run: Callable[[], Any]) -> list[str]:
    """A row of the table: `run` is called so many times."""
    found = []
    for number in range(1, count + 1):
        run()
        found += [resident_bytes()] * milestones(count).count(number)
    return [what, str(count), *map(mebibytes, found)]


def milestones(count: int) -> list[int]:
    """After how many times memory is noted: a tenth, by when libraries have what they keep, and each of five parts."""
    return [-(-count // 10), *(-(-count * part // PARTS) for part in range(1, PARTS + 1))]


def resident_bytes() -> int:
    """Of this process, by Linux."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def mebibytes(count: int) -> str:
    return f"{count / timing.MIB:.0f}"


if __name__ == "__main__":
    sys.exit(main())
