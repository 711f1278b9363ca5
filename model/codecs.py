"""Media to latents and back: one class for each modality."""

from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_vision_available

from .backbones import loading
from .configuration_megatransformer import (
    MegaTransformerAudioWriterConfig,
    MegaTransformerImageWriterConfig,
    WriterConfig,
)
from .feature_extraction_megatransformer import LOG_MEAN, LOG_STD, SILENCE, waveform_of
from .image_autoencoder import MegaTransformerImageAutoencoder
from .reconstruction import ReconstructionModel
from .vocoder import MegaTransformerVocoder

if is_vision_available():
    from PIL import Image

PIXEL_SCALE = 2.0
"""Pixels in -1 .. 1 have a deviation of about a half; latents should have one of 1."""
LOUDEST = (2.0 - LOG_MEAN) / LOG_STD
"""More than full scale has."""


class Codec(nn.Module):
    """Media of one modality to latents, (tokens, `latent_size`), at most `max_tokens` of an item, and back.

    `encode` takes targets, as the processor makes them, and gives the latents of all media and how many each has; for a
    wrong shape it raises ValueError. `project` gives the nearest latents that it could have given, `decode` one item.
    """

    latent_size: int
    max_tokens: int
    name: str | None = None
    """Name or folder of the trained part, if there is one."""

    def load(self) -> None:
        """Fetches the weights of the trained part, if there is one; ValueError if some are missing, or damaged."""
        for part in self.children():
            with loading(f"codec {self.name!r}"):
                trained, report = type(part).from_pretrained(
                    self.name, config=part.config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
                )
            if report["missing_keys"]:
                missing = sorted(report["missing_keys"])
                raise ValueError(
                    f"the weights of codec {self.name!r} lack {missing[0]!r} (and {len(missing) - 1} more)"
                )
            part.load_state_dict(trained.state_dict())

    def train(self, mode: bool = True) -> "Codec":
        """It stays in evaluation mode: latents have no noise."""
        return super().train(False)


class ImageCodec(Codec):
    """The pixels of square patches, row by row, of which nothing is trained; or a trained autoencoder, which stays as
    it is. Its weights are random until `load` fetches them, or a checkpoint of the language model has them.
    """

    def __init__(self, config: MegaTransformerImageWriterConfig):
        super().__init__()
        self.channels, self.side, self.patch = config.num_channels, config.image_size, config.patch_size
        self.latent_size = self.channels * self.patch**2
        self.autoencoder = None
        if config.codec == "autoencoder":
            self._take_autoencoder(config)
        self.max_tokens = (self.side // self.patch) ** 2

    def _take_autoencoder(self, config: MegaTransformerImageWriterConfig) -> None:
        self.name = config.codec_name_or_path
        self.autoencoder = frozen(MegaTransformerImageAutoencoder, config.codec_config, self.name)
        config.codec_config = self.autoencoder.config.to_dict()
        patch, bottleneck = self.autoencoder.config.patch_size, self.autoencoder.config.bottleneck
        if self.side % patch:
            raise ValueError(f"image_size ({self.side}) must be a multiple of the autoencoder's patch_size ({patch})")
        if (config.head == "fsq") != (bottleneck == "fsq"):
            raise ValueError(f"head {config.head!r} does not go with an autoencoder of bottleneck {bottleneck!r}")
        self.channels, self.patch = self.autoencoder.config.num_channels, patch
        self.latent_size = self.autoencoder.latent_size

    @property
    def num_codes(self) -> int:
        """Codes of an autoencoder whose bottleneck has some."""
        return self.autoencoder.config.num_codes

    def encode(self, targets: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[int]]:
        """(images, channels, side, side) in -1 .. 1."""
        self._check(targets)
        if self.autoencoder is None:
            patches = nn.functional.unfold(targets.float() * PIXEL_SCALE, self.patch, stride=self.patch)
            latents = patches.transpose(1, 2)
        else:
            pixels = targets.to(self.autoencoder.dtype)
            latents = self.autoencoder.refine(pixels, self.autoencoder.encode(pixels))
        return latents.flatten(0, 1), [self.max_tokens] * len(targets)

    def encode_ids(self, targets: torch.Tensor) -> torch.LongTensor:
        """Codes of images, (images, tokens)."""
        self._check(targets)
        return self.autoencoder.encode_ids(targets.to(self.autoencoder.dtype))

    def _check(self, targets: torch.Tensor) -> None:
        shape = (self.channels, self.side, self.side)
        if targets.ndim != 4 or targets.shape[1:] != shape:
            raise ValueError(
                f"image_targets has shape {tuple(targets.shape)}, expected (images, {', '.join(map(str, shape))})"
            )

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        if self.autoencoder is None:
            return latents.clamp(-PIXEL_SCALE, PIXEL_SCALE)
        return self.autoencoder.bottleneck(latents)

    def decode(self, latents: torch.Tensor) -> "Image.Image":
        if self.autoencoder is not None:
            return to_image(self.autoencoder.decode(latents[None].to(self.autoencoder.dtype))[0].float())
        patches = latents.float().T[None] / PIXEL_SCALE
        return to_image(nn.functional.fold(patches, self.side, self.patch, stride=self.patch)[0])

    def decode_partly(self, latents: torch.Tensor) -> "Image.Image":
        """What can be shown of an image whose last latents are missing."""
        return self.decode(nn.functional.pad(latents, (0, 0, 0, self.max_tokens - len(latents))))

    def decode_ids(self, ids: torch.LongTensor) -> list["Image.Image"]:
        """(images, tokens)."""
        return [to_image(pixels.float()) for pixels in self.autoencoder.decode_ids(ids)]


class AudioCodec(Codec):
    """Frames of a log-mel spectrogram, `frames_per_token` at a time."""

    def __init__(self, config: MegaTransformerAudioWriterConfig):
        super().__init__()
        self.config = config
        self.latent_size = config.num_mel_bins * config.frames_per_token
        self.max_tokens = config.max_tokens
        self.vocoder = None
        self.name = config.vocoder_name_or_path
        if self.name is None and config.vocoder_config is None:
            return
        self.vocoder = frozen(MegaTransformerVocoder, config.vocoder_config, self.name)
        config.vocoder_config = self.vocoder.config.to_dict()
        for option in ("sampling_rate", "n_fft", "hop_length", "num_mel_bins"):
            here, there = getattr(config, option), getattr(self.vocoder.config, option)
            if here != there:
                raise ValueError(f"{option} is {here}, but that of the vocoder {there}; they have to be the same")

    def encode(self, targets: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[int]]:
        """(waveforms, mel bins, frames), a multiple of `frames_per_token`, and (waveforms, frames), 1 for real
        frames.
        """
        clips, bins, frames = targets.shape
        together = self.config.frames_per_token
        if bins != self.config.num_mel_bins or frames % together:
            raise ValueError(
                f"audio_targets has shape {tuple(targets.shape)}, expected (clips, {self.config.num_mel_bins}, "
                f"frames), a multiple of {together} frames"
            )
        latents = targets.float().view(clips, bins, frames // together, together).permute(0, 2, 1, 3).flatten(2)
        if mask is None:
            return latents.flatten(0, 1), [frames // together] * clips
        is_real = mask[:, ::together].bool()
        return latents[is_real], is_real.sum(dim=1).tolist()

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.clamp(SILENCE, LOUDEST)

    def log_mel(self, latents: torch.Tensor) -> torch.Tensor:
        """(tokens, latent_size) -> (mel bins, frames)."""
        frames = latents.float().view(len(latents), self.config.num_mel_bins, self.config.frames_per_token)
        return frames.transpose(0, 1).flatten(1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """A waveform, float32 (samples,), on the CPU."""
        config, log_mel = self.config, self.log_mel(latents)
        if self.vocoder is not None:
            return self.vocoder.decode(log_mel[None].to(self.vocoder.dtype))[0].float().cpu()
        return waveform_of(log_mel, config.sampling_rate, config.n_fft, config.hop_length).cpu()

    decode_partly = decode


def build_codec(config: WriterConfig) -> Codec:
    """The codec that an output head's configuration names."""
    if config.model_type == MegaTransformerAudioWriterConfig.model_type:  # a remotely loaded class is another object
        return AudioCodec(config)
    return ImageCodec(config)


def frozen(model_class: type[ReconstructionModel], values: dict[str, Any] | None, name: str | None) -> nn.Module:
    """A model that does not learn, without discriminators, of a configuration, or of that of codec `name`, a name or
    folder; ValueError if there is none, or it is wrong, or of something else.
    """
    config_class = model_class.config_class
    with loading(f"codec {name!r}"):
        found = values or config_class.get_config_dict(name)[0]
    if not values and found.get("model_type") != config_class.model_type:
        raise ValueError(f"{name!r} is a {found.get('model_type')!r}, and not a {config_class.model_type!r}")
    with loading(f"codec {name!r}"):
        config = config_class.from_dict({**found, "adversarial_weight": 0.0})
        return model_class(config).requires_grad_(False).eval()


def to_image(pixels: torch.Tensor) -> "Image.Image":
    """(channels, height, width) in -1 .. 1 to a PIL image."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))
