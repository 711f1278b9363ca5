"""The network. Importing this package registers it with transformers' auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from .cache import RecurrentCache
from .codec_media import codec_media
from .configuration_codecs import MegaTransformerImageAutoencoderConfig, MegaTransformerVocoderConfig
from .configuration_megatransformer import (
    MegaTransformerAudioConfig,
    MegaTransformerAudioWriterConfig,
    MegaTransformerConfig,
    MegaTransformerImageWriterConfig,
    MegaTransformerTextConfig,
    MegaTransformerVisionConfig,
    RecurrenceConfig,
)
from .feature_extraction_megatransformer import MegaTransformerFeatureExtractor
from .griffin_lim import waveform_of
from .image_autoencoder import MegaTransformerImageAutoencoder
from .image_processing_megatransformer import MegaTransformerImageProcessor
from .media import MediaError, load_audio, load_image, write_audio
from .modalities import MODALITIES, Modality
from .modeling_megatransformer import (
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerForSequenceClassification,
    MegaTransformerModel,
    MegaTransformerTextModel,
)
from .processing_megatransformer import MEDIA_TOKENS, MegaTransformerProcessor, build_processor, media_tokens
from .vocoder import MegaTransformerVocoder
from .writers import WRITTEN, modality_names, set_token_ids
from .writing import MediaChunk, WritingOptions

MODELS = {
    MegaTransformerTextConfig: MegaTransformerForCausalLM,
    MegaTransformerConfig: MegaTransformerForConditionalGeneration,
    MegaTransformerImageAutoencoderConfig: MegaTransformerImageAutoencoder,
    MegaTransformerVocoderConfig: MegaTransformerVocoder,
}
"""The class that is trained, by the class of its configuration."""
CODEC_CONFIGS = (MegaTransformerImageAutoencoderConfig, MegaTransformerVocoderConfig)

AutoConfig.register(MegaTransformerTextConfig.model_type, MegaTransformerTextConfig)
AutoModel.register(MegaTransformerTextConfig, MegaTransformerTextModel)
AutoModelForCausalLM.register(MegaTransformerTextConfig, MegaTransformerForCausalLM)
AutoModelForSequenceClassification.register(MegaTransformerTextConfig, MegaTransformerForSequenceClassification)

AutoConfig.register(MegaTransformerImageAutoencoderConfig.model_type, MegaTransformerImageAutoencoderConfig)
AutoModel.register(MegaTransformerImageAutoencoderConfig, MegaTransformerImageAutoencoder)
AutoConfig.register(MegaTransformerVocoderConfig.model_type, MegaTransformerVocoderConfig)
AutoModel.register(MegaTransformerVocoderConfig, MegaTransformerVocoder)

AutoConfig.register(MegaTransformerConfig.model_type, MegaTransformerConfig)
AutoModel.register(MegaTransformerConfig, MegaTransformerModel)
AutoModelForCausalLM.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoModelForMultimodalLM.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoModelForImageTextToText.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoModelForTextToWaveform.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoProcessor.register(MegaTransformerConfig, MegaTransformerProcessor)
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
    "WRITTEN",
    "MediaChunk",
    "MediaError",
    "MegaTransformerAudioConfig",
    "MegaTransformerAudioWriterConfig",
    "MegaTransformerConfig",
    "MegaTransformerFeatureExtractor",
    "MegaTransformerForCausalLM",
    "MegaTransformerForConditionalGeneration",
    "MegaTransformerForSequenceClassification",
    "MegaTransformerImageAutoencoder",
    "MegaTransformerImageAutoencoderConfig",
    "MegaTransformerImageProcessor",
    "MegaTransformerImageWriterConfig",
    "MegaTransformerModel",
    "MegaTransformerProcessor",
    "MegaTransformerTextConfig",
    "MegaTransformerTextModel",
    "MegaTransformerVisionConfig",
    "MegaTransformerVocoder",
    "MegaTransformerVocoderConfig",
    "Modality",
    "RecurrenceConfig",
    "RecurrentCache",
    "WritingOptions",
    "build_processor",
    "codec_media",
    "load_audio",
    "load_image",
    "media_tokens",
    "modality_names",
    "set_token_ids",
    "waveform_of",
    "write_audio",
]
