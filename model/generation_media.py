"""`generate` that reads images and audio, and generates them among its tokens.

Each new position of a row is a token or a latent. A row is text until a start token comes, from the model or because it
was asked for; then latents, of which each is made from the hidden state of the position before; then the end token. All
of it goes through one cache. With guidance, each row runs twice, the second time with an unconditional prompt.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .cache import RecurrentCache
from .chat import TARGET_PREFIX
from .depth import DepthOptions, keyed_generator
from .exit_criteria import EXIT_CRITERIA, ExitCheck, ExitController, ExitCriterion, ExitOptions
from .fusion import check_counts, read_media, take_inputs
from .generation_media_wavefront import MediaWavefront
from .generation_text import (
    CACHE_OPTIONS,
    OF_FORWARD,
    TEXTS,
    OwnLoop,
    RecurrentGenerationMixin,
    by_name,
    check_read,
    chunk_lengths,
    num_cached_tokens,
    take_stop_strings,
)
from .modalities import MODALITIES, TARGET_MODALITIES
from .output_heads import OutputHead, put_codes, read_targets, take_targets
from .outputs import CACHE_NAME, with_parameters_of

MEDIA, ANY = ("image", "audio", "any"), (*TEXTS, "any")
READ_BY = {
    # what is read, and how much is generated
    **dict.fromkeys(("inputs", "input_ids", "attention_mask", "cache", "past_key_values"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("mm_encoder_outputs", "generation_config", "streamer", "synced_gpus"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("max_new_tokens", "max_length", "num_return_sequences", "do_sample"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "return_dict_in_generate"), (*TEXTS, *MEDIA)),
    # depth and cache
    **dict.fromkeys(("num_steps", "exit_criterion", "exit_threshold", "min_steps"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("exit_check_interval", "exit_in_prefill", "exit_schedule"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("noise_level", "noise_schedule", "state_warm_start", "initial_state"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("use_cache", *CACHE_OPTIONS, "cache_implementation"), (*TEXTS, *MEDIA)),
    **dict.fromkeys(("max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size"), (*TEXTS, *MEDIA)),
    # what is generated
    **dict.fromkeys(("num_flow_steps", "flow_temperature", "flow_seeds", "on_chunk", "chunk_size"), MEDIA),
    **dict.fromkeys(("velocity_threshold",), MEDIA),
    **dict.fromkeys(("decoding", "draft_steps"), ("text", *TARGET_MODALITIES)),
    **dict.fromkeys(("latent_tolerance",), TARGET_MODALITIES),
    **dict.fromkeys(("contrast_strength", "contrast_step"), ("text", *TARGET_MODALITIES)),
    **dict.fromkeys(("contrast_alpha",), ("text",)),
    **dict.fromkeys(("guidance_scale",), (*TEXTS, *MEDIA)),
    # which token is next
    **dict.fromkeys(("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "tokenizer"), ANY),
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"), ANY),
    **dict.fromkeys(("eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "bad_words_ids"), ANY),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), ANY),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ANY),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config"), ANY),
    **dict.fromkeys(("max_time", "stop_strings"), ANY),
    **dict.fromkeys(OF_FORWARD, ()),
}
"""By which loops of `generate` an option is read: "text", "drafts" (assisted generation), and the modes of media. Those
that are not here are read by the loops of transformers alone.
"""
MODES = ("text", *TARGET_MODALITIES, "any")
CHUNK_SIZE = 16
"""Latents from one `MediaChunk` to the next."""
VELOCITY_THRESHOLD = 0.05
RANGES = {
    "guidance_scale": (Real, 0, "a number"),
    "flow_temperature": (Real, 0, "a number"),
    "num_flow_steps": (Integral, 1, "a whole number"),
    "chunk_size": (Integral, 1, "a whole number"),
    "latent_tolerance": (Real, 0, "a number"),
}
"""Type and smallest value of options."""


@dataclass
class MediaChunk:
    """What a caller gets to see of an item that is being written."""

    row: int
    modality: str
    item: Any
    """A PIL image whose later patches are still gray, or a waveform (samples,) of all so far."""
    is_complete: bool


@dataclass
class MediaOptions:
    """How media are written; None: as the generation config says, then the output head's configuration.

    Args:
        mode: "image" or "audio" write one item, "any" text in which the model opens media itself.
        guidance_scale: Classifier-free guidance, at least 0; 1 is none.
        num_flow_steps: Euler steps of a latent, at least 1.
        flow_temperature: Variance of the noise that a latent begins with, at least 0.
        velocity_threshold: Relative change of the head's velocity, above 0, below which a latent takes no more core
            steps, where an `exit_criterion` is given. Default: 0.05.
        flow_seeds: One for each row, for the noise. Default: drawn from torch's global generator.
        on_chunk: Called with each `MediaChunk`: after `chunk_size` latents of an item each, and when it is complete.
        chunk_size: Latents from one chunk to the next. Default: 16.
        latent_tolerance: The most that a draft of a latent may be from the final one, as a share of the length of that,
            at least 0, to be kept in its place, with decoding "wavefront".

    Raises:
        ValueError: a value is outside its range.
    """

    mode: str = "any"
    guidance_scale: float | None = None
    num_flow_steps: int | None = None
    flow_temperature: float | None = None
    velocity_threshold: float | None = None
    flow_seeds: list[int] | None = None
    on_chunk: Callable[[MediaChunk], None] | None = None
    chunk_size: int | None = None
    latent_tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"generation_mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        for name, (kind, least, what) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, kind) and least <= value < math.inf):
                raise ValueError(f"{name} is {value}; give {what} of at least {least}")
        if self.chunk_size is not None and self.on_chunk is None:
            raise ValueError("chunk_size has no effect without on_chunk; leave it out, or say who is to see the chunks")

    def of(self, output_head: OutputHead) -> "MediaOptions":
        """The same, with what an output head's configuration says where nothing was given."""
        own = {
            "guidance_scale": output_head.config.guidance_scale,
            "num_flow_steps": output_head.config.num_flow_steps,
            "flow_temperature": output_head.config.flow_temperature,
        }
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})

    def or_else(self, config: GenerationConfig) -> "MediaOptions":
        """The same, with what a generation config says where nothing was given."""
        names = ("guidance_scale", "num_flow_steps", "flow_temperature", "velocity_threshold")
        said = {name: getattr(config, name, None) for name in names if getattr(self, name) is None}
        return replace(self, **said)


@dataclass
class MediaGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns when it writes media.

    Args:
        sequences: (rows, tokens), prompt included, with placeholders where media are.
        images: PIL images, row by row, in their order.
        audio: Waveforms, float32 (samples,), row by row, in their order.
        sampling_rate: Samples of the waveforms in a second.
        segments: What each row holds, in order: ("text", token ids), ("image", index in `images`), ("audio",
            index in `audio`).
        latents: Latents of each item, (tokens, latent_size), by modality, ordered as `images` and `audio`.
        exit_steps: (rows, new tokens), core steps taken for each new position; 0 behind the end of a row.
    """

    images: list | None = None
    audio: list[torch.Tensor] | None = None
    sampling_rate: int | None = None
    segments: list[list[tuple[str, Any]]] | None = None
    latents: dict[str, list[torch.Tensor]] | None = None
    exit_steps: torch.LongTensor | None = None


class MediaGenerationMixin:
    """Goes before `RecurrentGenerationMixin`: media are read once, before the prompt, and their features go with its
    parts: with its chunks, with the copies of its rows, and without what a cache holds already.
    """

    read_by = MappingProxyType(READ_BY)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        generation_mode: str = "text",
        guidance_scale: float | None = None,
        num_flow_steps: int | None = None,
        flow_temperature: float | None = None,
        flow_seeds: list[int] | None = None,
        velocity_threshold: float | None = None,
        on_chunk: Callable[[MediaChunk], None] | None = None,
        chunk_size: int | None = None,
        latent_tolerance: float | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """`generate` of `RecurrentGenerationMixin`, and:

        Args:
            generation_mode: "text"; "image" or "audio" write one item; "any" text in which the model opens media.
            guidance_scale, num_flow_steps, flow_temperature, flow_seeds, velocity_threshold, on_chunk, chunk_size,
                latent_tolerance: See `MediaOptions`; in mode "text" guidance is that of the logits, and there are no
                others.
            decoding: "wavefront" in modes "image" and "audio" drafts latents, without guidance and exits, and keeps
                those within `latent_tolerance` of the final ones; so what is generated is not quite the same.
            num_steps: Also by what is generated: {"text": 8, "image": 16, "audio": 4}.

        Returns:
            In the other modes a `MediaGenerateOutput`, unless `return_dict_in_generate=False`.

        Raises:
            ValueError: this model does not generate the modality, or an option is outside its range or has no effect.
        """
        options = {"num_flow_steps": num_flow_steps, "flow_temperature": flow_temperature, "flow_seeds": flow_seeds}
        options |= {"velocity_threshold": velocity_threshold, "on_chunk": on_chunk, "chunk_size": chunk_size}
        options |= {"guidance_scale": guidance_scale, "latent_tolerance": latent_tolerance}
        media_options = MediaOptions(generation_mode, **options)
        kwargs |= by_name(args, first="generation_config")
        config = kwargs.get("generation_config")
        media = {name: kwargs[name] for name in media_names() if kwargs.get(name) is not None}
        begun = {} if generation_mode == "text" else self._begun_items(inputs, kwargs)
        inputs, kwargs = self._read_media(inputs, kwargs, begun, keeps_cached=generation_mode != "text")
        if generation_mode == "text":
            if kwargs.get("assistant_model") is not None and media:
                kwargs["draft_media"] = media
            check_read(self.read_by, "text", options, config, self.generation_config)
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            if prompt is not None and not (config is not None and config.is_assistant):
                flows = [name for name, output_head in self.model.writers.items() if output_head.head is not None]
                refuse_opened("text", {row: it for row, it in opened_media(self.config, prompt).items() if it in flows})
            return super().generate(inputs, guidance_scale=guidance_scale, **kwargs)
        check_read(self.read_by, generation_mode, {**options, **kwargs}, config, self.generation_config)
        kwargs = {"return_dict_in_generate": True, **kwargs}
        if all(kwargs.get(name) is None for name in ("max_new_tokens", "max_length", "generation_config")):
            kwargs["max_new_tokens"] = self._default_new_tokens(generation_mode)
        num_cached = num_cached_tokens(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        loop = MediaLoop(media_options, num_cached, kwargs.get("streamer"), begun)
        return super().generate(inputs, **{**kwargs, "custom_generate": loop})

    def take_sources(self, kwargs: dict[str, Any]) -> "Sources | None":
        """Takes what a decoder sees of an encoder out of the keywords of a loop; here there is none."""
        return None

    @with_parameters_of(RecurrentGenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,  # named, since transformers looks for it here
        **kwargs: Any,
    ) -> dict:
        """Prepares as the original does; the media of a draft, whose prompt is none to transformers, are read too."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache, features = inputs["past_key_values"], kwargs.get("mm_encoder_outputs")
        if features and (cache is None or cache.get_seq_length() == 0):
            inputs["mm_encoder_outputs"] = features
        return inputs

    def _default_new_tokens(self, generation_mode: str) -> int:
        """New tokens where nobody says how many: those of one item, or of one of each kind and as many of text."""
        lengths = {name: output_head.num_places + 2 for name, output_head in self.model.writers.items()}
        return 2 * sum(lengths.values()) if generation_mode == "any" else lengths.get(generation_mode, 1)

    def _read_media(
        self, inputs: torch.Tensor | None, kwargs: dict[str, Any], begun: Mapping[int, "BegunItem"], keeps_cached: bool
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """The prompt, in which images that are codes are tokens, and the keywords with the features of all other media
        in `mm_encoder_outputs`: by the names of their placeholders one entry a row, (tokens, hidden), in place of what
        was read and of what was generated before. So they are expanded, cut and left out with the rows.

        Args:
            begun: See `_begun_items`.
            keeps_cached: Whether features that the cache holds are kept.
        """
        kwargs, writers = dict(kwargs), self.model.writers
        media, targets = take_inputs(kwargs), take_targets(kwargs)
        given = {name: output.pooler_output for name, output in (kwargs.pop("mm_encoder_outputs", None) or {}).items()}
        embeds, input_ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids") if inputs is None else inputs
        if (media or targets) and embeds is not None:
            raise ValueError("images and sound need input_ids with their placeholders, and no inputs_embeds")
        if input_ids is None and embeds is None:
            return inputs, kwargs
        num_cached = num_cached_tokens(input_ids, kwargs)
        if targets:
            input_ids = self._with_codes(input_ids, targets, num_cached)
            inputs, kwargs = (None, kwargs | {"input_ids": input_ids}) if inputs is None else (input_ids, kwargs)
        if num_cached and not keeps_cached:
            self._leave_out_cached(media, targets, input_ids[:, num_cached:])
        encoded = read_media(self.model.readers, media, run_all=self.model.must_run_alike)
        found = {name: output.pooler_output for name, output in encoded.items()} | read_targets(writers, targets)
        twice = sorted(found.keys() & given.keys())
        if twice:
            raise ValueError(f"{twice[0]}: give its features (mm_encoder_outputs) or what to read, not both")
        rows = {}
        for name in self._placeholder_names:
            parts = list((found | given).get(name, ()))
            for item in begun.values():
                if name == f"{TARGET_PREFIX}{item.modality}":
                    parts[item.number] = parts[item.number][: len(item.latents)]
            counts = self._count_places(name, input_ids, embeds)
            unseen = counts if embeds is not None else self._count_places(name, input_ids[:, num_cached:])
            if not parts and (not num_cached or not sum(unseen)):
                continue
            lengths = [len(part) for part in parts]
            counts = unseen if sum(lengths) == sum(unseen) else counts
            check_counts(name.replace(TARGET_PREFIX, "a written "), counts, lengths, is_whole=name in found)
            rows[name] = torch.cat(parts).split(counts)
            rows[name] = rows[name] if keeps_cached else last_features(rows[name], unseen)
        if rows:
            kwargs["mm_encoder_outputs"] = {name: of_rows(parts) for name, parts in rows.items()}
        return inputs, kwargs

    def _begun_items(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[int, "BegunItem"]:
        """What prompts end within, behind its first latents, by the number of the row. ValueError: it is not given."""
        input_ids, found = kwargs.get("input_ids") if inputs is None else inputs, {}
        for row, name in ({} if input_ids is None else opened_media(self.config, input_ids)).items():
            is_place = input_ids == getattr(self.config, f"{TARGET_PREFIX}{name}_token_id")
            output_head, count = dict(self.model.writers.items()).get(name), int(is_place[row].flip(0).cumprod(0).sum())
            if output_head is None or output_head.head is None or not count:
                continue
            start = input_ids[row, -count - 1] if count < len(is_place[row]) else None
            if kwargs.get(output_head.target_name) is None or start != getattr(self.config, f"{name}_start_token_id"):
                raise ValueError(
                    f"prompt {row} ends within an {name}, of which {output_head.target_name} or the start token is not "
                    "given; give both, or end the prompt with the start token"
                )
            latents, lengths = output_head.latents_of(kwargs)
            num_behind = int((is_place[row + 1 :, 1:] & ~is_place[row + 1 :, :-1]).sum())  # where items begin
            number = len(lengths) - 1 - num_behind
            found[row] = BegunItem(name, number, latents.split(lengths)[number][:count])
        return found

    def _with_codes(self, input_ids: torch.LongTensor, targets: dict[str, Any], num_cached: int) -> torch.LongTensor:
        """The prompt with the codes of all images, or of those behind what the cache holds; these targets are taken
        out.
        """
        for name, output_head in self.model.writers.items():
            if output_head.head is not None or output_head.target_name not in targets:
                continue
            places = sum(self._count_places(f"{TARGET_PREFIX}{name}", input_ids))
            start = 0 if places == len(targets[output_head.target_name]) * output_head.num_places else num_cached
            new = put_codes(self.model.writers, targets, input_ids[:, start:], self.config)
            input_ids = torch.cat((input_ids[:, :start], new), dim=1)
        return input_ids

    def _leave_out_cached(self, media: dict[str, Any], targets: dict[str, Any], unseen: torch.LongTensor) -> None:
        """Takes out what need not be read, since the cache has all of its modality."""
        names = {name: reader.input_names for name, reader in self.model.readers.items()}
        names |= {f"{TARGET_PREFIX}{it}": (f"{it}_targets", f"{it}_targets_mask") for it in self.model.writers}
        for name, inputs in names.items():
            if not sum(self._count_places(name, unseen)):
                for each in inputs:
                    media.pop(each, None)
                    targets.pop(each, None)

    @property
    def _placeholder_names(self) -> list[str]:
        """The names of all placeholders: those of what is read, and of what is generated."""
        return [*self.model.readers, *(f"{TARGET_PREFIX}{name}" for name in self.model.writers)]

    @property
    def placeholder_ids(self) -> list[int]:
        """Tokens in whose positions media stand."""
        ids = [getattr(self.config, f"{name}_token_id") for name in self._placeholder_names]
        return [token_id for token_id in ids if token_id is not None]

    def _expand_multimodal_outputs(
        self, input_ids: torch.LongTensor, mm_encoder_output: dict, expand_size: int = 1, **kwargs: Any
    ) -> dict:
        """The features of each row as often as the row itself."""
        return {
            name: of_rows(row for row in output.pooler_output for _ in range(expand_size))
            for name, output in mm_encoder_output.items()
        }

    def _count_places(
        self, name: str, input_ids: torch.LongTensor | None, embeds: torch.Tensor | None = None
    ) -> list[int]:
        """Placeholders in each row, of token ids or embeddings."""
        token_id = getattr(self.config, f"{name}_token_id")
        if token_id is None:
            return [0] * len(input_ids if embeds is None else embeds)
        if embeds is None:
            return (input_ids == token_id).sum(dim=1).tolist()
        is_place = embeds == self.model.embed_tokens(torch.tensor(token_id, device=embeds.device))
        return is_place.all(dim=-1).sum(dim=1).tolist()


def media_names() -> list[str]:
    """The arguments that are media, or features of such."""
    names = [name for modality in MODALITIES.values() for name in modality.input_names]
    names += [f"{name}_targets{end}" for name in TARGET_MODALITIES for end in ("", "_mask")]
    return [*names, "mm_encoder_outputs"]


def append_rows(cache: RecurrentCache, other: RecurrentCache) -> None:
    """Puts the rows of a cache of as many tokens behind those of another, which may be of static size."""
    rows, length = len(other.row_steps), other.length
    cache.batch_select_indices(torch.arange(rows).repeat(2))  # the second ones are written over
    for layer, theirs in zip(cache.layers, other.layers, strict=True):
        if cache.max_length is None:
            layer.reserve(theirs.num_steps, 2 * rows, length)
        deepest = torch.arange(layer.num_steps).clamp(max=theirs.num_steps - 1)
        layer.buffer[:, :, rows:, :, :length] = theirs.buffer[deepest.to(theirs.device), ..., :length, :]
    cache.row_steps[rows:, :length] = other.row_steps[:, :length]


def of_rows(features: Iterable[torch.Tensor]) -> BaseModelOutputWithPooling:
    """Features of rows, (tokens, hidden) each, as `forward` takes them."""
    return BaseModelOutputWithPooling(pooler_output=tuple(features))


def last_features(rows: Iterable[torch.Tensor], counts: Iterable[int]) -> tuple[torch.Tensor, ...]:
    """The last features of each row, so many of each."""
    return tuple(row[len(row) - count :] for row, count in zip(rows, counts, strict=True))


def opened_media(config: Any, input_ids: torch.LongTensor) -> dict[int, str]:
    """The modality of the generated item within which a prompt ends, by the number of the row."""
    found = {}
    for name in TARGET_MODALITIES:
        start, place = (getattr(config, f"{key}_token_id") for key in (f"{name}_start", f"{TARGET_PREFIX}{name}"))
        if start is None or place is None:
            continue
        for row in torch.isin(input_ids[:, -1], torch.tensor([start, place], device=input_ids.device)).nonzero():
            found[int(row)] = name
    return found


@dataclass
class BegunItem:
    """An item whose first latents, (tokens, latent_size), end a prompt, and its number among those of its modality."""

    modality: str
    number: int
    latents: torch.Tensor


def refuse_opened(mode: str, opened: Mapping[int, str]) -> None:
    """Raises ValueError for prompts that end within an item, by row."""
    for row, name in opened.items():
        raise ValueError(
            f"prompt {row} ends within an {name}, which generation_mode {mode!r} cannot complete; end it with its "
            f"start token and choose {name!r} or 'any'"
        )


def unconditional_ids(
    config: Any, ids: torch.LongTensor, mask: torch.Tensor | None, read: Iterable[str]
) -> torch.LongTensor:
    """Prompts, (rows, tokens), with <|null|> for all that is no structure; of prompts of media that are `read` alone,
    also for those. `mask`, (rows, past + tokens), is 0 for padding. ValueError: the model was not trained with such.
    """
    if config.null_token_id is None or config.structure_token_ids is None:
        raise ValueError(
            "guidance needs a model that was trained with dropped prompts (null_token_id is not set); give "
            "guidance_scale=1"
        )
    kept = torch.isin(ids, torch.tensor(config.structure_token_ids, device=ids.device))
    if mask is not None:
        kept |= mask[:, -ids.shape[1] :] == 0
    unconditional = ids.masked_fill(~kept, config.null_token_id)
    for name in read:
        is_place = ids == getattr(config, f"{name}_token_id")
        unconditional = unconditional.masked_fill(is_place & kept.all(dim=1, keepdim=True), config.null_token_id)
    return unconditional


@dataclass
class Sources:
    """What a decoder sees of an encoder: last states, (rows, source, hidden), with and without the text of the source,
    and which of them are no padding, (rows, source), or None.
    """

    states: torch.Tensor
    unconditional: torch.Tensor | None
    mask: torch.Tensor | None

    def of_rows(self, is_guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states and their mask, for the rows once, or twice with guidance. ValueError: there are none for it."""
        if not is_guided:
            return self.states, self.mask
        if self.unconditional is None:
            raise ValueError(
                "guidance needs what the encoder makes of the source without its text, of a model that was trained "
                "with dropped prompts; give input_ids and no encoder_outputs, or guidance_scale=1"
            )
        return torch.cat((self.states, self.unconditional)), None if self.mask is None else self.mask.repeat(2, 1)


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass
class Row:
    """How far one row is."""

    seed: int
    modality: str | None = None
    """What it is within; None: text."""
    latents: list[torch.Tensor] = field(default_factory=list)
    """Those of the item that is being generated."""
    noise: torch.Tensor | None = None
    """(positions, latent_size), of the item it is within: as many as there is room for."""
    num_media: int = 0
    end: int | None = None
    """How many new tokens it has; None: it goes on."""
    segments: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.end is not None


@dataclass
class MediaLoop(OwnLoop):
    """The loop that `generate` runs in place of sampling or greedy search; see `MediaGeneration`.

    Args:
        options: How media are written.
        num_cached: Tokens of the prompt that the cache holds.
        streamer: Gets the tokens of each position.
        begun: Items within which prompts end, by the number of the prompt.
    """

    options: MediaOptions
    num_cached: int = 0
    streamer: Any = None
    begun: Mapping[int, BegunItem] = field(default_factory=dict)
    is_velocity_asked: bool = False
    """Whether the caller, and not the generation config, gave its threshold."""
    draft_steps: int | str | None = None
    """Those of decoding "wavefront"; None: plain decoding."""

    def take_options(self, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        """Takes guidance, which is that of latents here, and stop strings; leaves out beams, which texts have."""
        self.is_velocity_asked = self.options.velocity_threshold is not None
        self.options = self.options.or_else(config)
        config.guidance_scale = config.num_beams = 1
        take_stop_strings(config, kwargs)

    def take_draft_steps(self, draft_steps: int | str | None) -> None:
        """Takes those of decoding "wavefront", or None. ValueError: there is no tolerance for it, or one for none."""
        if draft_steps is not None and self.options.latent_tolerance is None:
            raise ValueError(
                "decoding 'wavefront' of media keeps drafts of latents that are near enough; say by latent_tolerance "
                "what is, such as 0.1, or use decoding='plain'"
            )
        if draft_steps is None and self.options.latent_tolerance is not None:
            raise ValueError("latent_tolerance has no effect without decoding='wavefront'; leave it out, or name that")
        self.draft_steps = draft_steps

    def __call__(
        self,
        model: nn.Module,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> MediaGenerateOutput | torch.LongTensor:
        """Generates until no row goes on."""
        run = MediaGeneration(
            model, self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        if self.draft_steps is not None:
            MediaWavefront(run, self.draft_steps, self.streamer).generate()
        else:
            self._decode(run)
        if self.streamer is not None:
            self.streamer.end()
        return run.output() if generation_config.return_dict_in_generate else run.ids

    def _decode(self, run: "MediaGeneration") -> None:
        hidden = run.read_prompt()
        while True:
            ids, embeds = run.choose(hidden)
            if self.streamer is not None:
                self.streamer.put(ids.cpu())
            if run.is_done():
                break
            hidden = run.advance(embeds)


class MediaGeneration:
    """One call of `generate`: the rows, the cache, and what has been written."""

    def __init__(
        self,
        model: nn.Module,
        loop: MediaLoop,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.model, self.ids, self.generation_config = model, input_ids, generation_config
        self.media_options, self.num_cached = loop.options, loop.num_cached
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.writers: dict[str, OutputHead] = dict(model.model.writers.items())
        self.names = self._modes()
        self.config, self.device, self.prompt_length = model.config, input_ids.device, input_ids.shape[1]
        self.options = {name: loop.options.of(self.writers[name]) for name in self.names}
        self.is_guided = any(options.guidance_scale != 1 for options in self.options.values())
        sources = model.take_sources(model_kwargs)
        self.source = {} if sources is None else {"source": sources.of_rows(self.is_guided)}
        self.depth: DepthOptions = model_kwargs.pop("depth_options")
        if loop.is_velocity_asked and self.depth.exits.criterion == "none":
            raise ValueError("velocity_threshold has no effect without an exit_criterion; leave it out, or name one")
        self.cache = model_kwargs.pop(CACHE_NAME, None)
        if self.cache is None:
            raise ValueError("media are written through the cache: leave use_cache=False out")
        batch, past = len(input_ids), self.cache.get_seq_length()
        mask = model_kwargs.pop("attention_mask", None)
        self.mask = input_ids.new_ones(batch, past - self.num_cached + self.prompt_length) if mask is None else mask
        self.inputs = model_kwargs
        self.finished: dict[str, list[list[torch.Tensor]]] = {name: [[] for _ in range(batch)] for name in self.names}
        self.exit_steps: list[torch.Tensor] = []
        self.early: torch.Tensor | None = None  # (rows, hidden), the readout of the step that is contrasted with
        seeds = loop.options.flow_seeds or torch.randint(2**62, (batch,)).tolist()
        if len(seeds) != batch:
            raise ValueError(f"flow_seeds has {len(seeds)} seeds for {batch} rows; give one for each")
        self.rows = [Row(seed) for seed in seeds]
        self._open_rows(loop.begun, generation_config.num_return_sequences or 1)
        self._check_capacity()
        self._exit_controller(is_prompt=False)  # which refuses what cannot be

    def _open_rows(self, begun: Mapping[int, BegunItem], copies: int) -> None:
        """Rows whose prompts end within an item are within it, behind the latents that it has; each prompt has as many
        `copies`. ValueError: it is not of what is asked for.
        """
        opened = opened_media(self.config, self.ids)
        refuse_opened(self.media_options.mode, {row: name for row, name in opened.items() if name not in self.names})
        for row, name in opened.items():
            item = begun.get(row // copies)
            self._open(self.rows[row], name, [] if item is None else list(item.latents))

    def _check_capacity(self) -> None:
        """Raises ValueError where an item that is asked for, or was opened, cannot be completed."""
        mode, room = self.media_options.mode, self.generation_config.max_length - self.prompt_length
        for row in self.rows:
            name = row.modality or mode
            least = {"audio": 3, "any": 1}.get(name) or self.writers[name].num_places + 2
            least = max(1, least - (row.modality is not None) - len(row.latents))  # the start and these are there
            if room < least:
                raise ValueError(
                    f"there is room for {room} new tokens, but an {name} takes {least}; raise max_new_tokens"
                )

    def _modes(self) -> list[str]:
        """What may be written. Raises ValueError where the model has no head for it."""
        wanted = list(self.writers) if self.media_options.mode == "any" else [self.media_options.mode]
        heads = [name for name, output_head in self.writers.items() if output_head.head is not None]
        for name in wanted:
            if name not in heads:
                codes = "; its images are tokens: generate text, and give it to decode_image_tokens"
                raise ValueError(
                    f"generation_mode {self.media_options.mode!r} needs a flow head for {name}, which this model does "
                    f"not have; it writes {', '.join(['text', *heads])}{codes if name in self.writers else ''}"
                )
        return wanted

    # -------------------------------------------------------------------------------------------------- forward passes

    def read_prompt(self) -> torch.Tensor:
        """(rows, hidden), or twice as many with guidance, after the last token of each prompt."""
        ids, mask, features = self.ids, self.mask, self._features()
        if self.is_guided:
            unconditional = unconditional_ids(self.config, ids, self.mask, self.model.model.readers)
            if self.cache.get_seq_length():
                self._read_cached_again(unconditional, features)
            ids, mask = torch.cat((ids, unconditional)), torch.cat((mask, mask))
            features = {name: (*rows, *rows) for name, rows in features.items()}
        return self._noted(self._read(ids, features, mask, self.cache, self.num_cached, ids.shape[1]))

    def _features(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """The features of the prompts by the names of their placeholders, a row each."""
        given = self.inputs.get("mm_encoder_outputs") or {}
        return {name: output.pooler_output for name, output in given.items()}

    def _read(
        self,
        ids: torch.LongTensor,
        features: Mapping[str, tuple[torch.Tensor, ...]],
        mask: torch.Tensor,
        cache: RecurrentCache,
        start: int,
        end: int,
    ) -> ModelOutput:
        """Reads prompts, (rows, tokens), from `start` to `end`, with the features of their placeholders, at once or in
        chunks, as it was asked for. What comes out is that of the last one.
        """
        size = self.generation_config.prefill_chunk_size
        lengths = [end - start] if size is None else chunk_lengths(size, end - start)
        for first, last in pairwise(accumulate(lengths, initial=start)):
            read = {}
            for name, rows in features.items():
                left, here = (self.model._count_places(name, part) for part in (ids[:, first:], ids[:, first:last]))
                parts = zip(last_features(rows, left), here, strict=True)
                read[name] = of_rows(row[:count] for row, count in parts)
            seen = mask[:, : cache.get_seq_length() + last - first]
            outputs = self._forward(seen, cache, input_ids=ids[:, first:last], mm_encoder_outputs=read or None)
        return outputs

    def _read_cached_again(
        self, unconditional: torch.LongTensor, features: Mapping[str, tuple[torch.Tensor, ...]]
    ) -> None:
        """Adds the rows of unconditional prompts to a cache that holds a part of the prompts.

        Raises:
            ValueError: that part, or one of its media, is not given; or the cache cannot be given rows.
        """
        if self.cache.policy in ("first", "residual"):
            raise ValueError(
                f"guidance on a cache that holds a part of the prompt is not possible with cache policy "
                f"{self.cache.policy!r}; give the whole prompt without a cache, or guidance_scale=1"
            )
        missing = not self.num_cached
        counts = {name: self.model._count_places(name, unconditional) for name in self.model._placeholder_names}
        missing |= any(sum(counts[name]) > sum(map(len, features.get(name, ()))) for name in counts)
        if missing:
            raise ValueError(
                "guidance reads all of the prompt a second time, without its text; give the whole prompt and all of "
                "its media with the cache, or guidance_scale=1"
            )
        kept = self.cache.num_kept_steps if self.cache.policy == "ring" else None
        cache = RecurrentCache(self.model.text_config, self.cache.policy, kept)
        self._read(unconditional, features, self.mask, cache, 0, self.num_cached)
        append_rows(self.cache, cache)

    def advance(self, embeds: torch.Tensor) -> torch.Tensor:
        """The next positions: (rows, hidden) -> (rows, hidden), or twice as many with guidance."""
        mask = self.mask
        if self.is_guided:
            embeds, mask = torch.cat((embeds, embeds)), torch.cat((mask, mask))
        return self._noted(self._forward(mask, self.cache, inputs_embeds=embeds[:, None]))

    def _forward(self, mask: torch.Tensor, cache: RecurrentCache, **inputs: Any) -> ModelOutput:
        if "input_ids" in inputs:
            cache.last_state = None  # a prompt goes on from no token, in whatever chunks it is read
        return self.model.model(
            attention_mask=mask,
            cache=cache,
            use_cache=True,
            num_steps=self.num_steps(len(mask)),
            exit_controller=self._exit_controller(is_prompt="input_ids" in inputs),
            return_dict=True,
            **self._states(len(mask)),
            **self.source,
            **inputs,
        )

    def _noted(self, outputs: ModelOutput) -> torch.Tensor:
        """(rows, hidden), or twice as many with guidance, after the last token; its steps are remembered."""
        if outputs.exit_steps is not None:
            self.exit_steps.append(outputs.exit_steps[: len(self.rows)].clone())
        if outputs.contrasted is not None:
            self.early = outputs.contrasted[: len(self.rows), -1]
        return outputs.last_hidden_state[:, -1]

    def num_steps(self, num_rows: int) -> int | torch.LongTensor | None:
        """Core steps for the next position of each row, by what will be written there; of `num_rows`, which are the
        rows once, or twice with guidance.
        """
        mode, copies = self.media_options.mode, num_rows // len(self.rows)
        if isinstance(self.depth.num_steps, torch.Tensor) and self.depth.num_steps.ndim:
            steps = self.depth.num_steps
            return steps.repeat_interleave(len(self.rows) // len(steps)).repeat(copies)
        begun = mode if mode in TARGET_MODALITIES else "text"
        modalities = [row.modality or ("text" if row.num_media else begun) for row in self.rows]
        steps = [self.depth.steps_of(name) for name in modalities]
        if len(set(steps)) == 1:
            return steps[0]
        config = self.model.text_config
        usual = config.num_steps or config.recurrence.mean_steps
        return torch.tensor([usual if it is None else it for it in steps]).repeat(copies)

    def _states(self, num_rows: int) -> dict[str, Any]:
        """Where the iteration of each row begins, and what perturbs it."""
        state = self.inputs.get("initial_state")
        given = {} if state is None else {"initial_state": state.repeat(num_rows // len(self.rows), 1, 1)}
        early = {} if self.depth.contrast is None else {"contrast": self.depth.contrast.of_early}
        return given | self.depth.of_states | early

    def _exit_controller(self, is_prompt: bool) -> ExitController | None:
        """What ends the iteration of rows before their last step, where that was asked for."""
        exits, threshold = self.depth.exits, self.media_options.velocity_threshold
        if exits.criterion == "none" or (is_prompt and not exits.in_prefill):
            return None
        return MediaExitController(
            exits,
            self.model.compute_logits,
            self._first_velocities,
            self.model.text_config.vocab_size,
            VELOCITY_THRESHOLD if threshold is None else threshold,
        )

    def _first_velocities(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The velocity with which the next latent of each row begins, (rows, largest latent); zeros in rows of text.

        Args:
            hidden: (rows, hidden).
            rows: Which rows of the batch they are, those without the prompt behind the others; None: all.
        """
        numbers = range(len(hidden)) if rows is None else rows.tolist()
        rows_of = [self.rows[number % len(self.rows)] for number in numbers]
        sizes = [output_head.codec.latent_size for output_head in self.writers.values()]
        velocities = hidden.new_zeros(len(hidden), max(sizes))
        for name in self.names:
            chosen = [at for at, row in enumerate(rows_of) if row.modality == name and self._has_room(row)]
            if not chosen:
                continue
            output_head, index = self.writers[name], torch.tensor(chosen, device=self.device)
            positions, noise = self._positions_and_noise([rows_of[at] for at in chosen])
            condition = output_head.condition(hidden[index], positions)
            velocity = output_head.head.velocity(noise, torch.zeros(len(chosen), device=self.device), condition)
            velocities[index, : velocity.shape[1]] = velocity.to(velocities)
        return velocities

    def _positions_and_noise(self, rows: list[Row]) -> tuple[torch.LongTensor, torch.Tensor]:
        """The position of each row's next latent within its item, (rows,), and its noise, (rows, latent_size)."""
        positions = [len(row.latents) for row in rows]
        noise = torch.stack([row.noise[position] for row, position in zip(rows, positions, strict=True)])
        return torch.tensor(positions, device=self.device), noise.to(self.device)

    def _has_room(self, row: Row) -> bool:
        return len(row.latents) < len(row.noise)

    # -------------------------------------------------------------------------------------------------- what comes next

    def choose(self, hidden: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """The next position of each row: its token, (rows,), and its embedding, (rows, hidden)."""
        conditional, unconditional = hidden.chunk(2) if self.is_guided else (hidden, None)
        logits = self.model.compute_logits(conditional).float()
        ids = self._next_tokens(logits)
        embeds = self.model.model.embed_tokens(ids)
        for name in self.names:
            is_place = ids == getattr(self.config, f"written_{name}_token_id")
            if is_place.any():
                latents = self._next_latents(name, is_place.nonzero()[:, 0], conditional, unconditional)
                embeds = embeds.index_put((is_place,), self.writers[name].embed(latents).to(embeds))
        self.ids = torch.cat((self.ids, ids[:, None]), dim=1)
        self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        self._advance_rows(ids)
        return ids, embeds

    def _next_tokens(self, logits: torch.Tensor) -> torch.LongTensor:
        """(rows,), by each row's state."""
        texts = self._text_tokens(logits)
        tokens = []
        for number, row in enumerate(self.rows):
            if row.is_done:
                tokens.append(self._pad())
            elif row.modality is not None:
                tokens.append(self._media_token(row, logits[number]))
            elif self.media_options.mode in TARGET_MODALITIES:
                tokens.append(self._id(f"{self.media_options.mode}_start"))
            else:
                tokens.append(int(texts[number]))
        return torch.tensor(tokens, device=self.device)

    def _text_tokens(self, logits: torch.Tensor) -> torch.LongTensor:
        """What each row would write as text: a token, or the start of an item for which there is room."""
        forbidden = [f"{name}_end" for name in TARGET_MODALITIES] + ["null"]
        for name in TARGET_MODALITIES:
            room = self.generation_config.max_length - self.ids.shape[1]
            if name not in self.names or room < self.writers[name].num_places + 2:
                forbidden.append(f"{name}_start")
        ids = [getattr(self.config, f"{name}_token_id") for name in forbidden]
        logits = logits.clone()
        logits[:, [it for it in ids if it is not None]] = -torch.inf
        scores = self.logits_processor(self.ids, logits)
        if not self.generation_config.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)

    def _media_token(self, row: Row, logits: torch.Tensor) -> int:
        """A placeholder or the end of the item that the row is within: an image has its size, audio ends when the
        model says so.
        """
        place, end = self._id(f"written_{row.modality}"), self._id(f"{row.modality}_end")
        if not self._has_room(row):
            return end
        if row.modality == "image" or not row.latents:
            return place
        return place if logits[place] >= logits[end] else end

    def _next_latents(
        self, name: str, rows: torch.LongTensor, conditional: torch.Tensor, unconditional: torch.Tensor | None
    ) -> torch.Tensor:
        """(len(rows), latent_size), of rows that are within an item of this modality; they are remembered there."""
        output_head, options = self.writers[name], self.options[name]
        positions, noise = self._positions_and_noise([self.rows[row] for row in rows.tolist()])
        away = []
        if unconditional is not None:
            guidance = torch.full_like(positions, options.guidance_scale, dtype=torch.float)
            if output_head.config.guidance_schedule == "linear":
                lengths = torch.tensor([len(self.rows[row].noise) for row in rows.tolist()], device=self.device)
                guidance = 1 + (guidance - 1) * positions / (lengths - 1).clamp(min=1)
            away.append((guidance - 1, output_head.condition(unconditional[rows], positions)))
        if self.early is not None:
            strength = torch.full_like(noise[:, 0], self.depth.contrast.strength)
            away.append((strength, output_head.condition(self.early[rows], positions)))
        latents = self.draw_latents(name, positions, noise, conditional[rows], away)
        for row, latent in zip(rows.tolist(), latents, strict=True):
            self.rows[row].latents.append(latent)
            self._show(row, is_complete=False)
        return latents

    def draw_latents(
        self,
        name: str,
        positions: torch.LongTensor,
        noise: torch.Tensor,
        conditional: torch.Tensor,
        away: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> torch.Tensor:
        """Latents, (rows, latent_size), at positions of an item, (rows,), from their noise, (rows, latent_size), and
        what is before them, (rows, hidden), led away from other conditions; see `FlowHead.sample`. ValueError: they are
        not finite.
        """
        output_head = self.writers[name]
        condition, shift = output_head.condition(conditional, positions), output_head.config.flow_shift
        num_flow_steps = self.options[name].num_flow_steps
        latents = output_head.head.sample(condition, noise, num_flow_steps, shift, away)
        if not torch.isfinite(latents).all():
            raise ValueError(f"the {name} head gave latents that are NaN or infinite; is the checkpoint sound?")
        return output_head.codec.project(latents)

    def _advance_rows(self, ids: torch.LongTensor) -> None:
        """Moves each row on by its new token."""
        starts = {self._id(f"{name}_start"): name for name in self.names}
        ends = {self._id(f"{name}_end") for name in self.names}
        texts_end = self.stopping_criteria(self.ids, None)  # (rows,) of bool
        for number, (row, token) in enumerate(zip(self.rows, ids.tolist(), strict=True)):
            if row.is_done:
                continue
            if token in starts and row.modality is None:
                self._open(row, starts[token], [])
            elif token in ends and row.modality is not None:
                self._close(number, row)
            elif row.modality is None:
                if not (row.segments and row.segments[-1][0] == "text"):
                    row.segments.append(("text", []))
                row.segments[-1][1].append(token)
                row.end = self._num_new if texts_end[number] else None

    def _open(self, row: Row, name: str, latents: list[torch.Tensor]) -> None:
        output_head = self.writers[name]
        generator = keyed_generator("sample", name, row.seed, row.num_media)
        row.modality, row.latents = name, latents
        noise = torch.randn(output_head.num_places, output_head.codec.latent_size, generator=generator)
        room = len(latents) + self.generation_config.max_length - self.ids.shape[1] - 1  # and the end
        row.noise = noise[:room] * self.options[name].flow_temperature ** 0.5

    def _close(self, number: int, row: Row) -> None:
        self._show(number, is_complete=True)
        self.finished[row.modality][number].append(torch.stack(row.latents))
        row.segments.append((row.modality, len(self.finished[row.modality][number]) - 1))
        row.modality, row.num_media = None, row.num_media + 1
        row.end = self._num_new if self.media_options.mode in TARGET_MODALITIES else None

    def _show(self, number: int, is_complete: bool) -> None:
        """Hands a chunk to the caller who wants to see it."""
        row, size = self.rows[number], self.media_options.chunk_size or CHUNK_SIZE
        if self.media_options.on_chunk is None or (len(row.latents) % size and not is_complete):
            return
        item = self.writers[row.modality].codec.decode_partly(torch.stack(row.latents))
        self.media_options.on_chunk(MediaChunk(number, row.modality, item, is_complete))

    def take_position(self, number: int, latent: torch.Tensor | None, num_new: int) -> bool:
        """Moves a row that is within an item on by a latent, or, by None, to the end of the item, which is new token
        number `num_new`; whether it goes on.
        """
        row = self.rows[number]
        if latent is None:
            self._close(number, row)
            row.end = num_new
        else:
            row.latents.append(latent)
            self._show(number, is_complete=False)
        return not row.is_done

    def take_positions(self, tokens: list[list[int]], steps: list[list[int]]) -> None:
        """What all rows have of new tokens in the end, and the steps of each, behind which there is padding."""
        longest = max(map(len, tokens))
        new = [row + [self._pad()] * (longest - len(row)) for row in tokens]
        self.ids = torch.cat((self.ids[:, : self.prompt_length], torch.tensor(new, device=self.device)), dim=1)
        taken = torch.tensor([row + [0] * (longest - len(row)) for row in steps])
        self.exit_steps = list(taken.unbind(dim=1))

    def media_token_ids(self, name: str) -> tuple[int, int]:
        """The tokens of places and of the end of an item of a modality."""
        return self._id(f"written_{name}"), self._id(f"{name}_end")

    def is_done(self) -> bool:
        """Whether no row goes on. An item that was begun is always completed, so room was looked for before."""
        return all(row.is_done for row in self.rows) or self.ids.shape[1] >= self.generation_config.max_length

    # ---------------------------------------------------------------------------------------------------- what came out

    def output(self) -> MediaGenerateOutput:
        """All of it, media decoded."""
        images, audio, latents = [], [], {name: [] for name in self.names}
        media = {"image": images, "audio": audio}
        for number, row in enumerate(self.rows):
            segments = []
            for name, value in row.segments:
                if name in media:
                    found = self.finished[name][number][value]
                    latents[name].append(found)
                    media[name].append(self.writers[name].codec.decode(found))
                    value = len(media[name]) - 1
                segments.append((name, value))
            row.segments = segments
        steps = None
        if self.exit_steps:
            steps = torch.stack(self.exit_steps, dim=1)[:, : self._num_new]
            for number, row in enumerate(self.rows):
                steps[number, self._num_new if row.end is None else row.end :] = 0
        return MediaGenerateOutput(
            sequences=self.ids,
            images=images if "image" in self.names else None,
            audio=audio if "audio" in self.names else None,
            sampling_rate=self.writers["audio"].config.sampling_rate if "audio" in self.names else None,
            segments=[row.segments for row in self.rows],
            latents=latents,
            **{CACHE_NAME: self._cache_of_prompts()},
            exit_steps=steps,
        )

    @property
    def _num_new(self) -> int:
        return self.ids.shape[1] - self.prompt_length

    def _cache_of_prompts(self) -> RecurrentCache:
        """The cache without the rows of unconditional prompts, so that a further turn may go on from it."""
        if self.is_guided:
            self.cache.batch_select_indices(torch.arange(len(self.rows)))
        return self.cache

    def _id(self, name: str) -> int:
        found = getattr(self.config, f"{name}_token_id")
        if found is None:
            raise ValueError(f"{name}_token_id is not set in the model's configuration, and so it cannot write media")
        return found

    def _pad(self) -> int:
        pad = self.generation_config.pad_token_id
        return self.model.text_config.pad_token_id or 0 if pad is None else pad


def draw_codes(model: Any, inputs: Mapping[str, Any]) -> list[Any | None]:
    """The images that a model writes as tokens, one for each prompt, drawn by plain `generate`; None for a prompt whose
    answer holds no whole image.

    Args:
        model: One whose images are codes.
        inputs: Arguments of `generate`.
    """
    most = model.model.writers["image"].num_places + 1  # the start token
    ids = model.generate(**{**inputs, "do_sample": True, "top_k": 0, "max_new_tokens": most})
    images: list[Any | None] = []
    for row in ids[:, inputs["input_ids"].shape[1] :]:
        try:
            images.append(next(iter(model.decode_image_tokens(row[None])), None))
        except ValueError:  # too few codes
            images.append(None)
    return images


# ------------------------------------------------------------------------- when a row that writes a latent may stop


class VelocityOrText(ExitCriterion):
    """|v_i - v_{i-1}| / |v_i| of rows that write a latent, infinite at their first check; of others what a criterion of
    texts says. v is the head's velocity at t = 0, at the noise from which the latent will be made.

    Args:
        text: The criterion of texts.
        vocab_size: A check's `logits` are those of texts, and behind them v, zeros in rows of text.
        threshold: Threshold of velocities.
    """

    def __init__(self, text: ExitCriterion, vocab_size: int, threshold: float):
        self.text, self.vocab_size, self.threshold = text, vocab_size, threshold
        self.default_threshold = text.default_threshold
        self.writes: torch.Tensor | None = None  # (rows,) of bool, of the last check

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        texts, velocity = self._parts(now)
        texts_before, velocity_before = self._parts(before)
        values = self.text.value(texts, texts_before).float()
        self.writes = velocity.abs().sum(dim=-1) > 0
        change = torch.full_like(values, torch.inf)
        if velocity_before is not None:
            length = velocity.norm(dim=-1).clamp(min=1e-12)
            change = (velocity - velocity_before).norm(dim=-1) / length
        return torch.where(self.writes, change, values)

    def stops(self, value: torch.Tensor, threshold: float) -> torch.Tensor:
        return torch.where(self.writes, value < self.threshold, self.text.stops(value, threshold))

    def _parts(self, check: ExitCheck) -> tuple[ExitCheck, torch.Tensor | None]:
        if check.logits is None:
            return check, None
        return replace(check, logits=check.logits[:, : self.vocab_size]), check.logits[:, self.vocab_size :].float()


class MediaExitController(ExitController):
    """An `ExitController` of rows of which some write latents.

    Args:
        options: Those of texts.
        logits: (rows, hidden) -> (rows, vocab).
        velocities: (rows, hidden), and which rows of the batch they are, (rows,) or None for all -> (rows, size), zeros
            in rows of text.
        vocab_size: Number of the logits.
        velocity_threshold: Below which a row that writes a latent stops.

    Raises:
        ValueError: the criterion is "probe" or a schedule, or the threshold is not above 0.
    """

    def __init__(
        self,
        options: ExitOptions,
        logits: Callable[[torch.Tensor], torch.Tensor],
        velocities: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        vocab_size: int,
        velocity_threshold: float = VELOCITY_THRESHOLD,
    ):
        criterion = EXIT_CRITERIA.get(options.criterion)
        if criterion is not None and criterion.part is not None:
            raise ValueError(f"exit_criterion {options.criterion!r} judges text alone; name another to write media")
        if not velocity_threshold > 0:
            raise ValueError(f"velocity_threshold is {velocity_threshold}; give a number above 0")
        super().__init__(options, logits)
        self.criterion = VelocityOrText(EXIT_CRITERIA[options.criterion], vocab_size, velocity_threshold)
        self.velocities_of = velocities

    def read(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """(rows, vocab + size): logits, and behind them velocities."""
        return torch.cat((super().read(hidden, rows).float(), self.velocities_of(hidden, rows)), dim=-1)
