"""Configuration of the sequence-to-sequence model that reads, and may write, images and audio, such as for speech
recognition, speech synthesis and captions.
"""

from typing import Any

from .configuration_megatransformer import MediaConfig
from .configuration_megatransformer_seq2seq import (
    MegaTransformerSeq2SeqConfig,
    MegaTransformerSourceConfig,
    MegaTransformerTargetConfig,
)
from .configuration_megatransformer_text import validated


@validated
class MegaTransformerMultimodalSeq2SeqConfig(MegaTransformerSeq2SeqConfig, MediaConfig):
    """An encoder that reads text, images and audio, and a decoder that writes text, images or audio.

    Its options are those of `MegaTransformerSeq2SeqConfig`, and of what reads and writes media.
    """

    model_type = "megatransformer_multimodal_seq2seq"
    keys_to_ignore_at_inference = [
        *MegaTransformerSeq2SeqConfig.keys_to_ignore_at_inference,
        *MediaConfig.keys_to_ignore_at_inference,
    ]
    sub_configs_defaults = {**MegaTransformerSeq2SeqConfig.sub_configs_defaults, **MediaConfig.sub_configs_defaults}

    def __post_init__(self, **kwargs: Any) -> None:
        module = "modeling_megatransformer_multimodal_seq2seq.MegaTransformer"
        model = f"{module}ForMultimodalSeq2SeqLM"
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_megatransformer_multimodal_seq2seq.MegaTransformerMultimodalSeq2SeqConfig",
            "AutoModel": f"{module}MultimodalSeq2SeqModel",
            "AutoModelForSeq2SeqLM": model,
            "AutoModelForMultimodalLM": model,
            "AutoProcessor": "processing_megatransformer.MegaTransformerProcessor",
            **({"AutoModelForSpeechSeq2Seq": model} if self.audio_config is not None else {}),
            **({"AutoModelForImageTextToText": model} if self.vision_config is not None else {}),
            **({"AutoModelForTextToWaveform": model} if self.audio_writer_config is not None else {}),
            **(kwargs.get("auto_map") or {}),
        }
        super().__post_init__(**kwargs)

    @property
    def text_config(self) -> MegaTransformerTargetConfig:
        """The part that writes."""
        return self.decoder_config

    @property
    def source_config(self) -> MegaTransformerSourceConfig:
        """The part that reads."""
        return self.encoder_config

    def validate_heads(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.image_writer_config is not None and self.image_writer_config.head != "flow":
            raise ValueError(
                f"image_writer_config.head is {self.image_writer_config.head!r}, whose codes only causal models "
                "write; choose 'flow'"
            )
