"""Images: what reads them, and what is to be written of them."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.utils.import_utils import is_vision_available

from .backbones import Backbone
from .configuration_megatransformer import MegaTransformerImageWriterConfig, MegaTransformerVisionConfig
from .encoders import MegaTransformerVisionModel
from .image_processing_megatransformer import MegaTransformerImageProcessor
from .media import MAX_PIXELS, image_size, load_image
from .modality import Modality, check_count, only_of, processor_of_backbone

if is_vision_available():
    from PIL import Image, ImageOps


class ImageModality(Modality):
    """Images for a vision transformer or a pretrained backbone, whose processor is not ours and needs the number of
    tokens of every image; or, without a processor, the square in the middle of each, `side` pixels high and wide, for
    what draws them.
    """

    name = "image"
    config_class = MegaTransformerVisionConfig
    config_key = "vision_config"
    input_names = ("pixel_values", "image_sizes")
    target_names = ("image_targets",)
    shows_layers = True

    def __init__(self, processor: Any = None, num_tokens: int | None = None, side: int | None = None):
        if processor is not None:
            check_count("image_processor", processor, MegaTransformerImageProcessor, num_tokens)
        self.processor, self.count, self.side = processor, num_tokens, side
        self.max_pixels = processor.max_pixels if num_tokens is None else MAX_PIXELS

    @classmethod
    def build_encoder(cls, config: MegaTransformerVisionConfig) -> nn.Module:
        return MegaTransformerVisionModel(config) if config.backbone is None else Backbone(config, cls.input_names[0])

    @classmethod
    def dummy_inputs(cls, config: MegaTransformerVisionConfig) -> dict[str, torch.Tensor]:
        channels, side = config.num_channels, config.token_size
        if config.backbone is not None:
            channels, side = config.backbone_config["num_channels"], config.backbone_config["image_size"]
        return {"pixel_values": torch.zeros(1, channels, side, side)}

    @classmethod
    def build_processor(cls, config: MegaTransformerVisionConfig) -> Any:
        """The image processor of an encoder; ValueError for a backbone without one, or other channels than 3."""
        if config.backbone is not None:
            return processor_of_backbone(AutoImageProcessor, config.backbone)
        if config.num_channels != 3:
            raise ValueError(f"num_channels is {config.num_channels}, but images are read as RGB; give 3")
        side = config.image_size
        return MegaTransformerImageProcessor(
            patch_size=config.patch_size,
            pixel_shuffle=config.pixel_shuffle,
            size=None if side is None else {"height": side, "width": side},
            max_side=config.max_image_size,
        )

    def load(self, source: Any) -> "Image.Image":
        return load_image(source, self.max_pixels)

    def size(self, source: Any) -> tuple[int, int]:
        return image_size(source, self.max_pixels)

    def tokens_of_size(self, size: tuple[int, int]) -> int:
        return self.processor.num_tokens(*size) if self.count is None else self.count

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return self.tokens_of_size(preprocessed.shape[1:])

    def preprocess(self, medium: Any) -> torch.Tensor:
        """Float (3, height, width); squares in -1 .. 1."""
        if self.side is not None:
            pixels = np.asarray(self.reference(medium), dtype=np.float32).transpose(2, 0, 1)
            return torch.from_numpy(pixels / np.float32(127.5) - 1)
        if self.count is None:
            return self.processor.preprocess_one(medium)
        return only_of(self.processor(self.load(medium), return_tensors="pt"), "pixel_values", 4)

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.count is None:
            return self.processor.pad(preprocessed)
        return {self.input_names[0]: torch.stack(preprocessed)}

    @classmethod
    def as_target(cls, image_size: int, num_tokens: int, is_learned: bool) -> "ImageModality":
        """Images as they are to be generated, squares of `image_size`. Their number of tokens is fixed, so that there
        is nothing to learn about the end; with `is_learned` the placeholders are labels, in whose places the model puts
        codes.
        """
        images = cls(num_tokens=num_tokens, side=image_size)
        images.become_target((True, is_learned, False))
        return images

    @staticmethod
    def target_options(config: MegaTransformerImageWriterConfig) -> dict[str, Any]:
        """Arguments of `as_target` for what writes them; ValueError for other channels than images have."""
        if config.num_channels != 3:
            raise ValueError(f"num_channels is {config.num_channels}, but images are written as RGB; give 3")
        is_learned = config.head == "fsq"
        return {"image_size": config.image_size, "num_tokens": config.num_tokens, "is_learned": is_learned}

    @classmethod
    def of_codec(cls, config: PreTrainedConfig) -> "ImageModality":
        """Images as an autoencoder takes them; ValueError for other channels than they have."""
        if config.num_channels != 3:
            raise ValueError(
                f"num_channels is {config.num_channels}, but pictures are read with 3; set num_channels to 3"
            )
        return cls(num_tokens=config.num_tokens, side=config.image_size)

    def reference(self, medium: Any) -> "Image.Image":
        """The square in the middle, with which a generated image is compared."""
        return ImageOps.fit(self.load(medium), (self.side, self.side), Image.Resampling.BICUBIC)
