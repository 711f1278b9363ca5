"""The files of DeepSpeed, checked by DeepSpeed's own configuration classes before anything is built."""

import functools
import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from trainers.keywords import Recorder

from . import strict_yaml
from .loader import closest

DEEPSPEED_FOLDER = Path(__file__).parent / "deepspeed"
AUTO = "auto"
advice = functools.partial(closest, else_where="DeepSpeed's documentation lists the known ones")
# Those of the whole file that the Trainer fills in where they are "auto", each with a value that stands for it here.
FILLED_IN = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
INTEGERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
# Parts whose keys are compared with those of a class or of a function.
CHECKED_ELSEWHERE = ("optimizer", "scheduler", "zero_optimization")
# What DeepSpeed takes out of the parameters of an optimizer before it builds that.
NOT_ARGUMENTS = {"torch_adam", "adam_w_mode", "max_grad_norm", "cuda_aware", "comm_backend_name"}


def find_deepspeed(value: Any) -> Any:
    """The path of a DeepSpeed JSON that is given as a path or as a name in `configs/deepspeed/`, or its content where
    the file begins with a byte-order mark, which not every reader knows; checked, as one that is given as such is.

    Raises:
        ValueError: the file is not there or holds no JSON object, or DeepSpeed would not read all of it.
    """
    if value is None:
        return None
    content = deepspeed_content(value)
    path = path_of(value) if isinstance(value, str) else None
    check_deepspeed(content, "training.deepspeed" if path is None else f"training.deepspeed: {path}")
    return content if path is None or path.read_bytes().startswith(b"\xef\xbb\xbf") else str(path)


def path_of(value: str) -> Path:
    """Where the file is; raises ValueError where there is none."""
    for path in (Path(value), DEEPSPEED_FOLDER / value, DEEPSPEED_FOLDER / f"{value}.json"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in DEEPSPEED_FOLDER.glob("*.json")))
    raise ValueError(f"training.deepspeed: {value} does not exist; give a path or one of {known}")


def deepspeed_content(value: Any) -> Any:
    """The content of a file that is given as for `find_deepspeed`, with its errors; a value that is no string is the
    content.
    """
    if not isinstance(value, str):
        return value
    path = path_of(value)
    try:
        content = json.loads(strict_yaml.read_text(path), object_pairs_hook=without_doubles)
    except ValueError as error:  # of the encoding too
        raise ValueError(f"training.deepspeed: {path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"training.deepspeed: {path} is not valid JSON: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"training.deepspeed: {path} holds a {type(content).__name__}, not an object")
    return content


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key that is there twice, of which one would be lost."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"key {name!r} is there twice, join the two")
    return dict(pairs)


def check_deepspeed(content: dict[str, Any], where: str) -> None:
    """Build DeepSpeed's configuration of what a file says, and see what of it was read; raises ValueError for a key
    that nobody looks for, or a value that DeepSpeed refuses.
    """
    from deepspeed.runtime.config import DeepSpeedConfig  # it takes seconds, and is not always there

    check_parts(content, where)
    for name in INTEGERS:
        value = content.get(name, 1)
        if value != AUTO and not (fits(value, int) and value > 0):
            raise ValueError(f"{where}: {name} is {value!r}; give an integer of at least 1")
    filled = {name: FILLED_IN.get(name, value) if value == AUTO else value for name, value in content.items()}
    for name, value in FILLED_IN.items():
        if name not in ("train_batch_size", "gradient_clipping"):
            filled.setdefault(name, value)
    filled.pop("train_batch_size", None)  # whether it is the product of the others, the Trainer compares
    recorder = Recorder(filled)
    try:
        DeepSpeedConfig(recorder)
    except ValidationError as error:
        raise ValueError(f"{where}: {validation_problem(error, filled)}") from error
    except Exception as error:  # of any kind: DeepSpeed reads values without a look at their types
        last = recorder.last_asked
        given = f"{last} = {content[last]!r}" if last in content else "it"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: DeepSpeed refuses {given}: {reason}") from error
    check_values(content, recorder, where)


def check_parts(content: dict[str, Any], where: str) -> None:
    """Raises ValueError for an optimizer or a schedule that DeepSpeed has not, or arguments that it does not take."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    for name in ("optimizer", "scheduler"):
        part = content.get(name, {})
        if not isinstance(part, dict):
            raise ValueError(f"{where}: {name} is {part!r}, not an object with type and params")
        keys = [key for key in part if key != "legacy_fusion"]
        refuse_unknown(keys, ["type", "params"], f"{where}: unknown key {name}")
        if not isinstance(part.get("params", {}), dict):
            raise ValueError(f"{where}: {name}.params is {part['params']!r}, not an object")
    optimizers = {it.lower(): cls for it, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    schedules = {it: vars(lr_schedules)[it] for it in lr_schedules.VALID_LR_SCHEDULES}
    for name, classes, known in (
        ("optimizer", optimizers, DEEPSPEED_OPTIMIZERS),
        ("scheduler", schedules, lr_schedules.VALID_LR_SCHEDULES),
    ):
        part = content.get(name, {})
        given = part.get("type")
        kind = given.lower() if name == "optimizer" and isinstance(given, str) else given
        if given is None:
            continue
        if not isinstance(kind, str) or (kind not in known and kind not in classes):
            raise ValueError(f"{where}: {name}.type is {given!r}, which is unknown; {advice(given, known)}")
        if kind in classes:
            arguments = set(inspect.signature(classes[kind]).parameters) - {"params", "optimizer"}
            arguments |= NOT_ARGUMENTS if name == "optimizer" else set()
            refuse_unknown(part.get("params", {}), sorted(arguments), f"{where}: unknown key {name}.params")


def refuse_unknown(names: Iterable[str], known: Sequence[str], beginning: str) -> None:
    """Raises ValueError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{beginning}.{name}; {advice(name, known)}")


def check_values(content: dict[str, Any], recorder: Recorder, where: str, key: str = "") -> None:
    """Raises ValueError for a key that was not looked for, or a value of another type than its default."""
    for name, value in content.items():
        inner = f"{key}.{name}" if key else name
        if name not in recorder.asked and name not in FILLED_IN:
            raise ValueError(f"{where}: unknown key {inner}; {advice(name, sorted(recorder.asked))}")
        expected = type_of(recorder.asked.get(name), FILLED_IN.get(name))
        is_filled_in = value == AUTO and (name in FILLED_IN if not key else True)
        if expected and not is_filled_in and not fits(value, expected):
            raise ValueError(f"{where}: {inner} is {value!r}; give {NAMES_OF_TYPES[expected]}")
        there = dict.get(recorder, name)
        if isinstance(there, Recorder) and there.asked and name not in CHECKED_ELSEWHERE:
            check_values(value, there, where, inner)


NAMES_OF_TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def type_of(*defaults: Any) -> type | None:
    """The type of the first default that says one."""
    kinds = (next((cls for cls in NAMES_OF_TYPES if type(default) is cls), None) for default in defaults)
    return next(filter(None, kinds), None)


def fits(value: Any, expected: type) -> bool:
    """Whether a value is of a type; integers are numbers, truth values are none."""
    if expected in (int, float):
        return isinstance(value, (int, float) if expected is float else int) and not isinstance(value, bool)
    return isinstance(value, expected)


def validation_problem(error: ValidationError, content: dict[str, Any]) -> str:
    """The first problem that pydantic found, in one line."""
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    section = next(
        (name for name, part in content.items() if isinstance(part, dict) and within(part, problem["loc"])), None
    )
    path = f"{section}.{key}" if section else key
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path}; {advice(str(problem['loc'][-1]), fields_of(error, problem['loc']))}"
    return f"{path} is {problem['input']!r}: {problem['msg']}"


def within(part: Any, place: Sequence[Any]) -> bool:
    """Whether nested mappings have the keys of a place."""
    for name in place:
        if not isinstance(part, dict) or name not in part:
            return False
        part = part[name]
    return bool(place)


def fields_of(error: ValidationError, place: Sequence[Any]) -> list[str]:
    """Names of the fields of the class of DeepSpeed that pydantic speaks of, or of one in it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes = [DeepSpeedConfigModel]
    for cls in classes:
        classes += cls.__subclasses__()
    cls = next(cls for cls in classes if cls.__name__ == error.title)
    for name in place[:-1]:
        hint = cls.model_fields[name].annotation
        hints = (hint, *getattr(hint, "__args__", ()))
        cls = next(it for it in hints if inspect.isclass(it) and issubclass(it, DeepSpeedConfigModel))
    return sorted({*cls.model_fields, *(it.alias for it in cls.model_fields.values() if it.alias)})
