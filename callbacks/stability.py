"""Whether training is stable: gradients and updates by part, the core near the state that it ends in, and alarms."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy, unwrap_peft_model

from model.core_step import CoreStep

from .kept_batches import MOST_SAVED, KeptBatches, save_batch
from .model_size import part_of
from .reporting import aside

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "save", "stop")
SAMPLE = 65_536
"""Weights of each parameter, the first ones, by which an update is measured."""
IN_A_ROW = 3
"""Measurements of the spectral radius that have to be too large: single ones are, of healthy runs too."""
LOSS_FALL = 1.0
"""Nats by which the loss has to have fallen before depth is expected to pay."""


@dataclass
class StabilityConfig:
    """What is measured of a run's stability, and when that is an alarm."""

    action: str = "warn"
    """What an alarm leads to: "warn" says it, "save" also saves the last batch, "stop" does both and ends the run with
    an error."""
    gradient_logs: int | None = None
    """Every this many logs, at least 0, the norms of gradients and the sizes of updates are logged by part of the
    model; 0 turns it off. Default: 1; with DeepSpeed and FSDP, which divide them among ranks, 0."""
    core_steps: int | None = None
    """Every this many optimizer steps, at least 0, the spectral radius of a step of the core and the entropy of its
    attention are measured, on a few tokens; 0 turns it off. Default: 100; with DeepSpeed, FSDP, torch_compile,
    quantized weights and cache policy "first", through which they cannot be computed, 0."""
    update_alarm: float = 0.1
    """An alarm is raised when an update changes a part of the model by more than this share of its length, at least
    0."""
    state_growth_alarm: float = 10.0
    """An alarm is raised when the state after all steps is longer by more than this factor, at least 0, than
    after the first."""
    spectral_radius_alarm: float = 2.0
    """An alarm is raised when a step of the core makes small differences between states larger by more than
    this factor, at least 0, in three measurements one after the other."""
    attention_entropy_alarm: float = 0.02
    """An alarm is raised when the entropy of attention is below this share of the most it could be, at least 0, at most
    1."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"stability.action is {self.action!r}, must be one of {', '.join(ACTIONS)}.")
        for name in ("gradient_logs", "core_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"stability.{name} is {value}, must be at least 0, which turns it off.")
        for name in ("update_alarm", "state_growth_alarm", "spectral_radius_alarm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"stability.{name} is {getattr(self, name)}, must be a number of at least 0.")
        if not 0 <= self.attention_entropy_alarm <= 1:
            raise ValueError(f"stability.attention_entropy_alarm is {self.attention_entropy_alarm}, must be in 0 .. 1.")


class StabilityError(RuntimeError):
    """An alarm that ends a run."""


def core_of(model: PreTrainedModel) -> nn.Module | None:
    """The core of a model, also of one with PEFT's adapters; None where it has none."""
    return getattr(unwrap_peft_model(model).base_model, "core", None)


def intervals_of(config: StabilityConfig, args: Any, model: PreTrainedModel) -> tuple[int, int]:
    """`gradient_logs` and `core_steps`, or what they are by default.

    Raises:
        ValueError: one is asked for where it cannot be measured.
    """
    divided = "training.deepspeed" if args.deepspeed else "training.fsdp" if args.uses_fsdp else None
    by_epoch = args.logging_strategy != IntervalStrategy.STEPS and f"training.logging_strategy {args.logging_strategy}"
    opaque = divided or ("training.torch_compile" if args.compile_units else None)
    if core_of(model) is None:
        opaque = "a model without a core"
    elif getattr(model, "is_quantized", False):  # transformers sets it on such models alone
        opaque = "quantized weights"
    elif model.config.get_text_config().recurrence.cache_policy == "first":
        opaque = "cache policy 'first', where a step also depends on the first one"
    chosen = []
    for name, value, default, obstacle in (
        ("gradient_logs", config.gradient_logs, 1, divided or by_epoch or None),
        ("core_steps", config.core_steps, 100, opaque),
    ):
        if value and obstacle is not None:
            raise ValueError(f"callbacks.stability.{name} is {value}, but not possible with {obstacle}; leave it out")
        chosen.append((0 if obstacle else default) if value is None else value)
    return tuple(chosen)


class StabilityCallback(TrainerCallback):
    """Measures gradients and updates by part, and the core near the state that it ends in, and raises alarms about
    these and what the trainer measures. All figures stay on the device until they are logged.

    The callback goes before the reporting ones, so that they see its figures.

    Args:
        intervals: Logs from one measurement of gradients and updates to the next, and optimizer steps from one
            measurement of the core to the next; 0 for none.
        kept: The last batches.
    """

    def __init__(self, config: StabilityConfig, intervals: tuple[int, int], kept: KeptBatches) -> None:
        self.config, self.kept = config, kept
        self.gradient_logs, self.core_steps = intervals
        self.figures: dict[str, torch.Tensor] = {}  # until the next log
        self.before: dict[str, list[torch.Tensor]] = {}  # a sample of the weights before an update, by part
        self.core_call: tuple[tuple, dict[str, Any]] | None = None  # the last one of a forward pass
        self.mean_steps = 0  # of the model, once it is known
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.hook_of_core: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Prepare to measure the core."""
        recurrence = getattr(model.config.get_text_config(), "recurrence", None)
        self.mean_steps = 1 if recurrence is None else recurrence.mean_steps
        if self.core_steps:
            self.hooks = [model.register_forward_hook(self.measure_core)]

    # ---------------------------------------------------------------------------------------------- gradients, updates

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Measure the gradients of a step that is logged, whose log has the norm of all before they were clipped."""
        every = self.gradient_logs * state.logging_steps
        if not every or (state.global_step + 1) % every:
            return
        for part, parameters in parameters_by_part(model).items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.figures[f"gradient_norm_{part}"] = torch.nn.utils.get_total_norm(gradients)
            self.before[part] = [sample.clone() for sample in samples(parameters)]

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Measure its update, unless it was left out, and the weights may be others now."""
        if all(parameter.grad is None for parameter in model.parameters()):
            self.before = {}
        frozen = parameters_by_part(model, learning=False) if self.before else {}
        for part, parameters in parameters_by_part(model).items() if self.before else ():
            before = self.before[part]
            updates = [after - sample for after, sample in zip(samples(parameters), before, strict=True)]
            whole = before + samples(frozen.get(part, []))  # adapters change what the frozen weights do
            norms = [torch.nn.utils.get_total_norm(tensors) for tensors in (updates, whole)]
            self.figures[f"update_ratio_{part}"] = norms[0] / norms[1].clamp(min=torch.finfo(norms[1].dtype).tiny)
        self.before = {}

    # -------------------------------------------------------------------------------------------------------- the core

    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """See what the core gets in the first forward pass of this step, if it is due."""
        if self.core_steps and (state.global_step + 1) % self.core_steps == 0:
            self.hook_of_core = core_of(model).register_forward_pre_hook(self.see_core, with_kwargs=True)

    def see_core(self, core: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the core."""
        if core.training:
            self.core_call = args, kwargs

    def measure_core(self, model: PreTrainedModel, args: tuple, output: Any) -> None:
        """Forward hook of the model: measure the last step of the core."""
        if self.core_call is None:
            return
        (state, embeds), kwargs = self.core_call
        self.core_call = None
        self.hook_of_core.remove()
        step = CoreStep.of(core_of(model), state, embeds, **kwargs)
        with aside(model):
            self.figures["spectral_radius"] = step.spectral_radius()
            self.figures["attention_entropy"] = step.attention_entropy()

    # ------------------------------------------------------------------------------------------------- logs and alarms

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add the figures to the log of a training step and to the history, and raise the alarms.

        Raises:
            StabilityError: there is one, and the action is "stop".
        """
        if "loss" not in logs:
            return
        figures = self.take_figures(logs.get("grad_norm"))
        logs.update(figures)
        state.log_history[-1].update(figures)
        alarms = self.alarms(args, state, logs)
        if not alarms:
            return
        message = f"step {state.global_step}: {'; '.join(alarms)}"
        memory = state.stateful_callbacks.setdefault("stability", {"num_saved": 0})
        if self.config.action != "warn" and self.kept.batches and memory["num_saved"] < MOST_SAVED:
            memory["num_saved"] += 1
            path = Path(args.output_dir, "alarms", f"step-{state.global_step}-rank-{args.process_index}.pt")
            save_batch(path, self.kept.batches[-1], state.global_step, args)
            message += f" (the last batch is in {path})"
        if self.config.action == "stop":
            raise StabilityError(f"{message}; docs/troubleshooting.md says what helps")
        logger.warning("%s", message)

    def take_figures(self, grad_norm: float | None) -> dict[str, float]:
        """What was measured since the last log, the mean over ranks, with the norms of gradients before clipping."""
        if not self.figures:
            return {}
        values = reduce(torch.stack([value.float() for value in self.figures.values()]), "mean").tolist()
        figures, self.figures = dict(zip(self.figures, values, strict=True)), {}
        norms = {name: value for name, value in figures.items() if name.startswith("gradient_norm_")}
        whole = math.hypot(*norms.values())
        scale = grad_norm / whole if grad_norm and whole else 1.0
        return figures | {name: value * scale for name, value in norms.items()}

    def alarms(self, args: Any, state: TrainerState, logs: dict[str, float]) -> list[str]:
        """What is wrong, each as a part of a sentence."""
        config, found = self.config, []
        updates = {name.removeprefix("update_ratio_"): it for name, it in logs.items() if name.startswith("update_rat")}
        part = max(updates, key=updates.get, default=None)
        limits = (
            (
                "token_correlation",
                args.token_correlation_alarm,
                "the states of different tokens have a mean correlation of {:.3f}: they are collapsing",
            ),
            (
                "state_growth",
                config.state_growth_alarm,
                "the state after all steps is {:.1f} times as long as after the first: it runs away",
            ),
            (
                f"update_ratio_{part}",
                config.update_alarm,
                f"an update moves the weights of the {part} by {{:.3f}} of their length: the rate is too high",
            ),
        )
        for name, limit, text in limits:
            if logs.get(name, -math.inf) > limit:
                found.append(f"{text.format(logs[name])} (alarm above {limit:g})")
        radii = [entry["spectral_radius"] for entry in state.log_history if "spectral_radius" in entry][-IN_A_ROW:]
        if "spectral_radius" in logs and len(radii) == IN_A_ROW and min(radii) > config.spectral_radius_alarm:
            found.append(
                f"a step of the core multiplies small differences by {radii[-1]:.2f}, and did in the measurements "
                f"before: more steps do not settle (alarm above {config.spectral_radius_alarm:g})"
            )
        if self.is_depth_ignored(args, state, logs):
            found.append(
                f"the loss at one core step is only {logs['depth_gap']:.4f} nats above that at the mean depth: the "
                f"recurrence is being ignored (alarm below {args.depth_gap_alarm:g})"
            )
        if logs.get("attention_entropy", math.inf) < config.attention_entropy_alarm:
            found.append(
                f"the entropy of attention is {logs['attention_entropy']:.4f}: tokens look at one other alone "
                f"(alarm below {config.attention_entropy_alarm:g})"
            )
        return found

    def is_depth_ignored(self, args: Any, state: TrainerState, logs: dict[str, float]) -> bool:
        """Whether depth does not pay, though the loss has fallen, or half of training is over; before, it cannot."""
        gap = logs.get("depth_gap", math.inf)
        if self.mean_steps == 1 or not gap < args.depth_gap_alarm:
            return False
        first = next(entry["loss_at_mean_steps"] for entry in state.log_history if "loss_at_mean_steps" in entry)
        return first - logs["loss_at_mean_steps"] > LOSS_FALL or state.global_step >= state.max_steps / 2

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop to measure."""
        for hook in self.hooks:
            hook.remove()


def parameters_by_part(model: PreTrainedModel, learning: bool = True) -> dict[str, list[nn.Parameter]]:
    """The parameters that learn, or the others that are not quantized, by the part of the model that they are in, named
    as in `part_sizes`.
    """
    model, parts = unwrap_peft_model(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == learning and parameter.is_floating_point():
            parts.setdefault(part_of(name, model).replace(" ", "_"), []).append(parameter)
    return parts


def samples(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The first weights of each parameter; they share its memory."""
    return [parameter.detach().flatten()[:SAMPLE] for parameter in parameters]
