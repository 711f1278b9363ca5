"""The text models: MegaTransformerTextModel (embedding, prelude, core, coda), and with a head on top
MegaTransformerForCausalLM and MegaTransformerForSequenceClassification. They know of no images and no audio.
"""

import contextlib
import difflib
import functools
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, can_return_tuple, logging

from .attention import (
    AttentionInputs,
    CrossAttention,
    SourceInputs,
    prepare_attention,
    prepare_engine_attention,
    prepare_source,
    select_rows,
)
from .blocks import (
    AdminResidual,
    BlockStack,
    PositionEmbedding,
    ScaledEmbedding,
    build_norm,
    layer_order,
    sinusoids,
)
from .cache import RecurrentCache
from .configuration_megatransformer_text import MegaTransformerTextConfig
from .cross_entropy import causal_loss, count_labels
from .depth import ContrastOptions, NoiseOptions, resolve_depth
from .exit_criteria import ExitController, ExitOptions, ExitProbe
from .generation_text import RecurrentGenerationMixin
from .initialization import MegaTransformerPreTrainedModel
from .outputs import CACHE_NAME, MegaTransformerCausalLMOutput, MegaTransformerModelOutput, pop_cache, with_parameters
from .paged_attention import EngineCall, check_places, is_engine_call, pop_engine_names
from .recurrence import ActiveRows, build_core, default_state, iterate_core

logger = logging.get_logger(__name__)

PACKING_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments of flash attention and of state-space models, by which collators say where packed documents begin."""


def check_kwargs(kwargs: dict[str, Any], forward: Callable, position_ids: torch.Tensor | None) -> None:
    """Libraries around the model pass arguments of their own to every model. Those that ask for nothing, and those that
    say again where the packed documents of `position_ids` begin, are accepted. ValueError: any other is given, since
    `**kwargs` would swallow a misspelt one; or documents that `position_ids` do not begin.
    """
    for name, value in kwargs.items():
        if name in PACKING_NAMES and position_ids is not None:
            continue
        if value is None or value is False:
            continue
        if name in PACKING_NAMES:
            raise ValueError(f"{name} says where packed documents begin, which here do position_ids; give them as well")
        near = difflib.get_close_matches(name, inspect.signature(forward).parameters, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see its docstring for those it takes"
        raise ValueError(f"forward does not know the argument {name!r}; {hint}")
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None and (position_ids.flatten()[starts[:-1].long()] != 0).any():
        raise ValueError(f"cu_seq_lens_q has documents begin at {starts.tolist()}, where position_ids do not restart")


def last_state(name: str, cache: RecurrentCache | None) -> torch.Tensor | None:
    """The state in which the token before ended, (batch, 1, hidden), if there is one. ValueError for another name."""
    if name != "last":
        raise ValueError(f"initial_state is {name!r}; give a tensor, or 'last'")
    return None if cache is None else cache.last_state


class MegaTransformerTextModel(MegaTransformerPreTrainedModel):
    """Token ids to hidden states: embedding, prelude, core x r, coda, norm."""

    config: MegaTransformerTextConfig
    _auto_class = "AutoModel"

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.text_config = config.get_text_config()
        # transformers chooses the backend of parts that are models; this part is one with the whole.
        self.text_config._attn_implementation = self.get_correct_attn_implementation(
            self.text_config._attn_implementation or config._attn_implementation, is_init_check=True
        )
        config = self.text_config
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embedding_scale
        )
        if config.position_embedding == "learned":
            self.embed_positions = PositionEmbedding(config.max_position_embeddings, config.hidden_size)
        sharing = config.layer_sharing
        order = layer_order(config.num_unique_prelude_layers, config.num_prelude_layers, sharing)
        self.prelude = BlockStack(config, order, config.residual)
        self.core = build_core(config)
        order = layer_order(config.num_unique_coda_layers, config.num_coda_layers, sharing)
        self.coda = BlockStack(config, order, config.residual)
        is_normed = self.core is not None and config.recurrence.state_norm == "in_loop" and not config.num_coda_layers
        self.norm = nn.Identity() if is_normed else build_norm(config)
        self.exit_probe = ExitProbe(config.hidden_size) if config.recurrence.exit_probe else None
        self.exit_gate = nn.Linear(config.hidden_size, 1) if config.recurrence.exit_gate else None
        for number, layer in enumerate(self.cross_attentions):
            layer.number = number
        self.gradient_checkpointing, self.units_are_compiled = False, False
        self._step_hooks: OrderedDict[int, tuple[int | None, Callable]] = OrderedDict()
        self._drawn_state: tuple[tuple, torch.Tensor | None] = ((), None)
        self._state_to_export = self._state_key(), default_state(self.text_config)  # since a trace cannot draw
        self.post_init()

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """Those of a decoder behind an encoder, in the order of the layers."""
        return [module for module in self.modules() if isinstance(module, CrossAttention)]

    def add_exit_probe(self) -> ExitProbe:
        """A fresh probe in place of none, or of the one that is there; it is saved with the model."""
        self.text_config.recurrence.exit_probe = True
        self.exit_probe = ExitProbe(self.text_config.hidden_size).to(self.embed_tokens.weight)
        self.exit_probe.apply(self._init_weights)
        return self.exit_probe

    @torch.no_grad()
    def profile_residuals(self) -> None:
        """The profiling pass of Admin, on random tokens from a fixed seed, once, before the first update. In front of
        each sub-layer in the order of execution at the mean depth, w^2 becomes 1 plus the variances of the outputs of
        all before it, 1 being that of the input; of one that is executed several times, the mean of these sums.

        Raises:
            ValueError: no residual is Admin's, or they have been profiled, and weights may have been learned with that.
        """
        sums = {module: [] for module in self.modules() if type(module) is AdminResidual}
        if not sums or any(module.is_profiled for module in sums):
            reason = "has been profiled already" if sums else "has no residual 'admin'"
            raise ValueError(f"the model {reason}; profile a fresh one with residual 'admin'")
        variances = [torch.ones((), device=self.device)]

        def note(module: nn.Module, args: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
            sums[module].append(sum(variances))
            variances.append(args[1].float().var())

        shape = 4, min(64, self.text_config.max_position_embeddings)
        ids = torch.randint(self.text_config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        was_training, hooks = self.training, [module.register_forward_hook(note) for module in sums]
        self.eval()(inputs_embeds=self.embed_tokens(ids.to(self.device)), use_cache=False)
        self.train(was_training)
        for hook in hooks:
            hook.remove()
        for module, found in sums.items():
            module.weight.fill_(torch.stack(found).mean().sqrt())
            module.is_profiled.fill_(True)

    def compile_units(self, **kwargs) -> None:
        """Compiles prelude, one core step, and coda, each as a unit, with `torch.compile(**kwargs)`. The loop around
        them has a varying length and stays outside: compiled with it, every new depth would be a new graph.
        """
        # One count of graphs for all three, since they share a wrapper of transformers: each needs one or two, for each
        # of training and evaluation, of a fixed and a varying length.
        torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 32)
        for unit in (self.prelude, self.core, self.coda):
            if unit is not None:
                unit.compile(**kwargs)
        self.units_are_compiled = True

    def register_step_hook(self, step: int | None, fn: Callable[..., torch.Tensor | None]) -> RemovableHandle:
        """Calls `fn(state)` after core step `step`, counted from 1, in training, evaluation and generation, until
        `remove()` of the handle that is returned. What it returns, if not None, takes the place of the state: the next
        step, exits, outputs and the coda see that. A step that is not taken calls nothing. With `step` None it is
        called as `fn(state, step)` after every step.

        The state is s_i before any norm, (rows, new tokens, hidden), of the rows that are still iterated: those that
        have taken all their steps, or have exited, are not among them. Hooks of one step are called in the order of
        their registration. They run between the compiled units, so they add no graph.

        Raises:
            ValueError: The model has no core, or the step is below 1; in `forward`, a state of another shape is
                returned; decoding "wavefront" and the serving engine refuse hooks, since they take steps of different
                numbers at once.
        """
        if self.core is None:
            raise ValueError("the model has no core (num_core_layers is 0), so no step: use register_forward_hook")
        if step is not None and (not isinstance(step, int) or step < 1):
            raise ValueError(f"step is {step!r}; give the number of a core step, 1 or more, or None for all of them")
        handle = RemovableHandle(self._step_hooks)
        self._step_hooks[handle.id] = (step, fn)
        return handle

    def _run_step_hooks(self, step: int, state: torch.Tensor) -> torch.Tensor:
        """The state after a step, or what hooks have put in its place."""
        for wanted, fn in tuple(self._step_hooks.values()):
            if wanted not in (None, step):
                continue
            new = fn(state, step) if wanted is None else fn(state)
            if new is None:
                continue
            if new.shape != state.shape:
                raise ValueError(
                    f"a hook of core step {step} returned a state of shape {tuple(new.shape)}, expected "
                    f"{tuple(state.shape)}: return None to leave the state as it is"
                )
            state = new.to(state).contiguous()
        return state

    @property
    def has_step_hooks(self) -> bool:
        """Whether a hook of a step is registered."""
        return bool(self._step_hooks)

    @with_parameters("past_key_values")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | tuple[int, int] | torch.LongTensor | None = None,
        initial_state: torch.FloatTensor | Literal["last"] | None = None,
        output_states: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        state_noise: NoiseOptions | None = None,
        exit_controller: ExitController | None = None,
        **kwargs,
    ) -> MegaTransformerModelOutput:
        """
        Args:
            input_ids: (batch, sequence), below `vocab_size`.
            attention_mask: (batch, past + sequence) with 1 for real tokens and 0 for padding, or 4-D.
            position_ids: (batch, sequence). Default: counted over the real tokens. Without mask and cache, a restart at
                0 begins a new document, and attention does not cross it.
            cache: Cache of the tokens before; it is extended in place. One of transformers, such as prefix tuning has,
                is copied: go on with that of the output.
            inputs_embeds: (batch, sequence, hidden) instead of `input_ids`; already scaled, positions not yet added.
            num_steps: Core steps: an int, a pair (without gradient, with gradient), or (batch,). See `resolve_depth`.
            initial_state: s_0, broadcastable to (batch, sequence, hidden); or "last": a single new token behind a cache
                starts from the state in which the token before ended. Default: one fixed draw.
            output_states: Return s_0 .. s_r.
            output_hidden_states: Return `hidden_states`. Default: what the config says.
            output_attentions: Return `attentions`, which are then computed eagerly. Default: what the config says.
            state_noise: What perturbs the state before each step. Default: nothing.
            exit_controller: Says which rows stop early, and after which step. Made by the model with the head.
            kwargs: `source`, of a decoder: the last states of the encoder, (batch, source, hidden), and which of them
                are no padding, (batch, source) of bool, or None. Behind a cache, that has their keys and values.
                `contrast`: `ContrastOptions`. Those of engines, which keep keys and values: see `ENGINE_NAMES`.

        Raises:
            ValueError: a sequence is empty, a mask of the wrong shape, a position past a table, a cache foreign, or a
                depth is none.
        """
        cache, source = pop_cache(cache, kwargs), kwargs.pop("source", None)
        contrast: ContrastOptions | None = kwargs.pop("contrast", None)
        engine, cache, attention_mask = self._take_engine(kwargs, cache, attention_mask)
        check_kwargs(kwargs, self.forward, position_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward needs exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, sequence, _ = inputs_embeds.shape
        if use_cache is None:
            use_cache = self.config.use_cache and self.text_config.use_cache and not self.training
        if use_cache and cache is None and engine is None:
            cache = RecurrentCache(self.text_config)
        if cache is not None and not hasattr(cache, "row_steps"):
            cache = RecurrentCache.of_prefix(self.text_config, cache)
        past = self._check_inputs(batch, sequence, attention_mask, cache)
        depth = resolve_depth(num_steps, self.text_config, batch, self.training)
        if self.text_config.recurrence.untied_core and (exit_controller is not None or state_noise is not None):
            what = "exits are" if exit_controller is not None else "state_noise and its options are"
            raise ValueError(
                f"{what} not possible with untied_core, whose steps are all taken as trained; leave it out"
            )
        may_restart = position_ids is not None
        attention_mask, position_ids = self.place(inputs_embeds, past, attention_mask, position_ids)
        hidden = self.add_positions(inputs_embeds, position_ids)
        if cache is not None:
            cache.begin(hidden, depth.total)
            if self.units_are_compiled:  # with CUDA graphs, the memory of what the units returned before is free again
                torch.compiler.cudagraph_mark_step_begin()
        asked = self.asked_outputs(output_hidden_states, output_attentions)
        attentions = [] if asked["output_attentions"] else None
        if engine is None:
            inputs = prepare_attention(
                self.text_config, hidden, attention_mask, position_ids, cache, may_restart, attentions=attentions
            )
        else:
            for name, value in (
                *(("contrast", contrast), ("exits", exit_controller), ("output_attentions", attentions)),
                ("num_steps with a number per row", depth.rows),
            ):
                if value is not None:
                    raise ValueError(f"{name} is not possible where an engine keeps keys and values; leave it out")
            check_places(self.text_config, depth.total)
            inputs = prepare_engine_attention(self.text_config, hidden, position_ids, engine)
        inputs.hidden_states = [hidden] if asked["output_hidden_states"] else None
        if self.training or self.units_are_compiled:
            inputs.token = None
        elif inputs.token is not None and cache.token_functions is not None:
            inputs.token.functions = cache.token_functions
        if source is not None:
            inputs.source = self._see_source(hidden, *source, cache, None if attentions is None else [])

        slots = cache.prelude_slots if cache is not None else None
        hidden = self.prelude(hidden, inputs=inputs, slots=slots) if self.prelude.order else hidden
        if self.core is None:
            inputs = inputs if engine is None else inputs.of_step(0)
            hidden, state, states, exit_steps = self.read(hidden, inputs, cache), None, None, None
            contrasted = None
        else:
            is_warm = isinstance(initial_state, str)
            if is_warm:
                initial_state = last_state(initial_state, cache if past and sequence == 1 else None)
            state = self._first_state(hidden, initial_state)
            states = [state] if output_states or inputs.hidden_states is not None or contrast is not None else None
            is_noisy = state_noise is not None and state_noise.level
            perturb = functools.partial(self._perturb, state_noise, position_ids) if is_noisy else None
            check_exits = None
            if exit_controller is not None:
                is_padded = attention_mask is not None and attention_mask.ndim == 2
                exit_controller.begin(state, attention_mask[:, -sequence:].bool() if is_padded else None)
                check_exits = functools.partial(self._check_exits, exit_controller, cache)
            state, exit_steps = iterate_core(
                *(self.core, state, hidden, depth, inputs, cache, states, perturb, check_exits),
                step_hook=self._run_step_hooks if self._step_hooks else None,
            )
            if cache is not None:
                cache.fill_skipped_steps(exit_steps, num_new_tokens=sequence)
            if inputs.hidden_states is not None:
                inputs.hidden_states += states[1:]
            if engine is not None:
                inputs = inputs.of_step(depth.total)  # the places behind those of all steps
            state = self.norm_state(state)
            if cache is not None and is_warm:
                cache.last_state = state[:, -1:].clone()
            hidden = self._read_unless_seen(state, inputs, cache, exit_steps, exit_controller)
            contrasted = None if contrast is None else self._read_contrast(contrast, states, inputs, cache)
        if cache is not None:
            cache.advance(sequence)
        if inputs.hidden_states is not None:
            inputs.hidden_states[-1] = hidden
        return MegaTransformerModelOutput(
            last_hidden_state=hidden,
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=None if inputs.hidden_states is None else tuple(inputs.hidden_states),
            attentions=None if inputs.attentions is None else tuple(inputs.attentions),
            cross_attentions=None if source is None or attentions is None else tuple(inputs.source.attentions),
            state=state,
            states=tuple(states) if output_states and states else None,
            exit_steps=exit_steps,
            contrasted=contrasted,
        )

    def _take_engine(
        self, kwargs: dict[str, Any], cache: Any, attention_mask: torch.Tensor | None
    ) -> tuple[EngineCall | None, RecurrentCache | None, torch.Tensor | None]:
        """What an engine gives, if it calls, and cache and mask, which are then its own."""
        if not is_engine_call(kwargs):
            return None, cache, attention_mask
        config = self.text_config
        counts = (config.num_prelude_layers, config.num_core_layers)
        return EngineCall(pop_engine_names(kwargs), cache, attention_mask, *counts), None, None

    def _see_source(
        self,
        hidden: torch.Tensor,
        states: torch.Tensor,
        is_real: torch.Tensor | None,
        cache: RecurrentCache | None,
        attentions: list[torch.Tensor] | None,
    ) -> SourceInputs:
        """The source for cross-attentions; its keys and values are made once for all steps, and kept in a cache."""
        keys_values = None if cache is None else cache.source
        if keys_values is None:
            keys_values = tuple(layer.project_source(states) for layer in self.cross_attentions)
        if cache is not None:
            cache.source = keys_values
        return prepare_source(self.text_config, hidden, states, is_real, keys_values, attentions)

    def asked_outputs(
        self, output_hidden_states: bool | None = None, output_attentions: bool | None = None, **others: Any
    ) -> dict[str, bool]:
        """Which outputs are asked for, by argument, else by config."""
        given = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        return {name: bool(getattr(self.config, name) if value is None else value) for name, value in given.items()}

    def place(
        self, embeds: torch.Tensor, past: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mask and positions of the new tokens behind `past` others, checked."""
        batch, sequence, _ = embeds.shape
        if attention_mask is not None and attention_mask.ndim == 4 and not attention_mask.is_floating_point():
            attention_mask = attention_mask.bool()  # 1 for what is seen; numbers would be added
        if position_ids is not None and past == 0 and attention_mask is not None and attention_mask.ndim == 2:
            # A mask that hides nothing would hide that positions restart, and with them documents.
            attention_mask = None if attention_mask.all() else attention_mask
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Counted over the real tokens, so that a padded row stands where it would stand alone.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -sequence:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + sequence, device=embeds.device)[None]
        self._check_positions(position_ids, batch, sequence)
        return attention_mask, position_ids

    def _first_state(self, hidden: torch.Tensor, initial_state: torch.Tensor | None) -> torch.Tensor:
        """s_0, (batch, sequence, hidden), in one memory layout, so that there is one compiled graph."""
        state, wanted = self.start(hidden) if initial_state is None else initial_state, tuple(hidden.shape)
        shape = tuple(state.shape)
        if len(shape) != 3 or any(size not in (1, most) for size, most in zip(shape, wanted, strict=True)):
            raise ValueError(
                f"initial_state has shape {shape}, which cannot be broadcast to (batch, new tokens, hidden) = {wanted};"
                " in `generate`, where the number of new tokens changes, give (batch, 1, hidden)"
            )
        return state.to(hidden).expand_as(hidden).contiguous()

    def start(self, embeds: torch.Tensor) -> torch.Tensor:
        """s_0 where none is given, broadcastable to e, (batch, sequence, hidden)."""
        recurrence = self.text_config.recurrence
        return recurrence.state_scale * embeds if recurrence.state_init == "embedding" else self.fixed_state(embeds)

    def norm_state(self, state: torch.Tensor) -> torch.Tensor:
        """A state as the coda reads it."""
        return self.norm(state) if self.text_config.recurrence.state_norm == "shared" else state

    def fixed_state(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """`default_state` on the device and in the type of `hidden`, drawn once; None where there is no such state."""
        if self.text_config.recurrence.state_init == "embedding":
            return None
        key = (*self._state_key(), hidden.device, hidden.dtype)
        if self._drawn_state[0] != key:
            if torch.compiler.is_exporting():
                drawn, state = self._state_to_export
                if drawn != self._state_key():
                    raise ValueError(
                        f"state_init, state_scale and state_seed were {drawn} when the model was made, and are now "
                        f"{self._state_key()}: run it once before torch.export, which cannot draw another state"
                    )
                return state.to(hidden)
            with torch.inference_mode(False):  # training may use it, too
                self._drawn_state = (key, default_state(self.text_config).to(hidden))
        return self._drawn_state[1]

    def _state_key(self) -> tuple[str, float, int]:
        """The options on which `default_state` depends."""
        recurrence = self.text_config.recurrence
        return recurrence.state_init, recurrence.state_scale, recurrence.state_seed

    def _perturb(
        self, noise: NoiseOptions, position_ids: torch.LongTensor, step: int, active: ActiveRows
    ) -> torch.Tensor:
        """The states with noise, normed as the core leaves its states."""
        position_ids = position_ids if active.index is None else select_rows(position_ids, active.index)
        last = self.core.layers[self.core.order[-1]]
        return self.core.norm(last.mlp_norm_out(noise.mix(step, active.state, position_ids, self.text_config)))

    def read(self, state, inputs: AttentionInputs, cache) -> torch.Tensor:
        """norm(coda(state)): what the head reads. A second reading of the same tokens is written over the first."""
        slots = cache.coda_slots if cache is not None else None
        return self.norm(self.coda(state, inputs=inputs, slots=slots) if self.coda.order else state)

    def _read_contrast(
        self,
        contrast: ContrastOptions,
        states: list[torch.Tensor],
        inputs: AttentionInputs,
        cache: RecurrentCache | None,
    ) -> torch.Tensor:
        """What is read of the last token's mixed state, (batch, 1, hidden). The cache holds again what the last state
        has left there, also in earlier tokens' places, so that it does not matter in which chunks a prompt is read.
        """
        if cache is None or not isinstance(inputs.mask, torch.Tensor | None):
            raise ValueError("contrast is possible with a cache, and with the attention of sdpa or eager")
        slots, place = cache.coda_slots, cache.get_seq_length() + states[0].shape[1] - 1
        kept = [slot.both.select(3, place).clone() for slot in slots]
        mixed = self.norm_state(contrast.mix([state[:, -1:] for state in states]))
        contrasted = self.read(mixed, inputs.of_last(), cache)
        for slot, entries in zip(slots, kept, strict=True):
            slot.both.select(3, place).copy_(entries)
        return contrasted

    def _check_exits(
        self, controller: ExitController, cache: RecurrentCache | None, step: int, active: ActiveRows
    ) -> torch.Tensor | None:
        """Which of the rows stop after `step` steps; None where they are not checked."""
        if not controller.is_due(step):
            return None
        # Only the last reading is part of the output; the mask is already that of the backend that gives attentions.
        attentions = None if active.inputs.attentions is None else list(active.inputs.attentions)
        inputs, hidden = replace(active.inputs, hidden_states=None, attentions=attentions), None
        if controller.criterion.reads_logits:
            hidden = self.read(self.norm_state(active.state), inputs, cache)
        return controller.check(step, active.state, hidden, active.index)

    def _read_unless_seen(
        self,
        state: torch.Tensor,
        inputs: AttentionInputs,
        cache: RecurrentCache | None,
        exit_steps: torch.LongTensor,
        controller: ExitController | None,
    ) -> torch.Tensor:
        """The last readings, of which those made at a row's last check need not be made again."""
        is_recorded = inputs.hidden_states is not None or inputs.attentions is not None
        if controller is None or controller.hidden is None or is_recorded:
            return self.read(state, inputs, cache)
        unseen = (controller.steps_at_check != exit_steps).nonzero().squeeze(1).to(state.device)
        if len(unseen):
            controller.keep(self.read(state[unseen], inputs.of(unseen), cache), unseen)
        return controller.hidden

    def _check_inputs(self, batch: int, sequence: int, attention_mask, cache) -> int:
        """Number of tokens in the cache; raises for inputs that would fail late or broadcast silently."""
        if sequence == 0 or batch == 0:
            what = "sequence is empty; give at least one token" if batch else "batch is empty; give at least one row"
            raise ValueError(f"the input {what}")
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.ndim != 4 and attention_mask.shape != (batch, past + sequence):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected (batch, past + sequence) = "
                f"({batch}, {past + sequence}) or a 4-D mask"
            )
        if attention_mask is not None and attention_mask.ndim == 4:
            shape, wanted = tuple(attention_mask.shape), (sequence, past + sequence)
            if shape[0] not in (1, batch) or (shape[2:] != wanted and (cache is None or cache.max_length is None)):
                raise ValueError(
                    f"attention_mask has shape {shape}, expected (1 or {batch}, heads, {wanted[0]}, {wanted[1]})"
                )
        if self.training and self.gradient_checkpointing and cache is not None:
            raise ValueError(
                "a cache is not possible with gradient checkpointing in training mode, which computes keys and values "
                "again; call model.eval(), or pass use_cache=False"
            )
        return past

    def _check_positions(self, position_ids: torch.Tensor, batch: int, sequence: int) -> None:
        """Raises ValueError for positions of another shape, or past the table."""
        if position_ids.shape not in ((1, sequence), (batch, sequence)):
            raise ValueError(
                f"position_ids (counted over the attention mask in `generate`) has shape {tuple(position_ids.shape)}, "
                f"expected (batch, sequence) = ({batch}, {sequence})"
            )
        table = self.text_config.max_position_embeddings
        has_table = self.text_config.position_embedding in ("learned", "sinusoidal")
        if has_table and not torch.compiler.is_exporting() and position_ids.max() >= table:
            raise ValueError(
                f"{int(position_ids.max()) + 1} positions are more than the {table} of the "
                f"{self.text_config.position_embedding} table (max_position_embeddings); shorten the input, or use "
                "rope or alibi"
            )
        if has_table and not torch.compiler.is_exporting() and position_ids.min() < 0:
            raise ValueError(
                f"position_ids has {int(position_ids.min())}, and the {self.text_config.position_embedding} table "
                "begins at 0; give padding a position of at least 0"
            )

    def add_positions(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings, (batch, sequence, hidden), with those of their positions, where positions are embedded."""
        if self.text_config.position_embedding == "learned":
            return embeds + self.embed_positions(position_ids)
        if self.text_config.position_embedding == "sinusoidal":
            return embeds + sinusoids(position_ids, self.text_config.hidden_size).to(embeds)
        return embeds


def lasting(config: GenerationConfig) -> GenerationConfig:
    """The same without the mark of having been made of a model's configuration, with which transformers, when it loads
    the file, leaves out all that it does not know, such as `num_steps`.
    """
    return GenerationConfig.from_dict({name: it for name, it in config.to_dict().items() if not name.startswith("_")})


class MegaTransformerForCausalLM(MegaTransformerPreTrainedModel, RecurrentGenerationMixin, GenerationMixin):
    """The text model with a linear head."""

    config: MegaTransformerTextConfig
    _auto_class = "AutoModelForCausalLM"
    base_model_class = MegaTransformerTextModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self.base_model_class(config)
        self.text_config = config = config.get_text_config()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = lasting(self.generation_config)
        self.post_init()

    def adjust_generation_fn(self, given: GenerationConfig | None, *args: Any, **kwargs: Any) -> None:
        """Loads the generation config as the original does, and all of a file that has the mark, as older code has."""
        super().adjust_generation_fn(given, *args, **kwargs)
        if given is None and args[2] is not None:
            with contextlib.suppress(OSError, ValueError):  # there is no such file, or none that can be read
                file = cached_file(args[2], GENERATION_CONFIG_NAME, **kwargs)
                self.generation_config.update(**json.loads(Path(file).read_text("utf-8")), allow_custom_entries=True)
        self.generation_config = lasting(self.generation_config)

    # `generate` hands the last on, and PEFT has its own function to prepare inputs.
    @with_parameters("past_key_values", "depth_options")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | tuple[int, int] | torch.LongTensor | None = None,
        initial_state: torch.FloatTensor | Literal["last"] | None = None,
        output_states: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        exits: ExitOptions | None = None,
        state_noise: NoiseOptions | None = None,
        **kwargs,
    ) -> MegaTransformerCausalLMOutput:
        """Arguments of the base model, and:

        Args:
            labels: (batch, sequence), -100 where there is no loss. They are shifted inside: position i predicts label i
                + 1.
            loss_weights: (batch, sequence), what the loss of each label is multiplied by. Default: 1.
            logits_to_keep: Number of last positions whose logits are returned (0: all), or their indices. A loss is
                that of all positions.
            skip_logits: Whether, with labels, the loss is computed a chunk of tokens at a time, and no logits are
                returned, since all of them are batch * sequence * vocab numbers, several times over.
            num_items_in_batch: The loss is the mean over labels, by their weights, or, where the trainer gives this
                count (the sum of the weights of all labels of an accumulation window, on all ranks), their sum divided
                by it. 0 without labels.
            exits: What stops rows before `num_steps` steps, all tokens of the chunk together, judged by the last.
                Default: nothing.
            state_noise: See the base model.
            kwargs: `shift_labels`, (batch, sequence), in place of labels: position i predicts label i. Trainers that
                spread a sequence over ranks give them, since the last position of a part predicts the first token of
                the next. `label_smoothing`: the share of each label that is spread evenly over the vocabulary.
                `source`, `contrast`: see the base model.
        """
        # No parameter: `Trainer` takes all with "label" in their names for labels, and needs each of them to evaluate.
        shift_labels = kwargs.pop("shift_labels", None)
        of_base = {name: kwargs.pop(name) for name in ("source", "contrast") if kwargs.get(name) is not None}
        smoothing = kwargs.pop("label_smoothing", 0.0)
        cache = pop_cache(cache, kwargs)
        of_base |= pop_engine_names(kwargs)
        check_kwargs(kwargs, self.forward, position_ids)
        is_shifted = shift_labels is not None
        labels = shift_labels if is_shifted else labels
        if labels is not None:
            num_items_in_batch = count_labels(labels, num_items_in_batch, loss_weights, is_shifted)
            use_cache = bool(use_cache)  # whoever asks for a loss does not go on generating, unless told so
        controller = None
        if exits is not None and exits.criterion != "none":
            controller = ExitController(exits, self.compute_logits, self.model)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_steps=num_steps,
            initial_state=initial_state,
            output_states=output_states,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            state_noise=state_noise,
            exit_controller=controller,
            return_dict=True,
            **of_base,
        )
        outputs = dict(outputs)
        contrasted = outputs.pop("contrasted", None)
        logits, hidden = None, outputs["last_hidden_state"]
        is_last = isinstance(logits_to_keep, int) and logits_to_keep == 1
        was_read = controller is not None and controller.logits is not None and controller.last is None
        if is_last and was_read and contrasted is None:
            logits = controller.logits[:, None]  # read at the last checks
        elif labels is None or not skip_logits:
            logits = self.compute_logits(slice_logits_to_keep(hidden, logits_to_keep))
        if logits is not None and contrasted is not None:
            mixed = of_base["contrast"].mask(self.compute_logits(contrasted), logits[:, -1:])
            logits = torch.cat((logits[:, :-1], mixed), dim=1)
        loss, token_losses, vocab_size = None, None, self.text_config.vocab_size
        is_part = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        if labels is not None and (logits is None or loss_weights is not None or is_part or smoothing):
            options = (vocab_size, num_items_in_batch, loss_weights, is_shifted, smoothing)
            loss, token_losses = causal_loss(self.compute_logits, hidden, labels, *options)  # some tokens at a time
        elif labels is not None:
            shifted = labels if is_shifted else None
            loss = self.loss_function(logits, labels, vocab_size, num_items_in_batch, shift_labels=shifted)
        return MegaTransformerCausalLMOutput(loss=loss, logits=logits, token_losses=token_losses, **outputs)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., vocab)."""
        logits = self.lm_head(hidden)
        cap = self.text_config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


class MegaTransformerForSequenceClassification(GenericForSequenceClassification, MegaTransformerPreTrainedModel):
    """The text model with a linear head on the last token of a row that is no padding: `logits` (batch, num_labels).
    `forward` takes the arguments of the text model, such as `num_steps`, and `labels`: classes (batch,), or numbers
    where `num_labels` is 1.
    """

    config: MegaTransformerTextConfig
    _auto_class = "AutoModelForSequenceClassification"
    accepts_loss_kwargs = False  # its loss is the mean over the rows of a batch

    def __init__(self, config: MegaTransformerTextConfig):
        # Not that of GenericForSequenceClassification, which finds no model that is not registered.
        MegaTransformerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MegaTransformerTextModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
