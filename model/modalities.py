"""What the model reads beside text, one entry for each modality. Another one is one file that adds its entry here, and
an entry in `modality_configs` of the config.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from .audio import MegaTransformerAudioModel
from .backbones import Backbone
from .configuration_megatransformer import (
    EncoderConfig,
    MegaTransformerAudioConfig,
    MegaTransformerConfig,
    MegaTransformerVisionConfig,
)
from .vision import MegaTransformerVisionModel


class Modality(ABC):
    """How something becomes features in the places of its placeholders."""

    name: str
    """In configs, processors and logs."""
    config_class: type
    """Of the encoder's configuration."""
    input_names: tuple[str, ...]
    """Arguments of the encoder's `forward`, the medium itself first."""
    shows_layers: bool = False
    """Whether `forward` also takes lists, `hidden_states` and `attentions`, to which it appends those of its layers."""

    @property
    def token(self) -> str:
        """The placeholder, which stands once for each feature."""
        return f"<|{self.name}|>"

    @property
    def start_token(self) -> str:
        """Stands in front of the placeholders of a medium."""
        return f"<|{self.name}_start|>"

    @property
    def end_token(self) -> str:
        """Stands behind the placeholders of a medium."""
        return f"<|{self.name}_end|>"

    @abstractmethod
    def build_encoder(self, config: Any) -> nn.Module:
        """A module with `config` and `output_size`, whose `forward` takes `input_names` and returns features (media,
        tokens, output_size), and which of them are real, (media, tokens) of bool, or None if all are.
        """

    @abstractmethod
    def dummy_inputs(self, config: Any) -> dict[str, torch.Tensor]:
        """The smallest input of the encoder, one medium."""

    # For the processor, where transformers has no class for the modality:

    def preprocess(self, medium: Any, config: Any) -> torch.Tensor:
        """One medium to a tensor of any shape. ValueError, with the reason, for what is none."""
        raise NotImplementedError(f"modality {self.name!r} cannot be preprocessed; give tensors")

    def num_tokens(self, preprocessed: torch.Tensor, config: Any) -> int:
        """Features that the encoder will give for a preprocessed medium."""
        raise NotImplementedError(f"modality {self.name!r} cannot be preprocessed; give tensors")

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Preprocessed media to the inputs of the encoder."""
        raise NotImplementedError(f"modality {self.name!r} cannot be preprocessed; give tensors")


class ImageModality(Modality):
    """Pictures: a vision transformer, or a pretrained backbone."""

    name = "image"
    config_class = MegaTransformerVisionConfig
    input_names = ("pixel_values", "image_sizes")
    shows_layers = True

    def build_encoder(self, config: MegaTransformerVisionConfig) -> nn.Module:
        return MegaTransformerVisionModel(config) if config.backbone is None else Backbone(config, self.input_names[0])

    def dummy_inputs(self, config: MegaTransformerVisionConfig) -> dict[str, torch.Tensor]:
        channels, side = config.num_channels, config.token_size
        if config.backbone is not None:
            channels, side = config.backbone_config["num_channels"], config.backbone_config["image_size"]
        return {"pixel_values": torch.zeros(1, channels, side, side)}


class AudioModality(Modality):
    """Sound: convolutions and a transformer on a log-mel spectrogram, or a pretrained backbone."""

    name = "audio"
    config_class = MegaTransformerAudioConfig
    input_names = ("input_features", "input_features_mask")
    shows_layers = True

    def build_encoder(self, config: MegaTransformerAudioConfig) -> nn.Module:
        return MegaTransformerAudioModel(config) if config.backbone is None else Backbone(config, self.input_names[0])

    def dummy_inputs(self, config: MegaTransformerAudioConfig) -> dict[str, torch.Tensor]:
        bins, frames = config.num_mel_bins, config.subsampling
        if config.backbone is not None:
            bins, frames = config.backbone_config["num_mel_bins"], 2 * config.backbone_config["max_source_positions"]
        return {"input_features": torch.zeros(1, bins, frames)}


MODALITIES: dict[str, Modality] = {modality.name: modality for modality in (ImageModality(), AudioModality())}


def modality_configs(config: MegaTransformerConfig) -> dict[str, EncoderConfig]:
    """The configurations of all encoders of a model, by modality.

    Raises:
        ValueError: For a modality that is not registered.
    """
    configs = {"image": config.vision_config, "audio": config.audio_config}
    for name, part in (config.modality_configs or {}).items():
        if name not in MODALITIES:
            raise ValueError(
                f"modality_configs has {name!r}, which is not registered; import the file that adds it to MODALITIES "
                f"(known: {', '.join(MODALITIES)})"
            )
        configs[name] = MODALITIES[name].config_class(**part) if isinstance(part, dict) else part
    return {name: part for name, part in configs.items() if part is not None}
