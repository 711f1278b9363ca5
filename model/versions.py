"""What `--version` says."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def describe_versions() -> str:
    """The commit of this checkout, with a plus sign where files differ from it, and what most depends on."""
    return f"MegaTransformer {commit()}, torch {torch.__version__}, transformers {transformers.__version__}"


def commit() -> str:
    """Shortened; "of unknown commit" where this is no checkout, or git is not installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "of unknown commit"
    return found.stdout.strip()


class VersionAction(argparse.Action):
    """Writes the versions to standard output and ends the process. argparse's own action needs them in advance."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        what = "show the versions of this project, torch and transformers, and exit"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=what)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Do so."""
        sys.stdout.write(f"{describe_versions()}\n")
        parser.exit()
