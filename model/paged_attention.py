"""Engines that keep keys and values themselves, in pages: vLLM, SGLang, transformers' continuous batching.

Each has a place for every one of `range(config.num_hidden_layers)`, and finds that of an attention by the `layer_idx`
of its module at the time of the call. A layer of the core is executed at each step, and needs as many places: layer i
of the prelude has place i, layer j of the core at step s place p + s k + j, the coda what is behind.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .configuration_megatransformer_text import MegaTransformerTextConfig

ENGINE_MARKS = ("attention_instances", "write_index")
"""Arguments of `forward` that tell an engine: the first those of vLLM and SGLang, the second continuous batching."""
ENGINE_NAMES = (
    *ENGINE_MARKS,
    *("forward_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "block_table"),
    *("is_causal", "logits_indices", "logits_processor_args"),
)
"""Arguments of `forward` that go to the attention function of an engine."""


def is_engine_call(kwargs: dict[str, Any]) -> bool:
    """Whether arguments of `forward` are those of an engine."""
    return any(kwargs.get(name) is not None for name in ENGINE_MARKS)


def pop_engine_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """An engine's arguments, taken out of those of `forward`; none where it is not an engine that calls."""
    return {name: kwargs.pop(name) for name in ENGINE_NAMES if name in kwargs} if is_engine_call(kwargs) else {}


@dataclass
class EngineCall:
    """What an engine gives to one forward pass.

    Args:
        kwargs: Arguments for its attention function.
        cache: The pages of continuous batching; engines whose attention function writes them itself give None.
        mask: Who sees whom, in the form that the backend wants; None: the attention function knows.
        num_prelude_layers, num_core_layers: Layers before the first step, and of each step.
    """

    kwargs: dict[str, Any]
    cache: Any
    mask: torch.Tensor | None
    num_prelude_layers: int
    num_core_layers: int

    def first_place(self, step: int) -> int:
        """The place of the first layer behind the prelude and so many steps."""
        return self.num_prelude_layers + step * self.num_core_layers

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Keys and values, (1, heads, tokens, head_dim), as the attention function wants them, and its arguments."""
        kwargs = dict(self.kwargs)
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx, kwargs=kwargs)
        return key, value, kwargs


def check_engine(config: MegaTransformerTextConfig) -> None:
    """Raises ValueError for a text model that engines cannot run."""
    if config.encoder_hidden_size is not None:
        raise ValueError(
            "engines cannot run a decoder behind an encoder, whose source has no pages; use generate, or "
            "`python -m inference.serve`"
        )
    if config.position_embedding == "alibi":
        raise ValueError(
            "engines cannot run position_embedding 'alibi', since their attention knows no positions of the keys in "
            "pages; use generate, or train with 'rope'"
        )
    if config.recurrence.cache_policy == "first":
        raise ValueError(
            "engines cannot run cache_policy 'first', since their pages keep every step of all tokens; use generate"
        )


def check_places(config: MegaTransformerTextConfig, num_steps: int) -> None:
    """Raises ValueError for a text model that engines cannot run, or for which they have another number of places."""
    check_engine(config)
    executed, places = config.count_executed_layers(num_steps), config.num_hidden_layers
    if executed != places:
        raise ValueError(
            f"an engine has a place for each of {places} layers (num_hidden_layers), and {executed} are executed at "
            f"{num_steps} steps: give it a folder that `python convert.py serve CHECKPOINT FOLDER --num-steps "
            f"{num_steps}` has written"
        )
