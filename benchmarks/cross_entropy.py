"""Memory and time of the loss over a large vocabulary, in chunks of tokens against all logits at once.

python -m benchmarks.cross_entropy
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks import timing
from inference.arguments import OneLineParser
from inference.devices import choose_device, choose_threads
from model.cross_entropy import causal_loss, count_labels

REFERENCE = "all logits"


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
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    head = nn.Linear(args.hidden_size, args.vocab_size, bias=False, device=device)
    choose_threads(head, args.threads)
    hidden = torch.randn(args.batch_size, args.sequence_length, args.hidden_size, device=device, requires_grad=True)
    labels = torch.randint(args.vocab_size, hidden.shape[:2], device=device)
    losses = {
        REFERENCE: lambda: ForCausalLMLoss(head(hidden), labels, args.vocab_size),
        "in chunks": lambda: causal_loss(head, hidden, labels, args.vocab_size, count_labels(labels))[0],
    }
    passes = {name: forward_and_backward(loss, head, hidden) for name, loss in losses.items()}
    difference = largest_difference(*(run() for run in passes.values()))
    seconds = timing.interleave(passes, args.rounds, args.warmup, device)
    peaks = {name: timing.peak_bytes(run, device) for name, run in passes.items()}
    sys.stdout.write(report(args, seconds, peaks, difference))
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.cross_entropy", description="Loss over a large vocabulary, in chunks.")
    for flag, default, what in (
        ("vocab-size", 65536, "vocabulary"),
        ("hidden-size", 512, "width of the hidden states"),
        ("batch-size", 4, "rows"),
        ("sequence-length", 512, "tokens of a row"),
        ("rounds", 5, "timed rounds; in each, both have their turn once"),
        ("warmup", 1, "rounds before them that do not count"),
    ):
        parser.add_argument(f"--{flag}", type=timing.count, default=default, help=what)
    parser.add_argument(
        "--threads", type=timing.count, help="threads of torch on the CPU; default: by the size of the model"
    )
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser


def forward_and_backward(
    loss: Callable[[], torch.Tensor], head: nn.Linear, hidden: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """A function that returns the loss, and its gradients with respect to hidden states and weights."""

    def run() -> list[torch.Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, [hidden, head.weight])]

    return run


def largest_difference(ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The largest difference between two lists of tensors, relative to the largest entry of the tensor it is in."""
    return max(
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(ours, reference, strict=True)
    )


def report(args, seconds: dict[str, list[float]], peaks: dict[str, int], difference: float) -> str:
    """The setting, a table, and how far the results are apart."""
    ratios = timing.speed_ratios(seconds, REFERENCE)
    rows = [
        [
            name,
            f"{1000 * timing.quartiles(seconds[name])[1]:.0f}",
            timing.describe_ratio(ratios[name]),
            f"{peaks[name] / timing.MIB:.0f}",
            f"{peaks[REFERENCE] / peaks[name]:.1f}",
        ]
        for name in seconds
    ]
    header = ["forward and backward", "ms", "speed / all logits", "peak, MiB", "times less memory"]
    return (
        f"{args.batch_size} x {args.sequence_length} tokens, width {args.hidden_size}, vocabulary {args.vocab_size}; "
        f"medians of {args.rounds} rounds, quartiles in brackets.\n\n{timing.markdown_table(header, rows)}\n"
        f"Largest difference in loss and gradients, relative to the largest entry: {difference:.1e}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
