"""Where a run goes on, whether it can, and with which options of the optimizer and the schedule."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import (
    DEEPSPEED_FOLDERS,
    checkpoints_in,
    corrupt,
    has_manifest,
    is_unfinished,
    manifest_fault,
    not_finite,
    unreadable,
)
from .early_stopping import has_stopped

logger = logging.getLogger(__name__)

WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "step_lora.safetensors")
Options = dict[str, Any]
# Options that most optimizers have, by the names of torch.
COMPARED = ("lr", "betas", "eps", "weight_decay")
# The name of a group for which weight decay is off, in DeepSpeed's own optimizer.
UNDECAYED = "no_decay"


def find_resume_point(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `training.resume_from_checkpoint` names: a path, or "true" for the newest whole one of
    the output folder. None to start afresh, also where that folder has none yet, as after a kill before the first.

    Raises:
        ValueError: if there is no such checkpoint, if it is damaged, or if `max_steps` leaves it nothing to train; the
            newest may have all of its steps, after which the end of the run may still be missing.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    is_newest = str(wanted).lower() == "true"
    checkpoint = newest_checkpoint(Path(args.output_dir)) if is_newest else Path(wanted)
    if checkpoint is None:
        return None
    if not checkpoint.is_dir():
        raise ValueError(f"training.resume_from_checkpoint: {wanted} is no folder; give a checkpoint folder, or true")
    if not is_newest and (reason := damage(checkpoint)) is not None:
        raise ValueError(f"training.resume_from_checkpoint: {checkpoint} {reason}; give a checkpoint-N folder of a run")
    state = read_state(checkpoint)
    if (has_all_steps(state, args) and not is_newest) or 0 < args.max_steps < state["global_step"]:
        raise ValueError(f"training.resume_from_checkpoint: {nothing_left(checkpoint, state['global_step'], args)}")
    return str(checkpoint)


def read_state(folder: str | Path) -> dict[str, Any]:
    """The state of the trainer in a whole checkpoint."""
    return json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def has_all_steps(state: dict[str, Any], args: TrainingArguments) -> bool:
    """Whether a state is of the last step of a run, or of one behind it."""
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return (state.get("epoch") or 0) >= args.num_train_epochs


def nothing_left(checkpoint: str | Path, step: int, args: TrainingArguments) -> str:
    """A sentence for a checkpoint from which there is nothing to train."""
    length = ("max_steps", args.max_steps) if args.max_steps > 0 else ("num_train_epochs", args.num_train_epochs)
    return (
        f"{checkpoint} is of step {step}, and training.{length[0]} is {length[1]:g}: nothing is left to train; raise "
        f"{length[0]}, or take the checkpoint as it is"
    )


def holds_checkpoints(folder: Path) -> str | None:
    """The name of a checkpoint in the folder of a run that is whole or was; None where a kill left parts of one only,
    or nothing.
    """
    found = (path for path in checkpoints_in(folder) if (path / TRAINER_STATE_NAME).is_file())
    return next((path.name for path in found if not is_unfinished(path)), None)


def is_finished(folder: Path, args: TrainingArguments) -> bool:
    """Whether a run has come to its end in a folder: the state of the last step is written after all else."""
    try:
        state = read_state(folder)
        is_complete = has_all_steps(state, args) or has_stopped(state, args.early_stopping_patience)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or no whole one
        return False
    return is_complete and any(any(folder.glob(pattern)) for pattern in WEIGHTS)


def save_state_of(state: TrainerState, folder: str | Path) -> None:
    """Write the state of a run into its folder; nobody ever reads half of it."""
    beside = Path(folder, f".{TRAINER_STATE_NAME}")
    state.save_to_json(str(beside))
    beside.replace(Path(folder, TRAINER_STATE_NAME))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if there is none yet. Warnings name those that are passed over."""
    for checkpoint in reversed(checkpoints_in(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is passed over: it %s", checkpoint, reason)
    return None


def damage(folder: Path) -> str | None:
    """Why training cannot go on from a folder, as the end of a sentence that begins with it; None if it can.

    All files are compared with the manifest of the checkpoint. One that was saved by older code has none: there, the
    files that such a checkpoint has are looked for, and their own checksums compared, where they have any.
    """
    try:
        return (
            manifest_fault(folder)
            or faulty_state(folder)
            or missing_part(folder)
            or unreadable(folder)
            or (None if has_manifest(folder) else faulty_without_manifest(folder))
        )
    except OSError as error:
        return f"cannot be read ({error})"


def faulty_state(folder: Path) -> str | None:
    """The same as `damage`, of the trainer's state alone."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except OSError:
        return f"has no {TRAINER_STATE_NAME}, the last file of a checkpoint"
    except ValueError as error:
        return f"has a damaged {TRAINER_STATE_NAME} ({error})"
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        return f"has a damaged {TRAINER_STATE_NAME} (no global_step in it)"
    try:
        loaded = TrainerState(**state)
    except (TypeError, AttributeError, ValueError) as error:  # names and values that it does not know
        return f"has a damaged {TRAINER_STATE_NAME} ({' '.join(str(error).split())[:100]})"
    kinds = {"epoch": int | float | None, "log_history": list, "stateful_callbacks": dict}
    wrong = next((name for name, kind in kinds.items() if not isinstance(getattr(loaded, name), kind)), None)
    return None if wrong is None else f"has a damaged {TRAINER_STATE_NAME} ({wrong} is of another type)"


def missing_part(folder: Path) -> str | None:
    """The same as `damage`, of the weights and of the state of the optimizer, by the names of files."""
    if any(path.is_dir() for path in folder.glob(DEEPSPEED_FOLDERS)):  # where DeepSpeed keeps all of it
        path = folder / "latest"  # which tells DeepSpeed the folder to read
        try:
            name = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            return f"has no {path.name} that can be read ({error}), from which DeepSpeed goes on"
        if not (re.fullmatch(r"global_step\d+", name) and (folder / name).is_dir()):
            return f"has a damaged {path.name} (there is no {name[:40]!r} in the folder)"
        return None if any((folder / name).glob("*_states.pt")) else f"has no states in {name}"
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return f"has no weights ({WEIGHTS[0]})"
    if not any(folder.glob("optimizer*")):
        return "has no state of an optimizer (optimizer*)"
    return None


def faulty_without_manifest(folder: Path) -> str | None:
    """The same as `damage`, of a checkpoint that has no manifest: what else belongs to it, and what is in it."""
    is_deepspeeds = any(folder.glob(DEEPSPEED_FOLDERS))
    for pattern in ("rng_state*.pth",) if is_deepspeeds else ("rng_state*.pth", "scheduler.pt"):
        if not any(folder.glob(pattern)):
            return f"has no {pattern}"
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"has a damaged {path.name} ({error})"
    if (folder / "model.safetensors").exists() and not (folder / "config.json").exists():
        return "has no config.json"
    return corrupt(folder) or not_finite(folder)


def check_weights(checkpoint: str, model: PreTrainedModel | PeftModel) -> None:
    """Compare names and shapes of a checkpoint's weights with those of the model, of PEFT's with those of its adapter,
    reading no weights.

    Raises:
        ValueError: if any is missing, unexpected or of another shape; `Trainer` only warns of the first two.
    """
    is_adapter = is_peft_model(model)
    there = {}
    for path in Path(checkpoint).glob("adapter_model.safetensors" if is_adapter else "model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            there |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if not there:
        return  # DeepSpeed may keep them in files of its own, which it compares itself
    weights = get_peft_model_state_dict(model) if is_adapter else model.state_dict()
    here = {name: list(weight.shape) for name, weight in weights.items()}
    tied = {} if is_adapter else model.all_tied_weights_keys
    reshaped = [name for name in here if name in there and here[name] != there[name]]
    problems = {
        "missing": here.keys() - there.keys() - tied.keys(),
        "unexpected": there.keys() - here.keys(),
        "of another shape": [f"{name} ({there[name]}, not {here[name]})" for name in reshaped],
    }
    if any(problems.values()):
        first = {
            problem: ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3) for problem, names in problems.items()
        }
        listed = ", ".join(f"{problem} {names or 'none'}" for problem, names in first.items())
        raise ValueError(f"training.resume_from_checkpoint: {checkpoint} does not fit the model: {listed}")


def forget_tied_weights(model: PreTrainedModel, loaded: Any) -> None:
    """A hook after `load_state_dict`: weights that a checkpoint lacks are not missing where they are tied to others
    that it has; `Trainer` would warn of them.
    """
    missing, tied = set(loaded.missing_keys), model.all_tied_weights_keys
    loaded.missing_keys[:] = [name for name in loaded.missing_keys if tied.get(name, name) in missing]


# ----------------------------------------------------------------------------------------------- optimizer and schedule


def group_options(groups: Sequence[Options]) -> list[Options]:
    """The options of each group of an optimizer, without its parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def options_by_arguments(args: TrainingArguments, group: Options) -> Options:
    """What a group of DeepSpeed's own optimizer has, which is built from its file, that the Trainer compares with the
    arguments. The group of what does not decay is known by its name, which Muon lengthens.
    """
    betas, decay = (args.adam_beta1, args.adam_beta2), args.weight_decay
    if group.get("name", "").startswith(UNDECAYED):
        decay = 0.0
    return {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": decay}


class ResumeError(ValueError):
    """A checkpoint that a run cannot go on from, as is found out when training begins."""


class OptionsOfRun(TrainerCallback):
    """Gives optimizer and schedule, whose states a checkpoint has brought, the rates of this run when training begins.

    The schedule is that of the run's own number of steps, of which the checkpoint knows nothing: the rate of the next
    update is computed anew. Other options are the checkpoint's, unless `allow_changes` is true.
    """

    def __init__(self) -> None:
        self.options: list[Options] = []
        self.options_in_use: list[Options] = []

    def remember(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the options of an optimizer that the run has built, before a checkpoint replaces them."""
        groups = optimizer.param_groups
        self.options = group_options(groups)
        self.options_in_use = group_options([one for one in groups if one["params"]])
        optimizer.register_load_state_dict_pre_hook(check_sizes)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Give them.

        Raises:
            ResumeError: The checkpoint has other options, where that is not allowed.
        """
        if state.global_step == 0:
            return
        groups = optimizer.param_groups
        wanted = self.options or [options_by_arguments(args, group) for group in groups]
        if len(groups) < len(wanted):  # ZeRO-1 and -2 leave out a group of no parameters, as beside adapters is
            wanted = self.options_in_use
        if not args.allow_changes:
            check_group_options(groups, wanted)
        for group, options in zip(groups, wanted, strict=True) if args.allow_changes else ():
            group |= {name: value for name, value in options.items() if name in group}
            group["initial_lr"] = options["lr"]  # the rate that a schedule begins with
        set_rates(groups, lr_scheduler)


def check_group_options(groups: Sequence[Options], wanted: Sequence[Options]) -> None:
    """Raises ResumeError for groups that were trained in another way: of checkpoints without a record of options, this
    alone shows it.
    """
    for group, options in zip(groups, wanted, strict=True):
        there = {**group, "lr": group.get("initial_lr", options["lr"])}
        for name in COMPARED:
            if name in options and name in there and not are_alike(there[name], options[name]):
                raise ResumeError(
                    f"training.resume_from_checkpoint: the optimizer there has {name} {there[name]}, and here "
                    f"{options[name]}; give the same, or add --training.allow_changes true"
                )


def check_sizes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises ResumeError for a state whose groups are others than those of the optimizer that is to have it."""
    there, here = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if there != here:
        raise ResumeError(
            f"training.resume_from_checkpoint: the optimizer there has groups of {there} parameters, here of {here}; "
            "others decay or have rates of their own: begin anew, or go on with the code of that run"
        )


def are_alike(there: Any, here: Any) -> bool:
    """Whether two options are equal; a pair may be a list in a file."""
    return list(there) == list(here) if isinstance(there, (list, tuple)) else there == here


def set_rates(groups: Sequence[Options], scheduler: Any) -> None:
    """Set the rates of the next update: those of the step where a schedule stands, by its own formula.

    Those that follow from measurements, and not from the number of the step, keep what they have.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # what accelerate has wrapped
    if isinstance(schedule, LambdaLR):
        bases = [group["initial_lr"] for group in groups]
        rates = [base * factor(schedule.last_epoch) for base, factor in zip(bases, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": bases, "_last_lr": rates})
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    elif hasattr(schedule, "last_batch_iteration"):  # DeepSpeed's, which knows no other way
        schedule.step(schedule.last_batch_iteration)
