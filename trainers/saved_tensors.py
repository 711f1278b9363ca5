"""Files of tensors in a checkpoint, read without running what may be in them."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers.trainer_pt_utils import safe_globals as numpy_safe_globals

DEEPSPEED_FOLDERS = "global_step*"
# What goes on from a checkpoint reads; training_args.bin, also a pickle, is read by nobody.
PICKLES = ("*.pt", "*.pth", "optimizer.bin", f"{DEEPSPEED_FOLDERS}/**/*.pt")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", f"{DEEPSPEED_FOLDERS}/**/*.pt")


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
    for path in matching(folder, PICKLES):
        name = path.relative_to(folder).as_posix()
        if not zipfile.is_zipfile(path):
            return f"has a damaged {name}"
        try:
            load(path)
        except pickle.UnpicklingError:
            return f"has a {name} that holds {unsafe_contents(path)}; such a file may run code when it is loaded"
        except (RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError, IndexError) as error:
            return f"has a damaged {name} ({' '.join(str(error).split())[:100]})"
    return None


def corrupt(folder: Path) -> str | None:
    """As `unreadable`, by the checksums that are in the files themselves, for checkpoints without a manifest."""
    for path in matching(folder, PICKLES):
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
    for path in matching(folder, OPTIMIZERS):
        for name, tensor in tensors_of(load(path)):
            if not is_finite(tensor):
                return f"has states that are not finite ({name} in {path.relative_to(folder).as_posix()})"
    return None


def load(path: Path) -> Any:
    """What is in a file of `torch.save`, its tensors mapped and not read.

    Raises:
        pickle.UnpicklingError: there is more in it than tensors, plain values and DeepSpeed's own records.
    """
    with numpy_safe_globals(), safe_globals(deepspeed_records() if is_deepspeeds(path) else []):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def is_deepspeeds(path: Path) -> bool:
    """Whether a file is one of those that DeepSpeed writes into folders of its own."""
    return any(parent.match(DEEPSPEED_FOLDERS) for parent in path.parents)


def deepspeed_records() -> list[type]:
    """Classes of plain values in the states of DeepSpeed's optimizers; none where it is not installed, as nobody loads
    them then.
    """
    if not is_deepspeed_available():
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def unsafe_contents(path: Path) -> str:
    """What a file holds besides tensors and plain values, in words."""
    try:
        with numpy_safe_globals(), safe_globals(deepspeed_records() if is_deepspeeds(path) else []):
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


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a folder that match any of the patterns, each once."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
