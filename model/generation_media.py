"""What `generate` needs to know about images and sound: features that are read once, and media that are written."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .fusion import check_counts, read_media, take_inputs
from .generation_text import RecurrentGenerationMixin
from .outputs import with_parameters_of
from .writing import MediaChunk, WritingOptions, write_media


class MediaGenerationMixin:
    """Goes before `RecurrentGenerationMixin`: media are read once, before the prompt, and their features go with its
    parts: with its chunks, with the copies of its rows, and without what a cache holds already.
    """

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
        kwargs = self._read_media(inputs, kwargs)
        if generation_mode == "text":
            unused = [name for name, value in options.items() if value is not None]
            if unused:
                raise ValueError(f"{unused[0]} has no effect in generation_mode 'text'; leave it out")
            steps = writing.steps_of("text") if depths else num_steps
            return super().generate(inputs, *args, guidance_scale=guidance_scale, num_steps=steps, **kwargs)
        writing.num_steps = num_steps
        most = max(depths.values(), default=None) if depths else num_steps
        kwargs = {"return_dict_in_generate": True, **kwargs}
        if not {"max_new_tokens", "max_length", "generation_config"} & kwargs.keys():
            kwargs["max_new_tokens"] = self._room_for(generation_mode)
        loop = functools.partial(write_media, writing=writing)
        return super().generate(inputs, *args, num_steps=most, custom_generate=loop, **kwargs)

    def _room_for(self, generation_mode: str) -> int:
        """New tokens where nobody says how many: those of one medium, or of one of each kind and as many of text."""
        places = {name: writer.num_places + 2 for name, writer in self.model.writers.items()}
        return 2 * sum(places.values()) if generation_mode == "any" else places.get(generation_mode, 1)

    def _read_media(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords with features of all media in `mm_encoder_outputs`, by modality, in place of the inputs of the
        readers.
        """
        kwargs = dict(kwargs)
        media = take_inputs(kwargs)
        if media and kwargs.get("inputs_embeds") is not None:
            raise ValueError("images and sound need input_ids with their placeholders, and no inputs_embeds")
        encoded = read_media(self.model.readers, media, run_all=self.model.must_run_alike)
        outputs = dict(kwargs.pop("mm_encoder_outputs", None) or {})
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        for name, output in encoded.items():
            if name in outputs:
                raise ValueError(f"{name}: give its features (mm_encoder_outputs) or what to read, not both")
            check_counts(name, self._count_places(name, input_ids), [len(part) for part in output.pooler_output])
            outputs[name] = output
        return kwargs | ({"mm_encoder_outputs": outputs} if outputs else {})

    @property
    def placeholder_ids(self) -> list[int]:
        """Tokens in whose places media stand."""
        names = [f"{name}_token_id" for name in self.model.readers]
        names += [f"written_{name}_token_id" for name in self.model.writers]
        return [getattr(self.config, name) for name in names if getattr(self.config, name) is not None]

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

    @with_parameters_of(RecurrentGenerationMixin.prepare_inputs_for_generation)
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
