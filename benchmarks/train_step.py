"""Speed and memory of a training step, beside a Llama that executes the same layers with the same weights.

python -m benchmarks.train_step
python -m benchmarks.train_step --compile
python -m benchmarks.train_step --device cuda --dtype bf16 --gradient-checkpointing
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count as count_up
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import timing
from inference.arguments import OneLineParser, whole_number
from inference.devices import choose_device, choose_threads
from model import MegaTransformerForCausalLM
from model.recurrence import draw_training_states
from trainers.dry_run import StepCounts, flops_per_token, linear_parameters
from trainers.norms import speed_up_norms


class Trainee:
    """A model with its optimizer. Calling it is a training step: forward, backward, update, gradients cleared.

    Args:
        draw_inputs: Makes the arguments of `forward`, at every step anew.
        num_steps: Core steps without and with gradient, of ours.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draw_inputs: Callable[[], dict[str, Any]],
        args: argparse.Namespace,
        num_steps: tuple[int, int] = (0, 0),
    ):
        self.model, self.draw_inputs = model.train(), draw_inputs
        speed_up_norms(model)  # as trainers do; Llama's own are of another kind
        self.flops = args.batch_size * args.sequence_length * training_flops(model, num_steps, args.sequence_length)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16")
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if args.compile:
            compile_model(model)

    def __call__(self) -> None:
        with self.autocast:
            loss = self.model(**self.draw_inputs()).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Bytes of the weights and of the optimizer's moments: what is there between two steps."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return timing.held_bytes(*self.model.parameters(), *moments)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    try:
        device = choose_device(args.device)
        trainees = build_trainees(args, device)
    except ValueError as error:
        parser.error(str(error))
    choose_threads(trainees["pre norm"].model, args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    seconds = timing.interleave(trainees, args.rounds, args.warmup, device, clock)
    held = {name: trainee.held_bytes() for name, trainee in trainees.items()}
    peaks = {name: timing.peak_bytes(trainee, device) for name, trainee in trainees.items()}
    timing.save(args.output, args, seconds=seconds, held_bytes=held, peak_bytes=peaks)
    flops = {name: trainee.flops for name, trainee in trainees.items()}
    sys.stdout.write(report(args, device, seconds, flops, held, peaks))
    return 0


def build_parser() -> OneLineParser:
    parser = timing.build_parser("train_step", "Tokens per second and memory of a training step, beside Llama's.")
    parser.add_argument("--batch-size", type=timing.count, default=4, help="rows of the batch")
    parser.add_argument("--sequence-length", type=sequence_length, default=256, help="tokens of a row")
    parser.add_argument(
        "--dtype", choices=("float32", "bf16"), default="float32", help="bf16: autocast, float32 weights"
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of the CPU in place of the wall's, on a busy machine"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile: Llama as a whole, ours by units")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations, in all models")
    return parser


def sequence_length(text: str) -> int:
    """Argument type of --sequence-length."""
    return whole_number(text, 2, "a row needs a token and the one after it.")


# ------------------------------------------------------------------------------------------------------ what is trained


def build_trainees(args: argparse.Namespace, device: torch.device) -> dict[str, Trainee]:
    """Llama and our models by the name they have in the table, each with weights of its own."""
    ids = torch.randint(args.vocab_size, (args.batch_size, args.sequence_length), device=device)
    truncated = args.core_steps // 2
    llama = timing.shared_llama(timing.build_ours(args, "pre"), args.core_steps).to(device)
    # Without use_cache=False, Llama fills a cache in training too.
    trainees = {timing.REFERENCE: Trainee(llama, lambda: {"input_ids": ids, "labels": ids, "use_cache": False}, args)}
    for name, placement, no_grad in (
        ("pre norm", "pre", 0),
        (f"pre norm, {truncated} of {args.core_steps} steps without gradient", "pre", truncated),
        ("sandwich norm", "sandwich", 0),
    ):
        model = timing.build_ours(args, placement).to(device)
        timing.check_parameters(llama, model)
        num_steps = (no_grad, args.core_steps - no_grad)
        draw = partial(draw_inputs, model, ids, num_steps, count_up())
        trainees[name] = Trainee(model, draw, args, num_steps)
    return trainees


def training_flops(model: PreTrainedModel, num_steps: tuple[int, int], row: int) -> float:
    """Operations of the matrix products per token, forward and backward, as `flops_per_token` counts them; what
    gradient checkpointing computes again is not among them.
    """
    if isinstance(model, MegaTransformerForCausalLM):
        return flops_per_token(model, StepCounts(*num_steps, num_steps[1]), row).training
    config = model.config
    return 3 * (2 * linear_parameters(model) + 4 * row * config.hidden_size * config.num_hidden_layers)


def draw_inputs(
    model: MegaTransformerForCausalLM, ids: torch.Tensor, num_steps: tuple[int, int], steps: count_up
) -> dict[str, Any]:
    """The arguments of our `forward`. The initial state is drawn at every step, as in training, and on our time."""
    batch, sequence = ids.shape
    step = next(steps)
    state = draw_training_states(model.config, sequence, [(0, step, row) for row in range(batch)], model.device)
    return {
        "input_ids": ids,
        "labels": ids,
        "use_cache": False,
        "skip_logits": True,  # as in training
        "num_steps": num_steps,
        "initial_state": state,
    }


def compile_model(model: PreTrainedModel) -> None:
    """Llama as one graph; of ours prelude, core step and coda.

    With `fullgraph`, a break in a graph, or more graphs than torch allows, is an error instead of an eager call that
    the table would show as compiled.
    """
    torch.compiler.config.recompile_limit = 32  # counts the graphs of all models here together; meant for those of one
    if isinstance(model, MegaTransformerForCausalLM):
        model.model.compile_units(fullgraph=True)
    else:
        model.compile(fullgraph=True)


# --------------------------------------------------------------------------------------------------------------- report


def report(
    args: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, list[float]],
    flops: dict[str, float],
    held: dict[str, int],
    peaks: dict[str, int],
) -> str:
    """The setting, and a table with a line for each model."""
    tokens = args.batch_size * args.sequence_length
    ratios = timing.speed_ratios(seconds)
    mode = "compiled" if args.compile else "eager"
    recomputed = ", gradient checkpointing" if args.gradient_checkpointing else ""
    clock = ", seconds of the processor" if args.processor_time else ""
    header = [
        "training step",
        "tokens per second",
        "speed / Llama's",
        "TFLOP/s",
        "weights and moments, MiB",
        "step's peak above, MiB",
    ]
    rows = [
        [
            name,
            f"{tokens / timing.quartiles(seconds[name])[1]:.1f}",
            timing.describe_ratio(ratios[name]),
            f"{flops[name] / timing.quartiles(seconds[name])[1] / 1e12:.2f}",
            f"{held[name] / timing.MIB:.1f}",
            f"{peaks[name] / timing.MIB:.1f}",
        ]
        for name in seconds
    ]
    return (
        f"Batch {args.batch_size} x {args.sequence_length} tokens, {args.dtype}, {mode}{recomputed}{clock}; "
        f"{timing.describe_setting(args, device)}.\n\n{timing.markdown_table(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
