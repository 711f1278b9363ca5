"""Images and sound that a model generates for a client, and what can be shown of an image before it is complete."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import soundfile
import torch
from torch import nn
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from model import MediaChunk, length_before

from ..decoding import FiniteLogits
from .messages import AnswerJob


class CancelledJobError(Exception):
    """A job whose client is gone."""


class Watcher(BaseStreamer):
    """Sees each token that `generate` writes, and ends a job that has been cancelled.

    Args:
        is_cancelled: Whether it has.
        see: Gets all new tokens so far, after each.
    """

    def __init__(self, is_cancelled: Callable[[], bool], see: Callable[[list[int]], None]):
        self.is_cancelled, self.see = is_cancelled, see
        self.tokens: list[int] = []
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, and then tokens, (rows,) or (rows, tokens). CancelledJobError: the client is gone."""
        if self.is_cancelled():
            raise CancelledJobError
        if self.has_prompt:
            self.tokens += value.flatten().tolist()
            self.see(self.tokens)
        self.has_prompt = True

    def end(self) -> None:
        """There is nothing to do at the end."""


@dataclass(frozen=True)
class MediaWriter:
    """An image or a sound that is generated for a client.

    Args:
        model: A model that writes such media.
        job: What is asked for.
        inputs: The prompt.
        options: Options of `generate`.
        show: Gets a PNG of an image whose end is missing, `job.num_parts` times.
        is_cancelled: Whether the client is gone.
    """

    model: nn.Module
    job: AnswerJob
    inputs: dict[str, Any]
    options: dict[str, Any]
    show: Callable[[bytes], None]
    is_cancelled: Callable[[], bool]

    def write(self) -> tuple[bytes, list[int]]:
        """A PNG or a WAV, and the core steps of each position; none of a model without a core.

        Raises:
            CancelledJobError: the client is gone.
            ValueError: what the model wrote is no image, or an option does not fit.
        """
        job, options = self.job, self.options
        if job.kind == "image" and has_codes(self.model):
            return self._write_codes()
        if job.kind == "image" and job.num_parts:
            places = self.model.model.writers["image"].num_places
            size = -(-places // (job.num_parts + 1))
            left = iter(range((places - 1) // size))  # a chunk with all latents comes too, before the end

            def see(chunk: MediaChunk) -> None:
                if not chunk.is_complete and next(left, None) is not None:
                    self.show(png_of(chunk.item))

            options = {**options, "on_chunk": see, "chunk_size": size}
        output = self.model.generate(
            **self.inputs,
            **options,
            generation_mode=job.kind,
            flow_seeds=[job.seed or 0],
            do_sample=False,
            streamer=Watcher(self.is_cancelled, lambda tokens: None),
        )
        steps = steps_of(output)
        if job.kind == "image":
            return png_of(output.images[0]), steps
        samples, buffer = torch.as_tensor(output.audio[0]).float().clamp(-1, 1).cpu().numpy(), io.BytesIO()
        soundfile.write(buffer, samples, output.sampling_rate, format="WAV")
        return buffer.getvalue(), steps

    def _write_codes(self) -> tuple[bytes, list[int]]:
        """An image whose parts are tokens."""
        places, num_parts = self.model.model.writers["image"].num_places, self.job.num_parts
        size = -(-places // (num_parts + 1))

        def see(tokens: list[int]) -> None:
            codes = tokens[1:]  # behind the start token
            if num_parts and codes and len(codes) % size == 0 and len(codes) < places:
                row = torch.tensor([codes + [self.model.config.image_code_offset] * (places - len(codes))])
                for image in whole_images(self.model, row):
                    self.show(png_of(image))

        output = self.model.generate(
            **self.inputs,
            **self.options,
            do_sample=True,
            top_k=0,
            sampling_seed=self.job.seed or 0,
            max_new_tokens=places + 1,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            streamer=Watcher(self.is_cancelled, see),
            return_dict_in_generate=True,
        )
        new = output.sequences[:, length_before(self.model, self.inputs["input_ids"]) :].cpu()
        images = whole_images(self.model, new)
        if not images:
            raise ValueError("what the model wrote is no image; it has to learn more, or try another seed")
        return png_of(images[0]), steps_of(output)


def has_codes(model: nn.Module) -> bool:
    """Whether the images that a model writes are tokens."""
    return getattr(model, "decode_image_tokens", None) is not None


def steps_of(output: ModelOutput) -> list[int]:
    """The core steps of each new position of one row; none of a model without a core."""
    steps = getattr(output, "exit_steps", None)
    return [] if steps is None else steps[0].tolist()


def whole_images(model: nn.Module, rows: torch.LongTensor) -> list[Any]:
    """The images of rows of tokens; none where they hold no whole one."""
    try:
        return model.decode_image_tokens(rows)
    except ValueError:
        return []


def png_of(image: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
