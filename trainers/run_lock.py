"""One run at a time in a folder."""

import fcntl
import json
import logging
import os
import socket
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
                holder = holder_of(file)
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


def holder_of(file: int) -> str:
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
