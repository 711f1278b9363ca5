"""What `pretrain.py` can do with a run instead of training to its end, and with which options of the run."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from trainers import debugging, learning_rate_finder, profiling

MODES: Mapping[str, str] = {
    "dry_run": "Print what the run would need, and stop",
    "find_lr": "Try learning rates from small to large, write a plot of the losses, and stop",
    "profile": "Train a few steps, write a trace and a table of what costs time, and stop",
    "debug": "Train on one batch over and over, look for what is not finite, and stop",
}
"""What each is for, as `--help` says it. No file that a run leaves behind names one."""
# Nothing is saved, measured or shown besides: the steps alone are of interest.
_STEPS_ALONE = {
    **dict.fromkeys(("training.resume_from_checkpoint", "training.early_stopping_patience", "training.ema_decay")),
    **dict.fromkeys(("training.save_strategy", "training.eval_strategy"), "no"),
    **dict.fromkeys(("training.load_best_model_at_end", "training.eval_on_start", "training.push_to_hub"), False),
    "training.early_stopping_threshold": 0.0,
    "training.report_to": "none",
    "training.recurrence_logging_steps": 0,
    "callbacks.samples.prompts": [],
    "callbacks.media_samples.num_examples": 0,
    "callbacks.generated_samples.num_examples": 0,
    "callbacks.non_finite.action": "stop",
    "callbacks.non_finite.spike_deviations": None,
    "callbacks.stability.action": "warn",
    **dict.fromkeys(("callbacks.stability.gradient_logs", "callbacks.stability.core_steps"), 0),
}
_EACH_STEP_ALIKE = {
    "training.lr_scheduler_type": "constant",
    "training.lr_scheduler_kwargs": None,
    "training.warmup_steps": 0,
    "training.logging_strategy": "steps",
    "training.logging_steps": 1,
}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "find_lr": _STEPS_ALONE | _EACH_STEP_ALIKE | {"training.max_steps": learning_rate_finder.NUM_STEPS},
    "profile": _STEPS_ALONE | {"training.logging_strategy": "no", "training.max_steps": profiling.NUM_STEPS},
    "debug": _STEPS_ALONE
    | _EACH_STEP_ALIKE
    | {
        "training.max_steps": debugging.NUM_STEPS,
        "training.train_sampling_strategy": "sequential",
        "training.max_tokens_per_batch": None,
        **dict.fromkeys(("training.torch_compile_backend", "training.torch_compile_mode")),
        "training.torch_compile": False,
    },
}


def with_mode(tree: dict[str, Any]) -> dict[str, Any]:
    """Every option of a run, with those that its mode needs."""
    tree = copy.deepcopy(tree)
    for mode in _OPTIONS.keys() & tree.keys():
        for key, value in _OPTIONS[mode].items():
            *groups, name = key.split(".")
            functools.reduce(dict.__getitem__, groups, tree)[name] = value
    return tree
