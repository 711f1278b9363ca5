"""The sequence-to-sequence models: MegaTransformerSeq2SeqModel, an encoder and a decoder of the text model's blocks,
and with a head on top MegaTransformerForSeq2SeqLM.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_megatransformer_seq2seq import MegaTransformerSeq2SeqConfig
from .modeling_megatransformer_text import MegaTransformerForCausalLM, MegaTransformerTextModel
from .outputs import MegaTransformerCausalLMOutput, MegaTransformerModelOutput, with_parameters


@dataclass
class EncoderDecoderOutput(ModelOutput):
    """What outputs have of both parts, beside those of the decoder.

    Args:
        decoder_hidden_states: The same as `hidden_states`, by the name that `generate` looks for.
        decoder_attentions: The same as `attentions`, likewise.
        encoder_last_hidden_state: (batch, source, hidden).
        encoder_hidden_states: The `hidden_states` of the encoder.
        encoder_attentions: The `attentions` of the encoder.
    """

    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MegaTransformerSeq2SeqModelOutput(EncoderDecoderOutput, MegaTransformerModelOutput):
    """Output of the decoder, then of both parts."""


@dataclass
class MegaTransformerSeq2SeqLMOutput(EncoderDecoderOutput, MegaTransformerCausalLMOutput):
    """Output of the decoder with its head, then of both parts."""


def with_encoder(kind: type[ModelOutput], decoded: ModelOutput, encoded: ModelOutput) -> ModelOutput:
    """One output of those of both parts."""
    again = {f"decoder_{name}": decoded.get(name) for name in ("hidden_states", "attentions")}
    names = ("last_hidden_state", "hidden_states", "attentions")
    return kind(**decoded, **again, **{f"encoder_{name}": encoded.get(name) for name in names})


class MegaTransformerSeq2SeqModel(MegaTransformerTextModel):
    """Source and target ids to hidden states. It is the decoder, and has an encoder, so that what knows a recurrent
    model by its core finds that of the decoder.
    """

    config: MegaTransformerSeq2SeqConfig
    _auto_class = "AutoModel"
    output_class = MegaTransformerSeq2SeqModelOutput
    _tied_weights_keys = {"encoder.embed_tokens.weight": "embed_tokens.weight"}

    def post_init(self) -> None:
        """Makes the encoder, once, before all weights are initialised and tied."""
        if "encoder" not in dict(self.named_children()):
            self.encoder = MegaTransformerTextModel(self.config.encoder_config)
        super().post_init()

    def get_encoder(self, modality: str | None = None) -> MegaTransformerTextModel:
        """The encoder."""
        return self.encoder

    def take_source(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Takes further inputs of the encoder out of the keywords of `forward`; of texts there are none."""
        return {}

    def encode(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The output of the encoder, or the one that it has given before."""
        if encoder_outputs is None:
            return self.encoder(input_ids, attention_mask, use_cache=False, return_dict=True, **kwargs)
        if isinstance(encoder_outputs, tuple | list):
            return BaseModelOutput(*encoder_outputs)
        return encoder_outputs

    @with_parameters("past_key_values")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        encoder_num_steps: int | tuple[int, int] | torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MegaTransformerSeq2SeqModelOutput:
        """
        Args:
            input_ids: (batch, source).
            attention_mask: (batch, source) with 1 for real tokens of the source and 0 for padding.
            decoder_input_ids: (batch, target), behind those of a cache.
            decoder_attention_mask: (batch, past + target), likewise of the target.
            decoder_position_ids: (batch, target). Default: counted over the real tokens.
            encoder_outputs: What the encoder has given before, in place of `input_ids`.
            inputs_embeds: (batch, source, hidden) instead of `input_ids`.
            decoder_inputs_embeds: (batch, target, hidden) instead of `decoder_input_ids`.
            encoder_num_steps: Core steps of the encoder, as `num_steps` are those of the decoder.
            kwargs: Further arguments of the text model, for the decoder. With `source`, which the model with the head
                gives, it is the decoder alone, and all arguments are those of the text model.
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if "source" in kwargs:
            return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **asked, **kwargs)
        of_encoder = {"inputs_embeds": inputs_embeds, "num_steps": encoder_num_steps, **asked}
        of_encoder |= self.take_source(kwargs)
        encoded = self.encode(input_ids, attention_mask, encoder_outputs, **of_encoder)
        decoded = super().forward(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            source=(encoded.last_hidden_state, attention_mask),
            return_dict=True,
            **asked,
            **kwargs,
        )
        return with_encoder(self.output_class, decoded, encoded)


class MegaTransformerForSeq2SeqLM(MegaTransformerForCausalLM):
    """The sequence-to-sequence model with a linear head."""

    config: MegaTransformerSeq2SeqConfig
    _auto_class = "AutoModelForSeq2SeqLM"
    base_model_class = MegaTransformerSeq2SeqModel
    output_class = MegaTransformerSeq2SeqLMOutput
    _tied_weights_keys = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.encoder.embed_tokens.weight": "model.embed_tokens.weight",
    }

    def post_init(self) -> None:
        """Also says which of transformers' losses it is, which goes by names of classes: labels come shifted."""
        super().post_init()
        self.loss_type = "ForCausalLM"

    def get_encoder(self, modality: str | None = None) -> MegaTransformerTextModel:
        """The encoder."""
        return self.model.encoder

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Activates it as the original does, but not the reentrant kind, in which all layers and steps would go back
        through the keys and values of the source that they share; ValueError for that.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant is true, but layers share what they see of the source; leave it out")
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """(batch, target) of labels -> what the decoder reads to predict them: the start, and all but the last."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError("decoder_start_token_id and bos_token_id are null; give the token that begins a target")
        shifted = torch.cat((labels.new_full((len(labels), 1), start), labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    @with_parameters("past_key_values", "depth_options")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        encoder_num_steps: int | tuple[int, int] | torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MegaTransformerSeq2SeqLMOutput:
        """Arguments of the base model, those of the model of text with a head for the decoder, and:

        Args:
            labels: (batch, target), -100 where there is no loss; unlike those of a causal model they are not shifted:
                the decoder's position i predicts label i. They are what the decoder reads, where nothing else is given.
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        of_encoder = {"inputs_embeds": inputs_embeds, "num_steps": encoder_num_steps, **asked}
        of_encoder |= self.model.take_source(kwargs)
        encoded = self.model.encode(input_ids, attention_mask, encoder_outputs, **of_encoder)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoded = super().forward(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            shift_labels=None if labels is None else labels.contiguous(),  # as transformers' loss needs them
            source=(encoded.last_hidden_state, attention_mask),
            return_dict=True,
            **asked,
            **kwargs,
        )
        return with_encoder(self.output_class, decoded, encoded)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        encoder_num_steps: int | torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """That of the text model, for the target; the source, `inputs`, is encoded once, with `encoder_num_steps`. What
        is said of the steps, of exits and of the cache is that of the decoder, whose prompt, `decoder_input_ids`, is by
        default the start token.
        """
        source = kwargs.pop("input_ids", None) if inputs is None else inputs
        if kwargs.get("encoder_outputs") is None:
            given = {"inputs_embeds": kwargs.pop("inputs_embeds", None), "num_steps": encoder_num_steps}
            given |= self.model.take_source(kwargs)
            kwargs["encoder_outputs"] = self.model.encode(source, kwargs.get("attention_mask"), **given)
        return super().generate(None, generation_config, *args, **kwargs)
