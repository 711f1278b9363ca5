"""How media of each kind become tensors and placeholders: through our own processors, those of backbones, or those of
further modalities; and what is written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.utils.import_utils import is_vision_available

from .chat import WRITTEN_PREFIX
from .feature_extraction_megatransformer import SILENCE, MegaTransformerFeatureExtractor
from .image_processing_megatransformer import MegaTransformerImageProcessor
from .media import MAX_PIXELS, MAX_SECONDS, audio_seconds, image_size, load_audio, load_image
from .modalities import MODALITIES

if is_vision_available():
    from PIL import Image, ImageOps


class MediaKind:
    """A further modality, which does all of it itself."""

    learned = (False, False, False)
    """Whether the start token, the placeholders and the end token are labels where the assistant shows a medium."""

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
        self.max_seconds = min(MAX_SECONDS, extractor.to_dict().get("chunk_length", MAX_SECONDS))

    def tokens_of_size(self, size: float) -> int:
        return self.count

    def preprocess(self, medium: Any) -> torch.Tensor:
        batch = self.extractor(self.load(medium), sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return _only_of(batch, "input_features", 3)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return self.count

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"input_features": torch.stack(preprocessed)}


class WrittenModality:
    """The tokens and the model's arguments of what is written; it is opened and closed like what is read."""

    def __init__(self, medium: str, input_names: tuple[str, ...]):
        self.name, self.input_names = f"{WRITTEN_PREFIX}{medium}", input_names
        self.token, self.start_token, self.end_token = f"<|{self.name}|>", f"<|{medium}_start|>", f"<|{medium}_end|>"


WRITTEN_MODALITIES = (
    WrittenModality("image", ("image_targets",)),
    WrittenModality("audio", ("audio_targets", "audio_targets_mask")),
)
"""In the order of `modality_ids`."""


class WrittenImages(Images):
    """Pictures as they are to be written: the square in the middle, in one size.

    Args:
        image_size: Height and width.
        num_tokens: Placeholders of each.
        is_learned: Whether the placeholders are labels, in whose places the model puts codes. Their number is fixed, so
            that there is nothing to learn about the end.
    """

    def __init__(self, image_size: int, num_tokens: int, is_learned: bool):
        self.modality, self.max_pixels = WRITTEN_MODALITIES[0], MAX_PIXELS
        self.image_size, self.count, self.learned = image_size, num_tokens, (True, is_learned, False)

    def tokens_of_size(self, size: tuple[int, int]) -> int:
        return self.count

    def reference(self, medium: Any) -> "Image.Image":
        """The picture itself, with which a written one is compared."""
        return ImageOps.fit(self.load(medium), (self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def preprocess(self, medium: Any) -> torch.Tensor:
        """Float (3, image_size, image_size) in -1 .. 1."""
        pixels = np.asarray(self.reference(medium), dtype=np.float32).transpose(2, 0, 1)
        return torch.from_numpy(pixels / np.float32(127.5) - 1)

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        return self.count

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"image_targets": torch.stack(preprocessed)}


class WrittenRecordings(Recordings):
    """Recordings as they are to be written: log-mel spectrograms of whole tokens, whose end is learned.

    Args:
        num_mel_bins: Mel bins of a frame.
        frames_per_token: Frames of a token; silence fills the last one.
        sizes: Of the frames, as `MegaTransformerFeatureExtractor` takes them.
    """

    learned = (True, True, True)

    def __init__(self, num_mel_bins: int, frames_per_token: int, **sizes: Any):
        super().__init__(MegaTransformerFeatureExtractor(num_mel_bins, subsampling=frames_per_token, **sizes))
        self.modality = WRITTEN_MODALITIES[1]

    def reference(self, medium: Any) -> tuple[np.ndarray, int]:
        """Samples, with which written ones are compared, and their rate."""
        return self.load(medium), self.extractor.sampling_rate

    def preprocess(self, medium: Any) -> torch.Tensor:
        """Float (mel bins, frames), a multiple of those of a token."""
        spectrogram = super().preprocess(medium)
        return F.pad(spectrogram, (0, -spectrogram.shape[1] % self.extractor.subsampling), value=SILENCE)

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = super().collate(preprocessed)
        return {"audio_targets": batch["input_features"], "audio_targets_mask": batch["input_features_mask"]}


def _only_of(batch: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Tensor:
    """The tensor of a batch of one medium, as encoders of backbones take it."""
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    if len(shapes.get(name, ())) != dimensions or shapes[name][0] != 1:
        raise ValueError(
            f"the backbone's processor gives {shapes} for one medium, and not one {name} of {dimensions} dimensions; "
            "choose a backbone that takes media of one size"
        )
    return batch[name][0]
