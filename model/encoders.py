"""The encoders of images and of audio: a stem of convolutions, then a transformer in which all places of an item see
each other, with the blocks of our language model and RoPE instead of a table of positions, so that any size goes.

Sources: Dosovitskiy et al. 2020, arXiv 2010.11929 (images); Radford et al. 2022 (Whisper), arXiv 2212.04356 (audio).
"""

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn

from .attention import prepare_bidirectional_attention, rotary_angles
from .blocks import BlockStack, build_norm
from .configuration_megatransformer import EncoderConfig, MegaTransformerAudioConfig, MegaTransformerVisionConfig
from .initialization import MegaTransformerPreTrainedModel


class ConvStem(nn.Module):
    """Convolutions, each with a GELU, and a projection. Beyond the end of an item all is zero, as for an item alone."""

    def __init__(self, convs: Iterable[nn.Module], proj: nn.Module):
        super().__init__()
        self.convs, self.proj = nn.ModuleList(convs), proj

    def forward(self, hidden: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(items, channels, *places), and (items, dimensions) sizes or None -> (items, hidden, *fewer places), and the
        sizes in front of the projection.
        """
        for conv in self.convs:
            hidden = nn.functional.gelu(conv(hidden))
            if sizes is not None:
                sizes = (sizes + conv.stride[0] - 1) // conv.stride[0]
                hidden = hidden * is_inside(sizes, *hidden.shape[2:]).unsqueeze(1)
        return self.proj(hidden), sizes


def is_inside(sizes: torch.Tensor, *shape: int) -> torch.Tensor:
    """(items, *shape) of bool, whether a place is inside of an item of `sizes`, (items, dimensions)."""
    places = torch.meshgrid(*(torch.arange(length, device=sizes.device) for length in shape), indexing="ij")
    sizes = sizes[(slice(None), *[None] * len(shape))]  # (items, 1 for each dimension, dimensions)
    return (torch.stack(places, dim=-1) < sizes).all(dim=-1)


class MediaEncoder(MegaTransformerPreTrainedModel):
    """A stem, layers and a norm. `forward` of each encoder has lists beside its inputs: if given, `hidden_states` gets
    what enters the first layer and the output of each, the last of them after the norm, each (items, places, hidden);
    and `attentions` the probabilities of each layer, (items, heads, places, places).
    """

    def __init__(self, config: EncoderConfig, stem: ConvStem):
        super().__init__(config)
        self.stem = stem
        self.layers = BlockStack(config, range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.output_size = config.hidden_size
        self.gradient_checkpointing = False
        self.post_init()

    def transform(
        self,
        hidden: torch.Tensor,
        is_real: torch.Tensor | None,
        angles: torch.Tensor,
        hidden_states: list[torch.Tensor] | None,
        attentions: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Layers and norm, (items, places, hidden) -> the same; see `prepare_bidirectional_attention`."""
        inputs = prepare_bidirectional_attention(self.config, hidden, is_real, angles, hidden_states, attentions)
        hidden = self.norm(self.layers(hidden, inputs=inputs))
        if hidden_states is not None:
            hidden_states[-1] = hidden
        return hidden


# ------------------------------------------------------------------------------------------------------------- images


def image_stem(config: MegaTransformerVisionConfig) -> ConvStem:
    """Patches to vectors: each by itself through one linear map, or all through 3 x 3 convolutions with widths that
    double up to the hidden size, then a 1 x 1 one. Of `stem_depth` of the same width the first has stride 2.

    Source: Xiao et al. 2021, arXiv 2106.14881, whose `stem_depth` is 1; without its batch norms.
    """
    side, widths = config.patch_size, []
    if config.stem == "conv":
        halvings = int(math.log2(side))
        widths = [max(16, config.hidden_size >> step) for step in reversed(range(halvings))]
        side, widths = 1, [width for width in widths for _ in range(config.stem_depth)]
    widths = [config.num_channels, *widths]
    convs = [
        nn.Conv2d(before, width, kernel_size=3, stride=1 if index % config.stem_depth else 2, padding=1)
        for index, (before, width) in enumerate(pairwise(widths))
    ]
    return ConvStem(convs, nn.Conv2d(widths[-1], config.hidden_size, kernel_size=side, stride=side))


class MegaTransformerVisionModel(MediaEncoder):
    """Images to features, one for each square of `pixel_shuffle` x `pixel_shuffle` patches."""

    config: MegaTransformerVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MegaTransformerVisionConfig):
        super().__init__(config, image_stem(config))
        self.output_size = config.hidden_size * config.pixel_shuffle**2

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

        Returns:
            (images, tokens, output_size), row by row; and (images, tokens) of bool, whether they are inside of their
            image, or None if all are.

        Raises:
            ValueError: `patch_size * pixel_shuffle` does not divide a size, or the tensor does not hold it.
        """
        config, side = self.config, self.config.pixel_shuffle
        image_sizes = self._check_sizes(pixel_values, image_sizes)
        hidden, _ = self.stem(pixel_values, image_sizes)  # (images, hidden, rows, columns)
        rows, columns = hidden.shape[-2:]
        is_real = None if image_sizes is None else is_inside(image_sizes // config.patch_size, rows, columns)
        places = torch.arange(rows * columns, device=hidden.device)[None]
        angles = [  # half of the pairs of features rotate with the row, and half with the column
            rotary_angles(positions, config.head_dim // 2, config.rope_theta)
            for positions in (places // columns, places % columns)
        ]
        hidden = self.transform(
            hidden.flatten(2).transpose(1, 2),  # (images, patches, hidden)
            None if is_real is None else is_real.flatten(1),
            torch.cat(angles, dim=-1),
            hidden_states,
            attentions,
        )
        if is_real is not None:
            is_real = is_real[:, ::side, ::side].flatten(1)
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


def shuffle_pixels(hidden: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """Squares of `side` x `side` patches to one token: (images, rows * columns, width) -> (images, rows * columns /
    side^2, width * side^2). Source: Shi et al. 2016, arXiv 1609.05158, backwards; as in Idefics 3, arXiv 2408.12637.
    """
    images, _, width = hidden.shape
    squares = hidden.view(images, rows // side, side, columns // side, side, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(images, -1, side * side * width)


# -------------------------------------------------------------------------------------------------------------- audio


class MegaTransformerAudioModel(MediaEncoder):
    """Log-mel spectrograms to features, one for each `subsampling` frames. The stem is a convolution over three frames
    of stride 1, then one of stride 2 for each halving.
    """

    config: MegaTransformerAudioConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)

    def __init__(self, config: MegaTransformerAudioConfig):
        width, halvings = config.hidden_size, int(math.log2(config.subsampling))
        convs = [nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)]
        convs += [nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1) for _ in range(halvings)]
        super().__init__(config, ConvStem(convs, nn.Identity()))

    def forward(
        self,
        input_features: torch.FloatTensor,
        input_features_mask: torch.Tensor | None = None,
        hidden_states: list[torch.Tensor] | None = None,
        attentions: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            input_features: (waveforms, mel bins, frames), zero behind the end of a waveform.
            input_features_mask: (waveforms, frames), 1 for real frames, which come first. Default: all are real.

        Returns:
            (waveforms, tokens, output_size); and (waveforms, tokens) of bool, whether they are before the end of their
            waveform, or None if all are.

        Raises:
            ValueError: a tensor has the wrong shape, or a waveform has no frame.
        """
        hidden, lengths = self.stem(input_features, self._check_lengths(input_features, input_features_mask))
        hidden = hidden.transpose(1, 2)  # (waveforms, tokens, hidden)
        is_real = None if lengths is None else is_inside(lengths, hidden.shape[1])
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        angles = rotary_angles(places, self.config.head_dim, self.config.rope_theta)
        return self.transform(hidden, is_real, angles, hidden_states, attentions), is_real

    def _check_lengths(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Frames of each waveform, (waveforms, 1), or None if all are real."""
        if features.ndim != 3 or features.shape[1] != self.config.num_mel_bins or features.shape[2] == 0:
            raise ValueError(
                f"input_features has shape {tuple(features.shape)}, expected (clips, {self.config.num_mel_bins} mel "
                "bins, frames), at least one frame"
            )
        if mask is None:
            return None
        if mask.shape != (len(features), features.shape[2]):
            raise ValueError(
                f"input_features_mask has shape {tuple(mask.shape)}, expected (clips, frames) = "
                f"({len(features)}, {features.shape[2]})"
            )
        lengths = mask.long().sum(dim=1, keepdim=True)
        if not lengths.all():
            raise ValueError(f"clip {int((lengths == 0).nonzero()[0, 0])} has no real frame (input_features_mask)")
        return None if mask.all() else lengths
