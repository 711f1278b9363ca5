"""Speed and memory of greedy decoding behind a context, beside a Llama of the same layer passes and weights.

python -m benchmarks.decode
python -m benchmarks.decode --batch-sizes 1 8 32 --device cuda --dtype bf16
python -m benchmarks.decode --device cuda --dtype bf16 --static --policies        # caches of static size, CUDA graphs
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
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from benchmarks import timing
from inference.arguments import OneLineParser
from inference.devices import choose_device, choose_threads
from model import MegaTransformerForCausalLM, RecurrentCache
from trainers.dry_run import linear_parameters


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
    parser.add_argument("--static", action="store_true", help="caches of static size; compiled, with CUDA graphs")
    parser.add_argument("--kept-steps", type=timing.count, default=2, help="steps that the ring keeps")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the weights")
    return parser


def build_models(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """Llama and our models by the name they have in the table, each with what `generate` and a cache are told."""
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
        if args.static:  # Llama compiles itself
            model.model.compile_units(**CompileConfig(fullgraph=True).to_dict())
    return models


def measure(
    models: dict[str, tuple[PreTrainedModel, dict[str, Any]]],
    batch: int,
    context: int,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Seconds of every round, bytes of the cache at the end, of what is held besides, and of what is read for a token,
    by the name of a model.

    The context is put into a cache once for each model; every round continues it and then forgets what it has written.
    What is timed are the new tokens alone.
    """
    prompt = torch.randint(args.vocab_size, (batch, context + 1), device=device)
    room = context + 1 + args.new_tokens if args.static else None
    caches = {name: fill_cache(model, prompt[:, :-1], options, room) for name, (model, options) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(-args.warmup, args.rounds):
        for name, (model, options) in models.items():
            run = partial(continue_prompt, model, prompt, args.new_tokens, cache=caches[name], **depth_of(options))
            elapsed = timing.seconds_of(run, device)
            caches[name].crop(-args.new_tokens)
            if index >= 0:
                seconds[name].append(elapsed)
    held, peaks, read = {}, {}, {}
    for name, (model, options) in models.items():
        cache = caches.pop(name)
        run = partial(continue_prompt, model, prompt, 1, cache=cache, **depth_of(options))
        peaks[name] = timing.peak_bytes(run, device)
        held[name] = cache_bytes(cache)
        read[name] = bytes_read(model, batch, context + args.new_tokens // 2, args.core_steps)
    return {"seconds": seconds, "cache_bytes": held, "peak_bytes": peaks, "read_bytes": read}


@torch.no_grad()
def fill_cache(model: PreTrainedModel, context: torch.Tensor, options: dict[str, Any], room: int | None) -> Any:
    """A cache that holds the context, (batch, context), with `room` for so many tokens, or one that grows."""
    if isinstance(model, MegaTransformerForCausalLM):
        kept = options.get("cache_policy"), options.get("num_kept_steps")
        cache = RecurrentCache(model.config, *kept, room, room and options["num_steps"])
    else:
        cache = DynamicCache() if room is None else StaticCache(model.config, max_cache_len=room)
    model(context, cache=cache, use_cache=True, logits_to_keep=1, **depth_of(options))
    return cache


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


def bytes_read(model: PreTrainedModel, batch: int, length: int, core_steps: int) -> int:
    """The least that has to be read from memory to write a token of each row: the matrices of each execution of a
    layer, and the keys and values of all tokens before, with policy "full".
    """
    config = model.config
    if isinstance(model, MegaTransformerForCausalLM):
        base, head_dim = model.model, config.head_dim
        weights = sum(map(linear_parameters, (base.prelude, base.coda, model.lm_head)))
        weights += core_steps * linear_parameters(base.core)
        layers = config.num_prelude_layers + core_steps * config.num_core_layers + config.num_coda_layers
    else:
        weights, layers = linear_parameters(model), config.num_hidden_layers
        head_dim = config.hidden_size // config.num_attention_heads
    states = 2 * layers * batch * length * config.num_key_value_heads * head_dim
    return (weights + states) * model.dtype.itemsize


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache of transformers' kind holds."""
    return timing.held_bytes(*(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def report(args: argparse.Namespace, device: torch.device, results: dict[str, dict[str, Any]]) -> str:
    """The setting, and a table with a line for each model, batch size and context."""
    columns = ["tokens per second", "ms per token", "speed / Llama's", "cache, MiB", "peak above, MiB", "GB/s read"]
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
                    f"{result['read_bytes'][name] / per_token / 1e9:.1f}",
                ]
            )
    kind = f"{args.dtype}, static" if args.static else args.dtype
    return (
        f"{args.new_tokens} tokens behind a context, {kind}; {timing.describe_setting(args, device)}.\n\n"
        f"{timing.markdown_table(['decoding', 'batch x context', *columns], rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
