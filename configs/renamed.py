"""Options of earlier versions, in YAML files and on the command line. Old names still work, with a line that says the
new one. Options that are gone may have the value that is left, as in the config.yaml of an earlier run.
"""

import json
from collections.abc import Sequence
from typing import Any

from model import RecurrenceConfig
from model.terminal import say_new_name

RENAMED = {
    "callbacks.written_samples": "generated_samples",
    "data.condition_drop": "cfg_dropout",
    "data.max_bad_rows": "max_invalid_rows",
    **{f"recurrence.{old}": new for old, new in RecurrenceConfig.attribute_map.items()},
}
"""The end of a dotted key, without the places in lists, and the new name of its last part."""
REMOVED: dict[str, Any] = {
    "callbacks.samples.do_sample": False,
    "callbacks.samples.temperature": 0.8,
    "callbacks.samples.seed": 0,
    "callbacks.throughput.enabled": True,
    "callbacks.model_size.enabled": True,
    "callbacks.non_finite.keep_batches": 64,
    "tokenizer.training_rows": 10_000,
    "augmentation.image.vertical_flip": 0.0,
    "augmentation.image.hue": 0.0,
    "augmentation.image.trivial": 0.0,
    "augmentation.image.erasing": 0.0,
    "augmentation.text.span_corruption": 0.0,
    "augmentation.text.span_length": 3.0,
    "peft.use_rslora": False,
    "peft.use_dora": False,
    "training.exit_divergence": 1e-4,
    "training.exit_distance": 0.05,
    "training.logging_nan_inf_filter": False,
    "training.remove_unused_columns": False,
}
"""Options that are gone, by the end of the dotted key, and the value that each always has."""


def with_new_names(tree: Any, origin: str = "", keys: Sequence[str] = ()) -> Any:
    """A tree of options in which the old names are replaced, without options that are gone, and groups of these alone.

    Args:
        origin: What an error or a notice begins with.
        keys: The keys of the groups around the tree.

    Raises:
        ValueError: an option is given by both names, or one that is gone by another value than is left.
    """
    if isinstance(tree, list):
        return [with_new_names(item, origin, keys) for item in tree]
    if not isinstance(tree, dict):
        return tree
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if is_removed([*keys, str(name)], value, origin):
            continue
        new = new_name([*keys, str(name)], origin) if isinstance(name, str) else name
        if new != name and new in tree:
            raise ValueError(
                f"{origin}{'.'.join([*keys, name])} is an old name of {new}, which is there too; remove it"
            )
        inner = with_new_names(value, origin, [*keys, str(new)])
        if inner or inner == value:
            found[new] = inner
    return found


def new_name(keys: Sequence[str], origin: str = "") -> str:
    """The last of the keys that lead to an option, or the name that has taken its place, which is then said."""
    for old, new in RENAMED.items():
        if ends_with(keys, old):
            say_new_name(f"{origin}{'.'.join(keys)}", ".".join([*keys[:-1], new]))
            return new
    return keys[-1]


def is_removed(keys: Sequence[str], value: Any, origin: str = "") -> bool:
    """Whether the keys lead to an option that is gone.

    Raises:
        ValueError: they do, and the value is not the one that is left.
    """
    for old, left in REMOVED.items():
        if ends_with(keys, old):
            if value != left and value != json.dumps(left):  # the text of a flag
                raise ValueError(
                    f"{origin}{'.'.join(keys)} is {value!r}, but this option is gone, and is always {left!r}; remove it"
                )
            return True
    return False


def ends_with(keys: Sequence[str], end: str) -> bool:
    """Whether a dotted key is the end of the keys."""
    return f".{'.'.join(keys)}".endswith(f".{end}")
