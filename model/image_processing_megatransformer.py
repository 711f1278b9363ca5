"""Images to the tensors that the vision encoder reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.import_utils import is_vision_available

from .media import MAX_PIXELS, load_image
from .media_sources import read_source
from .processor_inputs import IDLE_IMAGE_OPTIONS, check_number, check_whole, flatten_media, read_options

if is_vision_available():
    from PIL import Image

LARGEST_SIDE = 16384
"""Pixels of the longest side that an image can have after it is resized."""
LARGEST_SHIFT = 1e6
"""Most that is subtracted from a channel, and by which it is multiplied."""


class MegaTransformerImageProcessor(BaseImageProcessor):
    """Resizes images to multiples of a token's side, scales and normalises them, pads a batch to its largest.

    Args:
        patch_size: Side of a patch in pixels.
        pixel_shuffle: Patches along the side of a token; a token covers patch_size * pixel_shuffle pixels each way.
        size: {"height", "width"} of every image, both multiples of a token's side. Default: each keeps its aspect,
            as nearly as whole tokens allow, and its size where that is at most max_side.
        max_side: Longest side in pixels where `size` is not set.
        max_pixels: Larger images are refused before they are decoded.
        image_mean: Subtracted from each channel, whose values are 0 .. 1.
        image_std: Divides each channel after that.

    Raises:
        ValueError: sizes hold no whole tokens; for images, see `load_image`.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        patch_size: int = 16,
        pixel_shuffle: int = 1,
        size: dict[str, int] | None = None,
        max_side: int = 512,
        max_pixels: int = MAX_PIXELS,
        image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.auto_map = {"AutoImageProcessor": "image_processing_megatransformer.MegaTransformerImageProcessor"}
        self.patch_size, self.pixel_shuffle = patch_size, pixel_shuffle
        self.size, self.max_side, self.max_pixels = size, max_side, max_pixels
        self.image_mean, self.image_std = image_mean, image_std
        self._check_values()
        self._check_sizes()
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def _check_values(self) -> None:
        for name in ("patch_size", "pixel_shuffle", "max_side"):
            check_whole(name, getattr(self, name), LARGEST_SIDE)
        check_whole("max_pixels", self.max_pixels, LARGEST_SIDE**2)
        for name, least in (("image_mean", -LARGEST_SHIFT), ("image_std", 1 / LARGEST_SHIFT)):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(f"{name} is {repr(values)[:60]}; give three numbers, one for each channel")
            for value in values:
                check_number(name, value, least, LARGEST_SHIFT)

    def _check_sizes(self) -> None:
        side, size = self.token_side, self.size
        if self.max_side < side:
            raise ValueError(f"max_side is {self.max_side}, but a token covers {side} pixels; give at least those")
        if size is not None and (not isinstance(size, Mapping) or set(size) != {"height", "width"}):
            raise ValueError(f"size is {repr(size)[:60]}, but needs height and width; give both")
        for name, length in (size or {}).items():
            check_whole(name, length, LARGEST_SIDE)
        if size is not None and any(length < side or length % side for length in size.values()):
            raise ValueError(f"size is {size}, but a token covers {side} pixels; give multiples of those")

    @property
    def token_side(self) -> int:
        """Pixels along the side of what becomes one token."""
        return self.patch_size * self.pixel_shuffle

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of this size is resized."""
        if self.size is not None:
            return self.size["height"], self.size["width"]
        scale = min(1.0, self.max_side / max(height, width))
        return self._whole_tokens(height * scale), self._whole_tokens(width * scale)

    def _whole_tokens(self, length: float) -> int:
        tokens = min(round(length / self.token_side), self.max_side // self.token_side)
        return max(1, tokens) * self.token_side

    def num_tokens(self, height: int, width: int) -> int:
        """Placeholders of an image that has this size before it is resized."""
        height, width = self.target_size(height, width)
        return (height // self.token_side) * (width // self.token_side)

    def preprocess_one(self, image: Any) -> torch.Tensor:
        """Anything `load_image` takes to float (3, height, width) of the target size."""
        image = load_image(image, self.max_pixels)
        height, width = self.target_size(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)) / np.float32(255)
        pixels -= mean
        pixels /= std
        return torch.from_numpy(pixels)

    def pad(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch, with zeros at the right and at the bottom: `pixel_values`, float (images, 3, height, width) of the
        largest, and `image_sizes`, int64 (images, 2), height and width of each without padding.
        """
        sizes = torch.tensor([image.shape[-2:] for image in images])
        height, width = sizes.amax(0).tolist()
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """An image, a list of them, or a list of lists, to a batch (`pad`). TypeError, ValueError: for options that ask
        for something; they belong to the processor itself.
        """
        read_options(kwargs, (), IDLE_IMAGE_OPTIONS, [self], "set it on the image processor")
        pictures = [read_source(image, "image") for image in flatten_media(images)]
        return BatchFeature(self.pad([self.preprocess_one(picture) for picture in pictures]), return_tensors)

    def fetch_images(self, images: Any) -> Any:
        """Images of the same nesting; transformers' own would download addresses."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return load_image(read_source(images, "image"), self.max_pixels)
