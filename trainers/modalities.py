"""What each modality contributes to the loss."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from model import modality_names


@dataclass
class ModalityWeights:
    """How much a learned token counts, by what its document contains; a modality that is not named here counts 1."""

    text: float = 1.0
    """Of documents that are text alone, at least 0."""
    image: float = 1.0
    """Of documents with images, at least 0."""
    audio: float = 1.0
    """Of documents with sound, at least 0."""

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} is {weight}; give a finite number, at least 0")
        if not any(vars(self).values()):
            raise ValueError("all weights are 0: nothing would be learned; leave one above 0")


class ModalityLosses:
    """Weighs the labels of a batch by their modality, and sums up the losses and the labels of each between two logs.

    The sums stay on the device, so that nothing waits for it before the log.

    Args:
        weights: Of the modalities.
    """

    def __init__(self, weights: ModalityWeights):
        self.names = modality_names()
        known = {"text": weights.text, "image": weights.image, "audio": weights.audio}
        self.weights = torch.tensor([known.get(name, 1.0) for name in self.names])
        self.num_windows = 0
        self._sums: torch.Tensor | None = None

    @property
    def are_weighted(self) -> bool:
        """Whether any modality counts other than 1."""
        return bool((self.weights != 1).any())

    def loss_weights(self, modality_ids: torch.Tensor) -> torch.Tensor:
        """Float32 weights of the labels, of the shape of `modality_ids`."""
        return self.weights.to(modality_ids.device)[modality_ids]

    def sum_of_weights(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weights of all labels of a batch that are learned: the first place of a row is predicted by nothing."""
        is_label = batch["labels"][:, 1:] != -100
        return (self.loss_weights(batch["modality_ids"][:, 1:]) * is_label).sum()

    def add(self, token_losses: torch.Tensor, labels: torch.Tensor, modality_ids: torch.Tensor) -> None:
        """Count a batch.

        Args:
            token_losses: (batch, sequence), the loss of each label in its place, 0 where there is none.
            labels: (batch, sequence), -100 where there is none.
            modality_ids: (batch, sequence).
        """
        figures = torch.stack((token_losses, labels != -100), dim=-1)[:, 1:].reshape(-1, 2)
        if self._sums is None:
            self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=figures.device)
        self._sums.index_add_(0, modality_ids[:, 1:].reshape(-1), figures.double())

    def flush(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What was counted since the last call, of each modality that occurred: `loss_NAME`, nats per token without
        weights; `tokens_NAME`, learned tokens of an accumulation window, on average; and, where modalities are
        weighted, `weight_share_NAME`, their share of the loss. Nothing where no batch has named any yet.

        Args:
            add_up: Sum of a tensor over the ranks.
        """
        if self._sums is None:
            return {}
        sums, windows = add_up(self._sums).cpu(), max(self.num_windows, 1)
        self._sums, self.num_windows = torch.zeros_like(self._sums), 0
        tokens = sums[:, 1]
        weighted = tokens * self.weights
        figures = {}
        for number, name in enumerate(self.names):
            if tokens[number] == 0:
                continue
            figures[f"loss_{name}"] = (sums[number, 0] / tokens[number]).item()
            figures[f"tokens_{name}"] = tokens[number].item() / windows
            if weighted.sum() > 0:
                figures[f"weight_share_{name}"] = (weighted[number] / weighted.sum()).item()
        return figures
