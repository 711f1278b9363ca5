"""The run that a checkpoint belongs to: its configuration, with what a command line says of the data."""

from collections.abc import Sequence
from pathlib import Path

from . import ResolvedConfig, load_run_config


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of this command, and those that `configs` reads: --config and --data.KEY, with their values."""
    own, overrides, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.partition("=")[0] != "--config" and not argument.startswith("--data."):
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest:
            overrides.append(rest.pop(0))
    return own, overrides


def read_run_config(checkpoint: Path, overrides: Sequence[str]) -> ResolvedConfig:
    """The configuration of the run that a checkpoint belongs to, with overrides.

    Raises:
        ValueError: there is none beside the checkpoint, or an override is wrong.
    """
    path = find_run_config(checkpoint)
    if path is not None:
        return load_run_config(path, overrides)
    if not any(override.partition("=")[0] == "--config" for override in overrides):
        raise ValueError(
            f"Neither {checkpoint} nor its parent folder has the config.yaml of a run: "
            "name the data with --config FILE."
        )
    return load_run_config(*first_config(overrides))


def find_run_config(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a checkpoint belongs to, if there is one: beside it, or a folder above."""
    paths = (folder / "config.yaml" for folder in (checkpoint, checkpoint.absolute().parent))
    return next(filter(Path.is_file, paths), None)


def first_config(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The path of the first --config, and the other overrides."""
    rest = list(overrides)
    index = next(i for i, override in enumerate(rest) if override.partition("=")[0] == "--config")
    _, has_value, path = rest.pop(index).partition("=")
    if not has_value:
        if index == len(rest):
            raise ValueError("--config: the value is missing")
        path = rest.pop(index)
    return path, rest
