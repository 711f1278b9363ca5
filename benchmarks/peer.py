"""Time of a mixture of very many experts by their number: the search by product keys, and the chosen experts.

python -m benchmarks.peer --threads 1
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import timing
from inference.arguments import OneLineParser
from inference.devices import choose_device, choose_threads
from model import MegaTransformerTextConfig
from model.peer import PeerFeedForward


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
        layers = {experts: build_layer(args, experts).to(device) for experts in numbers_of_experts(args)}
    except ValueError as error:
        parser.error(str(error))
    choose_threads(layers[args.most_experts], args.threads)
    hidden = torch.randn(1, args.tokens, args.hidden_size, device=device)
    with torch.no_grad():
        passes: dict[tuple[int, str], Callable[[], object]] = {}
        for experts, layer in layers.items():
            found = layer.retrieve(hidden)
            passes[experts, "search"] = partial(layer.retrieve, hidden)
            passes[experts, "experts"] = partial(layer.apply_experts, hidden, *found)
        seconds = timing.interleave(passes, args.rounds, args.warmup, device)
    sys.stdout.write(report(args, layers, seconds))
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.peer", description="Time of a mixture of very many experts.")
    for flag, default, what in (
        ("least-experts", 2**10, "experts of the smallest layer, a square"),
        (
            "most-experts",
            2**20,
            "experts of the largest layer, a square; those between have four times as many each",
        ),
        ("hidden-size", 64, "width"),
        ("heads", 8, "queries of a token"),
        ("top-k", 16, "experts that each query chooses"),
        ("key-dim", 128, "width of a query"),
        ("tokens", 256, "tokens"),
        ("rounds", 15, "timed rounds; in each, all have their turn once"),
        ("warmup", 3, "rounds before them that do not count"),
    ):
        parser.add_argument(f"--{flag}", type=timing.count, default=default, help=what)
    parser.add_argument("--threads", type=timing.count, help="threads of torch on the CPU; default: by size")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser


def numbers_of_experts(args) -> list[int]:
    """The squares from the least to the most, each four times the one before, whatever is between included."""
    numbers = [args.least_experts]
    while numbers[-1] < args.most_experts:
        numbers.append(min(4 * numbers[-1], args.most_experts))
    return numbers


def build_layer(args, experts: int) -> PeerFeedForward:
    """A layer with random weights, the same for every number of experts but for these."""
    config = MegaTransformerTextConfig(
        hidden_size=args.hidden_size,
        position_embedding="none",  # of what is not part of the layer
        num_attention_heads=1,
        mlp="peer",
        peer_num_experts=experts,
        peer_num_heads=args.heads,
        peer_top_k=args.top_k,
        peer_key_dim=args.key_dim,
    )
    torch.manual_seed(0)
    layer = PeerFeedForward(config)
    torch.nn.init.normal_(layer.keys, std=(2 / args.key_dim) ** 0.5)
    return layer


def report(args, layers: dict[int, PeerFeedForward], seconds: dict[tuple[int, str], list[float]]) -> str:
    """The setting, and a table."""
    rows = []
    for experts, layer in layers.items():
        search, chosen = (
            1e6 * timing.quartiles(seconds[experts, part])[1] / args.tokens for part in ("search", "experts")
        )
        weights = sum(parameter.numel() for parameter in layer.parameters())
        rows.append([f"{experts:,}", f"{layer.num_keys}", f"{weights:,}", f"{search:.1f}", f"{chosen:.1f}"])
    header = ["experts", "half-keys of a set", "parameters", "search, us / token", "experts, us / token"]
    return (
        f"{args.tokens} tokens, width {args.hidden_size}, {args.heads} heads, top {args.top_k}, keys of "
        f"{args.key_dim}; medians of {args.rounds} rounds.\n\n{timing.markdown_table(header, rows)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
