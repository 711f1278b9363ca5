"""Checkpoints from disk: found, checked, loaded; nothing missing, nothing ignored, nothing executed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from model import (
    MegaTransformerConfig,
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerTextConfig,
)
from model.chat import check_template
from model.quantization import QuantizationConfig, bits_and_bytes

from .adapters import add_adapters, base_of
from .checkpoints import PROCESSOR, TOKENIZER, find_checkpoint, is_adapter, read_json, reads_media

CONFIGS = {config.model_type: config for config in (MegaTransformerTextConfig, MegaTransformerConfig)}
MODELS = {
    MegaTransformerTextConfig.model_type: MegaTransformerForCausalLM,
    MegaTransformerConfig.model_type: MegaTransformerForConditionalGeneration,
}


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantization: QuantizationConfig | None = None,
    base: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Load a model, ready for evaluation, and its tokenizer or, where it reads images or sound, its processor.

    Args:
        path: a checkpoint folder, or a run folder; of a run folder its newest complete weights (`find_checkpoint`). Of
            an adapter also the model that it was trained on is loaded.
        device: where the model goes.
        dtype: of the weights; None keeps that of the checkpoint.
        quantization: how to round the weights; those of a checkpoint with rounded weights stay as they are.
        base: of an adapter, the folder of its model; by default where that was in training.

    Raises:
        FileNotFoundError: no such folder, or no complete model in it.
        ValueError: the folder holds another kind of model, its weights do not fit its config, or a file is damaged; the
            weights cannot be rounded, or are already; its chat template does not end.
    """
    tuned = find_checkpoint(path)
    folder = base_of(tuned, base) if is_adapter(tuned) else tuned
    config = load_config(folder)
    is_quantized, options = getattr(config, "quantization_config", None) is not None, {}
    if quantization is not None and quantization.load_in is not None:
        options = quantization_options(folder, config, quantization, dtype)
        is_quantized = True
    if is_quantized:
        options["device_map"] = {"": str(device)}  # rounded where the model is to be; left out, transformers chooses
    try:
        model, report = MODELS[config.model_type].from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that mismatches are reported below, with their names
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} are damaged ({error}): use another checkpoint.") from error
    check_loading(folder, report)
    if tuned != folder:
        model = add_adapters(model, tuned, merge=not is_quantized)
    if all((tuned / name).is_file() for name in TOKENIZER):
        folder = tuned
    processor = load_processor(folder) if reads_media(config.model_type) else load_tokenizer(folder)
    num_tokens, vocab_size = len(tokenizer_of(processor)), config.get_text_config().vocab_size
    if num_tokens > vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {num_tokens} tokens, the model only {vocab_size}: "
            "they do not belong together; use the checkpoint's own tokenizer."
        )
    check_template(processor)
    if is_quantized:
        choose_kernel(model)
    return model.to(device).eval(), processor


def quantization_options(
    folder: Path, config: PreTrainedConfig, quantization: QuantizationConfig, dtype: torch.dtype | None
) -> dict[str, BitsAndBytesConfig]:
    """The argument of `from_pretrained`; ValueError for weights that are quantised already, or cannot be."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The weights in {folder} are quantised already and cannot be quantised again, to {quantization.load_in}: "
            "leave that out, or use the checkpoint that they were made from."
        )
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
    return {"quantization_config": bits_and_bytes(quantization, model, dtype or config.dtype or torch.float32)}


def choose_kernel(model: PreTrainedModel) -> None:
    """Leave bitsandbytes' fast kernel for 4 bits, on CPUs with bfloat16 instructions, to models of bfloat16, since it
    computes in nothing else, and to matrices whose height it takes.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import

    for module in model.modules():
        if isinstance(module, Linear4bit) and (module.compute_dtype != torch.bfloat16 or module.out_features % 32):
            module.support_avx512bf16_for_cpu = False


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor, or the tokenizer itself."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def check_loading(folder: Path, report: dict) -> None:
    """Raise ValueError for weights that are missing, left over, or of another shape; transformers only warns."""
    for problem, keys in (
        ("lacks", report["missing_keys"]),
        ("has unexpected", report["unexpected_keys"]),
        ("has of another shape", report["mismatched_keys"]),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"The checkpoint {folder} {problem} {len(names)} of the weights ({listed}): "
                "its weights and its config.json do not belong together; save it again or use another checkpoint."
            )


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration in config.json; ValueError names the file if it is not that of one of our models."""
    found = read_json(folder / "config.json").get("model_type")
    if found not in CONFIGS:
        raise ValueError(
            f"{folder} holds a model of type {found!r}, not {' or '.join(map(repr, CONFIGS))}: give a checkpoint that "
            "pretrain.py wrote."
        )
    try:
        return CONFIGS[found].from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, AttributeError) as error:  # what transformers itself keeps there is not checked
        raise ValueError(
            f"{folder / 'config.json'} is wrong ({error}): correct it, or use another checkpoint."
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; ValueError names its files if they are damaged."""
    try:
        # Left out, transformers asks at the terminal whether it may run the model's code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library of tokenizers raises nothing narrower
        files = " or ".join(TOKENIZER)
        raise ValueError(f"{files} in {folder} is damaged ({type(error).__name__}: {error}): use another.") from error


def load_processor(folder: Path) -> ProcessorMixin:
    """The processor of a checkpoint; ValueError names its files if they are damaged."""
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # neither do the libraries of its parts
        files = " or ".join((PROCESSOR, *TOKENIZER))
        raise ValueError(f"{files} in {folder} is damaged ({type(error).__name__}: {error}): use another.") from error
