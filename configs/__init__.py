"""Configuration of runs: YAML files and flags, the classes that hold their options, and runs from begin to end."""

from .loader import flatten_keys, read_yaml, to_yaml
from .runs import (
    ResolvedConfig,
    RunConfig,
    load_config,
    load_run_config,
    one_line_errors,
    read_run_config,
    resolve,
)

__all__ = [
    "ResolvedConfig",
    "RunConfig",
    "flatten_keys",
    "load_config",
    "load_run_config",
    "one_line_errors",
    "read_run_config",
    "read_yaml",
    "resolve",
    "to_yaml",
]
