"""The models that read, and may write, images and audio: MegaTransformerModel, which embeds them for the text model,
and MegaTransformerForConditionalGeneration, which adds the losses of what is written.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import Backbone
from .cache import RecurrentCache
from .configuration_megatransformer import MegaTransformerConfig
from .fusion import ModalityEncoder, embed_media, read_media, take_inputs
from .generation_media import MediaGenerationMixin
from .modalities import MODALITIES, modality_configs, save_modalities
from .modeling_megatransformer_text import (
    MegaTransformerForCausalLM,
    MegaTransformerForSequenceClassification,
    MegaTransformerTextModel,
)
from .output_heads import (
    OutputHead,
    Targets,
    check_codes,
    embed_latents,
    encode_targets,
    images_of_codes,
    output_head_configs,
    put_codes,
    seeds_of_rows,
    take_targets,
)
from .outputs import (
    MegaTransformerCausalLMOutput,
    MegaTransformerModelOutput,
    pop_cache,
    with_parameters,
    with_parameters_of,
)

__all__ = [  # also those under whose names in this file old checkpoints look for text models
    "MegaTransformerForCausalLM",
    "MegaTransformerForConditionalGeneration",
    "MegaTransformerForSequenceClassification",
    "MegaTransformerModel",
    "MegaTransformerTextModel",
]

MEDIA_NAMES = (
    *(name for modality in MODALITIES.values() for name in modality.input_names),
    *("mm_encoder_outputs", "image_targets", "audio_targets", "audio_targets_mask"),
    *("flow_seeds", "num_targets_in_batch"),
)
"""Arguments of `forward` beside those of the text model."""


@dataclass
class MegaTransformerMediaModelOutput(MegaTransformerModelOutput):
    """Output of the text model, and:

    Args:
        image_outputs: What the encoder of images gave, as `get_image_features` returns it; not in training, unless
            hidden states or attentions are asked for. None where there were no images.
        audio_outputs: The same of audio.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    audio_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MegaTransformerMediaCausalLMOutput(MegaTransformerCausalLMOutput):
    """Output of the language model, the base model's `image_outputs` and `audio_outputs`, and:

    Args:
        target_losses: The losses of target latents by modality, float32 (latents,), without weight and gradient, and
            their rows in the batch, (latents,); with labels, where there are any. Their mean times its weight is part
            of `loss`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    audio_outputs: BaseModelOutputWithPooling | None = None
    target_losses: dict[str, tuple[torch.FloatTensor, torch.LongTensor]] | None = None


class Embedded(NamedTuple):
    """Tokens and media, embedded."""

    embeds: torch.Tensor
    """(batch, sequence, hidden)."""
    encoded: dict[str, ModelOutput]
    """What modality encoders gave, by modality."""
    targets: Targets | None = None
    """The latents of what is to be generated, for their losses."""
    input_ids: torch.LongTensor | None = None
    """(batch, sequence), with the codes of images in the positions of those that are written as codes."""


@dataclass
class MediaArguments:
    """The arguments of `forward` that are media, or say how they are read; those that are None are not there."""

    inputs: dict[str, Any]
    """Inputs of modality encoders; also of modalities that the model does not read, which then says so."""
    targets: dict[str, Any]
    """Targets of output heads."""
    mm_encoder_outputs: dict[str, ModelOutput]
    flow_seeds: torch.LongTensor | None
    num_targets_in_batch: dict[str, int | torch.Tensor]

    @property
    def are_there(self) -> bool:
        """Whether something is to be put among the tokens."""
        return bool(self.inputs or self.targets or self.mm_encoder_outputs)


def take_media(kwargs: dict[str, Any]) -> MediaArguments:
    """Takes them out of the keywords of `forward`."""
    outputs, seeds = kwargs.pop("mm_encoder_outputs", None) or {}, kwargs.pop("flow_seeds", None)
    counts = kwargs.pop("num_targets_in_batch", None) or {}
    return MediaArguments(take_inputs(kwargs), take_targets(kwargs), outputs, seeds, counts)


class BackbonesFollow:
    """Goes before a model with modality encoders: pretrained encoders follow where the attention backend is set."""

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Sets it as the original does, and in pretrained encoders as well."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for module in self.modules():
            if isinstance(module, Backbone):
                module.model.set_attn_implementation(module.config._attn_implementation)


class MegaTransformerModel(BackbonesFollow, MegaTransformerTextModel):
    """The text model with modality encoders of images, audio and whatever else the config names: their features stand
    where the placeholders were, and the rest is as if they were tokens. So do the latents of what output heads write. A
    checkpoint of the text model loads into it.
    """

    config: MegaTransformerConfig

    def __init__(self, config: MegaTransformerConfig):
        super().__init__(config)
        self.readers = nn.ModuleDict(
            {name: ModalityEncoder(name, part, config.source_config) for name, part in modality_configs(config).items()}
        )
        self.writers = nn.ModuleDict(
            {name: OutputHead(name, part, config.text_config) for name, part in output_head_configs(config).items()}
        )
        check_codes(self.writers, config)
        self.post_init()

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """What it reads, by name. Pipelines ask for it."""
        return ("text", *self.readers)

    def embed(
        self,
        input_ids: torch.LongTensor | None,
        media: MediaArguments,
        cache: RecurrentCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **asked: bool,
    ) -> Embedded:
        """Embeds tokens (batch, sequence), and what `take_media` gives in the positions of their placeholders. With
        `inputs_embeds` in place of `input_ids`, placeholders are those that have the embedding of one. `asked` are
        output_hidden_states and output_attentions. ValueError if there are more or fewer placeholders than features, or
        media that this model does not know.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward needs exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            input_ids = put_codes(self.writers, media.targets, input_ids, self.config)
        elif media.targets:
            raise ValueError("images and sound that are written need input_ids with their places, and no inputs_embeds")
        is_prefill, encoded = cache is None or cache.get_seq_length() == 0, media.mm_encoder_outputs
        if not encoded:
            encoded = read_media(self.readers, media.inputs, is_prefill and self.must_run_alike, **asked)

        def is_token(token_id: int) -> torch.Tensor:
            if input_ids is not None:
                return input_ids == token_id
            return (inputs_embeds == self.embed_tokens(torch.tensor(token_id, device=inputs_embeds.device))).all(-1)

        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if encoded or (is_prefill and input_ids is not None):
            features = {name: output.pooler_output for name, output in encoded.items()}
            embeds = embed_media(embeds, is_token, features, self.config, is_whole=not media.mm_encoder_outputs)
        if input_ids is None:
            return Embedded(embeds, encoded)
        latents = encode_targets(self.writers, media.targets, input_ids, self.config, filled=media.mm_encoder_outputs)
        seeds = self._flow_seeds(media.flow_seeds, input_ids, bool(latents))
        noise_seeds = seeds if self.training else None
        embeds = embed_latents(embeds, self.writers, latents, noise_seeds, run_all=self.must_run_alike)
        return Embedded(embeds, encoded, Targets(latents, seeds, media.num_targets_in_batch), input_ids)

    @property
    def must_run_alike(self) -> bool:
        """Whether all modality encoders run even if there is nothing to read: ranks that did not would leave others
        waiting, for gradients in training and for weights under ZeRO-3.
        """
        return self.training or is_deepspeed_zero3_enabled()

    def load_backbones(self) -> None:
        """Fetches the weights of pretrained encoders and codecs, which are random in a fresh model."""
        for output_head in self.writers.values():
            output_head.codec.load()
        for reader in self.readers.values():
            if isinstance(reader.encoder, Backbone):
                reader.encoder.load()

    @torch.no_grad()
    def count_tokens(self) -> dict[str, int]:
        """`num_image_tokens`, `num_audio_tokens`: how many each has, where a pretrained encoder gives all the same."""
        return {
            f"num_{name}_tokens": len(reader.read(**reader.dummy_inputs()).pooler_output[0])
            for name, reader in self.readers.items()
            if isinstance(reader.encoder, Backbone)
        }

    @can_return_tuple
    def get_features(
        self,
        name: str,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **inputs: torch.Tensor | None,
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: the features of each item, a tuple of (tokens, hidden), ready to be scattered. Of our
        encoders, and pretrained ones, also `last_hidden_state`, in front of the projector, and by request
        `hidden_states` and `attentions`. ValueError if this model does not read that modality.
        """
        if name not in self.readers:
            raise ValueError(f"this model does not read {name}; it reads {', '.join(self.input_modalities)}")
        asked = self.asked_outputs(output_hidden_states, output_attentions)
        given = {key: value for key, value in inputs.items() if value is not None}
        return self.readers[name].read(**asked, **given)

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **asked: bool):
        """`get_features` of images; see `MegaTransformerVisionModel` for the inputs."""
        return self.get_features("image", pixel_values=pixel_values, image_sizes=image_sizes, **asked)

    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **asked: bool
    ):
        """`get_features` of audio; see `MegaTransformerAudioModel` for the inputs."""
        inputs = {"input_features": input_features, "input_features_mask": input_features_mask}
        return self.get_features("audio", **inputs, **asked)

    @with_parameters("past_key_values", *MEDIA_NAMES)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> MegaTransformerMediaModelOutput:
        """Arguments of the text model, and:

        Args:
            pixel_values: (images, channels, height, width), in the order of their placeholders, row by row, padded with
                zeros at the right and the bottom.
            image_sizes: (images, 2), height and width of each without padding. Default: all are as large as the tensor.
            input_features: (waveforms, mel bins, frames), padded with zeros at the end.
            input_features_mask: (waveforms, frames), 1 for real frames. Default: all are real.
            mm_encoder_outputs: Features read before, by modality, instead of the inputs above; see `get_features`. Also
                those of generated media, by "written_image" and "written_audio", instead of targets.
            image_targets: (images, channels, side, side) in -1 .. 1, generated images in the order of their positions.
            audio_targets: (waveforms, mel bins, frames), the normalised log-mel spectrograms of generated audio.
            audio_targets_mask: (waveforms, frames), 1 for real frames. Default: all are real.
            flow_seeds: (batch,), of the noise on target latents that are read back, and of that and the times of their
                losses. Default: drawn in training, else from the tokens of each row.
            num_targets_in_batch: Target latents of an accumulation window on all ranks, by modality, by which the
                trainer has the sum of their losses divided. Default: those of this batch.
            output_hidden_states: Also those of the encoders, in `image_outputs` and `audio_outputs`.
            output_attentions: The same of attentions.
            kwargs: The inputs above, those of further modalities, and what the text model takes besides.

        Raises:
            ValueError: if there are more or fewer placeholders than features.
        """
        media, cache, encoded = take_media(kwargs), pop_cache(cache, kwargs), {}
        if input_ids is not None or media.are_there:  # else the embeddings are whole
            embedded = self.embed(input_ids, media, cache, inputs_embeds, **self.asked_outputs(**kwargs))
            inputs_embeds, encoded = embedded.embeds, self.shown(embedded.encoded, kwargs)
        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return MegaTransformerMediaModelOutput(**outputs, **encoded)

    def shown(self, encoded: dict[str, ModelOutput], kwargs: dict[str, Any]) -> dict[str, ModelOutput]:
        """`image_outputs` and `audio_outputs`, where there were any; a trainer would only carry them around."""
        if self.training and not any(self.asked_outputs(**kwargs).values()):
            return {}
        found = {name: encoded[name] for name in ("image", "audio") if name in encoded}
        return {f"{name}_outputs": it for name, it in found.items() if any(part.numel() for part in it.pooler_output)}

    def _flow_seeds(self, seeds: torch.Tensor | None, input_ids: torch.LongTensor, are_used: bool) -> torch.Tensor:
        """(batch,), on the CPU: those given, else in evaluation by the tokens of a row, of which alone its loss is."""
        if seeds is not None:
            return seeds.cpu()
        if self.training and len(self.writers):
            return torch.randint(2**62, (len(input_ids),))
        if are_used:
            return seeds_of_rows(input_ids, self.config.get_text_config().pad_token_id)
        return torch.zeros(input_ids.shape[0], dtype=torch.long)


class MegaTransformerForConditionalGeneration(BackbonesFollow, MediaGenerationMixin, MegaTransformerForCausalLM):
    """The model that reads and writes images and audio: a linear head for tokens, a flow for latents."""

    config: MegaTransformerConfig
    _auto_class = "AutoModelForMultimodalLM"
    base_model_class = MegaTransformerModel

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """What it reads, by name. Pipelines ask for it."""
        return self.model.input_modalities

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """Saves as transformers does, and the files of further modalities."""
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            save_modalities(self.config.modality_configs or (), save_directory)

    def get_image_features(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """`get_image_features` of the base model."""
        return self.model.get_image_features(*args, **kwargs)

    def get_audio_features(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """`get_audio_features` of the base model."""
        return self.model.get_audio_features(*args, **kwargs)

    @property
    def output_modalities(self) -> tuple[str, ...]:
        """What it writes, by name. Pipelines ask for it."""
        return ("text", *self.model.writers)

    @property
    def decode_image_tokens(self) -> Callable[[torch.LongTensor], list]:
        """Token ids (rows, tokens) to the images that they hold as codes, in order; only where the head is "fsq".
        Pipelines ask whether there is such a function.
        """
        output_head = dict(self.model.writers.items()).get("image")
        if output_head is None or output_head.head is not None:
            raise AttributeError("decode_image_tokens")
        return functools.partial(images_of_codes, output_head.codec, self.config.image_code_offset)

    @with_parameters_of(MegaTransformerForCausalLM.forward)
    @with_parameters(*MEDIA_NAMES)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MegaTransformerMediaCausalLMOutput:
        """Arguments of `MegaTransformerForCausalLM` and of `MegaTransformerModel`.

        With labels: L = L_text + sum over modalities of weight * mean |v - v*|^2.
        """
        media, cache = take_media(kwargs), pop_cache(cache, kwargs)
        embedded = self.model.embed(input_ids, media, cache, inputs_embeds, **self.model.asked_outputs(**kwargs))
        if embedded.input_ids is not input_ids:
            if kwargs.get("shift_labels") is not None:
                raise ValueError("shift_labels does not know the codes of images that are written; give labels")
            labels = labels if labels is None else torch.where(labels == input_ids, embedded.input_ids, labels)
        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=embedded.embeds,
            labels=labels,
            return_dict=True,
            **kwargs,
        )
        found = {**outputs, **self.model.shown(embedded.encoded, kwargs)}
        if outputs.loss is not None:
            found |= self._with_flow_loss(outputs, embedded.targets)
        return MegaTransformerMediaCausalLMOutput(**found)

    def with_codes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with codes where `input_ids` and `labels` hold positions of images, and without these images, where
        the head is "fsq"; others stay as they are. `forward` does it by itself; who compares logits with labels needs
        it.
        """
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if ids is None or batch.get("image_targets") is None:
            return batch
        targets = {"image_targets": batch["image_targets"]}
        coded = put_codes(self.model.writers, targets, ids, self.config)
        labels = labels if labels is None else torch.where(labels == ids, coded, labels)
        return {**batch, "input_ids": coded, "labels": labels, "image_targets": targets.get("image_targets")}

    def _with_flow_loss(self, outputs: MegaTransformerCausalLMOutput, targets: Targets | None) -> dict[str, Any]:
        """`loss`, with those of latents added, and `target_losses`."""
        loss, hidden, of_modalities = outputs.loss, outputs.last_hidden_state, {}
        for name, output_head in self.model.writers.items():
            if output_head.head is None:
                continue
            if targets is None or name not in targets.latents:
                loss = loss + (output_head.no_loss(hidden) if self.model.must_run_alike else 0.0)
                continue
            of_latents = output_head.losses(hidden, targets.latents[name], targets.seeds)
            of_modalities[name] = of_latents.detach(), targets.latents[name].rows
            count = targets.num_in_batch.get(name, len(of_latents))
            loss = loss + output_head.config.loss_weight * of_latents.sum() / count
        return {"loss": loss, "target_losses": of_modalities or None}
