"""Adapters: whose they are, and how they get onto a model."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from model.step_lora import CONFIG as STEP_LORA
from model.step_lora import load_step_lora
from model.weight_files import DeclaredWeight, declared_weights

from .checkpoints import ADAPTERS, adapters_in, blamed_on, find_checkpoint, is_adapter, read_json, weight_files
from .generation_config import FLAG, is_whole, real

if TYPE_CHECKING:
    from peft import LoraConfig

BASE_MODEL = "base_model.json"
LONGEST_PATH = 4096
LORA, LORA_WEIGHTS = "adapter_config.json", ADAPTERS["adapter_config.json"]
DOWN = (".lora_A.weight", ".lora_embedding_A")
PLAIN_NAME = re.compile(r"\^?[\w.]+")


def is_positive(value: Any) -> bool:
    return real(0)[0](value) and value > 0


def is_rank(value: Any) -> bool:
    return is_whole(value) and value > 0


def is_pattern(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether it maps plain names to values of a kind."""
    return value is None or (
        isinstance(value, dict) and all(PLAIN_NAME.fullmatch(name) and fits(part) for name, part in value.items())
    )


# What an adapter_config.json may say, and how that is said.
LORA_RULES = {
    "r": (is_rank, "a whole number of at least 1"),
    "lora_alpha": (is_positive, "a number above 0"),
    "rank_pattern": (lambda value: is_pattern(value, is_rank), "names with whole numbers of at least 1"),
    "alpha_pattern": (lambda value: is_pattern(value, is_positive), "names with numbers above 0"),
    "init_lora_weights": (
        lambda value: isinstance(value, bool) or value in ("gaussian", "eva", "orthogonal"),
        "true, or another that leaves the base as it is",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), FLAG),
    "modules_to_save": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of names",
    ),
}
# What makes another model of the base, or another kind of adapter.
NOT_READ = {"layer_replication", "megatron_config", "target_parameters", "trainable_token_indices", "use_bdlora"}
NOT_READ |= {"use_qalora", "alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config"}
NOT_READ |= {"monteclora_config"}


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was trained on."""

    path: str
    """Folder of its weights."""
    fingerprint: str
    """Of its weights; see `fingerprint_of`."""

    def save(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write it beside an adapter; `state_dict` is not looked at."""
        (Path(folder) / BASE_MODEL).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """See to it that the adapter in a folder was trained on this model.

        Raises:
            ValueError: it was not.
        """
        there = read_json(Path(folder) / BASE_MODEL)
        if there.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{folder} is an adapter of another base: of the weights that were in {there.get('path')}, not of "
                f"those in {self.path}; give the base that it was trained on"
            )


def base_model(folder: Path) -> BaseModel:
    """The model in a folder, as the base of adapters.

    Raises:
        ValueError: the folder holds an adapter itself.
    """
    if is_adapter(folder):
        raise ValueError(
            f"{folder} holds an adapter, and not the model below it: merge them first with `python convert.py merge "
            f"{folder} --output FOLDER`, and use what that writes."
        )
    return BaseModel(str(folder.absolute()), fingerprint_of(folder))


def fingerprint_of(folder: Path) -> str:
    """A digest of names, shapes and types of all weights of a model, and of the first row of each."""
    digest = blake2b(digest_size=16)
    for path in weight_files(folder):
        with safe_open(folder / path, framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                digest.update(repr((name, part.get_shape(), part.get_dtype())).encode())
                row = part[:1] if part.get_shape() else file.get_tensor(name).reshape(1)
                digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_of(adapter: Path, base: str | Path | None = None) -> Path:
    """The folder of the model that an adapter belongs to.

    Args:
        base: where it is now; by default where it was in training.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another model is there.
    """
    is_ours = (adapter / BASE_MODEL).is_file()
    if base is None:
        recorded = read_json(adapter / BASE_MODEL if is_ours else adapter / "adapter_config.json")
        base = recorded.get("path" if is_ours else "base_model_name_or_path")
        if not isinstance(base, str) or not 0 < len(base) < LONGEST_PATH:
            raise ValueError(f"{adapter} is an adapter, but of no base that could be found: {repr(base)[:60]}")
    try:
        folder = find_checkpoint(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter} is an adapter, and its base cannot be loaded: {error} Where it has moved, merge them with "
            f"`python convert.py merge {adapter} --base FOLDER --output FOLDER`."
        ) from error
    if is_ours:
        base_model(folder).load(adapter)
    return folder


def load_adapters(model: PreTrainedModel, folder: Path, merge: bool = True) -> PreTrainedModel:
    """The model with the adapters of a folder.

    Args:
        merge: whether LoRA is added to the weights, which rounded ones cannot bear, or stays beside them.

    Raises:
        ValueError: they are for layers that the model does not have.
    """
    adapters = adapters_in(folder)
    if STEP_LORA in adapters:
        load_step_lora(model, folder)
    if "adapter_config.json" not in adapters:
        return model
    lora = load_lora(model, folder)
    if not merge:
        return lora.get_base_model()
    with blamed_on(f"{folder} cannot be merged into {model.name_or_path}", "use another adapter, or another --dtype."):
        return lora.merge_and_unload(safe_merge=True)


def load_lora(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """PEFT's model with the adapter of a folder; ValueError if it is no LoRA, for layers that the model does not have,
    or lacks weights, of which PEFT would only warn.
    """
    from peft import PeftModel, get_peft_model_state_dict  # takes a second, for those who need it

    what = f"{folder} is an adapter of another base, or damaged; it does not fit {model.name_or_path}"
    weights = declared_weights([folder / LORA_WEIGHTS])
    with blamed_on(what, "use another."), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about what PEFT still asks for
        config = checked_lora_config(read_json(folder / LORA), weights)
        lora = PeftModel.from_pretrained(model, folder, config=config, torch_device=str(model.device))
        different = sorted(get_peft_model_state_dict(lora).keys() ^ weights.keys())
        if different:
            raise ValueError(f"{different[0][:80]} is on one side only")
    return lora


def checked_lora_config(content: Mapping[str, Any], weights: Mapping[str, DeclaredWeight]) -> "LoraConfig":
    """What PEFT wants to know of an adapter, after it is compared with its weights, whose size it decides.

    The layers are those that there are weights for. Patterns of names, in a file from elsewhere, may take for ever to
    match; so only plain names are patterns here. ValueError if it is none of a LoRA, or not of these weights.
    """
    from peft import LoraConfig

    kind = content.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {repr(kind)[:60]}; only LORA is read")
    for name, (fits, what) in LORA_RULES.items():
        if name in content and not fits(content[name]):
            raise ValueError(f"{name} is {repr(content[name])[:60]}; give {what}")
    unread = sorted(name for name in NOT_READ if content.get(name))
    if unread:
        raise ValueError(f"{unread[0]} is {repr(content[unread[0]])[:60]}, which is not read here")
    down = {name: weight for name, weight in weights.items() if name.endswith(DOWN) and weight.shape}
    if not down:
        raise ValueError("there are no weights of a LoRA in it")
    largest, ranks = max(weight.shape[0] for weight in down.values()), (content.get("rank_pattern") or {}).values()
    wrong = [rank for rank in (content.get("r", largest), *ranks) if rank > largest]
    if wrong:
        raise ValueError(f"its rank is {wrong[0]}, but that of its weights {largest}")
    # How the weights began, and which layers they are for, is known from the weights.
    options = {name: content[name] for name in LORA_RULES if name in content and name != "init_lora_weights"}
    targets = sorted(name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in down)
    return LoraConfig(**{**options, "target_modules": targets, "inference_mode": True})
