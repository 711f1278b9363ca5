"""Options that are mappings or lists of keywords: whoever takes them leaves a misspelt one unread, or fails late."""

import difflib
import inspect
import json
from collections.abc import Collection, KeysView, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

# What transformers takes from the arguments of activation checkpointing; the rest goes to torch.
OF_TRANSFORMERS = {"every_n_layers", "offload"}
SWITCHES = ("use_reentrant", "preserve_rng_state", "early_stop", "debug", "offload")
SCHEDULES_WITHOUT_ARGUMENTS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
# Optimizers whose `optim_args` are arguments of a class of torch.
OF_TORCH = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")
# Optimizers that compute with the parts of weights that FSDP leaves on each rank.
OF_FSDP = ("adamw_torch", "adamw_torch_fused", *OF_TORCH)
# What FSDP offers and a run cannot have: the value there has to be, and why.
FIXED_OF_FSDP = {
    "version": (2, "the first version is at the end of its life"),
    "state_dict_type": (
        "SHARDED_STATE_DICT",
        "whole states could not be gathered on one rank; weights are saved whole",
    ),
    "activation_checkpointing": (False, "it would wrap layers, whose weights had other names; set training's own"),
    "xla": (False, "the model knows no TPU"),
}


class Recorder(dict):
    """A mapping that remembers which keys it was asked for, and the defaults that were given with them.

    Libraries that look for each key that they know, and have no list of them, leave a misspelt one unread.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__({name: Recorder(it) if isinstance(it, dict) else it for name, it in content.items()})
        self.given = tuple(content)
        self.asked: dict[str, Any] = {}
        self.history: list[str] = []

    def note(self, name: str, default: Any = None) -> None:
        """Remember that somebody looks for a key."""
        self.asked.setdefault(name, default)
        self.history.append(name)

    @property
    def last_asked(self) -> str | None:
        """The key that was looked for last, of those that are there."""
        return next((name for name in reversed(self.history) if dict.__contains__(self, name)), None)

    def get(self, name: str, default: Any = None) -> Any:
        self.note(name, default)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.note(name)
        return super().__getitem__(name)

    def __contains__(self, name: str) -> bool:
        self.note(name)
        return super().__contains__(name)

    def keys(self) -> KeysView[str]:
        return KeysView(self)  # which looks keys up by the methods above


def check_keywords(args: TrainingArguments) -> None:
    """Look at the keywords of training arguments.

    Raises:
        ValueError: Nobody takes a keyword; the message has the closest one that is taken.
    """
    known = {*inspect.signature(checkpoint).parameters, *OF_TRANSFORMERS, *SWITCHES} - {"function", "args", "kwargs"}
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        value = read(name, getattr(args, name))
        for key, given in value.items():
            check_known(f"{name}.{key}", key, known)
            if key in SWITCHES and not isinstance(given, bool):
                raise ValueError(f"{name}.{key}: {given!r} is neither true nor false")
    if args.lr_scheduler_type in SCHEDULES_WITHOUT_ARGUMENTS and read("lr_scheduler_kwargs", args.lr_scheduler_kwargs):
        raise ValueError(f"lr_scheduler_kwargs: the schedule {args.lr_scheduler_type!s} takes none; leave them out")
    if not args.optim_args:
        return
    pairs = [item.partition("=") for item in args.optim_args.replace(" ", "").split(",")]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"optim_args: {key + equals + value!r} is no name=value, as in momentum=0.9,nesterov=true")
    if args.optim in WITHOUT_ARGUMENTS:
        raise ValueError(f"optim_args: {args.optim!s} takes none; leave them out, or give options such as adam_beta1")
    if cls := OF_TORCH.get(str(args.optim)):
        for key, _, _ in pairs:
            check_known(f"optim_args.{key}", key, set(inspect.signature(cls).parameters) - {"params"})


def recorded_fsdp(value: Any, is_used: bool) -> dict[str, Any] | None:
    """The options of FSDP, given as such or in a file, so that those which transformers reads are known afterwards.

    Raises:
        ValueError: The file is none, FSDP is off, or an option is one that a run cannot have.
    """
    content = read("fsdp_config", value)
    if not (content or is_used):
        return None
    if not is_used:
        raise ValueError(
            "fsdp_config is given, but fsdp is off, so that nothing would read it; set fsdp, or leave it out"
        )
    options = {name.removeprefix("fsdp_"): option for name, option in content.items()}
    for name, (value, reason) in FIXED_OF_FSDP.items():
        if options.get(name, value) != value:
            raise ValueError(f"fsdp_config.{name} is {options[name]!r}, but {reason}; leave it out")
    return Recorder({"state_dict_type": FIXED_OF_FSDP["state_dict_type"][0]} | options)


def check_fsdp(value: Any) -> Any:
    """The options of FSDP as a plain mapping, once transformers has read them.

    Raises:
        ValueError: There is an option that it has not looked for.
    """
    if not isinstance(value, Recorder):
        return value
    for name in value.given:
        check_known(f"fsdp_config.{name}", name, value.asked)
    return dict(value)


def read(name: str, value: Any) -> dict[str, Any]:
    """An option that is a mapping, JSON of one, or the path of a file with one.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        return {}
    try:
        if isinstance(value, str):
            text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8-sig")
            value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: {value!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} is no mapping")
    return value


def check_known(key: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        listed = ", ".join(sorted(known))
        raise ValueError(f"{key} is unknown; " + (f"did you mean {near[0]}? " if near else "") + f"known: {listed}")
