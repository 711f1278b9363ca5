"""The last batches of a run, kept so that a step that went wrong can be looked at and repeated."""

import os
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

MOST_BATCHES = 64
"""Micro-batches that are kept until they are let go."""
MOST_SAVED = 8
"""Steps of a run of which a batch is saved for one reason, some with weights, which take as much room as a model."""
PLAIN = (bool, int, float, str, tuple, list, dict, type(None))


@dataclass
class MicroBatch:
    """What went into one forward pass of training, and its loss; references, nothing is copied."""

    inputs: dict[str, Any]
    random_states: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: torch.Tensor | None = None


class KeptBatches:
    """Keeps what goes into the model while it trains, and the losses, which stay on the device.

    Args:
        are_whole: Whether what is needed to repeat a pass to the last bit is kept, too: inputs of floats, such as
            initial states and images, and the states of the random generators.
    """

    def __init__(self, are_whole: bool) -> None:
        self.are_whole = are_whole
        self.batches: deque[MicroBatch] = deque(maxlen=MOST_BATCHES)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, model: PreTrainedModel) -> None:
        """Keep the batches of a model."""
        self.hooks = [
            model.register_forward_pre_hook(self.keep, with_kwargs=True),
            model.register_forward_hook(self.keep_loss),
        ]

    def end(self) -> None:
        """Let all go."""
        for hook in self.hooks:
            hook.remove()
        self.batches.clear()

    def keep(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if not model.training:
            return
        inputs = {name: it for name, it in kwargs.items() if isinstance(it, (torch.Tensor, *PLAIN))}
        if not self.are_whole:
            inputs = {name: it for name, it in inputs.items() if not (torch.is_tensor(it) and it.is_floating_point())}
        self.batches.append(MicroBatch(inputs, random_states(model.device) if self.are_whole else {}))

    def keep_loss(self, model: PreTrainedModel, args: tuple, output: Any) -> None:
        """Forward hook."""
        if model.training and self.batches and output.loss is not None:
            self.batches[-1].loss = output.loss.detach()

    def first_not_finite(self) -> MicroBatch | None:
        """The first micro-batch whose loss is not finite, for which the host waits."""
        losses = ((batch, batch.loss) for batch in self.batches)
        return next((batch for batch, loss in losses if loss is not None and not loss.isfinite().all()), None)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that a forward pass on a device may draw from."""
    states = {"cpu": torch.get_rng_state()}
    return (
        states if device.type == "cpu" else states | {"device": torch.get_device_module(device).get_rng_state(device)}
    )


def save_batch(path: Path, batch: MicroBatch, step: int, args: Any) -> None:
    """Write a micro-batch for `repeat_loss`, with its step and what the arguments of training say; the file appears
    when it is whole.
    """
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    figures = {"step": step, "seed": args.seed, "autocast": autocast}
    save_whole(path, {"inputs": batch.inputs, "random_states": batch.random_states, "loss": batch.loss, **figures})


def save_whole(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` of a file that nobody ever reads half of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(content, beside)
    beside.replace(path)


@torch.no_grad()
def repeat_loss(model: PreTrainedModel, path: str | Path) -> torch.Tensor:
    """The loss of a batch that a run has saved, on a model in training mode: with its inputs, depth, initial states
    and random states, as far as the run kept them. The model gets the weights that were saved beside it, if there are.

    Args:
        model: A model of the run, such as one of its checkpoints.
        path: The file step-N-rank-R.pt.
    """
    path = Path(path)
    kept = torch.load(path, map_location=model.device, weights_only=True)
    weights = path.with_name(f"step-{kept['step']}-weights.pt")
    if weights.exists():
        model.load_state_dict(torch.load(weights, map_location=model.device, weights_only=True))
    states, device = {name: state.cpu() for name, state in kept["random_states"].items()}, model.device
    half = torch.autocast(device.type, getattr(torch, kept["autocast"])) if kept["autocast"] else nullcontext()
    with half, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "device" in states:
            torch.get_device_module(device).set_rng_state(states["device"], device)
        return model.train()(**kept["inputs"]).loss
