"""Recurrent depth: how many steps, from which state, and the loop itself.

Source of all that has no other named: Geiping et al. 2025, arXiv 2502.05171 ("the paper" below).

    e   = prelude(embed(x))
    s_0 ~ noise
    s_i = core(inject(s_{i-1}, e))      i = 1 .. r
    p   = head(coda(norm(s_r)))
"""

import hashlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .attention import AttentionInputs
from .blocks import TransformerBlock, run_layers
from .cache import CacheSlot, RecurrentCache
from .configuration_megatransformer import MegaTransformerTextConfig, RecurrenceConfig
from .step_lora import StepLora

logger = logging.get_logger(__name__)


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on `key` alone: the same on every rank, after resuming, in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


# ---------------------------------------------------------------------------------------------------------------- depth


def sample_depth(config: RecurrenceConfig, *key: int) -> tuple[int, int]:
    """Draws the depth of one micro-batch from `key`, usually (seed, global step, micro-batch), and from nothing else.

    p = Poisson(exp(Normal(ln mean - sigma^2/2, sigma))) + 1 (the paper's section 3.3; the mean of p is mean + 1).

    Returns:
        (n, k): n = max(p - backprop_steps, 0) steps without gradient, then k = min(backprop_steps, p) steps with.
    """
    generator = keyed_generator("depth", *key)
    mean = config.mean_steps
    if config.step_distribution == "lognormal-poisson":
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        rate = torch.exp(math.log(mean) - config.step_sigma**2 / 2 + config.step_sigma * normal)
        steps = int(torch.poisson(rate, generator=generator)) + 1
    elif config.step_distribution == "poisson":
        steps = int(torch.poisson(torch.tensor(float(mean - 1)), generator=generator)) + 1
    elif config.step_distribution == "uniform":
        steps = int(torch.randint(1, 2 * mean, (), generator=generator))
    else:
        steps = mean
    return max(steps - config.backprop_steps, 0), min(config.backprop_steps, steps)


@dataclass(frozen=True)
class Depth:
    """A resolved depth: at most `total` steps, the first `no_grad` of them without gradient; where rows differ, `rows`,
    (batch,), on the CPU.
    """

    no_grad: int
    total: int
    rows: torch.Tensor | None = None


def resolve_depth(
    num_steps: int | tuple[int, int] | torch.Tensor | None,
    config: MegaTransformerTextConfig,
    batch_size: int,
    training: bool = False,
) -> Depth:
    """Turns the `num_steps` argument of `forward` into a depth; the only place that knows what it may be.

    Args:
        num_steps: Steps, all with gradient; or (n, k): n steps without gradient, then k with; or (batch,): steps of
            each row, all with gradient; or None: `config.num_steps`, else the mean, of which in training only the last
            `backprop_steps` carry gradient.

    Raises:
        ValueError: for a number below 1, a tensor of the wrong shape or type, or any `num_steps` for a model without
        core.
    """
    if config.num_core_layers == 0:
        if num_steps is not None:
            raise ValueError(
                f"num_steps ({num_steps}) was given, but this model has no core to iterate (num_core_layers is 0)"
            )
        return Depth(0, 0)
    if num_steps is None:
        steps = config.num_steps or config.recurrence.mean_steps
        if training and torch.is_grad_enabled() and config.recurrence.step_distribution != "fixed":
            logger.warning_once(
                f"The model trains at {steps} core steps in every update, since no num_steps was given, and will work "
                f"best at that depth alone; to draw depths, give the trainer callbacks=[model.depth_callback()], or "
                f"forward num_steps={steps} to say that it is meant"
            )
        return Depth(max(steps - config.recurrence.backprop_steps, 0) if training else 0, steps)
    if isinstance(num_steps, torch.Tensor) and num_steps.ndim > 0:
        return _resolve_rows(num_steps, batch_size)
    if isinstance(num_steps, tuple):
        if len(num_steps) != 2 or any(_as_count(n, minimum=0) is None for n in num_steps) or sum(num_steps) < 1:
            raise ValueError(
                f"num_steps {num_steps} must be two counts (without gradient, with gradient), at least 1 in sum"
            )
        return Depth(int(num_steps[0]), int(num_steps[0]) + int(num_steps[1]))
    steps = _as_count(num_steps, minimum=1)
    if steps is None:
        raise ValueError(
            "num_steps must be an integer of at least 1, a tuple of two counts, or a tensor (batch,); "
            f"got {num_steps!r}"
        )
    return Depth(0, steps)


def _resolve_rows(num_steps: torch.Tensor, batch_size: int) -> Depth:
    if num_steps.shape != (batch_size,) or num_steps.is_floating_point() or num_steps.dtype == torch.bool:
        raise ValueError(
            f"num_steps as a tensor must hold one integer for each of the {batch_size} rows, got shape "
            f"{tuple(num_steps.shape)} of {num_steps.dtype}"
        )
    if int(num_steps.min()) < 1:
        raise ValueError(f"num_steps must be at least 1 in every row, got {num_steps.tolist()}")
    return Depth(0, int(num_steps.max()), rows=num_steps.cpu())


def _as_count(value, minimum: int) -> int | None:
    """`value` as an int of at least `minimum`, or None if it is no such number."""
    try:
        count = operator.index(value)
    except TypeError:
        return None
    return count if not isinstance(value, bool) and count >= minimum else None


# -------------------------------------------------------------------------------------------------------- initial state


def draw_state(config: MegaTransformerTextConfig, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One draw of the initial state that `config.recurrence.state_init` names.

    Args:
        shape: (..., hidden).
        generator: Never the global one: a draw must not depend on what else was drawn.

    Returns:
        Float32 tensor of `shape` on the generator's device.
    """
    kind = config.recurrence.state_init
    # Float32 whatever the default type is, which `from_pretrained` changes while it makes a model.
    state = torch.empty(shape, dtype=torch.float32, device=generator.device)
    if kind == "zero":
        state.zero_()
    elif kind == "like-init":
        # The scale of the embeddings as the core sees them at initialisation, by default sqrt(2/5); cut at three
        # deviations.
        std = config.initializer_range * config.embedding_scale
        nn.init.trunc_normal_(state, std=std, a=-3 * std, b=3 * std, generator=generator)
    else:
        state.normal_(generator=generator)
        if kind == "embed":
            state = state / math.sqrt(config.hidden_size)
        elif kind == "unit":
            state = nn.functional.layer_norm(state, state.shape[-1:])
    return state * config.recurrence.state_scale


def draw_training_states(
    config: MegaTransformerTextConfig,
    sequence: int,
    row_keys: list[tuple[int, ...]],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Initial states of a training batch, each row from its own key, usually (seed, global step, row in the global
    batch).

    So a row has the same state however the batch is spread over ranks and micro-batches. They are drawn where they are
    needed, since on a CPU that can take as long as a GPU's training step; the values differ between kinds of devices.

    Returns:
        (len(row_keys), sequence, hidden), float32 on `device`.
    """
    states = torch.empty(len(row_keys), sequence, config.hidden_size, device=device)
    for state, key in zip(states, row_keys, strict=True):
        state.copy_(draw_state(config, state.shape, keyed_generator("state", *key, device=device)))
    return states


def default_state(config: MegaTransformerTextConfig) -> torch.Tensor:
    """The state used when none is passed: one fixed draw, (1, 1, hidden), the same for every row and position, so that
    a row's result depends on nothing but the row.
    """
    return draw_state(config, (1, 1, config.hidden_size), keyed_generator("state", config.recurrence.state_seed))


# ------------------------------------------------------------------------------------------------------------ injection


class ConcatInjection(nn.Module):
    """Linear([s; e]), the paper's adapter."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        # Under autocast the product is half precise; what is iterated keeps the precision of the state.
        return self.proj(torch.cat((state, embeds), dim=-1)).to(state.dtype)


class AddInjection(nn.Module):
    """s + e."""

    def __init__(self, hidden_size: int):
        super().__init__()

    def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return state + embeds


class GateInjection(nn.Module):
    """g s + (1 - g) e, with g = sigmoid(Linear([s; e]))."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gate = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.gate(torch.cat((state, embeds), dim=-1)))
        return gate * state + (1 - gate) * embeds


INJECTIONS = {"concat": ConcatInjection, "add": AddInjection, "gate": GateInjection}


# --------------------------------------------------------------------------------------------------- the core, the loop


class RecurrentCore(GradientCheckpointingLayer):
    """One step s_i = core(inject(s_{i-1}, e)). The unit of compilation and of activation checkpointing."""

    def __init__(self, config: MegaTransformerTextConfig):
        super().__init__()
        self.injection = INJECTIONS[config.recurrence.injection](config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_core_layers))
        self.step_lora: StepLora | None = None

    def forward(
        self,
        state: torch.Tensor,
        embeds: torch.Tensor,
        inputs: AttentionInputs,
        slots: list[CacheSlot] | None = None,
        step: int | None = None,
    ) -> torch.Tensor:
        """state, embeds: (batch, sequence, hidden) -> the next state.

        Args:
            slots: The layers' places in the cache.
            step: Steps taken before, where there are adapters of single steps; else None, since for torch.compile
                each number would be a graph.
        """
        if step is not None:
            self.step_lora.step = step
        return run_layers(self.layers, self.injection(state, embeds), inputs, slots)


def iterate_core(
    core: RecurrentCore,
    state: torch.Tensor,
    embeds: torch.Tensor,
    depth: Depth,
    inputs: AttentionInputs,
    cache: RecurrentCache | None = None,
    trajectory: list[torch.Tensor] | None = None,
    disturb: Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
    look: Callable[[int, torch.Tensor, torch.Tensor | None, AttentionInputs], torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """s_i = core(s_{i-1}, e) for i = 1 .. r, the first `depth.no_grad` steps without gradient.

    A row leaves the batch, and keeps its state, when it has taken its own number of steps, or `look` says so. The rows
    that go on are named by their indices; None stands for all.

    Args:
        state: s_0, (batch, sequence, hidden).
        embeds: e, of the same shape.
        inputs: Mask and positions.
        trajectory: If given, s_1 .. s_r are appended.
        disturb: (steps taken, states, rows) -> the states that the next step sees.
        look: (steps taken, states, rows, their inputs) -> (rows,) of bool, whether they stop; or None: none does. Not
            asked after the last step.

    Returns:
        s_r, (batch, sequence, hidden), and the steps taken, (batch,) on the CPU.
    """
    grad_enabled = torch.is_grad_enabled()
    row_steps, going = None, []  # of rows that may leave; else nothing here depends on how many rows there are
    if depth.rows is not None or look is not None:
        row_steps = [depth.total] * len(state) if depth.rows is None else depth.rows.tolist()
        going = list(range(len(state)))
    rows, here, embeds_here, inputs_here = None, state, embeds, inputs  # those that go on
    for step in range(depth.total):
        if grad_enabled and step == depth.no_grad and not here.requires_grad:
            # Truncation: backpropagation ends here. A leaf that requires a gradient makes the first step with gradient
            # look like the others, so that torch.compile needs one graph for them instead of two.
            here = here.detach().requires_grad_()
        slots = cache.core_slots(step) if cache is not None else None
        with torch.set_grad_enabled(grad_enabled and step >= depth.no_grad):
            if disturb is not None:
                here = disturb(step, here, rows)
            here = core(
                here, embeds_here, inputs=inputs_here, slots=slots, step=None if core.step_lora is None else step
            )
        if trajectory is not None:
            trajectory.append(_put(state, rows, here))
        if row_steps is None:
            continue

        if look is not None and step + 1 < depth.total:
            stops = look(step + 1, here, rows, inputs_here)
            if stops is not None:
                for row, stop in zip(going, stops.tolist(), strict=True):  # the one point where the host waits
                    row_steps[row] = step + 1 if stop else row_steps[row]
        stays = [index for index, row in enumerate(going) if row_steps[row] > step + 1]
        if not stays:
            break
        if len(stays) < len(going):
            state, going = _put(state, rows, here), [going[index] for index in stays]
            kept = torch.tensor(stays, device=state.device)
            rows = kept if rows is None else rows.index_select(0, kept)
            here, embeds_here, inputs_here = here.index_select(0, kept), embeds.index_select(0, rows), inputs.of(rows)
    if row_steps is None:
        return here, torch.full(here.shape[:1], depth.total)
    return _put(state, rows, here), torch.tensor(row_steps)


def _put(state: torch.Tensor, rows: torch.LongTensor | None, here: torch.Tensor) -> torch.Tensor:
    """The states of all rows, with those of some rows, or of all, as they are now."""
    return here if rows is None else state.index_copy(0, rows, here)
