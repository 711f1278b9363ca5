"""A checkpoint as engines run it, vLLM for one: at one depth, with a place in their caches for each executed layer."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.configuration_megatransformer_text import MOST_STEPS
from model.depth import DepthOptions
from model.paged_attention import check_engine

from .checkpoints import check_files, find_checkpoint, is_adapter, read_json, weight_files
from .generation_config import GENERATION_CONFIG
from .refresh import MANIFEST, code_of, save_without_weights, skeleton

OF_TRAINING = (".bin", ".pt", ".pth")
"""Endings of what a trainer needs to go on: its arguments, optimizer and generators."""


def write_engine_folder(checkpoint: Path, output: Path, num_steps: int) -> MegaTransformerTextConfig:
    """Write a checkpoint for engines: its weights, hard links where the file system allows it and copies elsewhere, its
    tokenizer or processor, today's code, and a configuration that says how many layers are executed at that depth. It
    remains a checkpoint like any other, whose `generate` takes that depth, without exits and without warm starts of
    states, as engines do.

    Everything is made in a folder beside, and moved when it is complete: if something fails, nothing is written.

    Args:
        checkpoint: Folder of a checkpoint, or of a run (its newest complete weights).
        output: Folder for engines, empty or new.
        num_steps: Core steps of every token.

    Returns:
        The configuration of the text model.

    Raises:
        FileNotFoundError: there is no such folder, or no complete model in it.
        ValueError: the model has no core, or engines cannot run it; it is an adapter; the weights do not fit the
            configuration; the depth is too large; or the output folder holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and not empty; name another folder, or remove it")
    if not 1 <= num_steps <= MOST_STEPS:
        raise ValueError(f"--num-steps is {num_steps}, and a token takes at least 1 and at most {MOST_STEPS} steps")
    folder = find_checkpoint(checkpoint)
    if is_adapter(folder):
        raise ValueError(f"{folder} holds an adapter; merge it first with `python convert.py merge`")
    check_files(folder)
    model = skeleton(folder)
    if not isinstance(model, MegaTransformerForCausalLM):
        raise ValueError(f"{folder} holds a {type(model).__name__}, and engines write text: give a language model")
    config = model.config.get_text_config()
    if config.num_core_layers == 0:
        raise ValueError(
            f"{folder} holds a model without a core (num_core_layers is 0), which has no --num-steps: engines run the "
            "folder as it is"
        )
    check_engine(config)
    config.num_steps, config.num_executed_layers = num_steps, config.count_executed_layers(num_steps)
    config.recurrence.exit_criterion, config.recurrence.state_warm_start = "none", False
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".serve-") as name:
        made = Path(name) / "made"
        made.mkdir()
        save_without_weights(model, folder, made)
        carry_over(folder, made)
        fix_depth(made / GENERATION_CONFIG)
        made.replace(output)
    return config


def carry_over(folder: Path, made: Path) -> None:
    """The files of a checkpoint that are not written anew: weights, tokenizer, what `generate` does by default."""
    weights, left = weight_files(folder), {*code_of(folder), MANIFEST, "trainer_state.json"}
    for path in folder.iterdir():
        is_there = path.name in left or path.suffix in OF_TRAINING or (made / path.name).exists()
        if not path.is_file() or is_there:
            continue
        if path.name in weights:
            link_or_copy(path.resolve(), made / path.name)
        else:
            shutil.copy2(path, made)


def link_or_copy(path: Path, target: Path) -> None:
    """A hard link, or a copy on another file system, or on one without links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def fix_depth(path: Path) -> None:
    """Takes options of depth out of a generation config, if there is one: the configuration has them."""
    if path.is_file():
        content = {name: value for name, value in read_json(path).items() if name not in DepthOptions.names()}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
