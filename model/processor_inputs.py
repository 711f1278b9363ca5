"""Media that callers hand to the processor, for their places in texts and messages."""

from itertools import accumulate, islice, zip_longest
from typing import Any

import numpy as np
import torch

from .image_processing_megatransformer import flatten
from .media_sources import source_of
from .modality import Modality


def preprocess_parts(
    parts: list[dict[str, Any]],
    media: dict[str, list[Any]],
    kinds: dict[str, Modality],
    allow_fetch: bool = False,
) -> dict[str, list[torch.Tensor]]:
    """The tensors of the parts of messages that are media, by kind.

    Args:
        parts: {"type": KIND, and KIND, "path", "bytes", "url" or "base64": medium}, or without a medium. An array of
            samples may have its "sampling_rate" beside it.
        media: By kind, for parts without one, in order; a tensor of floats counts as preprocessed.
        allow_fetch: As for `read_source`.

    Raises:
        ValueError: if there are more or fewer media than parts for them, and for media that cannot be read.
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
        found.setdefault(name, []).append(medium if is_tensor else kinds[name].preprocess(medium))
    for name, rest in waiting.items():
        left = len(list(rest))
        if left:
            raise ValueError(
                f"{len(media[name])} media of type {name!r} are given, {left} more than parts that need one"
            )
    return found


def deal_media(media: list[Any], counts: list[int], modality: Modality) -> list[list[Any]]:
    """Media to the texts whose placeholders they fill.

    Args:
        media: One after another, or a list for each text.
        counts: Placeholders of each text.

    Raises:
        ValueError: if they differ in number; the message names the first text that they do not fit.
    """
    flat = flatten(media)
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
    """One medium, some, or a list for each text, as a list; None in the place of a text's list is an empty one."""
    media = media if isinstance(media, list) else [media]
    if any(part is None for part in media):
        return [[] if part is None else part if isinstance(part, list) else [part] for part in media]
    return media


def with_rate(audio: Any, rate: int) -> Any:
    """Arrays, in lists of any depth, with their sampling rate."""
    if isinstance(audio, list):
        return [with_rate(clip, rate) for clip in audio]
    return (audio, rate) if isinstance(audio, (np.ndarray, torch.Tensor)) else audio
