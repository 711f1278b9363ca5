"""Which folder holds what a run left behind, whole: a model, or an adapter beside which its model is not."""

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from model import CODEC_CONFIGS, MODELS, MediaConfig
from model.backbones import reason_of

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
PROCESSOR = "processor_config.json"
LARGEST_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read: tokenizers of a quarter of a million tokens have about 30 MB."""
# The files of adapters, PEFT's and ours: what they are, and their weights.
ADAPTERS = {"adapter_config.json": "adapter_model.safetensors", "step_lora.json": "step_lora.safetensors"}


def reads_media(model_type: str) -> bool:
    """Whether models of this type come with a processor."""
    return any(model_type == config.model_type and issubclass(config, MediaConfig) for config in MODELS)


def is_codec(folder: Path) -> bool:
    """Whether a folder holds an autoencoder of images or a vocoder, which have no tokenizer."""
    try:
        found = read_json(folder / "config.json").get("model_type")
    except (OSError, ValueError):
        return False
    return found in [config.model_type for config in CODEC_CONFIGS]


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete weights of a folder: its own, or those of a checkpoint-N in it with more steps, as there are
    where a finished run went on. Warnings name what is incomplete, and weights of the folder that are not the newest.

    Args:
        path: The folder, or a model's name on the hub, owner/name, unless there is a local folder "owner".

    Raises:
        FileNotFoundError: the path does not exist, is no folder, or holds no complete model; the hub does not give it.
    """
    folder = Path(path)
    if not folder.parent.exists() and HUB_NAME.fullmatch(str(path)):
        folder = fetch(str(path))
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: give the folder of a run or of a checkpoint.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file: give the folder of a run or of a checkpoint.")
    named = ((CHECKPOINT_NAME.fullmatch(child.name), child) for child in folder.iterdir() if child.is_dir())
    checkpoints = sorted((int(match[1]), child) for match, child in named if match)
    own = [(trained_steps(folder), folder)] if has_weights(folder) else []
    for _, candidate in sorted([*own, *checkpoints], key=lambda pair: pair[0], reverse=True):
        reason = incompleteness(candidate)
        if reason is None:
            if own and candidate != folder:
                logger.warning("%s is loaded, not the weights in %s itself", candidate, folder)
            return candidate
        if checkpoints:  # else the error below says it
            logger.warning("%s is passed over: it %s", candidate, reason)
    also = f", nor do its {len(checkpoints)} checkpoints" if checkpoints else " and no checkpoint-N folder"
    raise FileNotFoundError(
        f"{folder} holds no complete model (it {incompleteness(folder)}){also}: give the folder of a run or of a "
        "checkpoint."
    )


def fetch(name: str) -> Path:
    """The folder in the cache of a model on the hub, downloaded if it is not there yet.

    Raises:
        FileNotFoundError: there is no such model, or no network.
    """
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name} is no folder, and the hub does not give a model of that name ({reason}): give the folder of a run "
            "or of a checkpoint, or a name on the hub."
        ) from error


def has_weights(folder: Path) -> bool:
    """Whether there are weights, complete or not."""
    return is_adapter(folder) or any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters alone."""
    return bool(adapters_in(folder)) and not any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def adapters_in(folder: Path) -> dict[str, str]:
    """Those of `ADAPTERS` that a folder holds."""
    return {config: weights for config, weights in ADAPTERS.items() if (folder / config).is_file()}


def trained_steps(folder: Path) -> float:
    """Optimizer steps behind the weights of a folder; infinite, newer than all, where no trainer_state.json says so."""
    try:
        steps = read_json(folder / "trainer_state.json")["global_step"]
    except (OSError, ValueError, KeyError):
        return math.inf
    return steps if isinstance(steps, int) else math.inf


def incompleteness(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, as the end of a sentence that begins with "it"; None if it is one."""
    needed = list(adapters_in(folder)) if is_adapter(folder) else ["config.json"]
    if not (is_adapter(folder) or is_codec(folder)):
        needed += TOKENIZER
    for name in needed:
        if not (folder / name).is_file():
            return f"has no {name}"
    if not has_weights(folder):
        return f"has no {WEIGHTS}"
    try:
        for name in needed:
            read_json(folder / name)
        if "config.json" in needed and reads_media(read_json(folder / "config.json").get("model_type")):
            if not (folder / PROCESSOR).is_file():
                return f"has no {PROCESSOR}"
            read_json(folder / PROCESSOR)
        files = weight_files(folder)
    except ValueError as error:
        return f"is damaged: {error}"
    for name in files:
        if not (folder / name).is_file():
            return f"lacks the weights file {name}"
        try:
            with safe_open(folder / name, framework="pt"):  # reads the header and compares it with the file's size
                pass
        except SafetensorError as error:
            return f"has a damaged {name} ({error})"
    return None


def weight_files(folder: Path) -> list[str]:
    """Names of the files with weights; ValueError for an index that names none, or one that is elsewhere."""
    if is_adapter(folder):
        return sorted(adapters_in(folder).values())
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()) or not files:
        raise ValueError(f"{folder / INDEX} has no weight_map from weights to files")
    names = sorted(set(files.values()))
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise ValueError(f"{folder / INDEX} names {outside[0][:80]!r}, which is no safetensors file beside it")
    return names


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError names the file if it is none, or is too large or nested too deeply."""
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} is no regular file")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes, more than any such file needs ({LARGEST_JSON})")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def check_files(folder: Path) -> None:
    """Raises ValueError if there is anything in a checkpoint that is no file or folder, such as a pipe, from which
    libraries would read for ever. Links to files are files.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no regular file; take it out of the checkpoint")


@contextmanager
def blamed_on(what: str, advice: str) -> Iterator[None]:
    """Turns whatever a library raises about the content of a file, which is of all kinds, into a ValueError of one line
    that names the file.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({reason_of(error)}): {advice}") from error
