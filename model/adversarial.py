"""Discriminators: small networks that learn to tell reconstructions from media, so that codecs learn what they see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn


class Discriminator(nn.Module):
    """Judges each patch of a view of a medium.

    Source: Isola et al. 2016 (PatchGAN), arXiv 1611.07004, without its batch norms, which would make the judgement of a
    medium depend on others.

    Args:
        view: A batch of media to (media, channels, rows, columns).
        channels: Channels of the view.
        width: Of the first layer; the others have twice as many as the one before.
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
        with held(discriminator):
            judged, theirs = discriminator(made)
        said, ours = discriminator(media)
        generator.append(-judged.mean())
        features += [distance(mine.detach(), other) for mine, other in zip(ours, theirs, strict=True)]
        fake, _ = discriminator(made.detach())
        learned.append(nn.functional.relu(1 - said).mean() + nn.functional.relu(1 + fake).mean())
    parts = {"generator": generator, "features": features, "discriminator": learned}
    return {name: torch.stack(values).mean() for name, values in parts.items()}


def distance(wanted: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Mean |wanted - made| by mean |wanted|."""
    return (wanted - made).abs().mean() / wanted.abs().mean().clamp(min=1e-6)


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Nothing in this block gives the module's weights a gradient."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
