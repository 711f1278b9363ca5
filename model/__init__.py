"""The network. Importing this package registers it with transformers' auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .cache import RecurrentCache
from .configuration_megatransformer import (
    MegaTransformerAudioConfig,
    MegaTransformerConfig,
    MegaTransformerTextConfig,
    MegaTransformerVisionConfig,
    RecurrenceConfig,
)
from .modalities import MODALITIES, Modality
from .modeling_megatransformer import (
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerModel,
    MegaTransformerTextModel,
)

AutoConfig.register(MegaTransformerTextConfig.model_type, MegaTransformerTextConfig)
AutoModel.register(MegaTransformerTextConfig, MegaTransformerTextModel)
AutoModelForCausalLM.register(MegaTransformerTextConfig, MegaTransformerForCausalLM)

AutoConfig.register(MegaTransformerConfig.model_type, MegaTransformerConfig)
AutoModel.register(MegaTransformerConfig, MegaTransformerModel)
AutoModelForMultimodalLM.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)
AutoModelForImageTextToText.register(MegaTransformerConfig, MegaTransformerForConditionalGeneration)

__all__ = [
    "MODALITIES",
    "MegaTransformerAudioConfig",
    "MegaTransformerConfig",
    "MegaTransformerForCausalLM",
    "MegaTransformerForConditionalGeneration",
    "MegaTransformerModel",
    "MegaTransformerTextConfig",
    "MegaTransformerTextModel",
    "MegaTransformerVisionConfig",
    "Modality",
    "RecurrenceConfig",
    "RecurrentCache",
]
