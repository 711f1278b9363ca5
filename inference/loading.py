"""Checkpoints from disk: found, checked, loaded; nothing missing, nothing ignored, nothing executed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[MegaTransformerForCausalLM, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer, ready for evaluation.

    Args:
        path: a checkpoint folder, or a run folder; of a run folder without weights the newest complete checkpoint.
        device: where the model goes.
        dtype: of the weights; None keeps that of the checkpoint.

    Raises:
        FileNotFoundError: no such folder, or no complete model in it.
        ValueError: the folder holds another kind of model, or its weights do not fit its config.
    """
    folder = find_checkpoint(path)
    check_model_type(folder)
    try:
        model, report = MegaTransformerForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that mismatches are reported below, with their names
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} are damaged ({error}): use another checkpoint.") from error
    check_loading(folder, report)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, the model only {model.config.vocab_size}: "
            "they do not belong together; use the checkpoint's own tokenizer."
        )
    return model.to(device).eval(), tokenizer


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


def check_model_type(folder: Path) -> None:
    """Raise ValueError unless config.json is that of our language model."""
    expected = MegaTransformerTextConfig.model_type
    found = read_json(folder / "config.json").get("model_type")
    if found != expected:
        raise ValueError(
            f"{folder} holds a model of type {found!r}, not {expected!r}: give a checkpoint that pretrain.py wrote."
        )


def find_checkpoint(path: str | Path) -> Path:
    """The folder that holds the weights: the path itself, or the newest complete checkpoint-N in it.

    Incomplete checkpoints are passed over with a warning that says why.

    Raises:
        FileNotFoundError: the path does not exist, is no folder, or holds no complete model.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: give the folder of a run or of a checkpoint.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file: give the folder of a run or of a checkpoint.")
    problem = incompleteness(folder)
    if problem is None:
        return folder
    named = ((CHECKPOINT_NAME.fullmatch(child.name), child) for child in folder.iterdir() if child.is_dir())
    checkpoints = sorted((int(match[1]), child) for match, child in named if match)
    for _, checkpoint in reversed(checkpoints):
        reason = incompleteness(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is passed over: it %s", checkpoint, reason)
    also = f", nor do its {len(checkpoints)} checkpoints" if checkpoints else " and no checkpoint-N folder"
    raise FileNotFoundError(
        f"{folder} holds no complete model (it {problem}){also}: give the folder of a run or of a checkpoint."
    )


def incompleteness(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, as the end of a sentence that begins with "it"; None if it is one."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            return f"has no {name}"
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    else:
        return f"has no {WEIGHTS}"
    for name in files:
        if not (folder / name).is_file():
            return f"lacks the weights file {name}"
        try:
            with safe_open(folder / name, framework="pt"):  # reads the header and compares it with the file's size
                pass
        except SafetensorError as error:
            return f"has a damaged {name} ({error})"
    return None


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError names the file if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): use another checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object: use another checkpoint.")
    return content
