"""What callers hand to the processor: options, read, idle or unknown; media, for their places in texts and messages."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate, islice, zip_longest
from typing import Any

import numpy as np
import torch

from .media_sources import source_of
from .modality import Modality

CHAT_OPTIONS = (
    "allow_fetch",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_attention_mask",
    "truncation",
)
"""What chat templates read, besides their own arguments."""
CALL_OPTIONS = (*CHAT_OPTIONS, "add_special_tokens", "sampling_rate")
"""What processors read."""

IDLE_IMAGE_OPTIONS = {
    "data_format": ("channels_first",),
    "device": ("cpu",),
    "do_convert_rgb": (True,),
    "do_normalize": (True,),
    "do_pad": (True,),
    "do_rescale": (True,),
    "do_resize": (True,),
    "input_data_format": (),
    "rescale_factor": (1 / 255,),
    "resample": (3,),  # bicubic
    "size": (),
}
"""Options of image processors of transformers, and with which values each of them asks for what is done anyway. So does
None, and the processor's own setting of that name."""
IDLE_AUDIO_OPTIONS = {
    "device": ("cpu",),
    "padding": (True, "longest"),
    "pad_to_multiple_of": (),
    "max_length": (),
    "return_attention_mask": (True,),
    "return_token_timestamps": (False,),
    "truncation": (True,),
}
"""The same of feature extractors."""
IDLE_TEXT_OPTIONS = {
    "is_split_into_words": (False,),
    "return_length": (False,),
    "return_mm_token_type_ids": (False,),
    "return_offsets_mapping": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_text_replacement_offsets": (False,),
    "return_token_type_ids": (False,),
    "split_special_tokens": (False,),
    "stride": (0,),
    "text_pair": (),
    "verbose": (True, False),
}
"""The same of tokenizers."""
IDLE_CALL_OPTIONS = {
    **IDLE_AUDIO_OPTIONS,
    **IDLE_IMAGE_OPTIONS,
    **IDLE_TEXT_OPTIONS,
    "load_audio_from_video": (False,),
    "sanitize_control_tokens": (False,),
}
"""The same of processors."""
IDLE_CHAT_OPTIONS = {
    **IDLE_CALL_OPTIONS,
    "add_special_tokens": (True, False),  # a template writes them itself
    "documents": ([],),
    "enable_thinking": (False,),
    "sanitize_control_tokens": (True, False),  # texts never become special tokens
    "tools": ([],),
}
"""The same of their chat templates."""

_GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "audio_kwargs", "videos_kwargs")
_TRUNCATING = {
    None: False,
    False: False,
    "do_not_truncate": False,
    True: True,
    "longest_first": True,
    "only_first": True,
}


def read_options(
    given: Mapping[str, Any],
    known: Collection[str],
    idle: Mapping[str, tuple],
    parts: Iterable[Any],
    advice: str = "leave it out",
) -> dict[str, Any]:
    """Options of a call that are read, also those that transformers' callers put into groups.

    Args:
        known: Names of options that are read, besides return_tensors.
        idle: Names of further options, and values with which they ask for nothing.
        parts: Image processors and feature extractors; an option that repeats a setting of theirs asks for nothing.
        advice: What to do in place of giving an option that asks for something.

    Raises:
        TypeError: an option is not known; the message names the nearest one.
        ValueError: an option is known, but asks for what is not done.
    """
    options = {}
    for group in _GROUPS:
        options |= given.get(group) or {}
    options |= {name: value for name, value in given.items() if name not in _GROUPS}
    known = {"return_tensors", *known}
    read = {name: options.pop(name) for name in known & options.keys()}
    settings = {name: value for part in parts for name, value in part.to_dict().items()} if options else {}
    for name, value in sorted(options.items()):
        if name not in idle and name not in settings:
            near = difflib.get_close_matches(name, [*known, *idle, *settings], n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(known))}"
            raise TypeError(f"{name!r} is no option of this call; {meant}")
        if not (value is None or _is_among(value, idle.get(name, ())) or _is_among(value, (settings.get(name),))):
            raise ValueError(f"{name} is {value!r:.80}, which this call cannot do; {advice}")
    return read


def _is_among(value: Any, values: tuple) -> bool:
    value = list(value) if isinstance(value, tuple) else value
    return isinstance(value, (bool, int, float, str, list, dict)) and value in values


def limit_of(truncation: Any, max_length: int | None, default: int) -> int | None:
    """Most tokens of a text under an option `truncation` of tokenizers; None: all of them. `default` is the
    tokenizer's, where max_length is not given. ValueError: there is no such way of truncation.
    """
    if truncation not in _TRUNCATING:
        raise ValueError(f"truncation is {truncation!r}; give True or False")
    if not _TRUNCATING[truncation]:
        return None
    return default if max_length is None else max_length


def check_whole(name: str, value: Any, most: int) -> None:
    """Raises ValueError for a setting of a processor that is no whole number from 1 to the most."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {repr(value)[:60]}; give a whole number of 1 to {most}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raises ValueError for a setting of a processor that is no number in a range."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # no comparison with NaN is true
        raise ValueError(f"{name} is {repr(value)[:60]}; give a number of {least} to {most}")


# --------------------------------------------------------------------------------------------------------------- media


def preprocess_parts(
    parts: list[dict[str, Any]],
    media: dict[str, list[Any]],
    modalities: dict[str, Modality],
    allow_fetch: bool = False,
) -> dict[str, list[torch.Tensor]]:
    """The tensors of the parts of messages that are media (`source_of`), by modality; an array of samples may have its
    "sampling_rate" beside it. `media` are the items for parts without one, by modality, in order; a tensor of floats
    counts as preprocessed. ValueError if there are more or fewer media than parts for them, and for media that cannot
    be read.
    """
    waiting = {name: iter(given) for name, given in media.items()}
    found: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        name = part["type"]
        medium = source_of(part, allow_fetch)
        if part.get("sampling_rate") is not None:
            medium = with_rate(medium, part["sampling_rate"])
        is_tensor = False
        if medium is None:
            medium = next(waiting.get(name, iter(())), None)
            is_tensor = isinstance(medium, torch.Tensor) and medium.is_floating_point()
        if medium is None:
            raise ValueError(
                f"the messages have {sum(part['type'] == name for part in parts)} parts of type {name!r}, of which "
                f"number {len(found.get(name, []))} has no medium, and none is left of the "
                f"{len(media.get(name, []))} given beside them"
            )
        found.setdefault(name, []).append(medium if is_tensor else modalities[name].preprocess(medium))
    for name, rest in waiting.items():
        left = len(list(rest))
        if left:
            raise ValueError(
                f"{len(media[name])} media of type {name!r} are given, {left} more than parts that need one"
            )
    return found


def deal_media(media: list[Any], counts: list[int], modality: Modality) -> list[list[Any]]:
    """Media, one after another or a list for each text, to the texts whose placeholders they fill, of which each has as
    many as `counts` say. ValueError, if they differ in number, names the first text that they do not fit.
    """
    flat = flatten_media(media)
    if media and all(isinstance(part, list) for part in media):
        given = [len(part) for part in media]
        wrong = next((i for i, pair in enumerate(zip_longest(given, counts, fillvalue=0)) if pair[0] != pair[1]), None)
    else:
        wrong = next((i for i, end in enumerate(accumulate(counts)) if end > len(flat)), None)
        wrong = len(counts) - 1 if wrong is None and len(flat) > sum(counts) else wrong
    if wrong is not None:
        raise ValueError(
            f"sample {wrong}: the placeholders {modality.token} do not fit the media; the samples have {counts} "
            f"placeholders, {len(flat)} media of type {modality.name!r} are given"
        )
    rest = iter(flat)
    return [list(islice(rest, count)) for count in counts]


def as_list(media: Any) -> list[Any]:
    """One item, some, or a list for each text, as a list; None in the place of a text's list is an empty one."""
    media = media if isinstance(media, list) else [media]
    if any(part is None for part in media):
        return [[] if part is None else part if isinstance(part, list) else [part] for part in media]
    return media


def with_rate(audio: Any, rate: int) -> Any:
    """Arrays, in lists of any depth, with their sampling rate."""
    if isinstance(audio, list):
        return [with_rate(clip, rate) for clip in audio]
    return (audio, rate) if isinstance(audio, (np.ndarray, torch.Tensor)) else audio


def flatten_media(media: Any) -> list[Any]:
    """The media of a list of any depth, or a single one, in order."""
    if not isinstance(media, list):
        return [media]
    return [medium for part in media for medium in flatten_media(part)]
