"""Functions of users by import name, and reward functions whose results are checked."""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any


def load_function(kind: str, name: str, example: str) -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Args:
        kind: What it is for, as errors call it.
        example: A name that errors show.

    Raises:
        ValueError: no such module or function, or the module raises while it is imported.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"{kind} {name!r} names no function; write module:function, as {example}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the code of a user raises
        raise ValueError(
            f"{kind} {name!r}: {module_name} cannot be imported ({type(error).__name__}: {error}); correct it, or put "
            "its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module_name]
        raise ValueError(f"{kind} {name!r}: {module_name} has no function {function_name!r}, only {', '.join(known)}")
    return function


class RewardError(ValueError):
    """A reward function failed while a model was trained by it."""


def load_reward(name: str) -> Callable[..., Sequence[float | None]]:
    """The function that "package.module:function" names, with its results checked at every call.

    It is called by keyword with prompts, completions and completion_ids, one of each for every answer, with every other
    column of the data under its own name, and with trainer_state, log_extra and log_metric (see TRL's GRPOTrainer). It
    returns as many numbers, or None where it cannot tell.

    Raises:
        ValueError: no such module or function, or the module raises while it is imported.
        RewardError: when it is called: it raises, or returns anything but a finite number or None for each completion.
    """
    function = load_function("reward", name, "evaluation.rewards:exact_answer")

    @functools.wraps(function)
    def reward(*, completions: Sequence, **kwargs) -> list[float | None]:
        try:
            values = function(completions=completions, **kwargs)
        except Exception as error:  # whatever the code of a user raises
            raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
        if not hasattr(values, "__len__") or isinstance(values, str):
            raise RewardError(f"reward {name!r} returned {values!r:.80}; it must return a list of numbers")
        if len(values) != len(completions):
            raise RewardError(
                f"reward {name!r} returned {len(values)} values for {len(completions)} completions; it must return one "
                "for each"
            )
        wrong = [value for value in values if not (value is None or (isinstance(value, Real) and math.isfinite(value)))]
        if wrong:
            raise RewardError(f"reward {name!r} returned {wrong[0]!r:.80}; each value must be a finite number or None")
        return list(values)

    return reward
