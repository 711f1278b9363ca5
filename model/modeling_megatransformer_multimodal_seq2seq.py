"""The sequence-to-sequence models that read, and may write, images and audio, of the parts of those for text and of the
causal ones with media.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .configuration_megatransformer_multimodal_seq2seq import MegaTransformerMultimodalSeq2SeqConfig
from .fusion import embed_media, read_media, take_inputs
from .generation_media import MEDIA, READ_BY, Sources, unconditional_ids
from .generation_text import TEXTS
from .modeling_megatransformer import (
    MEDIA_NAMES,
    MegaTransformerForConditionalGeneration,
    MegaTransformerMediaCausalLMOutput,
    MegaTransformerMediaModelOutput,
    MegaTransformerModel,
)
from .modeling_megatransformer_seq2seq import (
    EncoderDecoderOutput,
    MegaTransformerForSeq2SeqLM,
    MegaTransformerSeq2SeqModel,
)
from .outputs import with_parameters, with_parameters_of

OF_SOURCE = ("encoder_outputs", "decoder_input_ids", "decoder_attention_mask")
"""Arguments of `generate` that only encoder-decoders have."""


@dataclass
class MegaTransformerMultimodalSeq2SeqModelOutput(EncoderDecoderOutput, MegaTransformerMediaModelOutput):
    """Output of the decoder, then of both parts."""


@dataclass
class MegaTransformerMultimodalSeq2SeqLMOutput(EncoderDecoderOutput, MegaTransformerMediaCausalLMOutput):
    """Output of the decoder with its heads, then of both parts."""


@dataclass
class GuidedSource(BaseModelOutput):
    """Output of the encoder, and:

    Args:
        unconditional: (batch, source, hidden), the last states of the source without its text, for guidance.
    """

    unconditional: torch.FloatTensor | None = None


class MegaTransformerMultimodalSeq2SeqModel(MegaTransformerSeq2SeqModel, MegaTransformerModel):
    """Source, with images and audio, and target to hidden states. The features of what is read stand among the tokens
    of the source, latents of what is written among those of the target.
    """

    config: MegaTransformerMultimodalSeq2SeqConfig
    output_class = MegaTransformerMultimodalSeq2SeqModelOutput

    def take_source(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Takes what modality encoders read out of the keywords of `forward`."""
        return take_inputs(kwargs)

    def encode(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The output of the encoder, or the one that it has given before; of media, those that `take_source` gives."""
        media = take_inputs(kwargs)
        if encoder_outputs is None and kwargs.get("inputs_embeds") is None:
            features = self.read_source(media)
            kwargs["inputs_embeds"], input_ids = self.embed_source(input_ids, features), None
        return super().encode(input_ids, attention_mask, encoder_outputs, **kwargs)

    def read_source(self, media: dict[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
        """The features of each item, (tokens, hidden), by modality."""
        found = read_media(self.readers, media, run_all=self.must_run_alike)
        return {name: output.pooler_output for name, output in found.items()}

    def embed_source(
        self, input_ids: torch.LongTensor, features: Mapping[str, tuple[torch.Tensor, ...]]
    ) -> torch.Tensor:
        """Tokens, (batch, source), and features in the places of their placeholders -> (batch, source, hidden)."""
        embeds = self.encoder.embed_tokens(input_ids)
        return embed_media(embeds, lambda token_id: input_ids == token_id, dict(features), self.config)

    @with_parameters_of(MegaTransformerSeq2SeqModel.forward)
    @with_parameters(*MEDIA_NAMES)
    def forward(self, *args: Any, **kwargs: Any) -> MegaTransformerMultimodalSeq2SeqModelOutput:
        """Arguments of `MegaTransformerSeq2SeqModel`, the inputs of modality encoders, whose placeholders stand in the
        source, and the targets of output heads, whose placeholders stand in the target; see `MegaTransformerModel`.
        """
        return super().forward(*args, **kwargs)


class MegaTransformerForMultimodalSeq2SeqLM(MegaTransformerForSeq2SeqLM, MegaTransformerForConditionalGeneration):
    """The sequence-to-sequence model with a linear head for tokens, and a flow for latents: speech recognition reads
    audio, speech synthesis writes it.
    """

    config: MegaTransformerMultimodalSeq2SeqConfig
    base_model_class = MegaTransformerMultimodalSeq2SeqModel
    output_class = MegaTransformerMultimodalSeq2SeqLMOutput
    read_by = MappingProxyType(READ_BY | dict.fromkeys(OF_SOURCE, (*TEXTS, *MEDIA)))

    @with_parameters_of(MegaTransformerForSeq2SeqLM.forward)
    @with_parameters(*MEDIA_NAMES)
    def forward(self, *args: Any, **kwargs: Any) -> MegaTransformerMultimodalSeq2SeqLMOutput:
        """Arguments of `MegaTransformerForSeq2SeqLM`, and of media as in `MegaTransformerMultimodalSeq2SeqModel`. The
        loss has those of latents added. Labels do not say where latents stand: with targets, give `decoder_input_ids`.
        """
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        generation_mode: str = "text",
        encoder_num_steps: int | torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """Generates as the causal model with media does, for the target; the source, `inputs` with its media, is
        encoded once, with `encoder_num_steps`, and, where media are written, a second time without its text.

        Raises:
            ValueError: media are to be written from embeddings of a source.
        """
        if generation_mode != "text" and kwargs.get("encoder_outputs") is None:
            source = kwargs.pop("input_ids", None) if inputs is None else inputs
            if source is None:
                raise ValueError("media are written from the tokens of a source; give input_ids, and no inputs_embeds")
            media, mask = take_inputs(kwargs), kwargs.get("attention_mask")
            kwargs["encoder_outputs"] = self._encode_guided(source, mask, media, encoder_num_steps)
        return super().generate(
            inputs,
            generation_config,
            *args,
            generation_mode=generation_mode,
            encoder_num_steps=encoder_num_steps,
            **kwargs,
        )

    def take_sources(self, kwargs: dict[str, Any]) -> Sources:
        """Takes what the decoder sees of the source out of the keywords of a loop, where the mask of the decoder's own
        tokens stays.
        """
        encoded, mask = kwargs.pop("encoder_outputs"), kwargs.pop("attention_mask", None)
        kwargs["attention_mask"] = kwargs.pop("decoder_attention_mask", None)
        return Sources(encoded.last_hidden_state, encoded.get("unconditional"), mask)

    def _encode_guided(
        self, source: torch.LongTensor, mask: torch.Tensor | None, media: dict[str, Any], num_steps: Any
    ) -> GuidedSource:
        """What the encoder makes of a source, and, where the model was trained with dropped prompts, of it without."""
        features = self.model.read_source(media)

        def encode(ids: torch.LongTensor, features: Mapping[str, tuple[torch.Tensor, ...]]) -> torch.Tensor:
            embeds = self.model.embed_source(ids, features)
            return self.model.encode(None, mask, inputs_embeds=embeds, num_steps=num_steps).last_hidden_state

        states = encode(source, features)
        if self.config.null_token_id is None:
            return GuidedSource(states)
        ids = unconditional_ids(self.config, source, mask, self.model.readers)
        for name, items in features.items():
            rows, kept = self._count_places(name, source), self._count_places(name, ids)
            features = features | {name: tuple(items_of_rows(items, rows, map(bool, kept)))}
        return GuidedSource(states, unconditional=encode(ids, features))


def items_of_rows(
    items: Iterable[torch.Tensor], places: Iterable[int], are_kept: Iterable[bool]
) -> Iterator[torch.Tensor]:
    """Those of the features, (tokens, hidden) each, that stand in rows that are kept; rows have so many places each."""
    items = iter(items)
    for count, is_kept in zip(places, are_kept, strict=True):
        while count > 0:
            item = next(items)
            count -= len(item)
            if is_kept:
                yield item
