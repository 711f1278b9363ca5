"""Locks of builds that did not end: torch waits for them without a word, and without an end."""

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)


def warn_of_build_locks() -> None:
    """Say which locks lie where DeepSpeed builds its operations, on one rank of each machine, before it does. A build
    that is killed leaves its own; none is removed here, as another machine may be building in the same folder.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for path, age in build_locks():
        holder = holder_of(path)
        if holder is None:
            logger.warning(
                "%s is the lock of a build, %s old, that no process of this machine holds: DeepSpeed waits for it "
                "without an end. If no other machine builds there, remove it: rm %s",
                path,
                in_words(age),
                path,
            )
        else:
            logger.warning(
                "%s is the lock of a build of process %d, begun %s ago: DeepSpeed waits until it is done",
                path,
                holder,
                in_words(age),
            )


def build_locks() -> list[tuple[Path, float]]:
    """The locks of builds, and their age in seconds."""
    from torch.utils.cpp_extension import get_default_build_root  # says on import that there is no GPU

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    found = Path(named).glob("*/lock") if named else Path(get_default_build_root()).glob("*/*/lock")
    locks = []
    for path in sorted(found):
        try:
            locks.append((path, max(time.time() - path.stat().st_mtime, 0.0)))
        except FileNotFoundError:  # its build has ended
            continue
    return locks


def holder_of(path: Path) -> int | None:
    """A process of this machine that has a file open; None if there is none that may be looked at."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                return int(link.parts[2])
        except OSError:  # it has ended, or closed it, or is another user's
            continue
    return None


def in_words(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
