"""Adapters: whose they are, and how they get onto a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from model.step_lora import CONFIG as STEP_LORA
from model.step_lora import load_step_lora

from .checkpoints import adapters_in, find_checkpoint, is_adapter, read_json, weight_files

BASE_MODEL = "base_model.json"


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was trained on."""

    path: str
    """Folder of its weights."""
    fingerprint: str
    """Of its weights; see `fingerprint_of`."""

    def save(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write it beside an adapter; `state_dict` is not looked at."""
        (Path(folder) / BASE_MODEL).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """See to it that the adapter in a folder was trained on this model.

        Raises:
            ValueError: it was not.
        """
        there = read_json(Path(folder) / BASE_MODEL)
        if there.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{folder} is an adapter of another base: of the weights that were in {there.get('path')}, not of "
                f"those in {self.path}; give the base that it was trained on"
            )


def base_model(folder: Path) -> BaseModel:
    """The model in a folder, as the base of adapters.

    Raises:
        ValueError: the folder holds an adapter itself.
    """
    if is_adapter(folder):
        raise ValueError(
            f"{folder} holds an adapter, and not the model below it: merge them first with `python convert.py merge "
            f"{folder} --output FOLDER`, and use what that writes."
        )
    return BaseModel(str(folder.absolute()), fingerprint_of(folder))


def fingerprint_of(folder: Path) -> str:
    """A digest of names, shapes and types of all weights of a model, and of the first row of each."""
    digest = blake2b(digest_size=16)
    for path in weight_files(folder):
        with safe_open(folder / path, framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                digest.update(repr((name, part.get_shape(), part.get_dtype())).encode())
                row = part[:1] if part.get_shape() else file.get_tensor(name).reshape(1)
                digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_of(adapter: Path, base: str | Path | None = None) -> Path:
    """The folder of the model that an adapter belongs to.

    Args:
        base: where it is now; by default where it was in training.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another model is there.
    """
    is_ours = (adapter / BASE_MODEL).is_file()
    if base is None:
        recorded = read_json(adapter / BASE_MODEL if is_ours else adapter / "adapter_config.json")
        base = recorded.get("path" if is_ours else "base_model_name_or_path")
    try:
        folder = find_checkpoint(str(base))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter} is an adapter, and its base cannot be loaded: {error} Where it has moved, merge them with "
            f"`python convert.py merge {adapter} --base FOLDER --output FOLDER`."
        ) from error
    if is_ours:
        base_model(folder).load(adapter)
    return folder


def add_adapters(model: PreTrainedModel, folder: Path, merge: bool = True) -> PreTrainedModel:
    """The model with the adapters of a folder.

    Args:
        merge: whether LoRA is added to the weights, which rounded ones cannot bear, or stays beside them.

    Raises:
        ValueError: they are for layers that the model does not have.
    """
    adapters = adapters_in(folder)
    if STEP_LORA in adapters:
        load_step_lora(model, folder)
    if "adapter_config.json" not in adapters:
        return model
    lora = load_lora(model, folder)
    return lora.merge_and_unload(safe_merge=True) if merge else lora.get_base_model()


def load_lora(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """PEFT's model with the adapter of a folder.

    Raises:
        ValueError: it is for layers that the model does not have, or lacks weights, of which PEFT would only warn.
    """
    from peft import PeftModel, get_peft_model_state_dict  # takes a second, for those who need it

    reason = None
    try:
        lora = PeftModel.from_pretrained(model, folder, torch_device=str(model.device))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
    else:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            different = get_peft_model_state_dict(lora).keys() ^ set(file.keys())
        reason = f"{sorted(different)[0]} is on one side only" if different else None
    if reason is not None:
        raise ValueError(
            f"{folder} is an adapter of another base, or damaged; it does not fit {model.name_or_path}: {reason}"
        )
    return lora
