"""Checkpoints from disk: found, checked, loaded; nothing missing, nothing ignored, nothing executed."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from model import (
    CODEC_CONFIGS,
    MODELS,
    MegaTransformerConfig,
    MegaTransformerMultimodalSeq2SeqConfig,
    MegaTransformerProcessor,
    MegaTransformerSeq2SeqConfig,
    MegaTransformerTextConfig,
    tokenizer_of,
)
from model.chat import TARGET_PREFIX, check_template
from model.feature_extraction_megatransformer import MegaTransformerFeatureExtractor
from model.image_processing_megatransformer import MegaTransformerImageProcessor
from model.quantization import QuantizationConfig, bits_and_bytes, keep_scales
from model.weight_files import build_skeleton, check_finite, check_fit, declared_weights, refuse_weights

from .adapters import base_of, load_adapters
from .checkpoints import (
    PROCESSOR,
    TOKENIZER,
    blamed_on,
    check_files,
    find_checkpoint,
    is_adapter,
    read_json,
    reads_media,
    weight_files,
)
from .devices import DTYPES, choose_device, choose_threads
from .generation_config import check_generation_config

LANGUAGE_MODELS = (
    MegaTransformerTextConfig,
    MegaTransformerConfig,
    MegaTransformerSeq2SeqConfig,
    MegaTransformerMultimodalSeq2SeqConfig,
)
# Settings of our processors, and the names that they have in the configurations of encoders.
IMAGE_SETTINGS = {name: name for name in ("patch_size", "pixel_shuffle")}
AUDIO_SETTINGS = {name: name for name in ("sampling_rate", "n_fft", "hop_length", "subsampling")}
AUDIO_SETTINGS["feature_size"] = "num_mel_bins"
LOCAL_NAME = re.compile(r"[\w|]+")
"""Of an implementation of attention or experts; others name code that transformers would fetch from the hub."""


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the weights go, and as what."""
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run (its newest complete checkpoint)")
    parser.add_argument("--device", help="device such as cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="format of the weights; default: the checkpoint's")
    parser.add_argument(
        "--load-in", choices=["8bit", "4bit"], help="bits of the weights in layers; default: the checkpoint's"
    )


def load_as_asked(
    path: str | Path, args: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """What `load_model` loads from a path for the arguments of `add_loading_arguments`, with torch's threads for it."""
    dtype, quantization = args.dtype and getattr(torch, args.dtype), QuantizationConfig(load_in=args.load_in)
    model, processor = load_model(path, choose_device(args.device), dtype, quantization)
    choose_threads(model)
    return model, processor


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
        dtype: Format of the weights; None keeps that of the checkpoint.
        quantization: how to round the weights; those of a checkpoint with rounded weights stay as they are.
        base: Folder of the model of an adapter; by default where that was in training.

    Raises:
        FileNotFoundError: no such folder, or no complete model in it.
        ValueError: the folder holds another kind of model, its weights do not fit its config, or a file is damaged; the
            weights cannot be rounded, or are already; its chat template does not end.
    """
    tuned = find_checkpoint(path)
    folder = base_of(tuned, base) if is_adapter(tuned) else tuned
    for each in {folder, tuned}:
        check_files(each)
    config = load_model_config(folder)
    skeleton = build_checked(folder, config)
    check_generation_config(folder, config.get_text_config().vocab_size)
    is_quantized, options = getattr(config, "quantization_config", None) is not None, {}
    if quantization is not None and quantization.load_in is not None:
        if is_quantized:
            raise ValueError(
                f"The weights in {folder} are quantised already and cannot be quantised again, to "
                f"{quantization.load_in}: leave that out, or use the checkpoint that they were made from."
            )
        rounding = bits_and_bytes(quantization, skeleton, dtype or config.dtype or torch.float32)
        is_quantized, options = True, {"quantization_config": rounding}
    if is_quantized:
        options["device_map"] = {"": str(device)}  # rounded where the model is to be; left out, transformers chooses
    options["dtype"] = "auto" if dtype is None else dtype
    model = load_and_check(folder, config, f"The weights in {folder} are damaged", **options)
    if tuned != folder:
        model = load_adapters(model, tuned, merge=not is_quantized)
        check_finite(tuned, model)
    if all((tuned / name).is_file() for name in TOKENIZER):
        folder = tuned
    processor = load_processor(folder, reads_media(config.model_type))
    check_processor(folder, processor, config)
    check_template(processor)
    if is_quantized:
        choose_kernel(model)
    return model.to(device).eval(), processor


def load_codec(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load an autoencoder of images or a vocoder, ready for evaluation.

    Args:
        folder: the checkpoint itself (`find_checkpoint`).
        device: where the model goes.

    Raises:
        ValueError: it is no codec, its weights do not fit its configuration, or a file is damaged.
    """
    check_files(folder)
    config = load_model_config(folder, CODEC_CONFIGS)
    build_checked(folder, config)
    return load_and_check(folder, config, f"The codec in {folder} is damaged").to(device).eval()


def load_and_check(folder: Path, config: PreTrainedConfig, damage: str, **options: Any) -> PreTrainedModel:
    """The model of a configuration with the weights of a folder, nothing missing, left over, or of another shape.

    Args:
        damage: What an error begins with.
        options: Arguments of `from_pretrained`.
    """
    options |= {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    with blamed_on(damage, "use another checkpoint."):
        model, report = MODELS[type(config)].from_pretrained(
            folder,
            config=config,
            ignore_mismatched_sizes=True,  # so that mismatches are reported below, with their names
            output_loading_info=True,
            **options,
        )
    for problem, keys in (
        ("lacks", report["missing_keys"]),
        ("has unexpected", report["unexpected_keys"]),
        ("has of another shape", report["mismatched_keys"]),
    ):
        refuse_weights(folder, problem, (key if isinstance(key, str) else key[0] for key in keys))
    check_finite(folder, model)
    return model


def build_checked(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, without weights, which are compared with those in the files of a folder. Nothing of
    their size is allocated. ValueError if they do not belong together.
    """
    declared = declared_weights(folder / name for name in weight_files(folder))
    with blamed_on(f"{folder / 'config.json'} is wrong", "correct it, or use another checkpoint."):
        skeleton = build_skeleton(MODELS[type(config)], config, declared)
    check_fit(folder, skeleton, declared)
    return skeleton


def check_processor(
    folder: Path, processor: PreTrainedTokenizerBase | ProcessorMixin, config: PreTrainedConfig
) -> None:
    """Raises ValueError for a tokenizer or processor that makes what the model has no place for."""
    tokenizer, vocab_size = tokenizer_of(processor), config.get_text_config().vocab_size
    names, length = tokenizer.model_input_names, tokenizer.model_max_length
    if not isinstance(names, list) or "input_ids" not in names:
        raise ValueError(f"{folder / TOKENIZER[0]} is wrong: model_input_names is {repr(names)[:60]}; take it out")
    if not isinstance(length, (int, float)) or not length > 0:
        raise ValueError(f"{folder / TOKENIZER[0]} is wrong: model_max_length is {repr(length)[:60]}; take it out")
    num_tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if num_tokens > vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {num_tokens} tokens, the model only {vocab_size}: "
            "they do not belong together; use the checkpoint's own tokenizer."
        )
    if not isinstance(processor, ProcessorMixin):
        return
    for name, here, there in shared_settings(processor, config):
        if here != there:
            raise ValueError(
                f"The processor in {folder} has {name} {repr(here)[:60]}, the model {there}: they do not belong "
                "together; use the checkpoint's own processor."
            )


def shared_settings(processor: ProcessorMixin, config: PreTrainedConfig) -> list[tuple[str, Any, Any]]:
    """What processor and model have to agree on: the name of a setting, its value there and here."""
    ids = [f"{name}_token_id" for name in processor.modalities]
    shared = [(name, getattr(processor, name), getattr(config, name, None)) for name in ids]
    vocabulary = processor.tokenizer.get_vocab()
    for name, kind in processor.modalities.items():
        if name.startswith(TARGET_PREFIX):
            for end, token in (("start", kind.start_token), ("end", kind.end_token)):
                key = f"{name.removeprefix(TARGET_PREFIX)}_{end}_token_id"
                shared.append((key, vocabulary.get(token), getattr(config, key, None)))
    pairs = (
        (processor.image_processor, MegaTransformerImageProcessor, config.vision_config, IMAGE_SETTINGS),
        (processor.feature_extractor, MegaTransformerFeatureExtractor, config.audio_config, AUDIO_SETTINGS),
    )
    for part, own_class, encoder, names in pairs:
        if isinstance(part, own_class):
            shared += [(name, getattr(part, name), getattr(encoder, there)) for name, there in names.items()]
    return shared


def choose_kernel(model: PreTrainedModel) -> None:
    """Leave bitsandbytes' fast kernel for 4 bits, on CPUs with bfloat16 instructions, to models of bfloat16, since it
    computes in nothing else, and to matrices whose height it takes. See to it that what is saved is what was loaded.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import

    for module in model.modules():
        if isinstance(module, Linear4bit):
            if module.compute_dtype != torch.bfloat16 or module.out_features % 32:
                module.support_avx512bf16_for_cpu = False
            keep_scales(module)


def load_model_config(folder: Path, kinds: Sequence[type[PreTrainedConfig]] = LANGUAGE_MODELS) -> PreTrainedConfig:
    """The configuration in config.json; ValueError names the file if it is of none of these kinds."""
    content = read_json(folder / "config.json")
    found, configs = content.get("model_type"), {kind.model_type: kind for kind in kinds}
    if not isinstance(found, str) or found not in configs:
        raise ValueError(
            f"{folder} holds a model of type {repr(found)[:60]}, not {' or '.join(map(repr, configs))}: give a "
            "checkpoint that pretrain.py wrote."
        )
    with blamed_on(f"{folder / 'config.json'} is wrong", "correct it, or use another checkpoint."):
        refuse_foreign_code(content)
        return configs[found].from_pretrained(folder, local_files_only=True)


def refuse_foreign_code(content: Any) -> None:
    """Raise ValueError if a config.json asks, anywhere in it, for weights in a format or for kernels from elsewhere."""
    parts = content if isinstance(content, list) else content.values() if isinstance(content, dict) else ()
    for part in parts:
        refuse_foreign_code(part)
    for name, value in content.items() if isinstance(content, dict) else ():
        if name.endswith("_implementation") and value is not None and not LOCAL_NAME.fullmatch(str(value)):
            raise ValueError(f"{name} is {repr(value)[:60]}, which is no implementation in this installation")
        if name == "quantization_config" and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            if method != "bitsandbytes":
                raise ValueError(f"quantization_config has quant_method {repr(method)[:60]}, not 'bitsandbytes'")


def load_processor(folder: Path, has_media: bool) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The processor of a checkpoint, or its tokenizer where the model reads text alone; ValueError names its files if
    they are damaged, or make another processor.
    """
    files, loader = ((PROCESSOR, *TOKENIZER), AutoProcessor) if has_media else (TOKENIZER, AutoTokenizer)
    with blamed_on(f"{' or '.join(files)} in {folder} is damaged", "use another."):
        # Left out, transformers asks at the terminal whether it may run the model's code.
        processor = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if has_media and not isinstance(processor, MegaTransformerProcessor):
            raise ValueError(f"it is a {type(processor).__name__}, and not a {MegaTransformerProcessor.__name__}")
        return processor
