"""Does a plain model learn more with a core? A small Llama is trained on a text by transformers' `Trainer`, and a copy
is retrofitted with a core by `convert.py retrofit`. Both are trained on for as long, and compared on the blocks of
another text, block by block.

    python -m benchmarks.retrofit --train-text train.txt --validation-text valid.txt --output retrofit.json
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.timing import markdown_table, output_file
from evaluation.intervals import ratio_interval
from inference.arguments import OneLineParser, counted, layer_range
from inference.converters.foreign import ForeignCheckpoint
from inference.converters.retrofit import retrofit
from inference.output import whole_file

VOCABULARY = 256
"""Bytes."""


class Budget(TrainerCallback):
    """Ends a training after so many seconds of this process, and lets the rate fall towards that end.

    Args:
        seconds: CPU seconds.
        rate: The highest rate.
        mean_steps: The mean of the steps, which grows towards it from 1; None: the model has no core.
        growth: The share of the time in which it does.
    """

    def __init__(self, seconds: float, rate: float, mean_steps: int | None = None, growth: float = 0.25):
        self.seconds, self.rate, self.mean_steps, self.growth = seconds, rate, mean_steps, growth
        self.start = time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Sets the rate, and the mean of the steps, for the share of the time that has passed."""
        share = min((time.process_time() - self.start) / self.seconds, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (state.global_step + 1) / 50) * (1 - 0.9 * share)
        if self.mean_steps is not None:
            recurrence = model.config.recurrence
            grown = min(share / self.growth, 1.0) if self.growth else 1.0
            recurrence.mean_steps = 1 + round((self.mean_steps - 1) * grown)
            recurrence.backprop_steps = recurrence.mean_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops when the time is over."""
        control.should_training_stop = time.process_time() - self.start >= self.seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: with code 2 after one line on standard error, for a text that is missing or too short.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging("error")
    torch.set_num_threads(1)
    with parser.one_line_errors():
        train, validation = (blocks_of(path, args.block_size) for path in (args.train_text, args.validation_text))
    set_seed(args.seed)
    original = trained(small_llama(args), train, args)
    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        parts = {"prelude": args.prelude, "core": args.core, "coda": args.coda}
        retrofitted = retrofit(ForeignCheckpoint(folder), parts, args.mean_steps)
    found = {"before": losses(original, validation), "retrofitted, before": losses(retrofitted, validation, 1)}
    original, retrofitted = (trained(model, train, args) for model in (original, retrofitted))
    found["original"] = losses(original, validation)
    for steps in sorted({1, 2, 4, args.mean_steps, 2 * args.mean_steps}):
        found[step_name(steps)] = losses(retrofitted, validation, steps)
    with whole_file(args.output) as file:
        file.write_text(
            json.dumps({"seconds": args.seconds, "losses": {name: it.tolist() for name, it in found.items()}})
        )
    sys.stdout.write(report(found, args.mean_steps))
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="retrofit", description="A small Llama with and without a core, in equal time.")
    parser.add_argument("--train-text", type=Path, required=True, help="text to train on")
    parser.add_argument("--validation-text", type=Path, required=True, help="text to compare on")
    parser.add_argument("--output", type=output_file, required=True, help="JSON file for the losses of each block")
    parser.add_argument(
        "--seconds", type=counted("the CPU seconds, 1 or more"), default=300, help="CPU seconds of a training"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and of the order of blocks")
    for name, default, what in (("layers", 6, "layers of the Llama"), ("hidden-size", 128, "width of the Llama"),
                                ("block-size", 128, "bytes of a block"), ("batch-size", 16, "blocks of an update"),
                                ("mean-steps", 4, "core steps on average")):  # fmt: skip
        parser.add_argument(f"--{name}", type=counted(what), default=default, help=f"{what}; default: {default}")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest rate of AdamW")
    parser.add_argument("--growth", type=float, default=0.25, help="share of the time in which the mean grows")
    for part, default in (("prelude", range(2)), ("core", range(2, 4)), ("coda", range(4, 6))):
        parser.add_argument(
            f"--{part}", type=layer_range, default=default, metavar="BEGIN:END", help=f"layers of the {part}"
        )
    return parser


def blocks_of(path: Path, size: int) -> datasets.Dataset:
    """The bytes of a text in blocks of `size`; what is left at the end is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is shorter than a block.
    """
    ids = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64)
    if len(ids) < size:
        raise ValueError(f"{path} has {len(ids)} bytes, less than a block of {size}; give a longer text")
    blocks = ids[: len(ids) // size * size].reshape(-1, size)
    return datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def small_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """A fresh Llama."""
    width = args.hidden_size
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=args.layers,
            num_attention_heads=max(width // 32, 1),
            max_position_embeddings=args.block_size,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def trained(model: PreTrainedModel, train: datasets.Dataset, args: argparse.Namespace) -> PreTrainedModel:
    """The model after so many seconds of training, at drawn depths if it has a core."""
    has_core = hasattr(model, "depth_callback")
    callbacks = [model.depth_callback()] if has_core else []
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=10**6,
            per_device_train_batch_size=args.batch_size,
            weight_decay=0.05,
            adam_beta2=0.95,
            lr_scheduler_type="constant",
            seed=args.seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        budget = Budget(args.seconds, args.learning_rate, args.mean_steps if has_core else None, args.growth)
        Trainer(model.train(), options, train_dataset=train, callbacks=[budget, *callbacks]).train()
    return model.eval()


@torch.no_grad()
def losses(model: PreTrainedModel, blocks: datasets.Dataset, num_steps: int | None = None) -> np.ndarray:
    """The mean loss of each block, (blocks,), in nats per byte."""
    depth = {} if num_steps is None else {"num_steps": num_steps}
    found = []
    for batch in blocks.with_format("torch").iter(64):
        ids = batch["input_ids"]
        logits = model.eval()(ids, **depth).logits[:, :-1]
        of_tokens = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found.append(of_tokens.mean(-1))
    return torch.cat(found).double().numpy()


def step_name(steps: int) -> str:
    """The name of the retrofitted model at a depth."""
    return f"retrofitted, {steps} step{'s' * (steps > 1)}"


def report(found: dict[str, np.ndarray], mean_steps: int) -> str:
    """The losses, and how much more or less they are than those of the original and of one step, block by block, with
    95 % intervals by a bootstrap over blocks.
    """
    lines = []
    for name, values in found.items():
        cells = [f"{values.mean():.4f}"]
        for other in ("original", step_name(1)):
            difference = values - found[other]
            low, high = ratio_interval(difference) if difference.any() else (0.0, 0.0)
            cells.append(f"{difference.mean():+.4f} ({low:+.4f} to {high:+.4f})")
        lines.append([name, *cells])
    header = ["model", "nats per byte", "against the original", "against one step"]
    return f"mean depth {mean_steps}\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    sys.exit(main())
