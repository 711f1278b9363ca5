"""What a modality is: one class, in one file, which knows its tokens and its encoder. Processors have instances, which
load, measure, preprocess and collate media, to read them or, as targets, to learn to write them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .backbones import reason_of
from .chat import TARGET_PREFIX


class Modality(ABC):
    """How media become tensors, and features in the places of their placeholders.

    Args:
        config: That of the encoder, of a modality whose media are read by one alone.
    """

    name: str
    """The name in configs, processors and logs; targets have "written_" in front."""
    config_class: type
    """The class of the encoder's configuration."""
    config_key: str | None = None
    """Where that stands in `MegaTransformerConfig`. None: in its `modality_configs`, by name."""
    input_names: tuple[str, ...]
    """Arguments of the encoder's `forward`, the item itself first; of targets those of the model for them."""
    target_names: tuple[str, ...] = ()
    """Arguments of the model that are targets, the item itself first; none where nothing of it is written."""
    file_suffixes: tuple[str, ...] = ()
    """What a folder without metadata is searched for, such as ".png"."""
    shows_layers: bool = False
    """Whether `forward` also takes lists, `hidden_states` and `attentions`, to which it appends those of its layers."""
    processor: Any = None
    """The image processor or feature extractor of transformers that does the work, if there is one."""
    learned: tuple[bool, bool, bool] = (False, False, False)
    """Whether the start token, the placeholders and the end token are labels where the assistant shows an item."""

    def __init_subclass__(cls) -> None:
        # The placeholder, once for each feature, and what stands in front of those of a medium and behind them.
        cls.token, cls.start_token, cls.end_token = (f"<|{cls.name}{end}|>" for end in ("", "_start", "_end"))

    def __init__(self, config: Any):
        self.config = config

    def become_target(self, learned: tuple[bool, bool, bool]) -> None:
        """Makes this what is written, opened and closed like what is read, with a placeholder of its own."""
        self.name = f"{TARGET_PREFIX}{self.name}"
        self.token, self.input_names, self.learned = f"<|{self.name}|>", self.target_names, learned

    @classmethod
    @abstractmethod
    def build_encoder(cls, config: Any) -> nn.Module:
        """A module with `config` and `output_size`, whose `forward` takes `input_names` and returns features (media,
        tokens, output_size), and which of them are real, (media, tokens) of bool, or None if all are.
        """

    @classmethod
    @abstractmethod
    def dummy_inputs(cls, config: Any) -> dict[str, torch.Tensor]:
        """The smallest input of the encoder, one item."""

    def load(self, source: Any) -> Any:
        """The item, decoded, from anything that holds it; ValueError, with the reason, if it cannot be used."""
        return source

    def size(self, source: Any) -> Any:
        """What `tokens_of_size` takes, without decoding where that can be."""
        return self.num_tokens(self.preprocess(source))

    def tokens_of_size(self, size: Any) -> int:
        """Placeholders of an item of that size."""
        return size

    def preprocess(self, medium: Any) -> torch.Tensor:
        """One item, or a source of one, to a tensor of any shape; ValueError, with the reason, if it cannot be used."""
        raise NotImplementedError(f"modality {self.name!r} cannot be preprocessed; give tensors")

    def num_tokens(self, preprocessed: torch.Tensor) -> int:
        """Placeholders of a preprocessed item, as many as the encoder gives features for it."""
        raise NotImplementedError(f"modality {self.name!r} cannot be preprocessed; give tensors")

    def collate(self, preprocessed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Preprocessed media to arguments of the model, `input_names`."""
        raise NotImplementedError(f"modality {self.name!r} cannot be preprocessed; give tensors")

    def codec_input(self, medium: Any, rng: np.random.Generator | None = None) -> torch.Tensor:
        """One item that was loaded, as a codec takes it; with `rng` it may be a part of it."""
        return self.preprocess(medium)

    def collate_codec_inputs(self, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of a codec."""
        return self.collate(list(inputs))


MODALITIES: dict[str, type[Modality]] = {}
"""All modalities whose files were imported, by name."""


def register(modality: type[Modality]) -> type[Modality]:
    """Adds a modality to `MODALITIES`; a decorator of its class."""
    MODALITIES[modality.name] = modality
    return modality


def check_count(argument: str, processor: Any, own_class: type, count: int | None) -> None:
    """Raises ValueError for a number of tokens that is missing, or given though a processor of ours counts them."""
    # By name: a class that was loaded from a checkpoint is another object.
    is_own = type(processor).__name__ == own_class.__name__
    if is_own != (count is None):
        what = "counts tokens itself" if is_own else "does not count tokens"
        raise ValueError(
            f"{argument} {type(processor).__name__} {what}, but their number is {count}; fix the number of tokens"
        )


def processor_of_backbone(auto_class: type, backbone: str) -> Any:
    """The image processor or feature extractor that a pretrained encoder brings along, without code of its own."""
    try:
        return auto_class.from_pretrained(backbone, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the processor of backbone {backbone!r} cannot be loaded: {reason_of(error)}") from error


def only_of(batch: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Tensor:
    """The tensor of a batch of one item, as encoders of backbones take it."""
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    if len(shapes.get(name, ())) != dimensions or shapes[name][0] != 1:
        raise ValueError(
            f"the backbone's processor gives {shapes} for one medium, and not one {name} of {dimensions} dimensions; "
            "choose a backbone that takes media of one size"
        )
    return batch[name][0]
