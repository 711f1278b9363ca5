"""The network. Importing this package registers it with transformers' auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .cache import RecurrentCache
from .configuration_megatransformer import (
    MegaTransformerAudioConfig,
    MegaTransformerConfig,
    MegaTransformerTextConfig,
    MegaTransformerVisionConfig,
    RecurrenceConfig,
)
from .feature_extraction_megatransformer import MegaTransformerFeatureExtractor
from .image_processing_megatransformer import MegaTransformerImageProcessor
from .media import MediaError, load_audio, load_image
from .modalities import MODALITIES, Modality
from .modeling_megatransformer import (
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerModel,
    MegaTransformerTextModel,
)
from .processing_megatransformer import MEDIA_TOKENS, MegaTransformerProcessor, build_processor, media_tokens

AutoConfig.register(MegaTransformerTextConfig.model_type, MegaTransformerTextConfig)
AutoModel.register(MegaTransformerTextConfig, MegaTransformerTextModel)
AutoModelForCausalLM.register(MegaTransformerTextConfig, MegaTransformerForCausalLM)

AutoConfig.register(MegaTransformerConfig.model_type, MegaTransformerConfig)
AutoModel.register(MegaTransformerConfig, MegaTransformerModel)
AutoModelForMultimodalLM.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoModelForImageTextToText.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoProcessor.register(MegaTransformerConfig, MegaTransformerProcessor)
AutoFeatureExtractor.register(MegaTransformerConfig, MegaTransformerFeatureExtractor)
# One class, whichever backend is asked for: it resizes with Pillow.
AutoImageProcessor.register(
    MegaTransformerConfig,
    image_processor_classes={"torchvision": MegaTransformerImageProcessor, "pil": MegaTransformerImageProcessor},
)

__all__ = [
    "MEDIA_TOKENS",
    "MODALITIES",
    "MediaError",
    "MegaTransformerAudioConfig",
    "MegaTransformerConfig",
    "MegaTransformerFeatureExtractor",
    "MegaTransformerForCausalLM",
    "MegaTransformerForConditionalGeneration",
    "MegaTransformerImageProcessor",
    "MegaTransformerModel",
    "MegaTransformerProcessor",
    "MegaTransformerTextConfig",
    "MegaTransformerTextModel",
    "MegaTransformerVisionConfig",
    "Modality",
    "RecurrenceConfig",
    "RecurrentCache",
    "build_processor",
    "load_audio",
    "load_image",
    "media_tokens",
]
