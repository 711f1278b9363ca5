"""Speed and cache of greedy `generate`, beside a Llama that executes the same layers with the same weights.

python -m benchmarks.decode
python -m benchmarks.decode --batch-sizes 1 8 32 --device cuda --dtype bf16
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import timing
from inference.arguments import OneLineParser
from inference.devices import choose_device


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
        models = build_models(args, device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {batch: measure(models, batch, args, device) for batch in args.batch_sizes}
    timing.save(args.output, args, batch_sizes=results)
    sys.stdout.write(report(args, device, results))
    return 0


def build_parser() -> OneLineParser:
    parser = timing.build_parser("decode", "Tokens per second and cache of greedy generation, beside Llama's.")
    parser.add_argument("--batch-sizes", type=timing.count, nargs="+", default=[1, 8], help="rows that are continued")
    parser.add_argument("--prompt-length", type=timing.count, default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=timing.count, default=64, help="tokens written after it")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the weights")
    return parser


def build_models(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """Llama and our models by the name they have in the table, each with what `generate` needs to be told."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    pre, sandwich = timing.build_ours(args, "pre"), timing.build_ours(args, "sandwich")
    llama = timing.shared_llama(pre, args.core_steps)
    models = {
        timing.REFERENCE: (llama, {}),
        "pre norm": (pre, {"num_steps": args.core_steps}),
        "sandwich norm": (sandwich, {"num_steps": args.core_steps}),
    }
    for model, _ in models.values():
        model.to(device, dtype).eval()
    for model in (pre, sandwich):
        timing.check_parameters(llama, model)
    return models


def measure(
    models: dict[str, tuple[PreTrainedModel, dict[str, Any]]],
    batch: int,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Seconds of every round, and bytes of the cache at the end, by the name of a model."""
    prompt = torch.randint(args.vocab_size, (batch, args.prompt_length), device=device)
    runs = {
        name: partial(continue_prompt, model, prompt, args.new_tokens, **options)
        for name, (model, options) in models.items()
    }
    caches = {name: cache_bytes(run(return_dict_in_generate=True).past_key_values) for name, run in runs.items()}
    return {
        "seconds": timing.interleave(runs, args.rounds, args.warmup, device),
        "cache_bytes": caches,
    }


def continue_prompt(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **options: Any) -> Any:
    """Greedy generation of exactly `new_tokens` tokens: the models have no token that ends a text."""
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, **options
    )
    ids = out if isinstance(out, torch.Tensor) else out.sequences
    expected = (prompt.shape[0], prompt.shape[1] + new_tokens)
    assert ids.shape == expected, f"generate returned {tuple(ids.shape)}, expected {expected}"
    return out


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache of transformers' kind holds."""
    return timing.held_bytes(*(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def report(args: argparse.Namespace, device: torch.device, results: dict[int, dict[str, Any]]) -> str:
    """The setting, and a table with a line for each model and batch size."""
    header = ["generate", "batch", "tokens per second", "ms per token", "speed / Llama's", "cache, MiB"]
    rows = []
    for batch, result in results.items():
        ratios = timing.speed_ratios(result["seconds"])
        for name, seconds in result["seconds"].items():
            per_token = timing.quartiles(seconds)[1] / args.new_tokens  # seconds for one more token of every row
            rows.append(
                [
                    name,
                    str(batch),
                    f"{batch / per_token:.1f}",
                    f"{1000 * per_token:.2f}",
                    timing.describe_ratio(ratios[name]),
                    f"{result['cache_bytes'][name] / timing.MIB:.2f}",
                ]
            )
    return (
        f"{args.new_tokens} tokens after a prompt of {args.prompt_length}, {args.dtype}; "
        f"{timing.describe_setting(args, device)}.\n\n{timing.markdown_table(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
