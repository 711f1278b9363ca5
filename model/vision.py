"""The encoder of images: patches, a transformer in which all patches see each other, a pixel shuffle.

Source: Dosovitskiy et al. 2020, arXiv 2010.11929, with the blocks of our language model and RoPE by row and column
instead of a table of positions, so that any size goes.
"""

import math
from itertools import pairwise

import torch
from torch import nn

from .attention import prepare_bidirectional_attention, rotary_angles
from .blocks import BlockStack, build_norm
from .configuration_megatransformer import MegaTransformerVisionConfig
from .initialization import MegaTransformerPreTrainedModel


class Stem(nn.Module):
    """Patches to vectors: each by itself through one linear map, or all through 3 x 3 convolutions with widths that
    double up to the hidden size, then a 1 x 1 one. Of `stem_depth` of the same width the first has stride 2.

    Source: Xiao et al. 2021, arXiv 2106.14881, whose `stem_depth` is 1; without its batch norms.
    """

    def __init__(self, config: MegaTransformerVisionConfig):
        super().__init__()
        side, widths = config.patch_size, []
        if config.stem == "conv":
            halvings = int(math.log2(side))
            widths = [max(16, config.hidden_size >> step) for step in reversed(range(halvings))]
            side, widths = 1, [width for width in widths for _ in range(config.stem_depth)]
        widths = [config.num_channels, *widths]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, kernel_size=3, stride=1 if index % config.stem_depth else 2, padding=1)
            for index, (before, width) in enumerate(pairwise(widths))
        )
        self.proj = nn.Conv2d(widths[-1], config.hidden_size, kernel_size=side, stride=side)

    def forward(self, pixels: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
        """(images, channels, height, width), and (images, 2) sizes or None -> (images, hidden, rows, columns)."""
        hidden = pixels
        for conv in self.convs:
            hidden = nn.functional.gelu(conv(hidden))
            if sizes is not None:  # what is beyond the border stays zero, as it is for an image alone
                sizes = sizes // conv.stride[0]
                hidden = hidden * is_inside(sizes, *hidden.shape[-2:]).unsqueeze(1)
        return self.proj(hidden)


def is_inside(sizes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(images, rows, columns) of bool, whether a place is inside of an image of `sizes` (images, 2)."""
    row = torch.arange(rows, device=sizes.device)[:, None] < sizes[:, 0, None, None]
    column = torch.arange(columns, device=sizes.device) < sizes[:, 1, None, None]
    return row & column


class MegaTransformerVisionModel(MegaTransformerPreTrainedModel):
    """Images to features, one for each square of `pixel_shuffle` x `pixel_shuffle` patches."""

    config: MegaTransformerVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MegaTransformerVisionConfig):
        super().__init__(config)
        self.stem = Stem(config)
        self.layers = BlockStack(config, config.num_hidden_layers)
        self.norm = build_norm(config)
        self.output_size = config.hidden_size * config.pixel_shuffle**2
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        image_sizes: torch.LongTensor | None = None,
        hidden_states: list[torch.Tensor] | None = None,
        attentions: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            pixel_values: (images, channels, height, width), zero beyond the size of an image.
            image_sizes: (images, 2), height and width of each. Default: all are as large as the tensor.
            hidden_states: If given, the embedded patches and the output of each layer are appended, the last of them
                after the norm; each (images, patches, hidden).
            attentions: If given, the attention probabilities of each layer are appended, (images, heads, patches,
                patches).

        Returns:
            (images, tokens, output_size), row by row; and (images, tokens) of bool, whether they are inside of their
            image, or None if all are.

        Raises:
            ValueError: `patch_size * pixel_shuffle` does not divide a size, or the tensor does not hold it.
        """
        image_sizes = self._check_sizes(pixel_values, image_sizes)
        hidden = self.stem(pixel_values, image_sizes)  # (images, hidden, rows, columns)
        rows, columns = hidden.shape[-2:]
        hidden = hidden.flatten(2).transpose(1, 2)  # (images, patches, hidden)
        is_real = None
        if image_sizes is not None:
            is_real = is_inside(image_sizes // self.config.patch_size, rows, columns).flatten(1)
        angles = self._angles(rows, columns, hidden.device)
        inputs = prepare_bidirectional_attention(self.config, hidden, is_real, angles, hidden_states, attentions)
        hidden = self.norm(self.layers(hidden, inputs=inputs))
        if hidden_states is not None:
            hidden_states[-1] = hidden
        side = self.config.pixel_shuffle
        if is_real is not None:
            is_real = is_real.view(-1, rows, columns)[:, ::side, ::side].flatten(1)
        return shuffle_pixels(hidden, rows, columns, side), is_real

    def _check_sizes(self, pixels: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor | None:
        """The sizes, or None if all images are as large as the tensor."""
        unit = self.config.token_size
        if pixels.ndim != 4 or pixels.shape[1] != self.config.num_channels or any(n % unit for n in pixels.shape[-2:]):
            raise ValueError(
                f"pixel_values has shape {tuple(pixels.shape)}, expected (images, {self.config.num_channels}, height, "
                f"width), both multiples of patch_size * pixel_shuffle = {unit}"
            )
        if sizes is None:
            return None
        whole = torch.tensor(pixels.shape[-2:], device=pixels.device)
        if (sizes == whole).all():
            return None
        if sizes.shape != (len(pixels), 2) or (sizes % unit).any() or (sizes < unit).any() or (sizes > whole).any():
            raise ValueError(
                f"image_sizes {sizes.tolist()} must be height and width of each of the {len(pixels)} images, multiples "
                f"of {unit}, from {unit} to {whole.tolist()}"
            )
        return sizes

    def _angles(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Angles of rotations of which half of the pairs turn with the row and half with the column."""
        places = torch.arange(rows * columns, device=device)[None]
        config = self.config
        angles = [
            rotary_angles(positions, config.head_dim // 2, config.rope_theta)
            for positions in (places // columns, places % columns)
        ]
        return torch.cat(angles, dim=-1)


def shuffle_pixels(hidden: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """Squares of `side` x `side` patches to one token: (images, rows * columns, width) -> (images, rows * columns /
    side^2, width * side^2). Source: Shi et al. 2016, arXiv 1609.05158, backwards; as in Idefics 3, arXiv 2408.12637.
    """
    images, _, width = hidden.shape
    squares = hidden.view(images, rows // side, side, columns // side, side, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(images, -1, side * side * width)
