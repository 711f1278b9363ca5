"""Checkpoints from disk: found, checked, loaded; nothing missing, nothing ignored, nothing executed."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoProcessor,
    AutoTokenizer,
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
from model.quantization import QuantizationConfig, bits_and_bytes

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
PROCESSOR = "processor_config.json"
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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Load a model, ready for evaluation, and its tokenizer or, where it reads images or sound, its processor.

    Args:
        path: a checkpoint folder, or a run folder; of a run folder its newest complete weights (`find_checkpoint`).
        device: where the model goes.
        dtype: of the weights; None keeps that of the checkpoint.
        quantization: how to round the weights; those of a checkpoint with rounded weights stay as they are.

    Raises:
        FileNotFoundError: no such folder, or no complete model in it.
        ValueError: the folder holds another kind of model, its weights do not fit its config, or a file is damaged; the
            weights cannot be rounded, or are already.
    """
    folder = find_checkpoint(path)
    config = load_config(folder)
    is_quantized, options = getattr(config, "quantization_config", None) is not None, {}
    if quantization is not None and quantization.load_in is not None:
        check_quantization(folder, config, quantization)
        is_quantized = True
        options["quantization_config"] = bits_and_bytes(quantization, dtype or config.dtype or torch.float32)
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
    processor = load_processor(folder) if reads_media(config.model_type) else load_tokenizer(folder)
    num_tokens, vocab_size = len(tokenizer_of(processor)), config.get_text_config().vocab_size
    if num_tokens > vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {num_tokens} tokens, the model only {vocab_size}: "
            "they do not belong together; use the checkpoint's own tokenizer."
        )
    if is_quantized:
        keep_matrices_in_place(model)
    return model.to(device).eval(), processor


def check_quantization(folder: Path, config: PreTrainedConfig, quantization: QuantizationConfig) -> None:
    """Raise ValueError for weights that are rounded already, and for a head that cannot be."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The weights in {folder} are quantised already, and cannot be again (to {quantization.load_in}): leave that "
            "out, or use the checkpoint that they were made from."
        )
    if config.get_text_config().tie_word_embeddings and "heads" not in quantization.keep_in_high_precision:
        raise ValueError(
            "The head of this model is its embedding (tie_word_embeddings), which cannot be quantised: name heads among "
            "the parts to keep in high precision."
        )


def keep_matrices_in_place(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from rearranging matrices of 4 bits when they are first used in evaluation, on CPUs with
    bfloat16 instructions: it fails for widths that are no multiple of 64, rounds the scales once more, and what is
    trained afterwards would get no gradient through them.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def reads_media(model_type: str) -> bool:
    """Whether models of this type come with a processor."""
    return model_type == MegaTransformerConfig.model_type


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


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete weights of a folder: its own, or those of a checkpoint-N in it with more steps, as there are
    where a finished run went on. Warnings name what is incomplete, and weights of the folder that are not the newest.

    Raises:
        FileNotFoundError: the path does not exist, is no folder, or holds no complete model.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: give the folder of a run or of a checkpoint.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file: give the folder of a run or of a checkpoint.")
    named = ((CHECKPOINT_NAME.fullmatch(child.name), child) for child in folder.iterdir() if child.is_dir())
    checkpoints = sorted((int(match[1]), child) for match, child in named if match)
    own = [(trained_steps(folder), folder)] if has_weights(folder) else []
    for _, candidate in sorted([*own, *checkpoints], key=lambda pair: pair[0], reverse=True):
        reason = incompleteness(candidate)
        if reason is None:
            if own and candidate != folder:
                logger.warning("%s is loaded, not the weights in %s itself", candidate, folder)
            return candidate
        if checkpoints:  # else the error below says it
            logger.warning("%s is passed over: it %s", candidate, reason)
    also = f", nor do its {len(checkpoints)} checkpoints" if checkpoints else " and no checkpoint-N folder"
    raise FileNotFoundError(
        f"{folder} holds no complete model (it {incompleteness(folder)}){also}: give the folder of a run or of a "
        "checkpoint."
    )


def has_weights(folder: Path) -> bool:
    """Whether there are weights, complete or not."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def trained_steps(folder: Path) -> float:
    """Optimizer steps behind the weights of a folder; infinite, newer than all, where no trainer_state.json says so."""
    try:
        return read_json(folder / "trainer_state.json")["global_step"]
    except (OSError, ValueError, KeyError):
        return math.inf


def incompleteness(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, as the end of a sentence that begins with "it"; None if it is one."""
    for name in ("config.json", *TOKENIZER):
        if not (folder / name).is_file():
            return f"has no {name}"
    if not has_weights(folder):
        return f"has no {WEIGHTS}"
    try:
        for name in ("config.json", *TOKENIZER):
            read_json(folder / name)
        if reads_media(read_json(folder / "config.json").get("model_type")):
            if not (folder / PROCESSOR).is_file():
                return f"has no {PROCESSOR}"
            read_json(folder / PROCESSOR)
        files = weight_files(folder)
    except ValueError as error:
        return f"is damaged: {error}"
    for name in files:
        if not (folder / name).is_file():
            return f"lacks the weights file {name}"
        try:
            with safe_open(folder / name, framework="pt"):  # reads the header and compares it with the file's size
                pass
        except SafetensorError as error:
            return f"has a damaged {name} ({error})"
    return None


def weight_files(folder: Path) -> list[str]:
    """Names of the files with weights; ValueError for an index that names none."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()) or not files:
        raise ValueError(f"{folder / INDEX} has no weight_map from weights to files")
    return sorted(set(files.values()))


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError names the file if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content
