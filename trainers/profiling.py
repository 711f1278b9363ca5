"""Where the time of training steps goes: a trace for a browser, and a table by part of the model."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_utils import unwrap_peft_model

SKIPPED, TRACED = 3, 10
"""Steps before those that are traced, in which memory is allocated and units are compiled; and those."""
NUM_STEPS = SKIPPED + TRACED
PREFIX = "part: "
"""Begins the names of the ranges that parts of the model make in a trace."""
HEAD = "head and loss"
"""What a language model does besides calling its base model."""
# How torch calls what it records of other parts of a step.
OTHERS = {"enumerate(DataLoader)": "data", "Optimizer.step": "optimizer"}
STEP = "ProfilerStep"
BACKWARD = "autograd::engine::evaluate_function"


class ProfilingCallback(TrainerCallback):
    """Traces `TRACED` steps of the first rank behind the first `SKIPPED` ones.

    Args:
        folder: Where the trace goes, as profile/trace.json. Chrome, Perfetto and TensorBoard's profiler show it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "profile" / "trace.json"
        self.table: str | None = None
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.profiler: profile | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Begin to watch."""
        if not state.is_world_process_zero:
            return
        for name, part in parts_of(model):
            self.hooks += Range(name).register(part)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (args.device.type == "cuda")]
        steps = schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1)
        self.profiler = profile(activities=activities, schedule=steps, on_trace_ready=self.write)
        self.profiler.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go on to the next step."""
        if self.profiler is not None:
            self.profiler.step()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        if self.profiler is not None:
            self.profiler.stop()
        for hook in self.hooks:
            hook.remove()

    def write(self, profiler: profile) -> None:
        """Write the trace, and make the table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))
        self.table = cost_table(profiler.events())


class Range:
    """Hooks by which a module stands in a trace as a range with a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: list[record_function] = []

    def register(self, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Put them on a module."""
        return [module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end)]

    def begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Begin a range: a forward pre-hook."""
        self.open.append(record_function(PREFIX + self.name))
        self.open[-1].__enter__()

    def end(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """End it: a forward hook."""
        self.open.pop().__exit__(None, None, None)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model by name: those of its base model, such as prelude, core and coda, and the whole for what is
    left, which is head and loss of language models.
    """
    model = unwrap_peft_model(model)
    yield HEAD, model
    if model.base_model is not model:
        yield "embedding, norms and masks", model.base_model
    queue = list(model.base_model.named_children())
    for name, part in queue:
        if isinstance(part, (nn.ModuleDict, nn.ModuleList)):
            queue += [(f"{name}.{inner}", module) for inner, module in part.named_children()]
        else:
            yield name, part


# ---------------------------------------------------------------------------------------------------------------- costs


def cost_table(events: Sequence[FunctionEvent]) -> str:
    """A Markdown table of what a step costs, by part, forward and backward: milliseconds of the device, if kernels ran
    on one, else of the CPU. Of what nobody waits for on a CPU, the milliseconds are those of its own thread.
    """
    has_device = any(event.device_time_total for event in events)
    costs = costs_of(events, "device_time_total" if has_device else "cpu_time_total")
    whole = sum(event.cpu_time_total for event in events if event.name.startswith(STEP))
    lines = [
        f"| part | forward, ms | backward, ms | share of the step, {whole / TRACED / 1e3:.1f} ms |",
        "|---|---:|---:|---:|",
    ]
    costs["the rest"] = (whole - sum(map(sum, costs.values())), 0.0)
    for name, (forward, backward) in sorted(costs.items(), key=lambda item: -sum(item[1])):
        times = (f"{time / TRACED / 1e3:.2f}" if time else "" for time in (forward, backward))
        lines.append(f"| {name} | {' | '.join(times)} | {(forward + backward) / whole:.1%} |")
    return "\n".join(lines)


def costs_of(events: Sequence[FunctionEvent], measure: str) -> dict[str, tuple[float, float]]:
    """Microseconds of each part, without those of the parts in it, in forward and backward passes.

    A function of a backward pass belongs to the part whose forward pass made it: torch gives both the same number. What
    checkpointing computes again belongs to the backward pass.
    """
    owners = {
        (event.thread, event.sequence_nr): part_around(event)
        for event in events
        if event.sequence_nr >= 0 and not is_backward(event)
    }
    costs: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        time, outer = getattr(event, measure), event.cpu_parent
        if event.name.startswith(BACKWARD) and not is_backward(outer):
            costs[owners.get((event.fwd_thread, event.sequence_nr)) or "gradients, summed up"][1] += time
        elif (name := name_of(event)) and not is_backward(event):
            if (around := part_around(outer)) == name:
                continue  # an optimizer within another
            costs[name][0] += event.cpu_time_total if name == "data" else time
            if around:
                costs[around][0] -= time
    return {name: (forward, backward) for name, (forward, backward) in costs.items()}


def name_of(event: FunctionEvent) -> str | None:
    """The part of a step that an event is, if it is one."""
    if event.name.startswith(PREFIX):
        return event.name.removeprefix(PREFIX)
    return next((name for start, name in OTHERS.items() if event.name.startswith(start)), None)


def part_around(event: FunctionEvent | None) -> str | None:
    """The innermost part of a step that an event is, or is within."""
    while event is not None and name_of(event) is None:
        event = event.cpu_parent
    return event and name_of(event)


def is_backward(event: FunctionEvent | None) -> bool:
    """Whether an event is, or is within, a function of a backward pass."""
    while event is not None and not event.name.startswith(BACKWARD):
        event = event.cpu_parent
    return event is not None
