"""The encoder of audio: convolutions that shorten a log-mel spectrogram, then a transformer whose frames all see each
other.

Source: Radford et al. 2022 (Whisper), arXiv 2212.04356, with the blocks of our language model and RoPE instead of a
table of positions, so that any length goes and padding is not needed.
"""

import math

import torch
from torch import nn

from .attention import prepare_bidirectional_attention, rotary_angles
from .blocks import BlockStack, build_norm
from .configuration_megatransformer import MegaTransformerAudioConfig
from .initialization import MegaTransformerPreTrainedModel


class Subsampling(nn.Module):
    """Convolutions over three frames: one of stride 1, then one of stride 2 for each halving."""

    def __init__(self, config: MegaTransformerAudioConfig):
        super().__init__()
        width, halvings = config.hidden_size, int(math.log2(config.subsampling))
        self.convs = nn.ModuleList(
            [nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)]
            + [nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1) for _ in range(halvings)]
        )

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(waveforms, mel bins, frames), and (waveforms,) frames that are real or None -> (waveforms, tokens, hidden),
        the same.
        """
        hidden = features
        for conv in self.convs:
            hidden = nn.functional.gelu(conv(hidden))
            if lengths is not None:  # what is behind the end stays zero, as it is for a clip alone
                lengths = (lengths + conv.stride[0] - 1) // conv.stride[0]
                hidden = hidden * is_before_end(lengths, hidden.shape[-1]).unsqueeze(1)
        return hidden.transpose(1, 2), lengths


def is_before_end(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(waveforms, size) of bool, whether a place is before the end."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class MegaTransformerAudioModel(MegaTransformerPreTrainedModel):
    """Log-mel spectrograms to features, one for each `subsampling` frames."""

    config: MegaTransformerAudioConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)

    def __init__(self, config: MegaTransformerAudioConfig):
        super().__init__(config)
        self.stem = Subsampling(config)
        self.layers = BlockStack(config, config.num_hidden_layers)
        self.norm = build_norm(config)
        self.output_size = config.hidden_size
        self.gradient_checkpointing = False
        self.post_init()

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
            hidden_states: If given, what enters the first layer and the output of each are appended, the last of them
                after the norm; each (waveforms, tokens, hidden).
            attentions: If given, the attention probabilities of each layer are appended, (waveforms, heads, tokens,
                tokens).

        Returns:
            (waveforms, tokens, output_size); and (waveforms, tokens) of bool, whether they are before the end of their
            waveform, or None if all are.

        Raises:
            ValueError: a tensor has the wrong shape, or a waveform has no frame.
        """
        lengths = self._check_lengths(input_features, input_features_mask)
        hidden, lengths = self.stem(input_features, lengths)
        is_real = None if lengths is None else is_before_end(lengths, hidden.shape[1])
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        angles = rotary_angles(places, self.config.head_dim, self.config.rope_theta)
        inputs = prepare_bidirectional_attention(self.config, hidden, is_real, angles, hidden_states, attentions)
        hidden = self.norm(self.layers(hidden, inputs=inputs))
        if hidden_states is not None:
            hidden_states[-1] = hidden
        return hidden, is_real

    def _check_lengths(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Frames of each waveform, (waveforms,), or None if all are real."""
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
        lengths = mask.long().sum(dim=1)
        if not lengths.all():
            raise ValueError(f"clip {int((lengths == 0).nonzero()[0])} has no real frame (input_features_mask)")
        return None if mask.all() else lengths
