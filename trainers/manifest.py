"""What a checkpoint consists of: sizes and digests of its files, written last and compared before a run goes on."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

NAME = "manifest.json"
FORMAT = 1
# What no run reads when it goes on, and what may be rewritten beside the weights.
IGNORED = ("README.md", "*.py", NAME)


def begin(folder: Path) -> None:
    """Make the folder of a checkpoint, marked as unfinished before any other file is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, {"format": FORMAT, "files": None})


def complete(folder: Path, problem: str | None = None) -> None:
    """Mark the folder of a checkpoint as finished, all of it being on the disk.

    Args:
        folder: With all files of all ranks.
        problem: Why no run should go on from it, as the end of a sentence that begins with the folder.
    """
    files = {}
    for path in files_of(folder):
        synchronize(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest(path)}
    for path in {folder, *(path.parent for path in files_of(folder))}:
        synchronize(path)
    write(folder, {"format": FORMAT, "files": files, "problem": problem})
    synchronize(folder.parent)


def fault(folder: Path, with_digests: bool = True) -> str | None:
    """How a folder differs from its manifest, as the end of a sentence that begins with the folder; None if it does
    not, or has none. Files that the manifest does not name do no harm.

    Args:
        folder: Of a checkpoint.
        with_digests: Whether the files are read; their sizes are always compared, and first.
    """
    try:
        manifest = read(folder)
        files = {} if manifest is None else checked(manifest)
    except ValueError as error:
        return f"has a damaged {NAME} ({error})"
    if files is None:
        return "was not finished, its saving was cut off"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if (size := path.stat().st_size) != entry["size"]:
            return f"has a damaged {name} ({size} bytes, and {entry['size']} when it was saved)"
    if manifest and manifest.get("problem"):
        return manifest["problem"]
    for name, entry in files.items() if with_digests else ():
        if digest(folder / name) != entry["sha256"]:
            return f"has a damaged {name} (its content is not what was saved)"
    return None


def is_unfinished(folder: Path) -> bool:
    """Whether the saving of a checkpoint was cut off."""
    try:
        manifest = read(folder)
        return manifest is not None and checked(manifest) is None
    except ValueError:
        return False


def exists(folder: Path) -> bool:
    """Whether a folder has a manifest: those that were saved by older code have none."""
    return (folder / NAME).exists()


def read(folder: Path) -> dict | None:
    """The manifest of a folder, None if there is none; ValueError if it is no JSON object."""
    if not exists(folder):
        return None
    manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("no JSON object")
    return manifest


def checked(manifest: dict) -> dict[str, dict] | None:
    """Sizes and digests by file, None of a checkpoint that was not finished.

    Raises:
        ValueError: for a format that is not known, and for files that are not described or lie outside of the folder.
    """
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, and known is {FORMAT}")
    files = manifest.get("files", {})
    if files is None:
        return None
    if not isinstance(files, dict) or not files:
        raise ValueError("it names no files")
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is outside of the folder")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"{name!r} has no size and sha256")
    return files


def files_of(folder: Path) -> Iterator[Path]:
    """The files that belong to a checkpoint, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(path.match(pattern) for pattern in IGNORED):
            yield path


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, manifest: dict) -> None:
    """Write a manifest of which nobody ever reads half."""
    beside = folder / f".{NAME}.{os.getpid()}"
    beside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    synchronize(beside)
    beside.replace(folder / NAME)
    synchronize(folder)


def synchronize(path: Path) -> None:
    """See to it that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
