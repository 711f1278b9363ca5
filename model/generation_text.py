"""What `generate` needs to know about recurrent depth: how many steps each token takes, and the cache of the steps."""

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import distributed
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import ModelOutput

from .cache import RecurrentCache
from .configuration_megatransformer_text import under_new_names
from .depth import CONTRAST_KEYWORDS, Depth, DepthOptions, resolve_depth
from .generation_wavefront import WavefrontLoop
from .outputs import CACHE_NAME, pop_cache
from .paged_attention import check_places
from .sampling import KeyedSampling

CACHE_OPTIONS = ("cache_policy", "num_kept_steps", "num_kept_tokens")
DECODING_OPTIONS = ("decoding", "draft_steps", "sampling_seed")
DEFAULT_NEW_TOKENS = 20  # of transformers
OWN_ARGUMENTS = ("num_steps", "depth_options", "num_cached_tokens", "draft_media")  # of `prepare_inputs_for_generation`
TEXTS = ("text", "drafts")
OF_FORWARD = (
    *("labels", "loss_weights", "num_items_in_batch", "num_targets_in_batch", "skip_logits", "logits_to_keep"),
    *("output_states", "exits", "state_noise", "depth_options", "num_cached_tokens"),
)
"""What `forward` takes, and `generate` does not."""


class RecurrentGenerationMixin:
    """Goes before `GenerationMixin`: depth, exits and cache by keyword, generation config, or `config.recurrence`."""

    read_by: Mapping[str, tuple[str, ...]] = MappingProxyType(
        dict.fromkeys(OF_FORWARD, ()) | dict.fromkeys((*DECODING_OPTIONS, *CONTRAST_KEYWORDS), ("text",))
    )
    """By which loops of `generate` an option is read; see `check_read`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """transformers' `generate`, and:

        Args:
            num_steps: Core steps of each token: an int, or (batch,), or an int by what is generated, {"text": 8}.
                Default: `config.num_steps`, else the mean.
            exit_criterion: What ends a row's iteration earlier: an entry of `EXIT_CRITERIA`, "schedule", or "none".
            exit_threshold, min_steps, exit_check_interval, exit_in_prefill, exit_schedule: See `ExitOptions`. Default:
                the prompt takes all steps.
            state_warm_start: A new token's iteration starts where that of the token before has ended.
            noise_level: See `NoiseOptions`.
            contrast_strength, contrast_step, contrast_alpha: See `ContrastOptions`. Default: no contrast.
            cache_policy, num_kept_steps, num_kept_tokens: See `RecurrentCache`.
            decoding: "plain", or "wavefront": tokens that are not finished are followed by drafts of the next, in the
                same launches of the core; the tokens are those of plain decoding. Default: "plain".
            draft_steps: Steps after which a token says such a draft, an int, or "auto": what takes the least time.
                Default: "auto".
            sampling_seed: Seed of the draws of `do_sample`, or a list of one for each prompt, on which alone the draws
                of a row depend, whatever is generated beside it. Default: torch's global generator draws.

        Returns:
            As the original; with `return_dict_in_generate=True` it has `exit_steps`, (rows, new tokens).

        Raises:
            ValueError: an option is outside its range or has no effect, or a combination is not possible.
        """
        kwargs |= by_name(args)
        given, own_loop = dict(kwargs), kwargs.get("custom_generate")
        own_loop = own_loop if isinstance(own_loop, OwnLoop) else None
        config, depth, options, kwargs = self._merge_options(generation_config, kwargs)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        is_assisted = own_loop is None and mode == GenerationMode.ASSISTED_GENERATION
        if own_loop is not None:
            own_loop.take_options(config, kwargs)
        else:
            loop, depth = "drafts" if is_assisted else "text", replace(depth, num_steps=depth.steps_of("text"))
            check_read(self.read_by, loop, given, generation_config, self.generation_config)
        self._check_options(config, depth, is_assisted, own_loop, kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        num_cached = num_cached_tokens(ids, kwargs)  # which refuses a prompt that is no longer than they
        if isinstance(state := kwargs.get("initial_state"), torch.Tensor) and len(state) == 1:
            prompts = ids if ids is not None else kwargs.get("inputs_embeds", [[]])
            kwargs["initial_state"] = state.expand(len(prompts), -1, -1)  # rows, for their copies
        cache = self._make_cache(inputs, config, depth, options, kwargs)
        asked = given.get("decoding") or getattr(generation_config, "decoding", None)  # not by the model's own config
        is_wave = options["decoding"] == "wavefront" and (own_loop is None or asked)
        draft_steps = options["draft_steps"] if is_wave else None
        if draft_steps is not None:
            self._check_wavefront(config, depth, cache, kwargs)
        if own_loop is not None:
            own_loop.take_draft_steps(draft_steps)
        elif draft_steps is not None:
            take_stop_strings(config, kwargs)
            kwargs["custom_generate"] = WavefrontLoop(depth, draft_steps, kwargs.get("streamer"), num_cached)
        if is_assisted:
            self._check_assistance(ids, depth, cache, kwargs)
        refuse_empty_rows(ids, config, kwargs)
        config.suppress_tokens = [*(config.suppress_tokens or ()), *self.placeholder_ids] or None
        num_prompt_tokens = prompt_length(inputs, kwargs, has_embeds=False)
        if (size := config.prefill_chunk_size) is not None and own_loop is None:
            config.prefill_chunk_size = chunk_lengths(size, num_prompt_tokens - num_cached)
        if cache is not None:
            cache.prompt_length, cache.token_functions = None, {}
            kwargs[CACHE_NAME] = cache
        if own_loop or not depth.is_fixed or (depth.num_steps is not None and hasattr(config, "num_steps")):
            kwargs["depth_options"] = depth  # a name that no generation config has: transformers would put others there
        elif depth.num_steps is not None:  # by the name that `forward` has too, which libraries that hand it on know
            kwargs["num_steps"] = depth.num_steps
        try:
            outputs = super().generate(inputs, config, **kwargs)
        finally:
            if cache is not None:
                cache.token_functions = None
        if isinstance(outputs, ModelOutput) and self.text_config.num_core_layers and "custom_generate" not in kwargs:
            num_new_tokens = outputs.sequences.shape[1] - num_prompt_tokens
            if cache is None or is_assisted:  # in which no row exits
                steps = self._full_steps(depth.num_steps, outputs.sequences.shape[0], num_new_tokens)
            else:
                cache = outputs[CACHE_NAME]  # PEFT's prefix tuning has put another in its place
                steps = steps_taken(cache, getattr(outputs, "beam_indices", None), num_new_tokens)
            behind = is_behind_the_end(outputs.sequences[:, num_prompt_tokens:], config)
            outputs["exit_steps"] = steps.masked_fill(behind, 0)
        return outputs

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' continuous batching, at the one depth for which the config makes room in its pages.

        Raises:
            ValueError: the config makes no such room, the model has media, or an option of depth or of the cache is
                given, which would have no effect.
        """
        unread = [name for name in (*DepthOptions.names(), *CACHE_OPTIONS, *DECODING_OPTIONS) if name in kwargs]
        if unread:
            raise ValueError(f"{unread[0]} has no effect in generate_batch; leave it out, or use generate")
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any):
        """The manager of transformers, of which `generate_batch` makes use, with the errors of that."""
        if len(self.output_modalities) > 1 or self.placeholder_ids:
            raise ValueError("continuous batching is for models of text alone; use generate")
        given = self.generation_config if generation_config is None else generation_config
        depth = DepthOptions.resolve({}, given, self.text_config.recurrence)
        if not depth.is_fixed:
            raise ValueError(
                "continuous batching takes all steps of every token, without exits, noise, contrast or warm starts of "
                "states; leave them out of the generation config and of config.recurrence, or use generate"
            )
        asked, own = depth.steps_of("text"), self._depth(None).total
        if asked not in (None, own):
            raise ValueError(
                f"num_steps is {asked} in the generation config, and continuous batching takes the {own} steps of the "
                "model's config; leave it out"
            )
        check_places(self.text_config, own)
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    @property
    def placeholder_ids(self) -> list[int]:
        """Tokens that stand for something else and are never written as text."""
        return []

    def _merge_options(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, DepthOptions, dict[str, Any], dict[str, Any]]:
        """The generation config as transformers will merge it, our options of depth and of the cache, and the keywords
        that are neither. Each option: the keyword, then the generation config, then that of the model; of depth then
        `config.recurrence`, of the cache where it is made.
        """
        old_names = self.text_config.recurrence.attribute_map
        kwargs = under_new_names(kwargs, old_names)
        names = (*DepthOptions.names(), *CACHE_OPTIONS, *DECODING_OPTIONS)
        given = {name: kwargs.pop(name, None) for name in names}
        config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        vars(config).update(under_new_names(vars(config), old_names))
        defaults = under_new_names(self.generation_config.to_dict(), old_names)
        config.update(**defaults, defaults_only=True, allow_custom_entries=True)
        kwargs = config.update(**kwargs)
        depth = DepthOptions.resolve(given, config, self.text_config.recurrence)
        unread = [name for name in CACHE_OPTIONS if given[name] is not None]
        has_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if unread and (has_cache or config.use_cache is False):
            how = "a cache that is given, which has its own" if has_cache else "use_cache=False"
            raise ValueError(f"{unread[0]} has no effect with {how}; leave one of them out")
        said = {
            name: getattr(config, name, None) if given[name] is None else given[name]
            for name in (*CACHE_OPTIONS, *DECODING_OPTIONS)
        }
        config.sampling_seed = said["sampling_seed"]
        check_decoding(config, said)
        said["draft_steps"] = said["draft_steps"] or "auto"
        return config, depth, said, kwargs

    def _check_options(
        self,
        config: GenerationConfig,
        depth: DepthOptions,
        is_assisted: bool,
        own_loop: "OwnLoop | None",
        kwargs: dict[str, Any],
    ) -> None:
        """Raises ValueError where tokens cannot differ in depth, or an option has no effect beside another."""
        if config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit drafts with the first layers, which say nothing before the core has run; leave "
                "it out, or give a smaller model as assistant_model"
            )
        if self.config.is_encoder_decoder:
            self._check_options_of_decoder(config, own_loop, kwargs)
        if config.prefill_chunk_size is not None and kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size is not possible with inputs_embeds; leave one of them out")
        named = sorted(depth.num_steps) if isinstance(depth.num_steps, dict) else ()
        if unknown := [name for name in named if name not in self.output_modalities]:
            raise ValueError(f"num_steps names {unknown[0]!r}, but this model has {', '.join(self.output_modalities)}")
        synced_gpus = kwargs.get("synced_gpus")
        if synced_gpus is None:  # as transformers decides it
            is_split = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)
            synced_gpus = is_split and distributed.is_initialized() and distributed.get_world_size() > 1
        if synced_gpus and own_loop is not None:
            raise ValueError(
                "media are not written under ZeRO-3 or FSDP: ranks would wait for each other; gather weights, or give "
                "synced_gpus=False where all ranks write the same"
            )
        criterion, has_state = depth.exits.criterion, kwargs.get("initial_state") is not None
        asked = [f"exit_criterion {criterion!r}"] * (criterion != "none")
        asked += ["num_steps with a number per row"] * bool(synced_gpus and isinstance(depth.num_steps, torch.Tensor))
        asked += ["state_warm_start"] * depth.state_warm_start
        contrast = ["contrast_strength"] * (depth.contrast is not None)
        if depth.state_warm_start and has_state:
            raise ValueError("initial_state has no effect with state_warm_start; leave one of them out")
        of_core = [*asked, *contrast, *["noise_level"] * bool(depth.noise.level), *["initial_state"] * has_state]
        if of_core and self.text_config.num_core_layers == 0:
            raise ValueError(f"{of_core[0]} was given, but this model has no core to iterate (num_core_layers is 0)")
        why = None
        if config.use_cache is False:
            why = "use_cache=False: what a token has left is in the cache"
        elif is_assisted:
            why = "assisted generation, which checks several tokens at one depth; leave one of them out"
        elif synced_gpus:
            why = "synced_gpus (ZeRO-3, FSDP): ranks that take different numbers of steps would wait for each other "
            why += "forever; leave it out, or gather the weights first"
        if asked and why:
            raise ValueError(f"{asked[0]} is not possible with {why}")

    def _check_options_of_decoder(
        self, config: GenerationConfig, own_loop: "OwnLoop | None", kwargs: dict[str, Any]
    ) -> None:
        """Raises ValueError for what only models without encoder have, whose prompt the decoder reads."""
        asked = ["assistant_model"] * (kwargs.get("assistant_model") is not None)
        asked += ["prefill_chunk_size"] * (config.prefill_chunk_size is not None)
        asked += ["guidance_scale of texts"] * (own_loop is None and config.guidance_scale not in (None, 1))
        if asked:
            raise ValueError(
                f"{asked[0]} is not possible behind an encoder, which has the prompt: leave it out, or take a model "
                "without encoder"
            )

    def _make_cache(
        self,
        inputs: torch.Tensor | None,
        config: GenerationConfig,
        depth: DepthOptions,
        options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> RecurrentCache | None:
        """The cache that was given, by either name, or a new one, since transformers' own have no slots for steps;
        ValueError for a kind that there is not.
        """
        given = pop_cache(kwargs.pop("cache", None), kwargs)
        if given is not None:
            return given if hasattr(given, "row_steps") else RecurrentCache.of_prefix(self.text_config, given)
        if config.use_cache is False:
            return None
        kind, config.cache_implementation = config.cache_implementation, None
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation {kind!r} is not possible here; choose 'dynamic' or 'static'")
        room = {}
        if kind == "static":
            prompt = prompt_length(inputs, kwargs, has_embeds=True)
            new = config.max_new_tokens or max((config.max_length or prompt + DEFAULT_NEW_TOKENS) - prompt, 0)
            room["max_length"] = max(prompt + new, config.max_cache_len or 0)
            room["max_steps"] = max(self._depth(depth.steps_of(name)).total for name in self.output_modalities)
            self._compile_for_generation(config)
        policy, num_kept_steps, room["num_kept_tokens"] = (options[name] for name in CACHE_OPTIONS)
        return RecurrentCache(self.text_config, policy, num_kept_steps, **room)

    def _check_assistance(
        self, ids: torch.Tensor | None, depth: DepthOptions, cache: RecurrentCache | None, kwargs: dict[str, Any]
    ) -> None:
        """Counts the tokens that the cache holds before; ValueError where drafts cannot be verified."""
        if kwargs.get("inputs_embeds") is not None:
            # transformers 5.23 and 5.24 lose the prompt then, for Llama too, and say nothing.
            raise ValueError("assisted generation is not possible with inputs_embeds; give input_ids alone")
        if cache is None:
            raise ValueError("assisted generation is not possible with use_cache=False; leave one of them out")
        if cache.max_length is not None:
            raise ValueError("assisted generation is not possible with a static cache; leave cache_implementation out")
        if num_cached := cache.get_seq_length():
            if num_cached_tokens(ids, {**kwargs, "cache": cache}) != num_cached:
                raise ValueError("assisted generation on a cache needs the whole conversation; give all of its tokens")
            kwargs["num_cached_tokens"] = num_cached
        steps = self._depth(depth.num_steps).total
        if not cache.is_full(steps):
            raise ValueError(
                f"assisted generation of {steps} steps is not possible with cache policy {cache.policy!r}: tokens "
                "checked together see other things of each other than alone, or cannot be taken back; use 'full'"
            )

    def _check_wavefront(
        self, config: GenerationConfig, depth: DepthOptions, cache: RecurrentCache | None, kwargs: dict[str, Any]
    ) -> None:
        """Raises ValueError for what a wavefront cannot do."""
        why = None
        core = self.model.core
        if core is None:
            why = "a model without core (num_core_layers is 0), of which no token has steps"
        elif self.text_config.recurrence.untied_core:
            why = "untied_core, since items of several steps share a launch"
        elif core.step_lora is not None:
            why = "adapters of single steps, since items of several steps share a launch; remove the adapter"
        elif self.config.is_encoder_decoder:
            why = "a model behind an encoder"
        elif cache is None:
            why = "use_cache=False"
        elif cache.max_length is not None:
            why = "a static cache; leave cache_implementation out"
        elif cache.policy == "last" or not cache.is_full(
            max(self._depth(depth.steps_of(name)).total for name in self.output_modalities)
        ):
            why = f"cache policy {cache.policy!r}, which does not keep all steps of a token; use 'full'"
        elif depth.state_warm_start:
            why = "state_warm_start, since a token would begin where an unfinished one ends"
        elif depth.noise.level or depth.contrast:
            why = "noise_level" if depth.noise.level else "contrast_strength"
        elif depth.exits.criterion == "schedule":
            why = "exit_criterion 'schedule'"
        elif config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            why = "beams or assisted generation; give num_beams=1 and no assistant_model"
        elif config.guidance_scale not in (None, 1):
            why = "guidance_scale"
        elif kwargs.get("prefix_allowed_tokens_fn") is not None:
            why = "prefix_allowed_tokens_fn, which is told rows by their number in a batch"
        elif kwargs.get("inputs_embeds") is not None:
            why = "inputs_embeds; give input_ids"
        elif config.prefill_chunk_size is not None:
            why = "prefill_chunk_size"
        elif config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
            why = "outputs of each step (scores, logits, attentions, hidden states)"
        elif self.text_config._attn_implementation != "sdpa":
            why = f"attention backend {self.text_config._attn_implementation!r}; use sdpa"
        if why is not None:
            raise ValueError(f"decoding 'wavefront' is not possible with {why}; or use decoding='plain'")

    def _depth(self, num_steps: int | torch.Tensor | None) -> Depth:
        """The depth, of as many rows as there are numbers."""
        rows = len(num_steps) if isinstance(num_steps, torch.Tensor) and num_steps.ndim else 1
        return resolve_depth(num_steps, self.text_config, rows)

    def _full_steps(self, num_steps: int | torch.Tensor | None, num_rows: int, num_tokens: int) -> torch.LongTensor:
        """(num_rows, num_tokens): what each token takes where none exits."""
        depth = self._depth(num_steps)
        rows = torch.tensor([depth.total]) if depth.rows is None else depth.rows
        return rows.repeat_interleave(num_rows // len(rows))[:, None].repeat(1, num_tokens)

    def _compile_for_generation(self, generation_config: GenerationConfig) -> None:
        """Compiles the units, as transformers compiles its models: on GPUs, or where a `compile_config` asks for it."""
        wanted = generation_config.compile_config is not None or self.device.type == "cuda"
        if wanted and not generation_config.disable_compile and not self.model.units_are_compiled:
            config = generation_config.compile_config
            # Not its default, CUDA graphs: those are recorded anew for each cache, and stay.
            self.model.compile_units(**({} if config is None else config.to_dict()))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        cache: RecurrentCache | None = None,
        past_key_values: RecurrentCache | None = None,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,  # named, since transformers looks for it here
        is_first_iteration: bool | None = False,
        num_cached_tokens: int = 0,
        depth_options: DepthOptions | None = None,
        draft_media: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict:
        """Prepares as the original does, with what the token takes of depth, by what `generate` was asked for.

        Args:
            num_cached_tokens: Where candidates are checked, tokens of the prompt that a cache held before: transformers
                5.23 and 5.24 give the whole prompt then, for Llama too, and the model would read them twice.
            draft_media: What a model that drafts reads of media; not read here.
        """
        cache = past_key_values if cache is None else cache
        if next_sequence_length is None and num_cached_tokens:
            next_sequence_length = input_ids.shape[1] - num_cached_tokens
        kwargs |= {CACHE_NAME: cache, "inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, next_sequence_length=next_sequence_length, **kwargs
        )
        inputs.pop("tokenizer", None)  # for stop strings; transformers hands it on to every model
        inputs["past_key_values"] = inputs.pop(CACHE_NAME, None)  # where PEFT looks for it, under each version
        index = 0
        if cache is not None and is_first_iteration:
            cache.last_state = None  # a prompt goes on from no token, in whatever chunks it is read
        elif cache is not None:
            cache.prompt_length = cache.get_seq_length() if cache.prompt_length is None else cache.prompt_length
            index = cache.get_seq_length() - cache.prompt_length + 1
        if depth_options is None:
            return inputs
        depth = self._depth(depth_options.num_steps)
        most = depth.total if depth.rows is None else int(depth.rows.min())
        return inputs | depth_options.arguments_of_token(index, len(input_ids), most)

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        """The original's processors; the pass without the prompt, by which guidance is taken, has the same depth."""
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                given = model_kwargs or {}
                depth = given.get("depth_options")
                steps = given.get("num_steps") if depth is None else depth.num_steps
                processor.model = functools.partial(self, num_steps=steps)
        config, seeds = generation_config, getattr(generation_config, "sampling_seed", None)
        if seeds is not None:  # the last of all, since it leaves one token
            if (prompts := len(kwargs["encoder_input_ids"])) != len(seeds) > 1:
                raise ValueError(f"sampling_seed has {len(seeds)} seeds for {prompts} prompts; give one for each")
            length = kwargs["input_ids_seq_length"]
            processors.append(KeyedSampling(seeds, length, config.num_return_sequences or 1))
        return processors

    def _get_candidate_generator(
        self, *, generation_config: GenerationConfig, model_kwargs: dict, assistant_model=None, **kwargs: Any
    ) -> Any:
        """The original's generator; a model that drafts takes the depth of its generation config, and reads media."""
        media = model_kwargs.get("draft_media") or {}
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OWN_ARGUMENTS}
        if assistant_model is not None:
            read = inspect.signature(assistant_model.forward).parameters
            if "mm_encoder_outputs" in read and media.get("mm_encoder_outputs"):
                raise ValueError("mm_encoder_outputs are of this model, and a draft reads media itself; give the media")
            model_kwargs.pop("mm_encoder_outputs", None)
            model_kwargs |= {name: value for name, value in media.items() if name in read}
            generation_config = copy.deepcopy(generation_config)
            generation_config.prefill_chunk_size = None  # chunks of a draft have no media
            for name in (*DepthOptions.names(), *CACHE_OPTIONS):
                setattr(generation_config, name, getattr(assistant_model.generation_config, name, None))
        return super()._get_candidate_generator(
            generation_config=generation_config, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Takes out what transformers 5.23 put in: it holds an output named `state` for a cache, and ours is none."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs.pop("state", None)
        return model_kwargs


def check_decoding(config: GenerationConfig, options: dict[str, Any]) -> None:
    """Raises ValueError for options of decoding outside their range, or without effect; makes a list of the seed."""
    decoding, draft_steps, seed = (options[name] for name in DECODING_OPTIONS)
    if decoding not in (None, "plain", "wavefront"):
        raise ValueError(f"decoding {decoding!r} is unknown; choose 'plain' or 'wavefront'")
    if draft_steps is not None and decoding != "wavefront":
        raise ValueError("draft_steps has no effect without decoding='wavefront'; leave it out, or name that")
    is_count = isinstance(draft_steps, int) and not isinstance(draft_steps, bool) and draft_steps >= 1
    if draft_steps not in (None, "auto") and not is_count:
        raise ValueError(f"draft_steps must be an integer of at least 1, or 'auto', got {draft_steps!r}")
    if seed is not None and not config.do_sample:
        raise ValueError("sampling_seed has no effect without do_sample=True; leave it out, or sample")
    if seed is not None and config.num_beams not in (None, 1):
        raise ValueError("sampling_seed is not possible with beams; give num_beams=1")
    seeds = [seed] if isinstance(seed, int) else seed
    if seeds is not None and not (isinstance(seeds, list | tuple) and all(type(it) is int for it in seeds) and seeds):
        raise ValueError(f"sampling_seed must be an integer, or a list of one for each prompt, got {seed!r}")
    config.sampling_seed = seeds
    if decoding == "wavefront" and config.do_sample and seeds is None:
        config.sampling_seed = [int(torch.randint(2**62, ()))]


def take_stop_strings(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Makes a criterion of stop strings, since transformers takes the tokenizer from loops that are not its own."""
    tokenizer = kwargs.pop("tokenizer", None)
    if config.stop_strings is not None and tokenizer is not None:
        criterion = StopStringCriteria(tokenizer, config.stop_strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
        config.stop_strings = None


class OwnLoop:
    """A loop that `generate` runs in place of those of transformers, as `custom_generate`."""

    def take_options(self, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        """Takes out of the merged generation config and the keywords what transformers would go by, or take away."""

    def take_draft_steps(self, draft_steps: int | str | None) -> None:
        """Takes those of decoding "wavefront"; None: plain decoding."""


def check_read(
    read_by: Mapping[str, tuple[str, ...]],
    loop: str,
    keywords: dict[str, Any],
    generation_config: GenerationConfig | None,
    defaults: GenerationConfig,
) -> None:
    """Raises ValueError for an option that a loop does not read: "text", "drafts" (assisted generation), or a mode of
    media. `read_by` names the loops that read an option; one that is not there is read by those of transformers alone.
    None, False, and what the model's own generation config (`defaults`) says ask for nothing.
    """
    if generation_config is not None and generation_config.is_assistant:
        return  # a draft has what transformers made of the options of the model that checks it
    asked, usual = dict(keywords), vars(defaults)
    for name, value in vars(generation_config or GenerationConfig()).items():
        if not name.startswith("_") and name != "transformers_version" and repr(usual.get(name)) != repr(value):
            asked.setdefault(name, value)  # by `repr`, since numbers of rows are tensors
    for name, value in asked.items():
        if value is None or value is False or (name in NO_EFFECT_AT_1 and value == 1):
            continue
        if loop not in read_by.get(name, TEXTS):
            texts = {"text": "a text that is generated", "drafts": "assisted generation"}
            where = texts.get(loop, f"generation_mode {loop!r}{WHY_NOT.get(name, '')}")
            raise ValueError(f"{name} has no effect in {where}; leave it out")


WHY_NOT = {"num_beams": ", whose latents have no scores to compare beams by"}
NO_EFFECT_AT_1 = ("num_beams", "num_return_sequences", "temperature", "top_p", "typical_p", "repetition_penalty")


def by_name(args: tuple[Any, ...], first: str = "logits_processor") -> dict[str, Any]:
    """Arguments that `generate` of transformers takes by their places, from `first` on, by their names; TypeError for
    more than it takes.
    """
    signature = inspect.signature(GenerationMixin.generate)
    before = list(signature.parameters).index(first)
    return dict(list(signature.bind_partial(*[None] * before, *args).arguments.items())[before:])


def length_before(model: GenerationMixin, input_ids: torch.LongTensor) -> int:
    """The number of tokens with which the sequences that `generate` returns begin: those of the prompt, (rows, tokens),
    or, of a decoder behind an encoder, the start token.
    """
    return 1 if model.config.is_encoder_decoder else input_ids.shape[1]


def prompt_length(inputs: torch.Tensor | None, kwargs: dict[str, Any], has_embeds: bool) -> int:
    """The number of prompt tokens with which `sequences` will begin, or, with `has_embeds`, which the model will read;
    without a prompt that is the begin token.
    """
    ids, embeds = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
    if embeds is not None and (has_embeds or ids is None):
        return embeds.shape[1] if has_embeds else 0
    return 1 if ids is None else ids.shape[1]


def chunk_lengths(size: int, length: int) -> list[int]:
    """The lengths of the chunks of `size` tokens in which a prompt is read. They are counted from its end, so that
    padding on the left moves none; the first is what is left. ValueError: `size` is no number of tokens.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"prefill_chunk_size is {size!r}; give a whole number of at least 1")
    return [length % size] * (length % size > 0) + [size] * (length // size)


def num_cached_tokens(input_ids: torch.LongTensor | None, kwargs: dict[str, Any]) -> int:
    """How many tokens of the prompt the cache holds already: all of its own, or, where the mask shows that the prompt
    goes on from them, none. ValueError: it holds all of the prompt.
    """
    cache, mask = pop_cache(kwargs.get("cache"), dict(kwargs)), kwargs.get("attention_mask")
    num_cached = 0 if cache is None else cache.get_seq_length()
    if not num_cached or input_ids is None or (mask is not None and mask.shape[1] != input_ids.shape[1]):
        return 0
    if num_cached >= input_ids.shape[1]:
        raise ValueError(
            f"the cache holds {num_cached} tokens, and the prompt has {input_ids.shape[1]}; give the whole "
            "conversation, or its new tokens and an attention_mask of all"
        )
    return num_cached


def steps_taken(cache: RecurrentCache, beam_indices: torch.LongTensor | None, num_new_tokens: int) -> torch.LongTensor:
    """(rows, new tokens), in the order of the sequences that are returned; each token was read off the one before."""
    if beam_indices is None:
        return cache.row_steps[:, cache.length - num_new_tokens : cache.length]
    first = cache.length if cache.prompt_length is None else cache.prompt_length
    steps = cache.row_steps[:, first - 1 : cache.length]
    return steps.gather(0, beam_indices.cpu().clamp(min=0)[:, : steps.shape[1]])[:, :num_new_tokens]


def is_behind_the_end(tokens: torch.LongTensor, config: GenerationConfig) -> torch.Tensor:
    """Which of the new tokens, (rows, new tokens), stand behind the end of their text, on the CPU."""
    tokens = tokens.cpu()
    if config.eos_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ended = torch.isin(tokens, torch.tensor(config.eos_token_id))
    behind = ended.cumsum(-1) > ended.long()
    pad = config.pad_token_id
    if pad is not None and not torch.isin(pad, torch.tensor(config.eos_token_id)):
        # A stop string or another criterion has ended the text.
        behind |= (tokens == pad).flip(-1).cumprod(-1).flip(-1).bool()
    return behind


def refuse_empty_rows(ids: torch.Tensor | None, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a row without a token, by the mask, or by padding where transformers makes one of that."""
    mask, pad = kwargs.get("attention_mask"), config.pad_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if mask is None and ids is not None and pad is not None and pad not in ends:
        mask = ids != pad
    if mask is not None and mask.ndim == 2 and mask.shape[1] and not mask.any(-1).all():
        row = int((~mask.any(-1)).nonzero()[0])
        raise ValueError(f"row {row} of the prompt is all padding (attention_mask); leave it out")
