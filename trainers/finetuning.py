"""What a fine-tuning run starts from, and which low-rank adapters it adds where."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from peft import LoraConfig
from torch import nn

ALL_LINEAR = "all-linear"
# Patterns of the names of modules.
PARTS = {
    "prelude": "model.prelude.*",
    "core": "model.core.*",
    "coda": "model.coda.*",
    "vision": "model.readers.image.encoder.*",
    "audio": "model.readers.audio.encoder.*",
    "projectors": "model.readers.*.projector.*",
}


@dataclass
class ModelOptions:
    """The checkpoint that is tuned."""

    path: str = field(default="", metadata={"is_path": True})
    """Folder of a run or of a checkpoint, or a name on the Hugging Face hub; it has to be given."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; by default that of the checkpoint. Adapters are float32."""
    num_steps: int | None = None
    """Mean of the core steps in training, and those of evaluation, at least 1; by default the checkpoint's."""
    backprop_steps: int | None = None
    """Last core steps that carry gradient, at least 1; by default as many as in the checkpoint's own training."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(".path: it is missing; give the folder of a checkpoint, such as runs/recurrent_lm")
        for name in ("num_steps", "backprop_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f".{name}: {value} is no number of steps; give at least 1")


@dataclass
class TargetOptions:
    """Linear layers by part of the model: names such as [qkv_proj, down_proj], or "all-linear"."""

    prelude: str | list[str] | None = None
    """Layers that run once, in front of the core."""
    core: str | list[str] | None = None
    """Layers that are iterated, and the injection (`proj` or `gate`); one delta serves all steps."""
    coda: str | list[str] | None = None
    """Layers that run once, behind the core."""
    vision: str | list[str] | None = None
    """The encoder of images."""
    audio: str | list[str] | None = None
    """The encoder of sound."""
    projectors: str | list[str] | None = None
    """What maps features of images and sound onto the model's width."""


@dataclass
class PeftOptions:
    """Low-rank adapters by PEFT (LoRA, Hu et al. 2021, arXiv 2106.09685): W x + alpha / rank B A x."""

    rank: int = 8
    """Of the deltas, at least 1."""
    alpha: int = 16
    """Scale of the deltas, times the rank; at least 1."""
    dropout: float = 0.0
    """Of what goes into the deltas; at least 0, below 1."""
    use_rslora: bool = False
    """Divide by the square root of the rank instead, so that large ranks learn as fast as small ones (Kalajdzievski
    2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Learn the length of each row of the sum apart from its direction (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    target_modules: TargetOptions = field(default_factory=TargetOptions)
    """Where the adapters are; at least one part has to be named."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f".dropout: {self.dropout} is no share; give at least 0 and less than 1")


@dataclass
class StepLoraOptions:
    """A low-rank delta of the core's weights for each of its first steps, instead of one for all."""

    num_steps: int = 8
    """Steps that have a delta, the first ones, at least 1; later steps have none."""
    rank: int = 4
    """Of the deltas, at least 1."""
    alpha: int = 8
    """Scale of the deltas, times the rank; at least 1."""
    target_modules: str | list[str] = ALL_LINEAR
    """Linear layers of the core, by name, or "all-linear"."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha)
        if self.num_steps < 1:
            raise ValueError(f".num_steps: {self.num_steps} steps have no delta; give at least 1")


def check_low_rank(rank: int, alpha: int) -> None:
    """Raises ValueError for a rank or a scale below 1."""
    for name, value in (("rank", rank), ("alpha", alpha)):
        if value < 1:
            raise ValueError(f".{name}: {value} is too small; give at least 1")


# ------------------------------------------------------------------------------------------------ options to adapters


def lora_config(options: PeftOptions, model: nn.Module) -> LoraConfig:
    """What PEFT wants to know.

    Raises:
        ValueError: as `find_targets`.
    """
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        target_modules=find_targets(model, options.target_modules),
        task_type="CAUSAL_LM",
    )


def find_targets(model: nn.Module, options: TargetOptions) -> list[str]:
    """The full names of the linear layers that the options name.

    Raises:
        ValueError: no part is named, or a name matches nothing; says what there is.
    """
    layers, found = linear_layers(model), []
    wanted = {
        "prelude": options.prelude,
        "core": options.core,
        "coda": options.coda,
        "vision": options.vision,
        "audio": options.audio,
        "projectors": options.projectors,
    }
    for part, names in wanted.items():
        if names is not None:
            found += match(layers, part, names, f"peft.target_modules.{part}")
    if not found:
        raise ValueError(f"peft.target_modules: no part is named; this model has {describe(layers)}")
    return found


def step_lora_targets(model: nn.Module, names: str | list[str], lora: LoraConfig | None = None) -> list[str]:
    """The linear layers of the core that are named, or all of them, as the core calls them.

    Args:
        lora: What is added beside it.

    Raises:
        ValueError: as `find_targets`; for layers with DoRA, which would scale the deltas of steps as well, but no more
            when it is merged.
    """
    layers = match(linear_layers(model), "core", names, "step_lora.target_modules")
    both = [layer for layer in layers if lora is not None and lora.use_dora and layer in lora.target_modules]
    if both:
        raise ValueError(
            f"step_lora.target_modules: {last_name(both[0])} of the core has DoRA as well, which would scale the "
            "deltas of steps; set peft.use_dora to false, or name other layers"
        )
    return [layer.removeprefix("model.core.") for layer in layers]


def linear_layers(model: nn.Module) -> dict[str, list[str]]:
    """The full names of the linear layers of each part that has any."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parts = {part: [name for name in linear if fnmatchcase(name, pattern)] for part, pattern in PARTS.items()}
    return {part: names for part, names in parts.items() if names}


def match(layers: dict[str, list[str]], part: str, names: str | list[str], key: str) -> list[str]:
    """The full names of the layers of a part that are named, or of all of them.

    Raises:
        ValueError: for a part without linear layers, and a name that none of them has.
    """
    if part not in layers:
        raise ValueError(f"{key}: {part} has no linear layers; this model has {describe(layers)}")
    if names == ALL_LINEAR:
        return layers[part]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in map(last_name, layers[part]):
            known = ", ".join(dict.fromkeys(map(last_name, layers[part])))
            raise ValueError(
                f"{key}: {name!r} matches nothing; the linear layers of {part} are {known}; or {ALL_LINEAR}"
            )
    return [layer for layer in layers[part] if last_name(layer) in names]


def last_name(name: str) -> str:
    """`qkv_proj` of `model.core.layers.0.attention.qkv_proj`."""
    return name.rpartition(".")[2]


def describe(layers: dict[str, list[str]]) -> str:
    """The parts and the names of their layers."""
    return ", ".join(f"{part} ({', '.join(dict.fromkeys(map(last_name, names)))})" for part, names in layers.items())
