"""What fewer bits cost: the loss against the number of core steps, part by part, and the memory of the weights.

python -m benchmarks.quantization runs/recurrent_lm
python -m benchmarks.quantization --config configs/recurrent_lm_100m.yaml      # memory alone, of random weights
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from benchmarks import timing
from configs import load_run_config, read_run_config
from dataset_loading import Collator
from evaluation.__main__ import validation_texts
from inference import arguments
from inference.devices import choose_device, choose_threads
from inference.loading import find_checkpoint, load_model
from model import MegaTransformerForCausalLM
from model.quantization import PARTS, QuantizationConfig, bits_and_bytes

DEPTHS = (1, 2, 4, 8, 16, 32)
OTHERS = {"embeddings": r"model\.embed_tokens", "norms": r".*norm\w*"}  # that are never quantised
Load = Callable[[], PreTrainedModel]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = timing.parsed(parser, argv)
    if (args.checkpoint is None) == (args.config is None):
        parser.error("give a checkpoint, or --config with a YAML file.")
    try:
        device = choose_device(args.device)
        if args.config is not None:
            memory = memory_of_config(args.config, device)
            sys.stdout.write(report_memory(memory))
            timing.save(args.output, args, memory=memory)
            return 0
        checkpoint = find_checkpoint(args.checkpoint)
        models = variants(checkpoint, device)
        whole = models["as trained"]
        model, tokenizer = load_model(checkpoint, device)
        choose_threads(model)
        texts = validation_texts(read_run_config(checkpoint, ["--data.packing", "false"]), tokenizer, args.limit)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = [row for source in texts.values() for row in source]
    batches = [Collator(tokenizer)(rows[i : i + args.rows]) for i in range(0, len(rows), args.rows)]
    bits = {name: losses(load(), model, batches, args.num_steps) for name, load in models.items()}
    sys.stdout.write(f"{report_losses('weights', bits, args.num_steps)}\n")
    parts = {name: losses(load(), model, batches, args.num_steps) for name, load in rounded_parts(whole).items()}
    sys.stdout.write(f"{report_losses('4 bits in one part alone', parts, args.num_steps)}\n")
    memory = {name: weight_bytes(load()) for name, load in models.items()}
    sys.stdout.write(report_memory(memory))
    timing.save(args.output, args, bits=bits, parts=parts, memory=memory)
    return 0


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(prog="benchmarks.quantization", description="What weights of fewer bits cost.")
    parser.add_argument("checkpoint", nargs="?", help="folder of a checkpoint, or of a run")
    parser.add_argument("--config", type=Path, help="YAML file of a run whose model's shape has its memory measured")
    parser.add_argument("--num-steps", type=timing.count, nargs="+", default=list(DEPTHS), help="depths")
    parser.add_argument("--limit", type=timing.count, default=64, help="validation texts of each source")
    parser.add_argument("--rows", type=timing.count, default=16, help="texts in a forward pass")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--output", type=timing.output_file, help="JSON file for the figures")
    return parser


# -------------------------------------------------------------------------------------------------------------- models


def variants(checkpoint: Path, device: torch.device) -> dict[str, Load]:
    """By name, how to load the checkpoint in fewer and fewer bits."""

    def load(dtype: torch.dtype | None = None, **options) -> Load:
        return lambda: load_model(checkpoint, device, dtype, QuantizationConfig(**options))[0]

    return {
        "as trained": load(),
        "16 bits": load(torch.bfloat16),
        "8 bits": load(load_in="8bit"),
        "8 bits, outliers not": load(load_in="8bit", outlier_threshold=6),
        "8 bits, injection too": load(load_in="8bit", keep_in_high_precision=["heads"]),
        "4 bits": load(load_in="4bit"),
        "4 bits, scales not": load(load_in="4bit", double_quant=False),
        "4 bits, injection too": load(load_in="4bit", keep_in_high_precision=["heads"]),
        "4 bits of fp4": load(load_in="4bit", quant_type="fp4"),
    }


def rounded_parts(load: Load) -> dict[str, Load]:
    """By name of a part, how to load the model with only that part rounded to 4 bits, and made float again."""
    patterns = PARTS | OTHERS
    weights = dict(load().named_parameters(remove_duplicate=False))
    return {
        part: lambda pattern=pattern: round_part(load(), pattern)
        for part, pattern in patterns.items()
        if any(is_in(name, pattern) for name in weights)
    }


def is_in(name: str, pattern: str) -> bool:
    """Whether the parameter of that name is in a module whose name matches."""
    return re.match(rf"(?:{pattern})\.", name) is not None


@torch.no_grad()
def round_part(model: PreTrainedModel, pattern: str) -> PreTrainedModel:
    """Rounds to NF4 and back the matrices of the modules that match, or, of norms, their vectors. A head that is the
    embedding becomes one of its own.
    """
    if model.config.get_text_config().tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    wanted = 1 if pattern == OTHERS["norms"] else 2
    for name, parameter in model.named_parameters():
        if is_in(name, pattern) and parameter.ndim == wanted:
            rounded, state = quantize_4bit(parameter.data, quant_type="nf4", compress_statistics=True)
            parameter.copy_(dequantize_4bit(rounded, state).view_as(parameter))
    return model


# ---------------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def losses(
    model: PreTrainedModel, whole: PreTrainedModel, batches: Sequence[dict], depths: Sequence[int]
) -> dict[int, dict[str, float]]:
    """By depth, over the tokens that count in the loss: loss in nats; divergence, the mean of KL(whole || model) at the
    same depth; agreement, the share whose likeliest token is the same.
    """
    return {depth: mean_scores([scores(model, whole, batch, depth) for batch in batches]) for depth in depths}


def scores(model: PreTrainedModel, whole: PreTrainedModel, batch: dict, depth: int) -> dict[str, torch.Tensor]:
    """Of each token that counts: (tokens,)."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    targets = inputs.pop("labels")[:, 1:]
    counts = targets != -100
    ours, theirs = (
        each(**inputs, num_steps=depth, use_cache=False).logits[:, :-1][counts].double().log_softmax(-1)
        for each in (model, whole)
    )
    return {
        "loss": -ours.gather(-1, targets[counts][:, None])[:, 0],
        "divergence": (theirs.exp() * (theirs - ours)).sum(-1),
        "agreement": (theirs.argmax(-1) == ours.argmax(-1)).double(),
    }


def mean_scores(of_batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Means over all tokens."""
    return {name: torch.cat([each[name] for each in of_batches]).mean().item() for name in of_batches[0]}


def report_losses(title: str, found: dict[str, dict[int, dict[str, float]]], depths: Sequence[int]) -> str:
    """Loss, and behind it the divergence from the checkpoint as it was trained, in thousandths of a nat."""
    header = [title, *(f"r = {depth}" for depth in depths)]
    rows = [
        [name, *(f"{each[depth]['loss']:.4f} ({1000 * each[depth]['divergence']:.2f})" for depth in depths)]
        for name, each in found.items()
    ]
    return timing.markdown_table(header, rows)


# -------------------------------------------------------------------------------------------------------------- memory


def weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of all weights, of those that are quantised with their scales and tables, and of these in 16 bits."""
    quantized = [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    return {
        "total": held(model),
        "quantized": sum(map(held, quantized)),
        "in_16_bits": sum(2 * module.in_features * module.out_features for module in quantized),
    }


def held(module: nn.Module) -> int:
    """Bytes of the tensors that a module saves; a tied one counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def memory_of_config(path: Path, device: torch.device, overrides: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """`weight_bytes` of a text model of that shape, with overrides, in 16, 8 and 4 bits."""
    config = load_run_config(path, overrides).model
    torch.manual_seed(0)
    model = MegaTransformerForCausalLM(config).to(torch.bfloat16)
    found = {"16 bits": weight_bytes(model)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for bits in ("8bit", "4bit"):
            options = bits_and_bytes(QuantizationConfig(load_in=bits), model, torch.bfloat16)
            found[f"{bits[0]} bits"] = weight_bytes(
                MegaTransformerForCausalLM.from_pretrained(
                    folder, quantization_config=options, dtype=torch.bfloat16, device_map={"": str(device)}
                )
            )
    return found


def report_memory(found: dict[str, dict[str, int]]) -> str:
    """In MB, and beside what is quantised in how many times the bytes of 16 bits."""
    header = ["weights", "quantised, MB", "against 16 bits", "all, MB", "against 16 bits"]
    whole = found["16 bits"]["total"]
    rows = []
    for name, each in found.items():
        ratio = f"{each['quantized'] / each['in_16_bits']:.3f}" if each["quantized"] else ""
        sizes = [f"{each['quantized'] / 1e6:.1f}", ratio, f"{each['total'] / 1e6:.1f}", f"{each['total'] / whole:.3f}"]
        rows.append([name, *sizes])
    return timing.markdown_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
