"""The mean of the weights of several checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .checkpoints import find_checkpoint, is_adapter, read_json, weight_files
from .loading import load_model

# What may differ between the configurations of checkpoints whose weights belong together.
FREE = ("transformers_version", "dtype")


def average(folders: Sequence[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """A model whose weights are the mean of those of several checkpoints, computed in float32, and the processor of
    the first.

    Args:
        folders: Two or more checkpoints of one model, or runs with checkpoints.

    Raises:
        ValueError: There is one only; one is an adapter, or of another model than the first.
    """
    if len(folders) < 2:
        raise ValueError(f"an average needs at least 2 checkpoints, and {folders[0]} is one; name more")
    checkpoints = [find_checkpoint(folder) for folder in folders]
    for checkpoint in checkpoints:
        if is_adapter(checkpoint):
            raise ValueError(f"{checkpoint} holds an adapter; merge each first, and average the models")
        check_same(checkpoints[0], checkpoint)
    model, processor = load_model(checkpoints[0])
    weights, places = model.state_dict(), [files_of_weights(checkpoint) for checkpoint in checkpoints]
    for checkpoint, files in zip(checkpoints, places, strict=True):
        if other := sorted(files.keys() ^ places[0].keys()):
            raise ValueError(f"{checkpoint} and {checkpoints[0]} have other weights, such as {other[0]}")
    with torch.no_grad():
        for name in places[0]:
            mean = sum(load_weight(files[name], name).float() for files in places) / len(places)
            weights[name].copy_(mean)
    return model, processor


def check_same(first: Path, other: Path) -> None:
    """Raises ValueError for checkpoints of two models."""
    ours, theirs = (read_json(folder / "config.json") for folder in (first, other))
    for name in sorted({*ours, *theirs} - set(FREE)):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{other} is of another model than {first}: {name} is {theirs.get(name)!r:.80} and "
                f"{ours.get(name)!r:.80}; average checkpoints of one run"
            )


def files_of_weights(checkpoint: Path) -> dict[str, Path]:
    """The file of each weight, by its name."""
    found = {}
    for name in weight_files(checkpoint):
        with safe_open(checkpoint / name, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), checkpoint / name)
    return found


def load_weight(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
