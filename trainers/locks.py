"""Locks: of the folder of a run, in which no other may write, and of builds that torch waits for without a word."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"


class RunLock:
    """A lock of the system on a file in the folder of a run, which says who holds it.

    It ends with the process, however that ends, and is no child's: `fcntl.flock` would stay with the workers that read
    the data, which outlive a kill for seconds.

    Args:
        folder: That of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOCK_NAME
        self.file: int | None = None

    def take(self, may_make_folder: bool = True) -> None:
        """Take it, if this process does not have it yet; where the system of files knows no locks, a warning says so.

        Args:
            may_make_folder: Whether a folder that is not there is made; without, nothing happens then.

        Raises:
            ValueError: another process has it.
        """
        if self.file is not None or not (may_make_folder or self.path.parent.is_dir()):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self.file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                holder = holder_in(file)
                os.close(file)
                raise ValueError(
                    f"training.output_dir: {self.path.parent} is in use by {holder}; wait for that run, stop it, or "
                    "choose another output_dir"
                ) from error
            except OSError as error:
                logger.warning("%s cannot be locked (%s): another run there would not be noticed", self.path, error)
            if is_same(file, self.path):  # else its holder has removed it between opening and locking
                self.file = file
            else:
                os.close(file)
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def release(self) -> None:
        """Give it back, and remove its file."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.file)
            self.file = None


def holder_in(file: int) -> str:
    """Who has written itself into the file of a lock."""
    try:
        holder = json.loads(os.pread(file, 1000, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])!r}"
    except (ValueError, KeyError, TypeError):  # it is about to
        return "another process"


def is_same(file: int, path: Path) -> bool:
    """Whether a path still leads to a file that is open."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------------ locks of builds


def warn_of_build_locks() -> None:
    """Say which locks lie where DeepSpeed builds its operations, on one rank of each machine, before it does. A build
    that is killed leaves its own; none is removed here, as another machine may be building in the same folder.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for path, age in build_locks():
        holder = process_with(path)
        if holder is None:
            state = (
                f", {in_words(age)} old, that no process of this machine holds: DeepSpeed waits for it without an end. "
                f"If no other machine builds there, remove it: rm {path}"
            )
        else:
            state = f" of process {holder}, begun {in_words(age)} ago: DeepSpeed waits until it is done"
        logger.warning("%s is the lock of a build%s", path, state)


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


def process_with(path: Path) -> int | None:
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
