"""What the codecs share: their block, the discriminators that judge what they make, and a model whose output is to be
like its input, with a loss of several parts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_codecs import CodecConfig
from .initialization import MegaTransformerPreTrainedModel


class ConvNeXtBlock(nn.Module):
    """x + W2 gelu(W1 norm(depthwise convolution of x)).

    Source: Liu et al. 2022, arXiv 2201.03545. Its factor on the branch is left out: the last layer begins small.

    Args:
        dimensions: 1 for audio, 2 for images.
        has_linear_path: Whether the convolution has a residual path of its own instead, m + W2 gelu(W1 norm(m)) with
            m = x + depthwise convolution of x. From the first to the last block there is a linear map then, which a
            norm does not deprive of how strong things are.
    """

    def __init__(self, config: CodecConfig, dimensions: int, has_linear_path: bool = False):
        super().__init__()
        self.has_linear_path = has_linear_path
        convolution = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
        width, side = config.hidden_size, config.kernel_size
        self.depthwise = convolution(width, width, side, padding=side // 2, groups=width)
        self.depthwise.is_zero_at_first = has_linear_path
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.down_proj.is_output_projection = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(media, hidden, *places) -> the same."""
        mixed = self.depthwise(hidden)
        if self.has_linear_path:
            hidden = mixed = hidden + mixed
        branch = self.norm(mixed.movedim(1, -1))  # (media, *places, hidden)
        branch = self.down_proj(nn.functional.gelu(self.up_proj(branch)))
        return hidden + branch.movedim(-1, 1)


# ------------------------------------------------------------------------------------------------------ discriminators


class Discriminator(nn.Module):
    """Judges each patch of a view of an item.

    Source: Isola et al. 2016 (PatchGAN), arXiv 1611.07004, without its batch norms, which would make the judgement of a
    item depend on others.

    Args:
        view: A batch of media to (media, channels, rows, columns).
        channels: Channels of the view.
        width: Channels of the first layer; each further one has twice as many as the one before.
        kernel: Rows and columns that a layer looks at, and by whose half, rounded up, it shortens them.
    """

    def __init__(
        self,
        view: Callable[[torch.Tensor], torch.Tensor],
        channels: int,
        width: int,
        kernel: tuple[int, int] = (4, 4),
    ):
        super().__init__()
        self.view = view
        widths = [channels, width, 2 * width, 4 * width]
        shape = {"stride": tuple((size + 1) // 2 for size in kernel), "padding": tuple(size // 2 for size in kernel)}
        self.convs = nn.ModuleList(nn.Conv2d(before, after, kernel, **shape) for before, after in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(self, media: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Judgements of the patches, (media, 1, rows, columns), and the features of all layers below."""
        hidden, features = self.view(media), []
        for conv in self.convs:
            hidden = nn.functional.leaky_relu(conv(hidden), 0.1)
            features.append(hidden)
        return self.head(hidden), features


def adversarial_losses(
    discriminators: nn.ModuleList, made: torch.Tensor, media: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Means over the discriminators of

        generator      -D(made), with D held
        features       |features of made - features of media|, relative to the latter, with D held
        discriminator  max(0, 1 - D(media)) + max(0, 1 + D(made)), with `made` held

    Source: the hinge loss of Lim and Ye 2017, arXiv 1705.02894; matching of features as in HiFi-GAN (Kong et al. 2020,
    arXiv 2010.05646), whose features are not divided by their size.
    """
    generator, features, learned = [], [], []
    for discriminator in discriminators:
        with without_gradients(discriminator):
            judged, theirs = discriminator(made)
        said, ours = discriminator(media)
        generator.append(-judged.mean())
        features += [relative_distance(mine.detach(), other) for mine, other in zip(ours, theirs, strict=True)]
        fake, _ = discriminator(made.detach())
        learned.append(nn.functional.relu(1 - said).mean() + nn.functional.relu(1 + fake).mean())
    parts = {"generator": generator, "features": features, "discriminator": learned}
    return {name: torch.stack(values).mean() for name, values in parts.items()}


def relative_distance(wanted: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Mean |wanted - made| by mean |wanted|."""
    return (wanted - made).abs().mean() / wanted.abs().mean().clamp(min=1e-6)


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Nothing in this block gives the module's weights a gradient."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


# ------------------------------------------------------------------------------------------------------------- model


@dataclass
class ReconstructionOutput(ModelOutput):
    """What `forward` of a codec returns."""

    loss: torch.FloatTensor | None = None
    """The weighted sum of its parts."""
    losses: dict[str, torch.FloatTensor] | None = None
    """The parts by name, without weights and without gradient."""
    reconstruction: torch.FloatTensor | None = None
    """A tensor that has the shape of the media."""


class ReconstructionModel(MegaTransformerPreTrainedModel):
    """A codec that is trained by itself. Its discriminators, if it has any, learn in the same backward pass: what they
    say of a reconstruction trains the codec through weights that are held, and what they learn about it stops there.
    """

    supports_gradient_checkpointing = False
    discriminators: nn.ModuleList | None

    def loss_weights(self) -> dict[str, float]:
        """Factors on the parts of the loss, by name."""
        raise NotImplementedError

    def build_discriminators(self, views: Iterable[dict[str, Any]]) -> nn.ModuleList | None:
        """One for each view (arguments of `Discriminator`), if the configuration asks for them."""
        if not self.config.adversarial_weight:
            return None
        return nn.ModuleList(Discriminator(**view, width=self.config.discriminator_size) for view in views)

    def compare(
        self, made: torch.Tensor, media: torch.Tensor, losses: dict[str, torch.Tensor], step: int | None
    ) -> ReconstructionOutput:
        """Adds what discriminators say of a reconstruction `made` of `media` to the other parts of the loss. `step` are
        the updates made before this one; None: as many as it takes.
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
