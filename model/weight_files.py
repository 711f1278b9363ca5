"""Weights in files: what their headers say, compared with a model before anything of its size is allocated."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig, PreTrainedModel

from .backbones import Backbone

LARGEST_TABLE = 2**26
"""Numbers of what a model computes for itself, such as positions, if the weights are fewer."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the name of its type in a header."""
OTHERS = {"F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ROUNDED = ("U8", "I8")
"""Types of what rounded weights are stored as."""
COMPANIONS = ("SCB", "weight_format")
"""Names of what stands beside weights of 8 bits; that of 4 bits begins with the name of its weight."""
PARTS_OF_OTHERS = (
    ("vision_config", "backbone", "backbone_config"),
    ("audio_config", "backbone", "backbone_config"),
    ("image_writer_config", "codec_name_or_path", "codec_config"),
    ("audio_writer_config", "vocoder_name_or_path", "vocoder_config"),
)
"""Parts of a configuration that may name another model, and where they hold the configuration of that."""
MOST_LISTED, LONGEST_NAME = 3, 80


@dataclass(frozen=True)
class DeclaredWeight:
    """A weight as the header of its file has it: its shape, and the name of its type, such as "F32"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_numbers(self) -> int:
        """The most numbers that it can stand for: two in a byte."""
        return 2 * math.prod(self.shape) * {**FLOATS, **OTHERS}.get(self.dtype, 8)


def declared_weights(paths: Iterable[Path]) -> dict[str, DeclaredWeight]:
    """The weights of all files, by their names; only the headers are read. ValueError if one of them is damaged."""
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = DeclaredWeight(tuple(part.get_shape()), str(part.get_dtype()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): use another checkpoint") from error
    return found


def build_skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, declared: Mapping[str, DeclaredWeight]
) -> PreTrainedModel:
    """The model of a configuration on the meta device, without weights. ValueError: it has many more weights than the
    files, or larger ones, and is not built to its end then; or it has parts of others, and does not say what they are
    like.
    """
    _refuse_absent_parts(config)
    with torch.device("meta"), _no_more_than(declared):
        return model_class(config)


def _refuse_absent_parts(config: PreTrainedConfig) -> None:
    """What a checkpoint was built with is in its configuration; a name alone would be looked for, also on the hub."""
    for part, name, filled in PARTS_OF_OTHERS:
        options = getattr(config, part, None)
        if options is not None and getattr(options, name) is not None and getattr(options, filled) is None:
            raise ValueError(
                f"{part} has {name} {getattr(options, name)[:60]!r}, but no {filled}, which says what it is"
            )


@contextmanager
def _no_more_than(declared: Mapping[str, DeclaredWeight]) -> Iterator[None]:
    """Stops modules that are made inside from becoming much larger than the weights in files."""
    most_weights = 2 * len(declared) + 16  # tied ones are registered twice
    most_numbers = sum(weight.num_numbers for weight in declared.values())
    counts = {"weights": 0, "modules": 0}

    def check(what: str, numbers: int, limit: int) -> None:
        if numbers > limit:
            raise ValueError(
                f"it describes a model with {what} than its {len(declared)} weights in files, of {most_numbers} "
                "numbers at most"
            )

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        counts["weights"] += 1
        check("more weights", counts["weights"], most_weights)
        check(f"a larger {name} {tuple(parameter.shape)}", parameter.numel(), most_numbers)

    def count_module(module: nn.Module, name: str, part: nn.Module) -> None:
        counts["modules"] += 1
        check("more parts", counts["modules"], 8 * most_weights + 1000)

    def count_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
        check(f"a larger {name} {tuple(buffer.shape)}", buffer.numel(), max(most_numbers, LARGEST_TABLE))

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
        register_module_buffer_registration_hook(count_buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_fit(folder: Path, model: PreTrainedModel, declared: Mapping[str, DeclaredWeight]) -> None:
    """Compares the weights of a model with those in the files of a folder. Those of a backbone are left to
    transformers, which knows the names that they have had in its earlier versions. Of rounded weights (of 8 or 4 bits),
    which have companions, the number of their numbers is compared. ValueError: weights are missing, left over, of
    another shape, or no floating-point numbers.
    """
    foreign = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Backbone))
    is_rounded = getattr(model.config, "quantization_config", None) is not None
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(foreign)}
    found = {name: weight for name, weight in declared.items() if not name.startswith(foreign)}
    missing = expected.keys() - found.keys() - model.all_tied_weights_keys.keys()
    unexpected = found.keys() - expected.keys() - model.all_tied_weights_keys.keys()
    if is_rounded:
        unexpected = {name for name in unexpected if not _is_companion(name, expected)}
    both = expected.keys() & found.keys()
    refuse_weights(folder, "lacks", missing)
    refuse_weights(folder, "has unexpected", unexpected)
    different = {name for name in both if not _has_shape_of(found[name], expected[name], is_rounded)}
    refuse_weights(folder, "has of another shape", different)
    # Beside rounded weights stand scales and tables, whose names are no weights of the model.
    typed = found.keys() if is_rounded else both
    wrong = {name for name in typed if not _has_type_of(found[name], expected.get(name), is_rounded)}
    refuse_weights(folder, "has no floating-point numbers in", wrong)


def refuse_weights(folder: Path, problem: str, names: Iterable[str]) -> None:
    """Raises ValueError with the first of the names, if there are any."""
    names = sorted(name[:LONGEST_NAME] for name in names)
    if names:
        listed = ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")
        raise ValueError(
            f"The checkpoint {folder} {problem} {len(names)} of the weights ({listed}): "
            "its weights and its config.json do not belong together; save it again or use another checkpoint."
        )


def _is_companion(name: str, expected: Mapping[str, torch.Tensor]) -> bool:
    before, _, last = name.rpartition(".")
    if last in COMPANIONS:
        return f"{before}.weight" in expected
    return name.partition(".weight.")[0] + ".weight" in expected


def _has_shape_of(weight: DeclaredWeight, expected: torch.Tensor, is_rounded: bool) -> bool:
    if is_rounded and weight.dtype not in FLOATS and len(weight.shape) == 2 and weight.shape[1] == 1:
        return 2 * math.prod(weight.shape) * OTHERS.get(weight.dtype, 8) == expected.numel() + expected.numel() % 2
    return weight.shape == tuple(expected.shape)


def _has_type_of(weight: DeclaredWeight, expected: torch.Tensor | None, is_rounded: bool) -> bool:
    if is_rounded and weight.dtype in ROUNDED:
        return True
    return weight.dtype in FLOATS or (expected is not None and not expected.is_floating_point())


def check_finite(folder: Path, model: nn.Module) -> None:
    """Raises ValueError for a weight that is infinite or no number, which makes all that follows no number either."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            # The sum takes no memory, and is not finite if a number is not; it may overflow by itself.
            if tensor.is_floating_point() and not tensor.sum().isfinite():
                wrong = tensor.numel() - int(tensor.isfinite().sum())
                if wrong:
                    raise ValueError(
                        f"The weights in {folder} are damaged: {wrong} of {tensor.numel()} numbers in {name} are "
                        f"infinite or no numbers in {str(tensor.dtype).removeprefix('torch.')}; use a checkpoint from "
                        "before training diverged, or another --dtype."
                    )
