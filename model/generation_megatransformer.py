"""What `generate` needs to know about recurrent depth: how many steps each token takes, and the cache of the steps."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    GenerationMode,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .cache import RecurrentCache
from .exit_criteria import check_exit_options
from .fusion import check_counts, read_media
from .recurrence import resolve_depth
from .writing import MediaChunk, WritingOptions, write_media

OPTIONS = (
    *("num_steps", "exit_criterion", "exit_threshold", "exit_first_step", "exit_every", "exit_in_prefill"),
    *("exit_schedule", "state_warm_start", "noise_level", "noise_schedule", "cache_policy", "num_kept_steps"),
)


class ExitSteps:
    """The core steps of each new token, collected while `generate` runs."""

    def __init__(self):
        self.taken: list[torch.Tensor] = []  # for each new token (rows,), on the CPU
        self.generation_config: GenerationConfig | None = None

    def of(self, outputs: ModelOutput) -> torch.LongTensor:
        """(rows, new tokens), in the order of the sequences that were returned; 0 behind the end of a text."""
        steps = torch.stack(self.taken, dim=1)
        tokens = outputs.sequences[:, -steps.shape[1] :].cpu()
        beams = getattr(outputs, "beam_indices", None)
        if beams is not None:
            steps = steps.gather(0, beams.cpu().clamp(min=0)[:, : steps.shape[1]])[:, : tokens.shape[1]]
        return steps.masked_fill(self._is_behind_the_end(tokens), 0)

    def _is_behind_the_end(self, tokens: torch.LongTensor) -> torch.Tensor:
        end, pad = (getattr(self.generation_config, name, None) for name in ("_eos_token_tensor", "_pad_token_tensor"))
        if end is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        ended = torch.isin(tokens, end.cpu())
        behind = ended.cumsum(-1) > ended.long()
        if pad is not None and pad not in end:  # a stop string or another criterion has ended the text
            behind |= (tokens == pad.cpu()).flip(-1).cumprod(-1).flip(-1).bool()
        return behind


class RecurrentGenerationMixin:
    """Goes before `GenerationMixin`: depth, exits and cache by keyword, generation config, or `config.recurrence`."""

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> ModelOutput | torch.LongTensor:
        """transformers' `generate`, and:

        Args:
            num_steps: Core steps of each token: an int, or (batch,). Default: `config.num_steps`, else the mean.
            exit_criterion: What ends a row's iteration earlier: an entry of `EXIT_CRITERIA`, "schedule", or "none".
            exit_threshold, exit_first_step, exit_every: See `forward`.
            exit_in_prefill: Whether the prompt may exit too, all its tokens together. Default: it takes all steps.
            exit_schedule: For the criterion "schedule": steps of each new token, the last for all that follow; or a
                function of the token's index.
            state_warm_start: A new token's iteration starts where that of the token before has ended.
            noise_level, noise_schedule: See `forward`.
            cache_policy, num_kept_steps: See `RecurrentCache`.

        Returns:
            As the original; with `return_dict_in_generate=True` it has `exit_steps`, (rows, new tokens).

        Raises:
            ValueError: for an option outside its range, or a combination that is not possible.
        """
        steps = ExitSteps()
        outputs = super().generate(*args, exit_steps=steps, **kwargs)
        if isinstance(outputs, ModelOutput) and steps.taken:
            outputs["exit_steps"] = steps.of(outputs)
        return outputs

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        """Each option: the keyword, then the generation config, then `config.recurrence`. A keyword that the generation
        config has an entry for would land there, not in the arguments of the model, so it is taken out before.
        """
        recurrence = self.text_config.recurrence
        defaults = {  # those of depth and cache are looked up where they are used
            "exit_criterion": recurrence.exit_criterion,
            "exit_threshold": recurrence.exit_threshold,
            "exit_first_step": recurrence.exit_first_step,
            "exit_every": recurrence.exit_every,
            "exit_in_prefill": recurrence.exit_in_prefill,
            "state_warm_start": recurrence.state_warm_start,
        }
        options = {name: kwargs.pop(name, None) for name in OPTIONS}
        steps = kwargs.pop("exit_steps", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in options.items():
            if value is None:
                value = getattr(generation_config, name, None)
            if value is None:
                value = defaults.get(name)
            setattr(generation_config, name, value)
            if value is not None and name not in ("cache_policy", "num_kept_steps"):
                model_kwargs[name] = value
        if steps is not None:
            steps.generation_config = generation_config
            model_kwargs["exit_steps"] = steps
        return generation_config, model_kwargs

    def _validate_generation_mode(self, mode: GenerationMode, config: GenerationConfig, mode_kwargs: dict) -> None:
        """As the original, and: can tokens of this mode differ in depth?"""
        super()._validate_generation_mode(mode, config, mode_kwargs)
        asked = []
        if config.exit_criterion == "schedule":
            if config.exit_schedule is None:
                raise ValueError("exit_criterion 'schedule' needs an exit_schedule: steps of each new token")
            asked.append("exit_criterion 'schedule'")
        elif config.exit_criterion != "none":
            check_exit_options(config.exit_criterion, config.exit_threshold, config.exit_first_step, config.exit_every)
            asked.append(f"exit_criterion {config.exit_criterion!r}")
        if mode_kwargs.get("synced_gpus") and isinstance(config.num_steps, torch.Tensor):
            asked.append("num_steps with a number per row")
        asked += ["state_warm_start"] if config.state_warm_start else []
        if not asked:
            return
        if self.text_config.num_core_layers == 0:
            raise ValueError(f"{asked[0]} was given, but this model has no core to iterate (num_core_layers is 0)")
        if config.use_cache is False:
            raise ValueError(f"{asked[0]} is not possible with use_cache=False: what a token has left is in the cache")
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                f"{asked[0]} is not possible with assisted generation, which checks several tokens at one depth; "
                "leave one of them out"
            )
        if mode_kwargs.get("synced_gpus"):
            raise ValueError(
                f"{asked[0]} is not possible with synced_gpus (ZeRO-3, FSDP): ranks that take different numbers of "
                "steps would wait for each other forever; leave it out, or gather the weights first"
            )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """As the original, with a `RecurrentCache` in place of transformers' dynamic and static ones."""
        refuse_empty_rows(model_kwargs.get("attention_mask"))
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic", "static"):
                raise ValueError(
                    f"cache_implementation {generation_config.cache_implementation!r} is not possible here; choose "
                    "'dynamic' or 'static'"
                )
            room = {}
            if generation_config.cache_implementation == "static":
                room["max_length"] = max(max_cache_length, generation_config.max_cache_len or 0)
                room["max_steps"] = resolve_depth(model_kwargs.get("num_steps"), self.text_config, batch_size).total
                self._compile_for_generation(generation_config)
            model_kwargs["past_key_values"] = RecurrentCache(
                self.text_config, generation_config.cache_policy, generation_config.num_kept_steps, **room
            )
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        if mode != GenerationMode.ASSISTED_GENERATION:
            return
        if model_kwargs.get("inputs_embeds") is not None:
            # In transformers 5.23 it loses the prompt then, for Llama too, and says nothing.
            raise ValueError("assisted generation is not possible with inputs_embeds; give input_ids alone")
        cache = model_kwargs.get("past_key_values")
        if cache is None:  # transformers says that it needs one
            return
        model_kwargs["num_cached_tokens"] = cache.get_seq_length()
        if cache.num_kept_steps is not None:
            steps = resolve_depth(model_kwargs.get("num_steps"), self.text_config, batch_size).total
            if cache.num_kept_steps < steps:
                raise ValueError(
                    f"assisted generation of {steps} steps is not possible with cache policy {cache.policy!r} of "
                    f"{cache.num_kept_steps}: tokens checked together see more of each other than alone; use 'full'"
                )

    def _valid_auto_compile_criteria(self, *args: Any) -> bool:
        """Never the whole forward pass, whose loop varies in length."""
        return False

    def _compile_for_generation(self, generation_config: GenerationConfig) -> None:
        """Compiles the units, as transformers compiles its models: on GPUs, or where a `compile_config` asks for it."""
        wanted = generation_config.compile_config is not None or self.device.type == "cuda"
        is_compiled = self.model.prelude._compiled_call_impl is not None
        if wanted and not generation_config.disable_compile and not is_compiled:
            config = generation_config.compile_config
            # Not its default, CUDA graphs: the state that a step returns is what the next one reads.
            self.model.compile_units(**({} if config is None else config.to_dict()))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,  # named, since transformers looks for it here
        num_cached_tokens: int = 0,
        exit_steps: ExitSteps | None = None,
        exit_in_prefill: bool = False,
        exit_schedule: Sequence[int] | Callable[[int], int] | None = None,
        **kwargs: Any,
    ) -> dict:
        """As the original; the prompt takes all steps unless told otherwise, and a schedule is a number of steps.

        Args:
            num_cached_tokens: Where candidates are checked, tokens of the prompt that a cache held before: transformers
                5.23 gives the whole prompt then, for Llama too, and the model would read them twice.
        """
        if next_sequence_length is None and num_cached_tokens:
            next_sequence_length = input_ids.shape[1] - num_cached_tokens
        index = len(exit_steps.taken) if exit_steps is not None else 0
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("tokenizer", None)  # for stop strings; transformers hands it on to every model
        if inputs.get("exit_criterion") == "schedule":
            inputs["exit_criterion"] = "none"
            if index > 0 or exit_in_prefill:
                inputs["num_steps"] = scheduled_steps(exit_schedule, index)
        elif index == 0 and not exit_in_prefill:
            inputs["exit_criterion"] = "none"
        return inputs

    def _get_logits_processor(self, *args: Any, model_kwargs: dict | None = None, **kwargs: Any) -> LogitsProcessorList:
        """As the original; the pass without the prompt, by which guidance is taken, has the same depth."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = functools.partial(self, num_steps=(model_kwargs or {}).get("num_steps"))
        return processors

    def _get_candidate_generator(
        self, *, generation_config: GenerationConfig, model_kwargs: dict, assistant_model=None, **kwargs: Any
    ) -> Any:
        """As the original; the model that drafts has a depth of its own, from its generation config."""
        ours = (*OPTIONS, "exit_steps", "num_cached_tokens")
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        if assistant_model is not None:
            generation_config = copy.deepcopy(generation_config)
            for name in OPTIONS:
                setattr(generation_config, name, getattr(assistant_model.generation_config, name, None))
        return super()._get_candidate_generator(
            generation_config=generation_config, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict, *args: Any, num_new_tokens: int = 1, **kwargs: Any
    ) -> dict[str, Any]:
        """As the original, which takes an output named `state` for a cache: ours is none."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        model_kwargs.pop("state", None)
        if model_kwargs.get("exit_steps") is not None and outputs.exit_steps is not None:
            model_kwargs["exit_steps"].taken += [outputs.exit_steps] * num_new_tokens
        return model_kwargs


class MediaGenerationMixin:
    """Goes before `RecurrentGenerationMixin`: media are read once, before the prompt, and their features go with its
    parts: with its chunks, with the copies of its rows, and without what a cache holds already.
    """

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        generation_mode: str = "text",
        guidance_scale: float | None = None,
        num_flow_steps: int | None = None,
        flow_temperature: float | None = None,
        flow_seeds: list[int] | None = None,
        velocity_threshold: float | None = None,
        on_chunk: Callable[[MediaChunk], None] | None = None,
        chunk_size: int | None = None,
        num_steps: int | dict[str, int] | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """As in `RecurrentGenerationMixin`, and:

        Args:
            generation_mode: "text"; "image" or "audio" write one medium; "any" text in which the model opens media.
            guidance_scale, num_flow_steps, flow_temperature, flow_seeds, velocity_threshold, on_chunk, chunk_size: See
                `WritingOptions`; in mode "text" guidance is that of the logits, and there are no others.
            num_steps: Also by what is written: {"text": 8, "image": 16, "audio": 4}.

        Returns:
            In the other modes a `MediaGenerateOutput`, unless `return_dict_in_generate=False`.

        Raises:
            ValueError: for a modality that this model does not write, or a value outside its range.
        """
        options = {"num_flow_steps": num_flow_steps, "flow_temperature": flow_temperature, "flow_seeds": flow_seeds}
        options |= {"on_chunk": on_chunk, "chunk_size": chunk_size}
        options |= {} if velocity_threshold is None else {"velocity_threshold": velocity_threshold}
        depths = num_steps if isinstance(num_steps, dict) else None
        writing = WritingOptions(generation_mode, guidance_scale, num_steps=depths, **options)
        if generation_mode == "text":
            unused = [name for name, value in options.items() if value is not None]
            if unused:
                raise ValueError(f"{unused[0]} has no effect in generation_mode 'text'; leave it out")
            steps = writing.steps_of("text") if depths else num_steps
            return super().generate(*args, guidance_scale=guidance_scale, num_steps=steps, **kwargs)
        writing.num_steps = num_steps
        most = max(depths.values(), default=None) if depths else num_steps
        kwargs = {"return_dict_in_generate": True, **kwargs}
        if not {"max_new_tokens", "max_length", "generation_config"} & kwargs.keys():
            kwargs["max_new_tokens"] = self._room_for(generation_mode)
        return super().generate(*args, num_steps=most, custom_generate=write_media, writing=writing, **kwargs)

    def _room_for(self, generation_mode: str) -> int:
        """New tokens where nobody says how many: those of one medium, or of one of each kind and as many of text."""
        places = {name: writer.num_places + 2 for name, writer in self.model.writers.items()}
        return 2 * sum(places.values()) if generation_mode == "any" else places.get(generation_mode, 1)

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        """As the original, which does not look at what is handed on to base classes, or to further modalities."""
        names = {name for reader in self.model.readers.values() for name in reader.input_names} | {"writing"}
        for method in (super().forward, super().prepare_inputs_for_generation):
            names |= set(inspect.signature(method).parameters)
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in names})

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict, model_input_name: str | None, generation_config: Any
    ) -> dict:
        """Features of all media in `mm_encoder_outputs`, by modality, in place of the inputs of the readers."""
        media = self.model.take_media(model_kwargs)
        if media and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("images and sound need input_ids with their placeholders, and no inputs_embeds")
        features = read_media(self.model.readers, media, run_all=self.model.must_run_alike)
        outputs = dict(model_kwargs.pop("mm_encoder_outputs", None) or {})
        for name, parts in features.items():
            if name in outputs:
                raise ValueError(f"{name}: give its features (mm_encoder_outputs) or what to read, not both")
            check_counts(name, self._count_places(name, inputs_tensor), [len(part) for part in parts])
            outputs[name] = BaseModelOutputWithPooling(pooler_output=parts)
        if outputs:
            model_kwargs["mm_encoder_outputs"] = outputs
        return model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As the original, and: a placeholder is no text."""
        processors = super()._get_logits_processor(*args, **kwargs)
        names = [f"{name}_token_id" for name in self.model.readers]
        names += [f"written_{name}_token_id" for name in self.model.writers]
        ids = [getattr(self.config, name) for name in names if getattr(self.config, name) is not None]
        return LogitsProcessorList([SuppressTokensLogitsProcessor(ids, device=self.device), *processors])

    def _expand_multimodal_outputs(
        self, input_ids: torch.LongTensor, mm_encoder_output: dict, expand_size: int = 1, **kwargs: Any
    ) -> dict:
        """The features of each row as often as the row itself: [A, B] of one row -> [A, B, A, B]."""
        expanded = {}
        for name, output in mm_encoder_output.items():
            rows = torch.cat(list(output.pooler_output)).split(self._count_places(name, input_ids))
            expanded[name] = BaseModelOutputWithPooling(
                pooler_output=tuple(row for row in rows for _ in range(expand_size))
            )
        return expanded

    def _count_places(self, name: str, input_ids: torch.LongTensor) -> list[int]:
        """Placeholders of a modality in each row."""
        return (input_ids == getattr(self.config, f"{name}_token_id")).sum(dim=1).tolist()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,  # named, since transformers looks for it here
        **kwargs: Any,
    ) -> dict:
        """As the original, without the features of placeholders that are in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        outputs = inputs.get("mm_encoder_outputs")
        num_seen = 0 if inputs.get("input_ids") is None else input_ids.shape[1] - inputs["input_ids"].shape[1]
        if not outputs or num_seen == 0:
            return inputs
        seen_ids, left = input_ids[:, :num_seen], {}
        for name, output in outputs.items():
            rows = torch.cat(list(output.pooler_output)).split(self._count_places(name, input_ids))
            seen = self._count_places(name, seen_ids)
            unseen = tuple(row[count:] for row, count in zip(rows, seen, strict=True))
            left[name] = BaseModelOutputWithPooling(pooler_output=unseen)
        return {**inputs, "mm_encoder_outputs": left}


def refuse_empty_rows(attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for a row without a token. Part of one may be all padding, where a prompt is read in parts."""
    if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.any(-1).all():
        row = int((~attention_mask.any(-1)).nonzero()[0])
        raise ValueError(f"row {row} of the prompt is all padding (attention_mask); leave it out")


def scheduled_steps(schedule: Sequence[int] | Callable[[int], int], index: int) -> int:
    """Steps of new token number `index`, counted from 0."""
    if callable(schedule):
        return schedule(index)
    return schedule[min(index, len(schedule) - 1)]
