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
        ValueError: There is one only; one is an adapter, of fewer bits, or of another model than the first; or integers
            differ.
    """
    if len(folders) < 2:
        raise ValueError(f"an average needs at least 2 checkpoints, and {folders[0]} is one; name more")
    checkpoints = [find_checkpoint(folder) for folder in folders]
    for checkpoint in checkpoints:
        if is_adapter(checkpoint):
            raise ValueError(f"{checkpoint} holds an adapter; merge each first, and average the models")
        check_same(checkpoints[0], checkpoint)
        if read_json(checkpoint / "config.json").get("quantization_config") is not None:
            raise ValueError(
                f"{checkpoint} has weights of 8 or 4 bits, which have no mean; average what they were made of"
            )
    model, processor = load_model(checkpoints[0])
    weights, places = model.state_dict(), [files_of_weights(checkpoint) for checkpoint in checkpoints]
    for checkpoint, files in zip(checkpoints, places, strict=True):
        if other := sorted(files.keys() ^ places[0].keys()):
            raise ValueError(f"{checkpoint} and {checkpoints[0]} have other weights, such as {other[0]}")
    with torch.no_grad():
        for name in places[0]:
            weights[name].copy_(mean_of(name, [files[name] for files in places]))
    return model, processor


def mean_of(name: str, places: Sequence[Path]) -> torch.Tensor:
    """The mean in float32 of a weight in several files; integers as they are, which have none.

    Raises:
        ValueError: Shapes differ, or integers do.
    """
    first = load_weight(places[0], name)
    total = torch.zeros_like(first, dtype=torch.float32)
    for place in places:
        weight = load_weight(place, name)
        if weight.shape != first.shape:
            raise ValueError(f"{name} is {list(weight.shape)} in {place} and {list(first.shape)} in {places[0]}")
        if not first.is_floating_point() and not torch.equal(weight, first):
            raise ValueError(f"{name} has other integers in {place} than in {places[0]}, which have no mean")
        total += weight
    return total / len(places) if first.is_floating_point() else first


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
