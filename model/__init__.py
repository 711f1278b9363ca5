"""The network. Importing this package registers it with transformers' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import RecurrentCache
from .configuration_megatransformer import MegaTransformerTextConfig, RecurrenceConfig
from .modeling_megatransformer import MegaTransformerForCausalLM, MegaTransformerTextModel

AutoConfig.register(MegaTransformerTextConfig.model_type, MegaTransformerTextConfig)
AutoModel.register(MegaTransformerTextConfig, MegaTransformerTextModel)
AutoModelForCausalLM.register(MegaTransformerTextConfig, MegaTransformerForCausalLM)

__all__ = [
    "MegaTransformerForCausalLM",
    "MegaTransformerTextConfig",
    "MegaTransformerTextModel",
    "RecurrenceConfig",
    "RecurrentCache",
]
