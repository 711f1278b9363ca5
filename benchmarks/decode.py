"""Speed and memory of greedy decoding behind a context, beside a Llama of the same layer passes and weights.

python -m benchmarks.decode
python -m benchmarks.decode --batch-sizes 1 8 32 --device cuda --dtype bf16
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import timing
from inference.arguments import OneLineParser
from inference.devices import choose_device, choose_threads


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
    choose_threads(models["pre norm"][0], args.threads)
    cells = [(batch, context) for context in args.contexts for batch in args.batch_sizes]
    results = {f"{batch} x {context}": measure(models, batch, context, args, device) for batch, context in cells}
    timing.save(args.output, args, cells=results)
    sys.stdout.write(report(args, device, results))
    return 0


def build_parser() -> OneLineParser:
    parser = timing.build_parser("decode", "Tokens per second and memory of greedy decoding, beside Llama's.")
    parser.add_argument("--batch-sizes", type=timing.count, nargs="+", default=[1, 8], help="rows that are continued")
    parser.add_argument("--contexts", type=timing.count, nargs="+", default=[128, 512, 2048], help="tokens before")
    parser.add_argument("--new-tokens", type=timing.count, default=128, help="tokens written after them")
    parser.add_argument(
        "--policies", nargs="*", default=["ring", "last"], choices=["ring", "last"], help="besides full"
    )
    parser.add_argument("--kept-steps", type=timing.count, default=2, help="steps that the ring keeps")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the weights")
    return parser


def build_models(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """Llama and our models by the name they have in the table, each with what `generate` needs to be told."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    pre, sandwich = timing.build_ours(args, "pre"), timing.build_ours(args, "sandwich")
    llama = timing.shared_llama(pre, args.core_steps)
    steps = {"num_steps": args.core_steps}
    kept = {"ring": {"num_kept_steps": args.kept_steps}, "last": {}}
    models = {
        timing.REFERENCE: (llama, {}),
        "pre norm": (pre, steps),
        **{f"pre norm, {name}": (pre, {**steps, "cache_policy": name, **kept[name]}) for name in args.policies},
        "sandwich norm": (sandwich, steps),
    }
    for model, _ in models.values():
        model.to(device, dtype).eval()
    for model in (pre, sandwich):
        timing.check_parameters(llama, model)
    return models


def measure(
    models: dict[str, tuple[PreTrainedModel, dict[str, Any]]],
    batch: int,
    context: int,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Seconds of every round, bytes of the cache at the end, and of what is held besides, by the name of a model.

    The context is put into a cache once for each model; every round continues a copy of it, and what is timed are the
    new tokens alone.
    """
    prompt = torch.randint(args.vocab_size, (batch, context + 1), device=device)
    caches = {name: fill_cache(model, prompt[:, :-1], options) for name, (model, options) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(-args.warmup, args.rounds):
        for name, (model, options) in models.items():
            cache = copy.deepcopy(caches[name])
            run = partial(continue_prompt, model, prompt, args.new_tokens, cache=cache, **depth_of(options))
            elapsed = timing.seconds_of(run, device)
            if index >= 0:
                seconds[name].append(elapsed)
    held, peaks = {}, {}
    for name, (model, options) in models.items():
        cache = caches.pop(name)
        run = partial(continue_prompt, model, prompt, 1, cache=cache, **depth_of(options))
        peaks[name] = timing.peak_bytes(run, device)
        held[name] = cache_bytes(cache)
    return {"seconds": seconds, "cache_bytes": held, "peak_bytes": peaks}


def fill_cache(model: PreTrainedModel, context: torch.Tensor, options: dict[str, Any]) -> Any:
    """A cache that holds the context. (batch, context)"""
    out = model.generate(
        context, attention_mask=torch.ones_like(context), max_new_tokens=1, return_dict_in_generate=True, **options
    )
    return out.cache  # what the last token leaves is never read, so it is not computed


def depth_of(options: dict[str, Any]) -> dict[str, Any]:
    """What `generate` is told where the cache is given."""
    return {name: value for name, value in options.items() if name == "num_steps"}


def continue_prompt(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **options: Any) -> Any:
    """Greedy generation of exactly `new_tokens` tokens: the models have no token that ends a text."""
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, **options
    )
    expected = (prompt.shape[0], prompt.shape[1] + new_tokens)
    assert ids.shape == expected, f"generate returned {tuple(ids.shape)}, expected {expected}"
    return ids


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache of transformers' kind holds."""
    return timing.held_bytes(*(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def report(args: argparse.Namespace, device: torch.device, results: dict[str, dict[str, Any]]) -> str:
    """The setting, and a table with a line for each model, batch size and context."""
    columns = ["tokens per second", "ms per token", "speed / Llama's", "cache, MiB", "peak above, MiB"]
    rows = []
    for cell, result in results.items():
        ratios = timing.speed_ratios(result["seconds"])
        for name, seconds in result["seconds"].items():
            per_token = timing.quartiles(seconds)[1] / args.new_tokens  # seconds for one more token of every row
            rows.append(
                [
                    name,
                    cell,
                    f"{int(cell.split()[0]) / per_token:.1f}",
                    f"{1000 * per_token:.2f}",
                    timing.describe_ratio(ratios[name]),
                    f"{result['cache_bytes'][name] / timing.MIB:.2f}",
                    f"{result['peak_bytes'][name] / timing.MIB:.2f}",
                ]
            )
    return (
        f"{args.new_tokens} tokens behind a context, {args.dtype}; {timing.describe_setting(args, device)}.\n\n"
        f"{timing.markdown_table(['decoding', 'batch x context', *columns], rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
