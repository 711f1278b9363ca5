"""Command-line arguments: one line on standard error and exit code 2 for whatever is wrong with them."""

import argparse
import difflib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from model.terminal import one_line, say_new_name
from model.versions import VersionAction

from .logs import LOG_LEVELS

logger = logging.getLogger(__name__)


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line; for an unknown flag it names the nearest known one.

    Args:
        renamed: Old names of flags, which still work, and the new ones.
    """

    def __init__(self, renamed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.renamed = renamed or {}
        self.add_argument("--version", action=VersionAction)
        self.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="least severe message to show")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """The values of a command line (default: `sys.argv`), in which flags may have their old names."""
        given = list(sys.argv[1:] if args is None else args)
        for index, argument in enumerate(given):
            old, equals, value = argument.partition("=")
            if new := self.renamed.get(old):
                say_new_name(old, new)
                given[index] = f"{new}{equals}{value}"
        return super().parse_args(given, namespace)

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Turn what is wrong with the input into one line on standard error and exit code 2."""
        try:
            yield
        except (ValueError, OSError) as error:
            logger.debug("Where it failed:", exc_info=True)
            self.error(str(error))

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


# --------------------------------------------------------------------------------------------------- types of arguments


def whole_number(text: str, minimum: int, why: str) -> int:
    """`text` as an int of at least `minimum`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: {why}") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is less than {minimum}: {why}")
    return value


def layer_range(text: str) -> range:
    """`text`, "begin:end", as the numbers of layers; the end is not among them."""
    begin, colon, end = text.partition(":")
    why = "give layers as begin:end, counted from 0, the end not among them, such as 2:6."
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} has no colon: {why}")
    found = range(whole_number(begin, 0, why), whole_number(end, 0, why))
    if found.stop < found.start:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins: {why}")
    return found


def finite_number(text: str, why: str, fits: Callable[[float], bool] = math.isfinite, fault: str = "") -> float:
    """`text` as a finite float; `fault` says what one is that does not fit."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: {why}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite: {why}")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is {fault}")
    return value


def counted(what: str) -> Callable[[str], int]:
    """The type of a number of things, 1 or more."""
    return partial(whole_number, minimum=1, why=f"give {what}.")


core_steps = counted("the number of times the core is applied, 1 or more")
new_tokens = counted("the number of tokens to generate, 1 or more")
prompt_tokens = counted("the most tokens that a prompt may have, 1 or more")
batch_rows = counted("the number of rows in a forward pass, 1 or more")
row_limit = counted("the number of rows per source, 1 or more, or leave --limit out for all")
media_count = counted("the number of images or audio files, 1 or more")
flow_steps = counted("the number of steps from noise to a latent, 1 or more")
top_tokens = partial(whole_number, minimum=0, why="give the number of likeliest tokens to draw from; 0 draws from all.")
seed = partial(whole_number, minimum=0, why="give a seed, 0 or more.")
finite = partial(finite_number, why="give a finite number.")
guidance = partial(
    finite_number,
    why="give a number, 0 or more.",
    fits=lambda value: value >= 0,
    fault="less than 0: give a number, 0 or more.",
)
temperature = partial(
    finite_number,
    why="give a temperature above 0.",
    fits=lambda value: value > 0,
    fault="not above 0: for temperature 0, the likeliest token, use --greedy.",
)
nucleus = partial(
    finite_number,
    why="give a probability above 0, at most 1.",
    fits=lambda value: 0 < value <= 1,
    fault="not a probability above 0 and at most 1; 1 keeps every token.",
)
penalty = partial(
    finite_number,
    why="give a factor above 0; 1 changes nothing.",
    fits=lambda value: value > 0,
    fault="not above 0: give a factor; 1 changes nothing.",
)
