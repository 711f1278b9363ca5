"""The trainer of codecs, whose output is to be like their input."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .base import ScoringTrainer
from .objectives import ObjectiveOptions


class ReconstructionTrainer(ScoringTrainer):
    """`transformers.Trainer` for models that take media and return how well they came through.

    Args:
        score: (reconstructions, batch) -> (media, scores), float.
        kwargs: The arguments of `transformers.Trainer`; compute_metrics gets the scores of all media.

    Raises:
        ValueError: The libraries refuse an option; nothing is written then.
    """

    def __init__(
        self, *args: Any, score: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor], **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        del self.model.config.use_cache  # `Trainer` writes it into every configuration
        self.score = score
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)  # on the device until they are logged

    def create_accelerator_and_postprocess(self) -> None:
        """Also refuses an objective, before there is a folder."""
        if self.args.objective != ObjectiveOptions():
            raise ValueError("training.objective is about the steps of a core, and codecs have none; leave it out")
        super().create_accelerator_and_postprocess()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        """Tells the model how many updates it has had, and keeps the parts of its loss."""
        inputs = {name: value for name, value in inputs.items() if name != "lengths"}  # for scores alone
        outputs = model(**inputs, step=self.state.global_step)
        if model.training:
            for name, value in outputs.losses.items():
                self._losses[f"loss_{name}"].append(value)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def scores_of(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Scores of the reconstructions, (media, scores)."""
        return self.score(outputs.reconstruction.float(), inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means, over all ranks, of what was gathered since the last log of training."""
        if "loss" in logs and self._losses:
            means = torch.stack([torch.stack(values).mean().float() for values in self._losses.values()])
            means = self.accelerator.reduce(means, "mean").tolist()
            logs = {**logs, **dict(zip(self._losses, means, strict=True))}
            self._losses.clear()
        super().log(logs, *args, **kwargs)
