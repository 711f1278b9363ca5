"""Recurrent depth: from which state, with what injected, and the loop itself.

Source of all that has no other named: Geiping et al. 2025, arXiv 2502.05171 ("the paper" below).

    e   = prelude(embed(x))
    s_0 ~ noise, or e
    s_i = core(inject(s_{i-1}, e))      i = 1 .. r; where asked for, core(inject(s_{i-1}, e) + sinusoid(i))
    p   = head(coda(norm(s_r)))         where asked for, each s_i is normed, or none
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import AttentionInputs
from .blocks import TransformerBlock, build_norm, layer_order, pass_token, run_layers, sinusoids
from .cache import CacheSlot, RecurrentCache, slots_by_step
from .configuration_megatransformer_text import MegaTransformerTextConfig
from .depth import Depth, keyed_generator
from .step_lora import StepLora
from .token_pass import is_plain, token_norm

# -------------------------------------------------------------------------------------------------------- initial state


def draw_state(config: MegaTransformerTextConfig, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One draw of the initial state that `config.recurrence.state_init` names, float32 of `shape`, (..., hidden), on
    the generator's device; never the global one, since a draw must not depend on what else was drawn. "embedding" is
    not drawn.
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
) -> torch.Tensor | None:
    """Initial states of a training batch, (rows, sequence, hidden), float32 on `device`, each row from its own key,
    usually (seed, global step, row in the global batch): so it has the same state however the batch is spread over
    ranks and micro-batches. They are drawn where they are needed, since on a CPU that can take as long as a GPU's
    training step; the values differ between kinds of devices. None: states begin as the embedded input.
    """
    if config.recurrence.state_init == "embedding":
        return None
    states = torch.empty(len(row_keys), sequence, config.hidden_size, device=device)
    for state, key in zip(states, row_keys, strict=True):
        state.copy_(draw_state(config, state.shape, keyed_generator("state", *key, device=device)))
    return states


def default_state(config: MegaTransformerTextConfig) -> torch.Tensor | None:
    """The state used when none is passed: one fixed draw, (1, 1, hidden), the same for every row and position, so that
    a row's result depends on nothing but the row; None: the embedded input itself.
    """
    if config.recurrence.state_init == "embedding":
        return None
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


class ScalarInjection(nn.Module):
    """s + a e, with one learned number a, 1 at first. With a = 0 and s_0 = e the first step is a plain stack's."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return state + self.weight * embeds


class NoInjection(nn.Module):
    """s alone."""

    def __init__(self, hidden_size: int):
        super().__init__()

    def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return state


INJECTIONS = {
    "concat": ConcatInjection,
    "add": AddInjection,
    "gate": GateInjection,
    "scalar": ScalarInjection,
    "none": NoInjection,
}


# --------------------------------------------------------------------------------------------------- the core, the loop


class RecurrentCore(GradientCheckpointingLayer):
    """One step s_i = core(inject(s_{i-1}, e)). The unit of compilation and of activation checkpointing."""

    def __init__(self, config: MegaTransformerTextConfig):
        super().__init__()
        self.injection = INJECTIONS[config.recurrence.injection](config.hidden_size)
        self.order = layer_order(config.num_unique_core_layers, config.num_core_layers, config.layer_sharing)
        steps, scale = config.recurrence.loop_scale_steps, 1.0
        if steps is not None:
            scale = 1 / (steps * math.sqrt(config.num_core_layers))
        self.layers = nn.ModuleList(TransformerBlock(config, config.residual, scale) for _ in set(self.order))
        self.norm = build_norm(config) if config.recurrence.state_norm == "in_loop" else nn.Identity()
        self.has_step_embedding = config.recurrence.step_embedding != "none"
        self.step_lora: StepLora | None = None

    @property
    def is_told_step(self) -> bool:
        """Whether `forward` is given the number of the step."""
        return self.step_lora is not None

    @property
    def depends_on_step(self) -> bool:
        """Whether a step does other than the same from the same state; else they can be taken one by one."""
        return self.has_step_embedding or self.step_lora is not None

    def embed_step(self, step: int, state: torch.Tensor) -> torch.Tensor | None:
        """The embedding of the step after `step` others, (1, 1, hidden): the sinusoid of the steps taken then; None
        where nothing is. Source: Dehghani et al. 2018, arXiv 1807.03819, without its sinusoid of the position.
        """
        if not self.has_step_embedding:
            return None
        return sinusoids(torch.full((1, 1), step + 1, device=state.device), state.shape[-1]).to(state)

    def forward(
        self,
        state: torch.Tensor,
        embeds: torch.Tensor,
        inputs: AttentionInputs,
        slots: list[CacheSlot] | None = None,
        step: int | None = None,
        step_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """state, embeds: (batch, sequence, hidden) -> the next state.

        Args:
            slots: The places of the executed layers in the cache.
            step: Steps taken before, where there are adapters of single steps; else None, since for torch.compile
                each number would be a graph.
            step_embeds: The embedding that `embed_step` gives.
        """
        if step is not None:
            self.step_lora.step = step
        layers = [self.layers[index] for index in self.order]
        x = self.injection(state, embeds)
        return self.norm(run_layers(layers, x if step_embeds is None else x + step_embeds, inputs, slots))

    def token_function(self) -> Callable[..., torch.Tensor]:
        """A function that does what `forward` does, for one new token of each row."""
        if not is_plain(self, RecurrentCore):
            return self
        take_step, known, term = TokenStep(self), None, None

        def forward(state, embeds, inputs, slots, step, step_embeds):
            nonlocal known, term
            if embeds is not known:
                known, term = embeds, take_step.term(embeds.squeeze(1))
            if step is not None:
                self.step_lora.step = step
            embedded = None if step_embeds is None else step_embeds.squeeze(1)
            return take_step(state.squeeze(1), term, inputs, slots, embedded).unsqueeze(1)

        return forward


class UntiedCore(nn.Module):
    """Cores with layers and injection of their own, one for each step: the twin of a recurrent model with the same
    executed layers, of which none is executed twice.
    """

    step_lora, depends_on_step, is_told_step = None, True, True

    def __init__(self, config: MegaTransformerTextConfig):
        super().__init__()
        self.cores = nn.ModuleList(RecurrentCore(config) for _ in range(config.recurrence.mean_steps))
        self.order, self.has_step_embedding = self.cores[0].order, self.cores[0].has_step_embedding

    def embed_step(self, step: int, state: torch.Tensor) -> torch.Tensor | None:
        """The embedding that any of them has of its step."""
        return self.cores[step].embed_step(step, state)

    def forward(self, state: torch.Tensor, *args: Any, step: int, **kwargs: Any) -> torch.Tensor:
        """The step of the core whose turn it is, after `step` others; see `RecurrentCore`."""
        return self.cores[step](state, *args, step=None, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Each is compiled by itself, since each number of a step would be a graph."""
        for core in self.cores:
            core.compile(*args, **kwargs)

    def token_function(self) -> Callable[..., torch.Tensor]:
        """A function that does what `forward` does, for one new token of each row."""
        functions = [core.token_function() for core in self.cores]
        return lambda state, embeds, step, **kwargs: functions[step](state, embeds, step=None, **kwargs)


def build_core(config: MegaTransformerTextConfig) -> RecurrentCore | UntiedCore | None:
    """The core that a configuration describes, if it has one."""
    if not config.num_core_layers:
        return None
    return UntiedCore(config) if config.recurrence.untied_core else RecurrentCore(config)


class TokenStep:
    """One step of a core for one new token of each row, of which e is injected as a term that is the same at every
    step: of Linear([s; e]) the part of e.
    """

    def __init__(self, core: RecurrentCore):
        self.layers = [core.layers[index] for index in core.order]
        self.term, self.inject, self.norm = nn.Identity(), core.injection, token_norm(core.norm)
        if is_plain(core.injection, ConcatInjection) and is_plain(core.injection.proj, nn.Linear):
            of_state, of_embeds = core.injection.proj.weight.chunk(2, dim=1)
            self.term = partial(nn.functional.linear, weight=of_embeds)
            self.inject = lambda state, term: torch.addmm(term, state, of_state.t())

    def __call__(
        self,
        state: torch.Tensor,
        term: torch.Tensor,
        inputs: AttentionInputs,
        slots: list[CacheSlot],
        step_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """state, term, step_embeds: (rows, hidden) -> the next state."""
        x = self.inject(state, term)
        return self.norm(pass_token(self.layers, x if step_embeds is None else x + step_embeds, inputs, slots))


class ActiveRows:
    """The rows of a batch that are still iterated. The others keep the state, and the steps, that they left with.

    Args:
        state: s_0, (batch, sequence, hidden).
        embeds: e, of the same shape.
        inputs: Mask and positions.
        limits: The most steps of each row. None: no row leaves, and nothing depends on how many rows there are.
    """

    def __init__(
        self, state: torch.Tensor, embeds: torch.Tensor, inputs: AttentionInputs, limits: list[int] | None = None
    ):
        self.state, self.embeds, self.inputs = state, embeds, inputs
        self.index: torch.LongTensor | None = None  # which rows of the batch they are; None: all of them
        self.steps = limits  # of each row of the batch
        self._numbers = list(range(len(limits or ())))  # `index` for the host
        self._batch = state, embeds, inputs

    def leave(self, step: int, stops: torch.Tensor | None) -> bool:
        """Leaves out the rows for which `step` steps are enough, by their limit or by `stops`, (active rows,) of bool.
        Says whether a row goes on.
        """
        if self.steps is None:
            return True
        if stops is not None:
            for row, stop in zip(self._numbers, stops.tolist(), strict=True):  # the one point where the host waits
                self.steps[row] = step if stop else self.steps[row]
        kept = [place for place, row in enumerate(self._numbers) if self.steps[row] > step]
        if kept and len(kept) < len(self._numbers):
            self.narrow(kept)
        return bool(kept)

    def narrow(self, kept: list[int]) -> None:
        """Goes on with some of them, named by their places among those that are active."""
        _, embeds, inputs = self._batch
        self._batch = self.scatter_into_batch(), embeds, inputs
        self._numbers = [self._numbers[place] for place in kept]
        chosen = torch.tensor(kept, device=self.state.device)
        self.index = chosen if self.index is None else self.index.index_select(0, chosen)
        self.state = self.state.index_select(0, chosen)
        self.embeds, self.inputs = embeds.index_select(0, self.index), inputs.of(self.index)

    def scatter_into_batch(self) -> torch.Tensor:
        """The states of all rows, (batch, sequence, hidden)."""
        return self.state if self.index is None else self._batch[0].index_copy(0, self.index, self.state)


def iterate_core(
    core: RecurrentCore | UntiedCore,
    state: torch.Tensor,
    embeds: torch.Tensor,
    depth: Depth,
    inputs: AttentionInputs,
    cache: RecurrentCache | None = None,
    trajectory: list[torch.Tensor] | None = None,
    perturb: Callable[[int, ActiveRows], torch.Tensor] | None = None,
    check_exits: Callable[[int, ActiveRows], torch.Tensor | None] | None = None,
    step_hook: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """s_i = core(s_{i-1}, e) for i = 1 .. r, the first `depth.no_grad` steps without gradient: s_r, (batch, sequence,
    hidden), and the steps taken, (batch,) on the CPU. state: s_0; embeds: e; inputs: mask and positions.

    A row leaves the batch, and keeps its state, when it has taken its own number of steps, or `check_exits` says so.

    Args:
        trajectory: If given, s_1 .. s_r are appended.
        perturb: (steps taken, active rows) -> the states that the next step sees.
        check_exits: (steps taken, active rows) -> (active rows,) of bool, whether they stop; or None: none does. Not
            asked after the last step.
        step_hook: (steps taken, state of the active rows) -> the state in its place, which all that follows sees.
    """
    grad_enabled, limits = torch.is_grad_enabled(), None
    if depth.rows is not None or check_exits is not None:
        limits = [depth.total] * len(state) if depth.rows is None else depth.rows.tolist()
    active = ActiveRows(state, embeds, inputs, limits)
    take_step = core if inputs.token is None else inputs.token.function_of(core, type(core).token_function)
    slots_of = slots_by_step(cache, inputs.window, len(core.order))
    for step in range(depth.total):
        if grad_enabled and step == depth.no_grad and not active.state.requires_grad:
            # Truncation: backpropagation ends here. A leaf that requires a gradient makes the first step with gradient
            # look like the others, so that torch.compile needs one graph for them instead of two.
            active.state = active.state.detach().requires_grad_()
            if trajectory:  # the leaf itself, so that the next state can be derived by it
                trajectory[-1] = active.state
        of_step = step if core.is_told_step else None
        with torch.set_grad_enabled(grad_enabled and step >= depth.no_grad):
            s = active.state if perturb is None else perturb(step, active)
            active.state = take_step(
                s,
                active.embeds,
                inputs=active.inputs.of_step(step),
                slots=slots_of(step),
                step=of_step,
                step_embeds=core.embed_step(step, s),
            )
            if step_hook is not None:
                active.state = step_hook(step + 1, active.state)
        if trajectory is not None:
            trajectory.append(active.scatter_into_batch())
        stops = check_exits(step + 1, active) if check_exits is not None and step + 1 < depth.total else None
        if not active.leave(step + 1, stops):
            break
    state = active.scatter_into_batch()
    return state, torch.full(state.shape[:1], depth.total) if limits is None else torch.tensor(active.steps)
