"""The network. Importing this package registers it with transformers' auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from .cache import RecurrentCache
from .configuration_codecs import MegaTransformerImageAutoencoderConfig, MegaTransformerVocoderConfig
from .configuration_megatransformer import (
    MediaConfig,
    MegaTransformerAudioConfig,
    MegaTransformerAudioWriterConfig,
    MegaTransformerConfig,
    MegaTransformerImageWriterConfig,
    MegaTransformerVisionConfig,
)
from .configuration_megatransformer_multimodal_seq2seq import MegaTransformerMultimodalSeq2SeqConfig
from .configuration_megatransformer_seq2seq import MegaTransformerSeq2SeqConfig
from .configuration_megatransformer_text import MegaTransformerTextConfig, RecurrenceConfig
from .depth import NoiseOptions
from .exit_criteria import ExitOptions
from .feature_extraction_megatransformer import MegaTransformerFeatureExtractor, waveform_of
from .generation_media import MediaChunk, MediaOptions, draw_codes
from .generation_text import length_before
from .image_autoencoder import MegaTransformerImageAutoencoder
from .image_processing_megatransformer import MegaTransformerImageProcessor
from .media import MediaError, load_audio, load_image, write_audio
from .modalities import (
    MEDIA_TOKENS,
    MODALITIES,
    TARGET_MODALITIES,
    Modality,
    codec_media,
    media_tokens,
    modality_names,
    set_token_ids,
)
from .modeling_megatransformer import MegaTransformerForConditionalGeneration, MegaTransformerModel
from .modeling_megatransformer_multimodal_seq2seq import (
    MegaTransformerForMultimodalSeq2SeqLM,
    MegaTransformerMultimodalSeq2SeqModel,
)
from .modeling_megatransformer_seq2seq import MegaTransformerForSeq2SeqLM, MegaTransformerSeq2SeqModel
from .modeling_megatransformer_text import (
    MegaTransformerForCausalLM,
    MegaTransformerForSequenceClassification,
    MegaTransformerTextModel,
)
from .processing_megatransformer import MegaTransformerProcessor, build_processor, tokenizer_of
from .sampling import KeyedSampling
from .vocoder import MegaTransformerVocoder

MODELS = {
    MegaTransformerTextConfig: MegaTransformerForCausalLM,
    MegaTransformerConfig: MegaTransformerForConditionalGeneration,
    MegaTransformerSeq2SeqConfig: MegaTransformerForSeq2SeqLM,
    MegaTransformerMultimodalSeq2SeqConfig: MegaTransformerForMultimodalSeq2SeqLM,
    MegaTransformerImageAutoencoderConfig: MegaTransformerImageAutoencoder,
    MegaTransformerVocoderConfig: MegaTransformerVocoder,
}
"""The class that is trained, by the class of its configuration."""
CODEC_CONFIGS = (MegaTransformerImageAutoencoderConfig, MegaTransformerVocoderConfig)
"""Configurations of codecs, which `trainer: reconstruction` trains."""

for _config in MODELS:
    AutoConfig.register(_config.model_type, _config)
for _config in CODEC_CONFIGS:
    AutoModel.register(_config, MODELS[_config])
for _auto in (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForTextToWaveform):
    _auto.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoModel.register(MegaTransformerTextConfig, MegaTransformerTextModel)
AutoModelForCausalLM.register(MegaTransformerTextConfig, MegaTransformerForCausalLM)
AutoModelForSequenceClassification.register(MegaTransformerTextConfig, MegaTransformerForSequenceClassification)
AutoModel.register(MegaTransformerConfig, MegaTransformerModel)
AutoModel.register(MegaTransformerSeq2SeqConfig, MegaTransformerSeq2SeqModel)
AutoModelForSeq2SeqLM.register(MegaTransformerSeq2SeqConfig, MegaTransformerForSeq2SeqLM)
AutoModel.register(MegaTransformerMultimodalSeq2SeqConfig, MegaTransformerMultimodalSeq2SeqModel)
for _auto in (
    *(AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForMultimodalLM, AutoModelForImageTextToText),
    AutoModelForTextToWaveform,
):
    _auto.register(MegaTransformerMultimodalSeq2SeqConfig, MegaTransformerForMultimodalSeq2SeqLM)
AutoProcessor.register(MegaTransformerConfig, MegaTransformerProcessor)
AutoProcessor.register(MegaTransformerMultimodalSeq2SeqConfig, MegaTransformerProcessor)
AutoFeatureExtractor.register(MegaTransformerConfig, MegaTransformerFeatureExtractor)
# One class, whichever backend is asked for: it resizes with Pillow.
AutoImageProcessor.register(
    MegaTransformerConfig,
    image_processor_classes={"torchvision": MegaTransformerImageProcessor, "pil": MegaTransformerImageProcessor},
)

__all__ = [
    "CODEC_CONFIGS",
    "MEDIA_TOKENS",
    "MODALITIES",
    "MODELS",
    "TARGET_MODALITIES",
    "ExitOptions",
    "KeyedSampling",
    "MediaChunk",
    "MediaConfig",
    "MediaError",
    "MediaOptions",
    "MegaTransformerAudioConfig",
    "MegaTransformerAudioWriterConfig",
    "MegaTransformerConfig",
    "MegaTransformerFeatureExtractor",
    "MegaTransformerForCausalLM",
    "MegaTransformerForConditionalGeneration",
    "MegaTransformerForMultimodalSeq2SeqLM",
    "MegaTransformerForSeq2SeqLM",
    "MegaTransformerForSequenceClassification",
    "MegaTransformerImageAutoencoder",
    "MegaTransformerImageAutoencoderConfig",
    "MegaTransformerImageProcessor",
    "MegaTransformerImageWriterConfig",
    "MegaTransformerModel",
    "MegaTransformerMultimodalSeq2SeqConfig",
    "MegaTransformerMultimodalSeq2SeqModel",
    "MegaTransformerProcessor",
    "MegaTransformerSeq2SeqConfig",
    "MegaTransformerSeq2SeqModel",
    "MegaTransformerTextConfig",
    "MegaTransformerTextModel",
    "MegaTransformerVisionConfig",
    "MegaTransformerVocoder",
    "MegaTransformerVocoderConfig",
    "Modality",
    "NoiseOptions",
    "RecurrenceConfig",
    "RecurrentCache",
    "build_processor",
    "codec_media",
    "draw_codes",
    "length_before",
    "load_audio",
    "load_image",
    "media_tokens",
    "modality_names",
    "set_token_ids",
    "tokenizer_of",
    "waveform_of",
    "write_audio",
]
