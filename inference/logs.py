"""One place that sets up logging, for every command line."""

import logging
import os
import re
import sys

from .shutdown import say_errors

sys.excepthook = say_errors  # from here on: what is imported next takes seconds

# isort: split
import transformers  # noqa: E402  behind that

from model.terminal import visible  # noqa: E402

LOG_LEVELS = ("debug", "info", "warning", "error")

# On CPUs with bfloat16 instructions it warns, whenever it is imported, of a kernel that it would fetch from the hub.
# The scripts import this file first, so that their errors stay one line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LAUNCHER_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def check_launcher_numbers() -> None:
    """Refuse what is no number where a launcher writes one: with code 2, and one line on standard error."""
    for name in LAUNCHER_NUMBERS:
        value = os.environ.get(name, "0")
        if not re.fullmatch(r"-?\d+", value):
            sys.stderr.write(
                f"error: {name} is {value!r} in the environment, where launchers write a whole number; unset it, or "
                "start with `deepspeed` or `torchrun`\n"
            )
            raise SystemExit(2)


check_launcher_numbers()  # some libraries read them while they are imported


class ConsoleHandler(logging.StreamHandler):
    """Writes to the standard error of the moment; a class of its own, so that it is found again."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        """Formats it without characters that command a terminal."""
        return visible(super().format(record))


def set_up_logging(level: str = "info", rank: int = 0) -> None:
    """Send the messages of all libraries to standard error, once.

    Calling it again changes the level and adds no second handler. Ranks other than 0 say warnings and errors only.

    Args:
        level: one of `LOG_LEVELS`.
        rank: this process among all.

    Raises:
        ValueError: an unknown level.
    """
    if level not in LOG_LEVELS:
        raise ValueError(f"Log level {level!r} is not known: choose one of {', '.join(LOG_LEVELS)}.")
    number = getattr(logging, level.upper())
    if rank != 0:
        number = max(number, logging.WARNING)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, ConsoleHandler)]:
        root.removeHandler(handler)
        handler.close()
    handler = ConsoleHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(number)
    # transformers brings a handler of its own; with ours each of its messages would appear twice.
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity(max(number, logging.WARNING) if level != "debug" else number)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a bar in a file is noise
