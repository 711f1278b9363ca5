"""How media of each kind become tensors and placeholders: through our own processors, those of backbones, or those of
further modalities.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .feature_extraction_megatransformer import MegaTransformerFeatureExtractor
from .image_processing_megatransformer import MegaTransformerImageProcessor
from .media import MAX_PIXELS, MAX_SECONDS, audio_seconds, image_size, load_audio, load_image
from .modalities import MODALITIES


class MediaKind:
    """A further modality, which does all of it itself."""

    def __init__(self, name: str, config: dict[str, Any]):
        if name not in MODALITIES:
            raise ValueError(f"modality {name!r} is not registered; import the file that adds it to MODALITIES")
        self.modality = MODALITIES[name]
        self.config = self.modality.config_class(**config)

    def load(self, source: Any) -> Any:
        """The medium, decoded, from anything that holds it."""
        return source

    def size(self, source: Any) -> Any:
        """What `tokens_of_size` takes, without decoding where that can be."""
        return self.num_tokens(self.preprocess(source))

    def tokens_of_size(self, size: Any) -> int:
        """Placeholders of a medium of that size."""
        return size

    def preprocess(self, medium: Any) -> torch.Tensor:
        """One medium, or a source of one, to its tensor."""
        return self.modality.preprocess(medium, self.config)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        """Placeholders of a preprocessed medium."""
        return self.modality.num_tokens(preprocessed, self.config)

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Preprocessed media to arguments of the model."""
        return self.modality.collate(preprocessed)


class Images(MediaKind):
    """Pictures through our image processor."""

    def __init__(self, processor: MegaTransformerImageProcessor):
        self.modality, self.processor = MODALITIES["image"], processor
        self.max_pixels = processor.max_pixels

    def load(self, source: Any) -> Any:
        return load_image(source, self.max_pixels)

    def size(self, source: Any) -> tuple[int, int]:
        return image_size(source, self.max_pixels)

    def tokens_of_size(self, size: tuple[int, int]) -> int:
        return self.processor.num_tokens(*size)

    def preprocess(self, medium: Any) -> torch.Tensor:
        return self.processor.preprocess_one(medium)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return self.processor.num_tokens(*preprocessed.shape[1:])

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.processor.pad(preprocessed)


class BackboneImages(Images):
    """Pictures through the image processor of a backbone, each as many tokens."""

    def __init__(self, processor: Any, num_tokens: int):
        self.modality, self.processor, self.count = MODALITIES["image"], processor, num_tokens
        self.max_pixels = MAX_PIXELS

    def tokens_of_size(self, size: tuple[int, int]) -> int:
        return self.count

    def preprocess(self, medium: Any) -> torch.Tensor:
        return _only_of(self.processor(self.load(medium), return_tensors="pt"), "pixel_values", 4)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return self.count

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack(preprocessed)}


class Recordings(MediaKind):
    """Recordings through our feature extractor."""

    def __init__(self, extractor: MegaTransformerFeatureExtractor):
        self.modality, self.extractor = MODALITIES["audio"], extractor
        self.max_seconds = extractor.max_seconds

    def load(self, source: Any) -> np.ndarray:
        return load_audio(source, self.extractor.sampling_rate, self.max_seconds)

    def size(self, source: Any) -> float:
        return audio_seconds(source, self.extractor.sampling_rate)

    def tokens_of_size(self, size: float) -> int:
        return self.extractor.num_tokens(self.extractor.num_samples(size))

    def preprocess(self, medium: Any) -> torch.Tensor:
        return self.extractor.preprocess_one(medium)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return -(-preprocessed.shape[1] // self.extractor.subsampling)

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.extractor.pad(preprocessed)


class BackboneRecordings(Recordings):
    """Recordings through the feature extractor of a backbone, each as many tokens."""

    def __init__(self, extractor: Any, num_tokens: int):
        self.modality, self.extractor, self.count = MODALITIES["audio"], extractor, num_tokens
        self.max_seconds = MAX_SECONDS

    def tokens_of_size(self, size: float) -> int:
        return self.count

    def preprocess(self, medium: Any) -> torch.Tensor:
        batch = self.extractor(self.load(medium), sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return _only_of(batch, "input_features", 3)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return self.count

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"input_features": torch.stack(preprocessed)}


def _only_of(batch: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Tensor:
    """The tensor of a batch of one medium, as encoders of backbones take it."""
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    if len(shapes.get(name, ())) != dimensions or shapes[name][0] != 1:
        raise ValueError(
            f"the backbone's processor gives {shapes} for one medium, and not one {name} of {dimensions} dimensions; "
            "choose a backbone that takes media of one size"
        )
    return batch[name][0]
