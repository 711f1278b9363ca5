"""Old names of options. In a YAML file or on the command line they still work, with a line that says the new one."""

from collections.abc import Sequence
from typing import Any

from model import RecurrenceConfig
from model.terminal import say_new_name

RENAMED = {
    "data.condition_drop": "cfg_dropout",
    "data.max_bad_rows": "max_invalid_rows",
    **{f"recurrence.{old}": new for old, new in RecurrenceConfig.attribute_map.items()},
}
"""The end of a dotted key, without the places in lists, and the new name of its last part."""


def with_new_names(tree: Any, origin: str = "", keys: Sequence[str] = ()) -> Any:
    """A tree of options in which the old names are replaced.

    Args:
        origin: What an error or a notice begins with.
        keys: The keys of the groups around the tree.

    Raises:
        ValueError: an option is given by both names.
    """
    if isinstance(tree, list):
        return [with_new_names(item, origin, keys) for item in tree]
    if not isinstance(tree, dict):
        return tree
    found: dict[str, Any] = {}
    for name, value in tree.items():
        new = new_name([*keys, str(name)], origin) if isinstance(name, str) else name
        if new != name and new in tree:
            raise ValueError(
                f"{origin}{'.'.join([*keys, name])} is an old name of {new}, which is there too; remove it"
            )
        found[new] = with_new_names(value, origin, [*keys, str(new)])
    return found


def new_name(keys: Sequence[str], origin: str = "") -> str:
    """The last of the keys that lead to an option, or the name that has taken its place, which is then said."""
    for old, new in RENAMED.items():
        if tuple(keys[-len(old.split(".")) :]) == tuple(old.split(".")):
            say_new_name(f"{origin}{'.'.join(keys)}", ".".join([*keys[:-1], new]))
            return new
    return keys[-1]
