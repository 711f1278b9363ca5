"""Reading a checkpoint of another project: its configuration, and its weights, each of which is taken once."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.weight_files import check_finite, refuse_weights

from ..checkpoints import blamed_on, check_files, fetch, has_weights, read_json, weight_files

PICKLED = "pytorch_model.bin"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder without any of these has no tokenizer."""


class ForeignCheckpoint:
    """The configuration and the weights of a model of another project.

    Args:
        source: Its folder, or its name on the hub.

    Raises:
        FileNotFoundError: There is no such folder or name, or a file is missing.
        ValueError: A file is damaged, or is no checkpoint.
    """

    def __init__(self, source: str | Path):
        self.folder = Path(source) if Path(source).exists() else fetch(str(source))
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is a file: give the folder of a checkpoint")
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{self.folder} has no config.json: give the folder of a checkpoint")
        check_files(self.folder)
        self.config, self.weights = read_json(self.folder / "config.json"), read_weights(self.folder)

    def option(self, name: str, kind: type | tuple[type, ...] = int, default: Any = None) -> Any:
        """An entry of the configuration. ValueError: it is missing without a default, or of another type."""
        value = self.config.get(name, default)
        is_bool = isinstance(value, bool) and kind is not bool
        if value is None or not isinstance(value, kind) or is_bool:
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise ValueError(f"{name} in {self.folder / 'config.json'} is {value!r:.60}; a {wanted} is needed")
        return value

    def expect(self, **wanted: Any) -> None:
        """Raises ValueError for an entry that has another value than the one that is known here; one that is missing
        has it.
        """
        for name, value in wanted.items():
            found, known = self.config.get(name, value), value if isinstance(value, tuple) else (value,)
            if found not in known:
                listed = " or ".join(map(repr, known))
                raise ValueError(
                    f"{name} in {self.folder / 'config.json'} is {found!r:.60}, which is not supported; it must be "
                    f"{listed}"
                )

    def take(self, name: str) -> torch.Tensor:
        """A weight, which is then not left over. ValueError: it is missing."""
        if name not in self.weights:
            refuse_weights(self.folder, "lacks", [name])
        return self.weights.pop(name)

    def drop(self, is_known: Callable[[str], bool]) -> None:
        """Weights that can be computed, such as tables of positions, are left out."""
        self.weights = {name: weight for name, weight in self.weights.items() if not is_known(name)}

    def tokenizer(self, config: MegaTransformerTextConfig) -> PreTrainedTokenizerBase | None:
        """The tokenizer that stands beside the weights, if there is one; `config` is that of our model, since
        transformers may not know the other.
        """
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        with blamed_on(f"the tokenizer in {self.folder}", "use another checkpoint"):
            return AutoTokenizer.from_pretrained(self.folder, config=config, local_files_only=True)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder by their names, from safetensors, or, where there are none, from files of torch, of which
    nothing but tensors is read.

    Raises:
        FileNotFoundError: There are no weights, or a file of them is missing.
        ValueError: A file is damaged, holds anything but tensors, or is named twice.
    """
    found: dict[str, torch.Tensor] = {}
    for path in weight_paths(folder):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy the whole checkpoint")
        for name, weight in load_weights(path).items():
            if not isinstance(weight, torch.Tensor):
                raise ValueError(f"{path} holds a {type(weight).__name__} under {name!r:.60}, and no tensor")
            if name in found:
                raise ValueError(f"{name:.80} stands in {path} and in another file of {folder}")
            found[name] = weight
    return found


def weight_paths(folder: Path) -> list[Path]:
    """The files of the weights."""
    if has_weights(folder):
        return [folder / name for name in weight_files(folder)]
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    raise FileNotFoundError(f"{folder} has no weights: neither safetensors nor one {PICKLED}; save it as safetensors")


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The content of a file. ValueError: it is damaged, or would run code if it were read."""
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason}): use another checkpoint") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, and no weights by their names")
    return found


def fill(
    config: MegaTransformerTextConfig, weights: dict[str, torch.Tensor], source: ForeignCheckpoint
) -> MegaTransformerForCausalLM:
    """The model of a configuration with these weights, which it needs all, and no others.

    Raises:
        ValueError: Weights are missing, of another shape, integers, infinite, or left over, also in the source.
    """
    refuse_weights(source.folder, "has unexpected", source.weights)
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    with torch.device("meta"):
        expected = MegaTransformerForCausalLM(config).state_dict()
    refuse_weights(source.folder, "lacks", expected.keys() - weights.keys())
    refuse_weights(source.folder, "has unexpected", weights.keys() - expected.keys())
    different = [name for name, weight in weights.items() if weight.shape != expected[name].shape]
    refuse_weights(source.folder, "has of another shape", different)
    integers = [name for name, weight in weights.items() if not weight.is_floating_point()]
    refuse_weights(source.folder, "has no floating-point numbers in", integers)
    with no_init_weights():
        model = MegaTransformerForCausalLM(config).to(weights["model.embed_tokens.weight"].dtype)
    model.load_state_dict(weights)
    check_finite(source.folder, model)
    return model.eval()
