"""Functions of anyone, by import name."""

import importlib
from collections.abc import Callable
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
