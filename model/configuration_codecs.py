"""Configurations of what turns media into few numbers, or into others, and back: they are trained by themselves, before
a language model writes with them.
"""

import math
from dataclasses import field
from typing import Any, Literal

from transformers.utils.type_validators import interval

from .configuration_megatransformer_text import MOST_LAYERS, StrictConfig, check_positive, validated


class CodecConfig(StrictConfig):
    """What the codecs have in common: ConvNeXt blocks (`convnext.py`), and discriminators by option.

    Args:
        hidden_size: Width of the blocks.
        intermediate_size: Width inside a block.
        kernel_size: Places along each side that a block looks at, odd.
        norm_eps: Epsilon of the norms.
        initializer_range: Standard deviation of the weights, above 0. Default: sqrt(2 / (5 hidden_size)).
        adversarial_weight: Factor on the losses that discriminators give; 0 is without them.
        adversarial_start: Updates before these losses begin.
        discriminator_size: Width of the discriminators' first layer.
    """

    is_causal = False
    attn_logit_softcapping = None  # no attention

    hidden_size: int = interval(min=1)(default=256)
    intermediate_size: int = interval(min=1)(default=512)
    kernel_size: int = interval(min=1)(default=3)
    norm_eps: float | int = interval(min=0.0, exclude_min=True)(default=1e-6)
    initializer_range: float | int | None = None
    adversarial_weight: float | int = interval(min=0.0)(default=0.0)
    adversarial_start: int = interval(min=0)(default=0)
    discriminator_size: int = interval(min=1)(default=32)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(2 / (5 * self.hidden_size))
        super().__post_init__(**kwargs)

    def validate_blocks(self) -> None:
        """Checks that `interval` cannot express; run by `strict` after the fields' own."""
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size ({self.kernel_size}) must be odd, so that a block has a middle")
        check_positive(self, "initializer_range")


@validated
class MegaTransformerImageAutoencoderConfig(CodecConfig):
    """Images to a few numbers for each patch, and back.

    Args:
        num_channels: Channels of an image.
        image_size: Height and width of the images that it is trained on; others, of whole patches, go as well.
        patch_size: Side in pixels of what becomes one latent.
        num_encoder_layers: Blocks of the encoder.
        num_decoder_layers: Blocks of the decoder.
        bottleneck: "sphere" latents have `latent_size` numbers whose mean square is 1 (Ke and Xue 2025, arXiv
            2509.24335),
            "fsq" latents are rounded, one code for each (Mentzer et al. 2023, arXiv 2309.15505).
        latent_size: Numbers in a latent; with "fsq" there are as many as levels.
        fsq_levels: Values that each number of a code can have, at least 2 each; with "sphere" they are not read.
        num_component_images: Images of the training data whose patches have the principal components that the linear
            path from images to images begins with; 0: it begins at random. With "fsq" it is not read.
        num_refinement_steps: Steps that improve the latents of a language model's targets, each through the decoder and
            back; 0: they are as the encoder gives them. `python -m evaluation` shows what they give. With "fsq", whose
            rounded latents have no gradient to follow, it is not read.
        latent_noise: Largest standard deviation of the noise on latents of a sphere, in training: the more, the less
            harm errors of those who write latents do, and the less detail is kept.
        pixel_loss: "absolute" is the mean absolute error of pixels, "logarithmic" the mean over images of the logarithm
            to base 10 of their mean square error, which is what peak signal-to-noise ratios measure (Chen et al. 2022,
            arXiv 2204.04676): images that are nearly right count as much as others.
        pixel_loss_weight: Factor on it.
        gradient_loss_weight: Factor on that of the differences between neighbours.
    """

    model_type = "megatransformer_image_autoencoder"
    _auto_class = "AutoConfig"

    num_channels: int = interval(min=1)(default=3)
    image_size: int = interval(min=1)(default=64)
    patch_size: int = interval(min=1)(default=8)
    num_encoder_layers: int = interval(min=0, max=MOST_LAYERS)(default=2)
    num_decoder_layers: int = interval(min=0, max=MOST_LAYERS)(default=4)
    bottleneck: Literal["sphere", "fsq"] = "sphere"
    latent_size: int = interval(min=1)(default=16)
    fsq_levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    num_component_images: int = interval(min=0)(default=0)
    num_refinement_steps: int = interval(min=0)(default=0)
    latent_noise: float | int = interval(min=0.0)(default=0.1)
    pixel_loss: Literal["absolute", "logarithmic"] = "absolute"
    pixel_loss_weight: float | int = interval(min=0.0)(default=1.0)
    gradient_loss_weight: float | int = interval(min=0.0)(default=0.3)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_codecs.MegaTransformerImageAutoencoderConfig",
            "AutoModel": "image_autoencoder.MegaTransformerImageAutoencoder",
            **(kwargs.get("auto_map") or {}),
        }
        if self.bottleneck == "fsq":
            self.latent_size = len(self.fsq_levels)
        super().__post_init__(**kwargs)

    @property
    def num_tokens(self) -> int:
        """Latents of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_codes(self) -> int:
        """Codes that a latent can be, with "fsq"."""
        return math.prod(self.fsq_levels)

    @property
    def mean_executed_layers(self) -> int:
        """Blocks between an image and its reconstruction."""
        return max(1, self.num_encoder_layers + self.num_decoder_layers)

    def validate_sizes(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise ValueError(f"fsq_levels is {self.fsq_levels}; give at least one number, each at least 2")
        if self.num_component_images and self.latent_size > self.hidden_size:
            raise ValueError(
                f"latent_size ({self.latent_size}) must be at most hidden_size ({self.hidden_size}), which "
                "num_component_images fills with components"
            )
        if self.bottleneck == "sphere" and self.latent_size < 2:
            raise ValueError(f"latent_size ({self.latent_size}) must be at least 2: a sphere of one number is a sign")


@validated
class MegaTransformerVocoderConfig(CodecConfig):
    """Log-mel spectrograms to audio. Source: Siuzdak 2023 (Vocos), arXiv 2306.00814.

    Args:
        sampling_rate: Samples per second; waveforms of another rate are resampled.
        n_fft: Samples in a frame, under a Hann window.
        hop_length: Samples from a frame to the next, at most half of n_fft.
        num_mel_bins: Mel bands of a frame.
        max_seconds: Longest waveform; what follows is not read.
        clip_seconds: What is cut out of each waveform for training, anywhere; shorter ones are followed by silence.
        num_hidden_layers: Number of blocks.
        stft_sizes: Windows of the loss on spectrograms, in samples.
        stft_loss_weight: Factor on that loss.
        mel_loss_weight: Factor on the mean absolute error of the log-mel spectrogram.
    """

    model_type = "megatransformer_vocoder"
    _auto_class = "AutoConfig"

    hidden_size: int = interval(min=1)(default=128)
    intermediate_size: int = interval(min=1)(default=384)
    kernel_size: int = interval(min=1)(default=7)
    sampling_rate: int = interval(min=1)(default=8000)
    n_fft: int = interval(min=2)(default=256)
    hop_length: int = interval(min=1)(default=80)
    num_mel_bins: int = interval(min=1)(default=64)
    max_seconds: float | int = interval(min=0.0, exclude_min=True)(default=30.0)
    clip_seconds: float | int = interval(min=0.0, exclude_min=True)(default=0.5)
    num_hidden_layers: int = interval(min=1, max=MOST_LAYERS)(default=4)
    stft_sizes: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    stft_loss_weight: float | int = interval(min=0.0)(default=1.0)
    mel_loss_weight: float | int = interval(min=0.0)(default=1.0)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_codecs.MegaTransformerVocoderConfig",
            "AutoModel": "vocoder.MegaTransformerVocoder",
            **(kwargs.get("auto_map") or {}),
        }
        super().__post_init__(**kwargs)

    @property
    def clip_samples(self) -> int:
        """Samples of a waveform for training: whole frames, at least one."""
        return max(1, round(self.clip_seconds * self.sampling_rate / self.hop_length)) * self.hop_length

    @property
    def mean_executed_layers(self) -> int:
        """Blocks between a spectrogram and its audio."""
        return self.num_hidden_layers

    def validate_sizes(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.n_fft % 2 or 2 * self.hop_length > self.n_fft:
            raise ValueError(
                f"hop_length ({self.hop_length}) must be at most half of n_fft ({self.n_fft}), which must be even: "
                "frames that overlap less do not make a sound"
            )
        if self.num_mel_bins > self.n_fft // 2:
            raise ValueError(f"num_mel_bins ({self.num_mel_bins}) must be at most n_fft / 2 ({self.n_fft // 2})")
        if not self.stft_sizes or min(self.stft_sizes) < 16:
            raise ValueError(f"stft_sizes is {self.stft_sizes}; give at least one window, of 16 samples or more")
        if max(self.stft_sizes) > self.clip_samples:
            raise ValueError(
                f"stft_sizes ({self.stft_sizes}) has windows longer than a clip of {self.clip_samples} samples; raise "
                "clip_seconds or leave them out"
            )
