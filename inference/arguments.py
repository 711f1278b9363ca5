"""Command-line arguments: one line on standard error and exit code 2 for whatever is wrong with them."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from typing import NoReturn

from model.terminal import one_line
from model.versions import VersionAction

from .devices import DTYPES
from .logs import LOG_LEVELS


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line; for an unknown flag it names the nearest known one."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.add_argument("--version", action=VersionAction)
        self.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="least severe message to show")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line on standard error."""
        _, is_unknown, unknown = message.partition("unrecognized arguments: ")
        if is_unknown:
            flag = re.split("[ =]", unknown)[0]
            known = re.findall(r"--[a-z][a-z0-9-]*", self.format_usage())
            near = difflib.get_close_matches(flag, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "see --help for those there are."
            message = f"unknown argument {flag!r}: {fix}"
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the weights go, and as what."""
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the checkpoint's")
    parser.add_argument(
        "--load-in", choices=["8bit", "4bit"], help="bits of the weights in layers; default: the checkpoint's"
    )


def whole_number(text: str, minimum: int, why: str) -> int:
    """`text` as an int of at least `minimum`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: {why}") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is less than {minimum}: {why}")
    return value


def number(text: str, why: str) -> float:
    """`text` as a finite float."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: {why}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite: {why}")
    return value


def finite(text: str) -> float:
    """Argument type of thresholds and rates."""
    return number(text, "give a finite number.")


def core_steps(text: str) -> int:
    """Argument type of --num-steps."""
    return whole_number(text, 1, "give the number of times the core is applied, 1 or more.")


def new_tokens(text: str) -> int:
    """Argument type of --max-new-tokens."""
    return whole_number(text, 1, "give the number of tokens to generate, 1 or more.")


def prompt_tokens(text: str) -> int:
    """Argument type of --max-prompt-tokens."""
    return whole_number(text, 1, "give the most tokens that a prompt may have, 1 or more.")


def batch_rows(text: str) -> int:
    """Argument type of --batch-size."""
    return whole_number(text, 1, "give the number of rows in a forward pass, 1 or more.")


def row_limit(text: str) -> int:
    """Argument type of --limit."""
    return whole_number(text, 1, "give the number of rows per source, 1 or more, or leave --limit out for all.")


def media_count(text: str) -> int:
    """Argument type of --count."""
    return whole_number(text, 1, "give the number of images or sounds, 1 or more.")


def flow_steps(text: str) -> int:
    """Argument type of --num-flow-steps."""
    return whole_number(text, 1, "give the number of steps from noise to a latent, 1 or more.")


def guidance(text: str) -> float:
    """Argument type of --guidance-scale and --flow-temperature."""
    value = number(text, "give a number, 0 or more.")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0: give a number, 0 or more.")
    return value


def temperature(text: str) -> float:
    """Argument type of --temperature."""
    value = number(text, "give a temperature above 0.")
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"{text} is not above 0: for temperature 0, the likeliest token, use --greedy."
        )
    return value


def nucleus(text: str) -> float:
    """Argument type of --top-p."""
    value = number(text, "give a probability above 0, at most 1.")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability above 0 and at most 1; 1 keeps every token.")
    return value


def top_tokens(text: str) -> int:
    """Argument type of --top-k."""
    return whole_number(text, 0, "give the number of likeliest tokens to draw from; 0 draws from all.")


def penalty(text: str) -> float:
    """Argument type of --repetition-penalty."""
    value = number(text, "give a factor above 0; 1 changes nothing.")
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0: give a factor; 1 changes nothing.")
    return value


def seed(text: str) -> int:
    """Argument type of --seed."""
    return whole_number(text, 0, "give a seed, 0 or more.")
