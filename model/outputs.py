"""What the models return, and the name of the cache in it, which is `cache` from transformers 5.24 on and was
`past_key_values` before: `forward` takes both, and outputs have both.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_NAME = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"
"""The name by which the installed transformers hands the cache to a model, and looks for it in outputs."""


def pop_cache(cache: Any, kwargs: dict[str, Any]) -> Any:
    """The cache, which may also be called `past_key_values`; that is taken out of the keywords. (The library's
    `deprecate_kwarg` would warn at each token where the library itself still uses the old name.) ValueError if both are
    given.
    """
    past_key_values = kwargs.pop("past_key_values", None)
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("cache and past_key_values are two names of the same; give one of them")
    return past_key_values


def with_parameters(*names: str) -> Callable[[Callable], Callable]:
    """Decorator of a method with `**kwargs`: its signature, in which transformers looks for what `generate` may be
    given, lists these as well.
    """
    further = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return functools.partial(_list_parameters, further)


def with_parameters_of(base: Callable) -> Callable[[Callable], Callable]:
    """Decorator of a method that hands its `**kwargs` on to `base`: its signature, in which transformers looks for what
    a model takes, lists those parameters too.
    """

    def decorate(method: Callable) -> Callable:
        own, theirs = inspect.signature(method).parameters, inspect.signature(base).parameters
        further = [each for name, each in theirs.items() if name not in own and each.kind != each.VAR_KEYWORD]
        return _list_parameters([each.replace(kind=each.KEYWORD_ONLY) for each in further], method)

    return decorate


def _list_parameters(further: list[inspect.Parameter], method: Callable) -> Callable:
    own = inspect.signature(method)
    *named, rest = own.parameters.values()
    method.__signature__ = own.replace(parameters=[*named, *further, rest])
    return method


if CACHE_NAME == "cache":

    class CacheByBothNames:
        """`ModelOutput` has the old name itself."""

else:

    class CacheByBothNames:
        """Adds the new name to outputs."""

        @property
        def cache(self) -> Any:
            """The cache, if one was asked for."""
            return self.past_key_values


@dataclass
class MegaTransformerModelOutput(CacheByBothNames, BaseModelOutputWithPast):
    """Output of the base model: `last_hidden_state`, (batch, sequence, hidden), after coda and final norm; `cache`, if
    one was asked for; and what follows.

    Args:
        hidden_states: The embedded input, the output of each prelude layer, s_1 .. s_r, and the output of each coda
            layer, the last of them after the final norm; each (batch, sequence, hidden). With
            `output_hidden_states=True`.
        attentions: The attention probabilities of each executed layer, (batch, heads, sequence, keys), 0 in rows that
            had stopped before. With `output_attentions=True`.
        state: (batch, sequence, hidden), after the last core step and the final norm. None without a core.
        states: s_0 .. s_r as the core left them, each (batch, sequence, hidden); only with `output_states=True`.
        exit_steps: (batch,), core steps taken by each row, on the CPU. None without a core.
        cross_attentions: The same as `attentions` of the source, in a decoder: (batch, heads, sequence, source).
        contrasted: (batch, 1, hidden), `last_hidden_state` of the last token if it is read from what `contrast` mixes.
    """

    state: torch.FloatTensor | None = None
    states: tuple[torch.FloatTensor, ...] | None = None
    exit_steps: torch.LongTensor | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    contrasted: torch.FloatTensor | None = None


@dataclass
class MegaTransformerCausalLMOutput(CacheByBothNames, CausalLMOutputWithPast):
    """Output of the language model: `loss` (scalar, if labels were given), `logits` (batch, sequence, vocab), and the
    base model's `cache`, `hidden_states`, `attentions`, `cross_attentions`, `state`, `states`, `exit_steps` and
    `last_hidden_state`.

    `token_losses`, (batch, sequence), float32 without gradient: the loss of label i at place i, before its weight, 0
    where there is no label. With `skip_logits` or `loss_weights`.
    """

    state: torch.FloatTensor | None = None
    states: tuple[torch.FloatTensor, ...] | None = None
    exit_steps: torch.LongTensor | None = None
    token_losses: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
