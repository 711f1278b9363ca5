"""Checkpoints of a run: manifests that finish them, those that are deleted, and tensors read without running code."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_deepspeed_available
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals as numpy_safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .sharding import METADATA_NAME, entries_of, read_metadata

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
DELETED = "deleted-"  # in front of a name, so that a half of it is never taken for a checkpoint
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
UNFINISHED = "was not finished, its saving was cut off"
# What no run reads when it goes on, and what may be rewritten next to the weights.
IGNORED = ("README.md", "*.py", MANIFEST_NAME)
DEEPSPEED_FOLDERS = "global_step*"
# What goes on from a checkpoint reads; training_args.bin, also a pickle, is read by nobody.
PICKLES = ("*.pt", "*.pth", "optimizer.bin", f"{DEEPSPEED_FOLDERS}/**/*.pt")
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", f"{DEEPSPEED_FOLDERS}/**/*.pt")
OPTIMIZER_FOLDER = "optimizer_0"  # of FSDP2
# What is raised when a file is none that it should be.
DAMAGES = (RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError, IndexError)


class CheckpointKeeper(TrainerCallback):
    """Writes the manifest of each checkpoint when all ranks have written theirs, then deletes old ones.

    It comes after all other callbacks, which may add files to a checkpoint.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.unfinished: Path | None = None

    def begin(self, folder: Path, args: TrainingArguments, num_bytes: int) -> None:
        """Make the folder of a checkpoint, on all ranks, before anything is written into it. One of that name is
        deleted: what was cut off there would be mixed with what comes.

        Args:
            num_bytes: About what the checkpoint takes, where there is none yet that says it.

        Raises:
            NoSpaceError: The disk has less free than that, or than the newest checkpoint has taken.
        """
        (problem,) = broadcast_object_list([lack_of_space(folder, num_bytes) if args.should_save else None])
        if problem is not None:
            raise NoSpaceError(problem)
        self.limit, args.save_total_limit = args.save_total_limit, None  # `Trainer` would count what is not whole
        if args.should_save:
            if folder.exists():
                discard(folder)
            self.unfinished = folder
            begin_checkpoint(folder)
        PartialState().wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the checkpoint of this step; after that it counts, unless something in it is not finite."""
        args.save_total_limit = self.limit
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        PartialState().wait_for_everyone()
        if args.should_save:
            problem = not_finite(folder)
            if problem is not None:
                logger.warning("%s %s: no run goes on from it", folder, problem)
            complete_checkpoint(folder, problem)
            self.unfinished = None
            rotate(folder, args.save_total_limit, state.best_model_checkpoint)
        PartialState().wait_for_everyone()

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """A context in which a run saves, and of a checkpoint that cannot be written nothing is left.

        Raises:
            OSError: There was one.
        """
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch's
            if self.unfinished is None:
                raise
            if self.unfinished.exists():
                discard(self.unfinished)
            raise OSError(
                f"{self.unfinished} cannot be written ({error}); make room, and go on with "
                "--training.resume_from_checkpoint true"
            ) from error


class NoSpaceError(ValueError):
    """A checkpoint for which the disk has no room; those before it are as they were."""


def bytes_of_checkpoint(parameters: Iterable[nn.Parameter], has_moments: bool = True) -> int:
    """Bytes of the weights of a checkpoint, and for those that learn two moments of float32, as Adam has them, if it
    has any. Other optimizers have fewer, and DeepSpeed and FSDP keep the weights once more.
    """
    is_split = is_deepspeed_zero3_enabled()
    total = 0
    for parameter in parameters:
        count = parameter.ds_numel if is_split else parameter.numel()
        total += count * (parameter.element_size() + 8 * (parameter.requires_grad and has_moments))
    return total


def lack_of_space(folder: Path, num_bytes: int) -> str | None:
    """Why a checkpoint cannot be saved, in a sentence with its numbers; None if there is room.

    Args:
        folder: That of the checkpoint; what is there already is going to be deleted.
        num_bytes: About what it takes; the newest whole one of the run, where there is one, says it better.
    """
    newest = next(filter(looks_whole, reversed(checkpoints_in(folder.parent))), None)
    if newest is not None:
        num_bytes = size_of(newest)
    place = next(path for path in folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free + size_of(folder)
    if num_bytes <= free:
        return None
    needed, there = num_bytes / 2**20, free / 2**20
    return (
        f"{folder} needs about {needed:.1f} MiB, and {there:.1f} MiB are free there; make room, or lower "
        "training.save_total_limit, and go on with --training.resume_from_checkpoint true"
    )


def rotate(newest: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest whole checkpoints of a run, by their steps, and those that are not whole.

    Those of later steps are left alone: the run went on from an earlier one, and replaces them when it is there.

    Args:
        newest: The checkpoint that was saved last, which stays.
        limit: How many whole ones stay, at least 1; None for all, and then only what was cut off is deleted.
        best: The checkpoint that stays in any case.
    """
    for path in newest.parent.glob(f"{DELETED}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)
    kept = {newest.name, Path(best).name if best else newest.name}
    last_step = number_of(newest)
    checkpoints = [path for path in checkpoints_in(newest.parent) if number_of(path) <= last_step]
    whole = [path for path in checkpoints if looks_whole(path)]
    for path in checkpoints:
        if path.name not in kept and path not in whole and (limit or is_unfinished(path)):
            discard(path)
    if not limit:
        return
    excess = len(whole) - max(limit, len(kept & {path.name for path in whole}))
    for path in [path for path in whole if path.name not in kept][: max(excess, 0)]:
        discard(path)


def looks_whole(folder: Path) -> bool:
    """Whether a checkpoint is whole, as far as names and sizes tell."""
    return (folder / TRAINER_STATE_NAME).is_file() and manifest_fault(folder, with_digests=False) is None


def discard(folder: Path) -> None:
    """Delete a checkpoint, which is none any more from the first moment on."""
    renamed = folder.with_name(f"{DELETED}{folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    folder.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)  # what is left, the next rotation deletes


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints in that of a run, whole or not, by their steps."""
    paths = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return sorted((path for path in paths if CHECKPOINT_NAME.fullmatch(path.name)), key=number_of)


def number_of(folder: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(CHECKPOINT_NAME.fullmatch(folder.name)[1])


# --------------------------------------------------------------------------------------------------------- the manifest


def begin_checkpoint(folder: Path) -> None:
    """Make the folder of a checkpoint, marked as unfinished before any other file is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, {"format": MANIFEST_FORMAT, "files": None})


def complete_checkpoint(folder: Path, problem: str | None = None) -> None:
    """Mark the folder of a checkpoint as finished, all of it being on the disk.

    Args:
        folder: Folder with all files of all ranks.
        problem: Why no run should go on from it, as the end of a sentence that begins with the folder.
    """
    files = {}
    for path in files_of_checkpoint(folder):
        synchronize(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for path in {folder, *(path.parent for path in files_of_checkpoint(folder))}:
        synchronize(path)
    write_manifest(folder, {"format": MANIFEST_FORMAT, "files": files, "problem": problem})
    synchronize(folder.parent)


def manifest_fault(folder: Path, with_digests: bool = True) -> str | None:
    """How a folder differs from its manifest, as the end of a sentence that begins with the folder; None if it does
    not, or has none. Files that the manifest does not name do no harm.

    Args:
        folder: Folder of a checkpoint.
        with_digests: Whether the files are read; their sizes are always compared, and first.
    """
    try:
        manifest = read_manifest(folder) if has_manifest(folder) else {"files": {}}
    except ValueError as error:
        return f"has a damaged {MANIFEST_NAME} ({error})"
    files = manifest["files"]
    if files is None:
        return UNFINISHED
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if (size := path.stat().st_size) != entry["size"]:
            return f"has a damaged {name} ({size} bytes, and {entry['size']} when it was saved)"
    if manifest.get("problem"):
        return manifest["problem"]
    for name, entry in files.items() if with_digests else ():
        if sha256_of(folder / name) != entry["sha256"]:
            return f"has a damaged {name} (its content is not what was saved)"
    return None


def is_unfinished(folder: Path) -> bool:
    return manifest_fault(folder, with_digests=False) == UNFINISHED


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest: those that were saved by older code have none."""
    return (folder / MANIFEST_NAME).exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, with sizes and digests by file under "files", None of what was not finished. ValueError
    if the format is not known, or files are not described or lie outside of the folder.
    """
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("no JSON object")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, and known is {MANIFEST_FORMAT}")
    files = manifest.setdefault("files", {})
    if files is None:
        return manifest
    if not isinstance(files, dict) or not files:
        raise ValueError("it names no files")
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is outside of the folder")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"{name!r} has no size and sha256")
    return manifest


def files_of_checkpoint(folder: Path) -> Iterator[Path]:
    """The files that belong to a checkpoint, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(path.match(pattern) for pattern in IGNORED):
            yield path


def size_of(folder: Path) -> int:
    """Bytes of the files that belong to a checkpoint; 0 where there is none."""
    return sum(path.stat().st_size for path in files_of_checkpoint(folder))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write a manifest of which nobody ever reads half."""
    beside = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    beside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    synchronize(beside)
    beside.replace(folder / MANIFEST_NAME)
    synchronize(folder)


def synchronize(path: Path) -> None:
    """See to it that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------- files of tensors


def unreadable(folder: Path) -> str | None:
    """The first file of a checkpoint that is damaged, or holds other things than tensors and plain values, as the end
    of a sentence that begins with the folder; None if there is none. DeepSpeed's files are unpickled without limits
    when a run goes on from them.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # reads the header and compares it with the file's size
                pass
        except SafetensorError as error:
            return f"has a damaged {path.name} ({error})"
    for path in matching_files(folder, PICKLES):
        name = path.relative_to(folder).as_posix()
        if not zipfile.is_zipfile(path):
            return f"has a damaged {name}"
        try:
            load_tensors(path)
        except pickle.UnpicklingError:
            return f"has a {name} that holds {unsafe_contents(path)}; such a file may run code when it is loaded"
        except DAMAGES as error:
            return f"has a damaged {name} ({' '.join(str(error).split())[:100]})"
    for path in sorted(folder.glob(f"*/{METADATA_NAME}")):
        name = path.parent.name
        try:
            for _ in entries_of(path.parent, read_metadata(path.parent), only_values=True):
                pass
        except pickle.UnpicklingError as error:
            return f"has a folder {name} that holds {error}; such a file may run code when it is loaded"
        except (*DAMAGES, OSError) as error:
            return f"has a damaged folder {name} ({' '.join(str(error).split())[:100]})"
    return None


def corrupt(folder: Path) -> str | None:
    """The same as `unreadable`, by the checksums in the files themselves, for checkpoints without a manifest."""
    for path in matching_files(folder, PICKLES):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return f"has a damaged {path.relative_to(folder).as_posix()}"
    return None


def not_finite(folder: Path) -> str | None:
    """Where the first weight or state of an optimizer is NaN or infinite, as the end of a sentence that begins with the
    folder; None if all are finite.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not is_finite(file.get_tensor(name)):
                    return f"has weights that are not finite ({name} in {path.name})"
    for path in matching_files(folder, OPTIMIZER_FILES):
        for name, tensor in tensors_of(load_tensors(path)):
            if not is_finite(tensor):
                return f"has states that are not finite ({name} in {path.relative_to(folder).as_posix()})"
    for path in sorted(folder.glob(f"{OPTIMIZER_FOLDER}/{METADATA_NAME}")):
        for name, value in entries_of(path.parent, read_metadata(path.parent)):
            if isinstance(value, torch.Tensor) and not is_finite(value):
                return f"has states that are not finite ({name} in {path.parent.name})"
    return None


def load_tensors(path: Path) -> Any:
    """What is in a file of `torch.save`, its tensors mapped and not read; pickle.UnpicklingError for more than tensors,
    plain values and DeepSpeed's own records.
    """
    with numpy_safe_globals(), safe_globals(deepspeed_records(path)):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def deepspeed_records(path: Path) -> list[type]:
    """Classes of plain values in the states of DeepSpeed's optimizers; none for files outside of its folders, and where
    it is not installed, as nobody loads them then.
    """
    if not is_deepspeed_available() or not any(parent.match(DEEPSPEED_FOLDERS) for parent in path.parents):
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def unsafe_contents(path: Path) -> str:
    """What a file holds besides tensors and plain values, in words."""
    try:
        with numpy_safe_globals(), safe_globals(deepspeed_records(path)):
            names = get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, ValueError):
        names = []
    return ", ".join(names[:3]) or "more than tensors and plain values"


def tensors_of(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists, with the keys that lead to them."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from tensors_of(value, f"{name}.{index}" if name else str(index))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # float8, of which torch knows little
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a folder that match any of the patterns, each once."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
