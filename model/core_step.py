"""One step of a core as a function of the state alone, and the spectral radius of such a function."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

ROWS, TOKENS = 2, 64
"""Rows of a batch, and tokens of each, on which a core is measured, unless told otherwise."""
ITERATIONS = 8


@torch.no_grad()
def spectral_radius(
    step: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    num_iterations: int = ITERATIONS,
    is_real: torch.Tensor | None = None,
) -> torch.Tensor:
    """The largest absolute eigenvalue of the derivative of `step(state)` by the state, by power iteration with forward
    derivatives: about the factor by which small differences grow in a step.

    Args:
        step: The function, from a state to one of the same shape.
        state: Where it is derived.
        num_iterations: Products with the derivative. The mean (geometric) growth over the second half of them counts,
            as complex eigenvalues make that of a single one vary.
        is_real: What of the state counts, broadcastable to it, of bool. Default: all.
    """
    generator = torch.Generator(state.device).manual_seed(0)
    vector = torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)
    kept, growths = torch.ones_like(vector) if is_real is None else is_real.to(vector), []
    vector = vector * kept / (vector * kept).norm()
    for _ in range(num_iterations):
        vector = torch.func.jvp(step, (state,), (vector,))[1] * kept
        growths.append(vector.norm())
        vector = vector / growths[-1].clamp(min=torch.finfo(state.dtype).tiny)
    return torch.stack(growths[num_iterations // 2 :]).log().mean().exp()


@dataclass
class CoreStep:
    """One step s -> core(s, e) for a few tokens; the core is in evaluation mode.

    Args:
        core: The core.
        state: s, (rows, tokens, hidden).
        embeds: e, of the same shape.
        inputs: Mask, added to the logits, and positions.
        step: Steps taken before, where there are adapters of single steps.
        step_embeds: What is added in this step, where it has an embedding.
    """

    core: nn.Module
    state: torch.Tensor
    embeds: torch.Tensor
    inputs: Any
    step: int | None
    step_embeds: torch.Tensor | None

    @classmethod
    def of(
        cls,
        core: nn.Module,
        state: torch.Tensor,
        embeds: torch.Tensor,
        inputs: Any,
        step: int | None,
        step_embeds: torch.Tensor | None,
        most_tokens: int = TOKENS,
        **others: Any,
    ) -> "CoreStep":
        """The first rows and tokens of a step of a whole batch, in the type of the weights."""
        dtype = next(core.parameters()).dtype
        tokens = min(most_tokens, state.shape[1])
        state, embeds = (part.detach()[:ROWS, :tokens].to(dtype) for part in (state, embeds))
        inputs = inputs.of(torch.arange(len(state), device=state.device))
        mask = additive_mask(inputs.mask, tokens, state)
        if inputs.position_bias is not None:
            mask = mask + inputs.position_bias[..., :tokens, :tokens].to(dtype)
        rotary = inputs.rotary and tuple(part[:, :tokens].to(dtype) for part in inputs.rotary)
        source = inputs.source and inputs.source.map(lambda part: part if part is None else part.detach())
        if source is not None and source.mask is not None:
            source.mask = as_added(source.mask[..., :tokens, :], state)
        inputs = replace(inputs, mask=mask, rotary=rotary, position_bias=None, rows=None, source=source)
        return cls(core, state, embeds, inputs, step, None if step_embeds is None else step_embeds.to(dtype))

    def take(self, state: torch.Tensor, attentions: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The next state; attention is computed eagerly, through which forward derivatives are known."""
        source = self.inputs.source and replace(self.inputs.source, attentions=[])
        inputs = replace(self.inputs, attentions=[] if attentions is None else attentions, source=source)
        return self.core.forward(state, self.embeds, inputs=inputs, step=self.step, step_embeds=self.step_embeds)

    def after(self, taken: int) -> "CoreStep":
        """The same for the step after `taken` others."""
        step = taken if self.core.is_told_step else None
        return replace(self, step=step, step_embeds=self.core.embed_step(taken, self.state))

    @property
    def is_real(self) -> torch.Tensor:
        """Which tokens are no padding, (1 or rows, tokens) of bool: those that see themselves."""
        mask = self.inputs.mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return mask > torch.finfo(mask.dtype).min / 2

    def spectral_radius(self, num_iterations: int = ITERATIONS) -> torch.Tensor:
        """That of the derivative of the next state by the state, padding left out."""
        return spectral_radius(self.take, self.state, num_iterations, self.is_real[..., None])

    @torch.no_grad()
    def attention_entropy(self) -> torch.Tensor:
        """The mean entropy of the attention of a token over those that it sees, in shares of the most it could be: 1 if
        it looks at all alike, 0 if it looks at one. Padding is left out.
        """
        attentions: list[torch.Tensor] = []
        self.take(self.state, attentions)
        probabilities = torch.stack(attentions).float()  # (layers, rows, heads, query, key)
        entropy = torch.special.entr(probabilities).sum(-1)
        is_seen = self.inputs.mask > torch.finfo(self.inputs.mask.dtype).min / 2  # (1 or rows, 1 or heads, query, key)
        num_seen = (is_seen.sum(-1) * self.is_real[:, None]).expand(entropy.shape)
        return (entropy / num_seen.log())[num_seen > 1].mean()


def additive_mask(mask: Any, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """The mask of any backend for the first tokens, (1 or rows, 1 or heads, tokens, tokens), as the eager one adds it;
    without one, or with a block mask, plain causal, and with FlashAttention's, (rows, tokens) of bool, without padding.
    """
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=like.device).tril()
    if not isinstance(mask, torch.Tensor):
        mask = causal
    elif mask.ndim == 2:
        mask = causal & mask.bool()[:, None, None, :tokens]
    return as_added(mask[..., :tokens, :tokens], like)


def as_added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask of bool, or one that is added already, as one that is added."""
    return torch.where(mask, 0.0, torch.finfo(like.dtype).min).to(like) if mask.dtype == torch.bool else mask.to(like)
