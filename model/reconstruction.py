"""What the codecs share: a model whose output is to be like its input, and a loss of several parts."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .adversarial import Discriminator, adversarial_losses
from .convnext import ConvNeXtBlock
from .initialization import MegaTransformerPreTrainedModel


@dataclass
class ReconstructionOutput(ModelOutput):
    """What `forward` of a codec returns."""

    loss: torch.FloatTensor | None = None
    """The weighted sum of its parts."""
    losses: dict[str, torch.FloatTensor] | None = None
    """The parts by name, without weights and without gradient."""
    reconstruction: torch.FloatTensor | None = None
    """Of the shape of the media."""


class ReconstructionModel(MegaTransformerPreTrainedModel):
    """A codec that is trained by itself. Its discriminators, if it has any, learn in the same backward pass: what they
    say of a reconstruction trains the codec through weights that are held, and what they learn about it stops there.
    """

    supports_gradient_checkpointing = False
    discriminators: nn.ModuleList | None

    def loss_weights(self) -> dict[str, float]:
        """Factors on the parts of the loss, by name."""
        raise NotImplementedError

    def build_discriminators(self, discriminators: Iterator[Discriminator]) -> nn.ModuleList | None:
        """Those that the configuration asks for."""
        return nn.ModuleList(discriminators) if self.config.adversarial_weight else None

    def compare(
        self, made: torch.Tensor, media: torch.Tensor, losses: dict[str, torch.Tensor], step: int | None
    ) -> ReconstructionOutput:
        """Adds what discriminators say to the other parts of the loss.

        Args:
            made: The reconstruction.
            media: What it should be.
            losses: Parts that are known already.
            step: Updates that were made before this one. None: as many as it takes.
        """
        weights = self.loss_weights()
        has_begun = step is None or step >= self.config.adversarial_start
        if self.training and self.discriminators is not None and has_begun:
            losses = losses | adversarial_losses(self.discriminators, made, media)
            weight = self.config.adversarial_weight
            weights |= {"generator": weight, "features": weight, "discriminator": 1.0}
        loss = sum(weights[name] * value for name, value in losses.items())
        return ReconstructionOutput(loss, {name: value.detach() for name, value in losses.items()}, made)

    def compile_units(self, **options: object) -> None:
        """Compile the blocks; what stands around them is cheap, or complex numbers."""
        for module in self.modules():
            if isinstance(module, ConvNeXtBlock):
                module.compile(**options)
