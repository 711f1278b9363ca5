"""All modalities, and what depends on which there are."""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from .audio_modality import AudioModality
from .chat import NULL_TOKEN, ROLE_TOKENS, TARGET_PREFIX
from .configuration_codecs import MegaTransformerVocoderConfig
from .configuration_megatransformer import EncoderConfig, MediaConfig
from .image_modality import ImageModality
from .modality import MODALITIES, Modality, register

logger = logging.get_logger(__name__)

for _modality in (ImageModality, AudioModality):
    register(_modality)

TARGET_MODALITIES = (ImageModality.name, AudioModality.name)
"""What can be written, in the order of `modality_ids`."""


def modality_configs(config: MediaConfig) -> dict[str, EncoderConfig]:
    """The configurations of all encoders of a model, by modality; ValueError if one is not registered."""
    configs = {it.name: getattr(config, it.config_key) for it in MODALITIES.values() if it.config_key is not None}
    for name, part in (config.modality_configs or {}).items():
        if name not in MODALITIES:
            raise ValueError(
                f"modality_configs has {name!r}, which is not registered; import the file that adds it to MODALITIES "
                f"(known: {', '.join(MODALITIES)})"
            )
        configs[name] = MODALITIES[name].config_class(**part) if isinstance(part, dict) else part
    return {name: part for name, part in configs.items() if part is not None}


def further_modality(name: str, config: dict[str, Any]) -> Modality:
    """A modality whose media are read by its own class alone; ValueError if it is not registered."""
    if name not in MODALITIES:
        raise ValueError(f"modality {name!r} is not registered; import the file that adds it to MODALITIES")
    modality = MODALITIES[name]
    return modality(modality.config_class(**config))


def codec_media(config: PreTrainedConfig) -> ImageModality | AudioModality:
    """The media that a codec of this configuration takes; ValueError for other channels than images have."""
    is_vocoder = config.model_type == MegaTransformerVocoderConfig.model_type
    return (AudioModality if is_vocoder else ImageModality).of_codec(config)


def modality_names() -> tuple[str, ...]:
    """What tokens are counted as, in the order of `modality_ids`: by what their document contains."""
    further = [name for name in MODALITIES if name not in TARGET_MODALITIES]
    return ("text", *TARGET_MODALITIES, *(f"{TARGET_PREFIX}{name}" for name in TARGET_MODALITIES), *further)


# -------------------------------------------------------------------------------------------------------------- tokens


def tokens_of(modalities: Iterable[Modality | type[Modality]]) -> list[str]:
    """Special tokens of modalities."""
    return [token for modality in modalities for token in (modality.start_token, modality.token, modality.end_token)]


ROLES = tuple(ROLE_TOKENS[role] for role in ("user", "assistant", "system"))
"""What a vocabulary needs of those that begin messages."""
MEDIA_TOKENS = (*ROLES, *tokens_of((ImageModality, AudioModality)))
"""What a vocabulary has after pad, begin and end if the run has media, in this order if trained by us. That of tools
comes with fine-tuning (`prepare_tokenizer`).
"""
TARGET_TOKENS = (*(f"<|{TARGET_PREFIX}{name}|>" for name in TARGET_MODALITIES), NULL_TOKEN)
"""What it has after those if media are written."""


def media_tokens(config: MediaConfig) -> list[str]:
    """`MEDIA_TOKENS`, those of a model's further modalities, and `TARGET_TOKENS` if it writes media."""
    further = tokens_of(MODALITIES[name] for name in config.modality_configs or {})
    writes = config.image_writer_config is not None or config.audio_writer_config is not None
    return [*MEDIA_TOKENS, *further, *(TARGET_TOKENS if writes else ())]


def set_token_ids(config: MediaConfig, tokenizer: Any) -> None:
    """Fill in the ids of special tokens that a tokenizer has: those of media, and what guidance leaves in."""
    vocabulary = tokenizer.get_vocab()
    tokens = {f"{name}_token_id": modality.token for name, modality in MODALITIES.items()}
    for name in TARGET_MODALITIES:
        modality = MODALITIES[name]
        tokens[f"{TARGET_PREFIX}{name}_token_id"] = f"<|{TARGET_PREFIX}{name}|>"
        tokens |= {f"{name}_start_token_id": modality.start_token, f"{name}_end_token_id": modality.end_token}
    tokens["null_token_id"] = NULL_TOKEN
    for name, token in tokens.items():
        if token in vocabulary:
            setattr(config, name, vocabulary[token])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    writer = config.image_writer_config
    if writer is not None and writer.head == "fsq":
        config.image_code_offset = max(vocabulary.values()) + 1
    config.structure_token_ids = sorted(special - {config.null_token_id})


# -------------------------------------------------------------------------------------------------------------- saving


def save_modalities(names: Iterable[str], folder: str | Path) -> None:
    """Puts the files of further modalities, by name, beside the code in the folder of a checkpoint, and lets it import
    them, so that it is loaded elsewhere like every other. What a file imports as `model.x` it imports there as `.x`.
    """
    listing = Path(folder, Path(__file__).name)
    for name in names:
        modality = MODALITIES[name]
        file = Path(inspect.getfile(modality))
        line, known = f"from .{file.stem} import {modality.__name__}", listing.read_text(encoding="utf-8")
        if line in known:
            continue
        code = re.sub(r"(?m)^(\s*)from model\.(\w+) import", r"\1from .\2 import", file.read_text(encoding="utf-8"))
        if re.search(r"(?m)^\s*(from|import) model\b", code) or Path(__file__).with_name(file.name).exists():
            logger.warning_once(
                f"{folder} lacks the code of modality {name!r}, since {file} has the name of a file of the model, or "
                "imports `model` itself; give it another name, and import from files, such as `model.modality`"
            )
            continue
        Path(folder, file.name).write_text(code, encoding="utf-8")
        listing.write_text(f"{known}\n{line}\n", encoding="utf-8")
