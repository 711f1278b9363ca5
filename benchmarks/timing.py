"""What the speed benchmarks share: the models that are compared, the clock, the memory meter, the table.

Both sides execute the same layers the same number of times with the same weights: ours iterates its core, Llama has a
layer for every pass, and the layers of a repetition hold the same parameter objects. So neither side has fewer weights
to read, to update, or to keep in a cache of the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import datasets
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from inference.arguments import OneLineParser, whole_number
from inference.devices import cpu_model, device_report
from inference.logs import set_up_logging
from model import MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.blocks import TransformerBlock

MIB = 2**20
REFERENCE = "Llama, shared weights"

# -------------------------------------------------------------------------------------------------------- command line


def count(text: str) -> int:
    """Argument type: 1, 2, 3 ..."""
    return whole_number(text, 1, "give 1 or more.")


def output_file(text: str) -> Path:
    """Argument type of --output; it fails before the measurement, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a folder that exists: make {path.parent} first.")
    return path


def build_parser(name: str, description: str) -> OneLineParser:
    """The options that both benchmarks have."""
    parser = OneLineParser(prog=f"benchmarks.{name}", description=description)
    for flag, default, what in (
        ("hidden-size", 512, "width of the residual stream"),
        ("intermediate-size", 1408, "width inside the feed-forward layer"),
        ("heads", 8, "query heads"),
        ("key-value-heads", 8, "key/value heads"),
        ("vocab-size", 8192, "vocabulary"),
        ("prelude-layers", 1, "layers before the core"),
        ("core-layers", 4, "layers of the core"),
        ("coda-layers", 1, "layers after the core"),
        ("core-steps", 4, "times the core is applied"),
        ("rounds", 10, "timed rounds; in each, every model has its turn once"),
        ("warmup", 2, "rounds before them that do not count"),
    ):
        parser.add_argument(f"--{flag}", type=count, default=default, help=what)
    parser.add_argument("--threads", type=count, help="threads of torch on the CPU; default: by the size of the model")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--output", type=output_file, help="JSON file for the seconds of every round")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; messages are of the level that they ask for, and `datasets` shows no progress."""
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    datasets.disable_progress_bars()
    return args


# -------------------------------------------------------------------------------------------------------------- models


def build_ours(args: argparse.Namespace, norm_placement: str) -> MegaTransformerForCausalLM:
    """Our model, with an untied head, from the same seed at every call.

    Raises:
        ValueError: for sizes that do not fit together.
    """
    torch.manual_seed(0)
    config = MegaTransformerTextConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_prelude_layers=args.prelude_layers,
        num_core_layers=args.core_layers,
        num_coda_layers=args.coda_layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        position_embedding="rope",
        norm_placement=norm_placement,
        tie_word_embeddings=False,
        recurrence={"mean_steps": args.core_steps, "backprop_steps": args.core_steps},
    )
    return MegaTransformerForCausalLM(config)


def shared_llama(model: MegaTransformerForCausalLM, num_steps: int) -> LlamaForCausalLM:
    """A Llama that executes the layers of a pre-norm `model` at `num_steps`, with its weights.

    It has a layer for every pass, with a place of its own in the cache; layers of the same block share the parameters.
    What it lacks: the injection, the initial state, and the norm between core and coda.
    """
    config, base = model.config, model.model
    blocks = [*base.prelude.layers, *list(base.core.layers) * num_steps, *base.coda.layers]
    llama_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(blocks),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(llama_config)
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(base.embed_tokens.weight * config.embedding_scale)
        llama.model.norm.weight.copy_(base.norm.weight)
        llama.lm_head.weight.copy_(model.lm_head.weight)
    first_layers: dict[TransformerBlock, LlamaDecoderLayer] = {}
    for block, layer in zip(blocks, llama.model.layers, strict=True):
        if block in first_layers:
            share_parameters(first_layers[block], layer)
        else:
            copy_weights(block, layer)
            first_layers[block] = layer
    return llama


@torch.no_grad()
def copy_weights(block: TransformerBlock, layer: LlamaDecoderLayer) -> None:
    """The weights of our block into a layer of Llama, which holds what we fuse in matrices of their own."""
    attention, head_dim = block.attention, block.attention.head_dim
    heads = [attention.num_heads, attention.num_key_value_heads, attention.num_key_value_heads]
    query, key, value = attention.qkv_proj.weight.split([number * head_dim for number in heads])
    gate, up = block.mlp.gate_up_proj.weight.chunk(2)
    for theirs, ours in (
        (layer.self_attn.q_proj, query),
        (layer.self_attn.k_proj, key),
        (layer.self_attn.v_proj, value),
        (layer.self_attn.o_proj, attention.o_proj.weight),
        (layer.mlp.gate_proj, gate),
        (layer.mlp.up_proj, up),
        (layer.mlp.down_proj, block.mlp.down_proj.weight),
        (layer.input_layernorm, block.attention_norm_in.weight),
        (layer.post_attention_layernorm, block.mlp_norm_in.weight),
    ):
        theirs.weight.copy_(ours)


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Puts the parameter objects of `source` in the place of those of `target`, a module of the same shape."""
    for name, parameter in source.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(path), leaf, parameter)


def check_parameters(llama: LlamaForCausalLM, ours: MegaTransformerForCausalLM) -> None:
    """Both have the same number of parameters, apart from what only ours has: the injection, and the outer norms of the
    sandwich.
    """
    named = ours.named_parameters()
    common = sum(parameter.numel() for name, parameter in named if not is_ours_alone(name))
    theirs = sum(parameter.numel() for parameter in llama.parameters())  # each object once
    assert common == theirs, f"{common} parameters against {theirs} of Llama"


def is_ours_alone(name: str) -> bool:
    """Whether the parameter of this name has no counterpart in Llama."""
    return ".injection." in name or "_norm_out." in name


# --------------------------------------------------------------------------------------------------------------- clock


def interleave(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `clock` that each candidate takes in each round, `warmup` rounds before them left out.

    They take turns, A B C A B C, so that what slows the machine down for a while slows all of them down.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(-warmup, rounds):
        for name, run in candidates.items():
            elapsed = seconds_of(run, device, clock)
            if index >= 0:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(
    run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call, by default on the wall, until the device has finished its work."""
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_ratios(seconds: dict[str, list[float]], reference: str = REFERENCE) -> dict[str, list[float]]:
    """How many times as fast as the reference each candidate was, round by round."""
    return {
        name: [base / own for base, own in zip(seconds[reference], values, strict=True)]
        for name, values in seconds.items()
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated linearly."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(points).tolist())


# -------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call of `run` holds at a time, beyond what was held before it.

    On a GPU it is torch's own count. On the CPU it is the sum of what torch's allocator reports to the profiler:
    tensors, and the temporaries of operators, but not what math libraries allocate for themselves. Watching slows the
    call down, so this is never the one that is timed.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def held_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the tensors, each counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


# -------------------------------------------------------------------------------------------------------------- report


def describe_setting(args: argparse.Namespace, device: torch.device) -> str:
    """What was measured where, in one line."""
    passes = args.prelude_layers + args.core_steps * args.core_layers + args.coda_layers
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return (
        f"{passes} layer passes ({args.prelude_layers} + {args.core_steps} x {args.core_layers} + {args.coda_layers}), "
        f"width {args.hidden_size}, {args.heads} heads, vocabulary {args.vocab_size}; {chip}{threads}, "
        f"torch {torch.__version__}; rounds: {args.rounds}, medians, quartiles in brackets"
    )


def describe_ratio(ratios: Sequence[float]) -> str:
    """Median and quartiles of the ratios, as they stand in a table."""
    lower, median, upper = quartiles(ratios)
    return f"{median:.3f} ({lower:.3f} to {upper:.3f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def save(path: Path | None, args: argparse.Namespace, **results: object) -> None:
    """Writes options, machine and results as JSON, if a file was named."""
    if path is not None:
        record = {"options": vars(args), "machine": device_report().splitlines(), **results}
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")
