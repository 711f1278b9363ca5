"""Low-rank deltas of the core's weights for each of its first steps: W x + alpha / rank B_i A_i x in step i.

LoRA (Hu et al. 2021, arXiv 2106.09685) gives all steps one delta; here each has its own, and those behind the first n
have none. There is one core for all steps, so that these deltas cannot be merged into it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

CONFIG, WEIGHTS = "step_lora.json", "step_lora.safetensors"


class StepDeltas(nn.Module):
    """The deltas of one linear layer. (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, num_steps: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(num_steps, rank, in_features))
        self.up = nn.Parameter(torch.zeros(num_steps, out_features, rank))
        nn.init.kaiming_uniform_(self.down.view(-1, in_features), a=math.sqrt(5))  # as PEFT does

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """`step` counts from 0. Behind the last step that has a delta: 0, through all weights, so that they have a
        gradient whatever the depth; without one, optimizers leave weights alone, but under ZeRO they do not.
        """
        if step >= len(self.down):
            return 0.0 * (self.down.sum() + self.up.sum())
        x = x.to(self.down.dtype)
        return nn.functional.linear(nn.functional.linear(x, self.down[step]), self.up[step])


class StepLora(nn.Module):
    """The deltas of a core, added to the outputs of its linear layers by hooks, so that these may be of any kind:
    `targets` are their names in `core.named_modules()`, `num_steps` the steps that have deltas, `rank` that of the
    low-rank updates, `alpha` their scale, times the rank.
    """

    def __init__(self, core: nn.Module, targets: Iterable[str], num_steps: int, rank: int, alpha: int):
        super().__init__()
        self.options = {"num_steps": num_steps, "rank": rank, "alpha": alpha, "targets": list(targets)}
        self.num_steps, self.scale = num_steps, alpha / rank
        self.step = 0  # of the step in progress; the core sets it, again where activations are computed again
        self.dropped: frozenset[int] = frozenset()  # steps that go without deltas in training
        self.is_off: Callable[[], bool] = lambda: False  # who has a switch for other adapters puts it here
        self.deltas, device = nn.ModuleDict(), next(core.parameters()).device
        for target in self.options["targets"]:
            layer = core.get_submodule(target)
            deltas = StepDeltas(layer.in_features, layer.out_features, num_steps, rank).to(device)
            self.deltas[target.replace(".", "__")] = deltas  # a name of a module has no dots
            layer.register_forward_hook(partial(self._add, deltas))

    def _add(self, deltas: StepDeltas, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        step = self.num_steps if self.training and self.step in self.dropped else self.step
        if self.is_off() or (step >= self.num_steps and not torch.is_grad_enabled()):
            return output
        return output + (self.scale * deltas(args[0], step)).to(output.dtype)

    def save(self, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes the two files of the adapter; `state_dict` has the weights of the whole model, where a library has
        gathered it.
        """
        mark = ".step_lora."
        if state_dict is None:
            weights = self.state_dict()
        else:
            weights = {name.partition(mark)[2]: weight for name, weight in state_dict.items() if mark in name}
        weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        save_file(weights, Path(folder) / WEIGHTS)
        (Path(folder) / CONFIG).write_text(json.dumps(self.options, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Reads the weights of an adapter with the same options; ValueError if it has other weights."""
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            there = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        here = {name: weight.shape for name, weight in self.state_dict().items()}
        different = sorted(name for name in here | there if name not in there or there[name].shape != here.get(name))
        if different:
            name = different[0]
            found = tuple(there[name].shape) if name in there else "missing"
            raise ValueError(
                f"{Path(folder) / WEIGHTS} does not fit: {name[:80]} is {found} there and "
                f"{tuple(here.get(name, ())) or 'missing'} here; it belongs to another base, or was made with other "
                "options"
            )
        self.load_state_dict(there)


def add_step_lora(model: nn.Module, targets: Iterable[str], num_steps: int, rank: int, alpha: int) -> StepLora:
    """Adds fresh deltas, which change nothing yet, to layers of the core of a model with a head; `targets` are their
    names in `core.named_modules()`. ValueError if the model has no core, or no such layer.
    """
    core = model.base_model.core
    if core is None:
        raise ValueError("step_lora needs a core, and this model has none (num_core_layers is 0); leave it out")
    if model.config.get_text_config().recurrence.untied_core:
        raise ValueError("step_lora adapts the steps of one core, and untied_core has one for each; leave it out")
    layers = {name for name, module in core.named_modules() if isinstance(module, nn.Linear)}
    missing = sorted(set(targets) - layers)
    if missing:
        raise ValueError(f"the core has no linear layer {missing[0]!r}; it has {', '.join(sorted(layers))}")
    core.step_lora = StepLora(core, targets, num_steps, rank, alpha)
    # What `save_pretrained` writes is the model without adapters.
    names = [name for name in model.state_dict() if ".step_lora." in name]
    model._keys_to_ignore_on_save = [*(model._keys_to_ignore_on_save or ()), *names]
    return core.step_lora


def load_step_lora(model: nn.Module, folder: str | Path) -> StepLora:
    """Adds the deltas of an adapter folder, whose options are compared with its weights before room is made for them.
    ValueError if they do not fit each other or the model, or a file is damaged.
    """
    path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    try:
        options = adapter_options(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the adapter again") from error
    try:
        with safe_open(weights, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".down")]  # noqa: SIM118
            shapes = {tuple(file.get_slice(name).get_shape()[:2]) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged ({error}); save the adapter again") from error
    expected = (options["num_steps"], options["rank"])
    if shapes != {expected}:
        raise ValueError(
            f"{path} has num_steps and rank {expected}, but the weights beside it are of {sorted(shapes)[:3]}; save "
            "the adapter again"
        )
    adapter = add_step_lora(model, **options)
    adapter.load(folder)
    return adapter


def adapter_options(content: object) -> dict[str, Any]:
    """The arguments of `add_step_lora`; ValueError if they are not."""
    numbers = ("num_steps", "rank", "alpha")
    if not isinstance(content, dict) or content.keys() != {*numbers, "targets"}:
        raise ValueError(f"it has not just {', '.join(numbers)} and targets")
    for name in numbers:
        value = content[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"{name} is {repr(value)[:60]}; give a whole number of at least 1")
    targets = content["targets"]
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"targets is {repr(targets)[:60]}; give names of layers")
    return content
