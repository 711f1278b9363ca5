"""What each modality, and the latents of written media, contribute to the loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model import TARGET_MODALITIES, modality_names


@dataclass
class ModalityWeights:
    """How much a learned token counts, by what its document contains; a modality that is not named here counts 1."""

    text: float = 1.0
    """Weight of documents that are text alone, at least 0."""
    image: float = 1.0
    """Weight of documents with images, at least 0."""
    audio: float = 1.0
    """Weight of documents with audio, at least 0."""

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
        weights: Weights of the modalities.
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


class TargetLosses:
    """Counts the latents of an accumulation window, and sums up their losses between two logs.

    Args:
        config: Configuration of the model; its output heads' placeholders are `written_NAME_token_id`.
    """

    def __init__(self, config: Any):
        ids = {name: getattr(config, f"written_{name}_token_id", None) for name in TARGET_MODALITIES}
        self.token_ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
        self.num_in_window: dict[str, torch.Tensor] = {}
        self._sums = torch.zeros(len(self.token_ids), 2, dtype=torch.float64)

    def count(
        self, batches: Sequence[Mapping[str, torch.Tensor]], add_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Count the latents of a window: the places of its batches.

        Args:
            add_up: Sum of a tensor over the ranks.
        """
        targets = [batch.get("decoder_input_ids", batch["input_ids"]) for batch in batches]
        counts = [sum((ids == it).sum() for ids in targets) for it in self.token_ids.values()]
        counts = add_up(torch.stack(counts)).clamp(min=1)
        self.num_in_window = dict(zip(self.token_ids, counts, strict=True))

    def add(self, losses: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Count the losses of the latents of a batch, of which the rows do not matter."""
        for number, name in enumerate(self.token_ids):
            if name in losses:
                total, count = losses[name][0].sum(), len(losses[name][0])
                self._sums = self._sums.to(total.device)
                self._sums[number] += torch.stack((total.double(), total.new_tensor(count, dtype=torch.float64)))

    def flush(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`flow_loss_NAME` of each modality that occurred since the last call, the mean over its latents."""
        sums = add_up(self._sums).cpu()
        self._sums = torch.zeros_like(self._sums)
        means = zip(self.token_ids, sums.tolist(), strict=True)
        return {f"flow_loss_{name}": total / count for name, (total, count) in means if count}


def target_sums(losses: Mapping[str, tuple[torch.Tensor, torch.Tensor]], inputs: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of the latents of each row, and their number, for each modality that may be generated:
    float64 (batch, 2 x modalities), in the order of `TARGET_MODALITIES`.

    Args:
        losses: (latents,) and their rows, by modality.
        inputs: (batch, sequence), on the device of the sums.
    """
    sums = torch.zeros(len(inputs), len(TARGET_MODALITIES), 2, dtype=torch.float64, device=inputs.device)
    for number, name in enumerate(TARGET_MODALITIES):
        if name in losses:
            of_latents, rows = losses[name]
            figures = torch.stack((of_latents, torch.ones_like(of_latents)), dim=-1)
            sums[:, number].index_add_(0, rows, figures.double())
    return sums.flatten(1)


def flow_seeds(keys: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Seeds of the noise of each row, int64 (rows,), from its key alone."""
    return torch.tensor([int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 2) for key in keys])
