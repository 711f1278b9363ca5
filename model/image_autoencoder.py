"""Images to a few numbers for each patch, and back."""

import math

import torch
from torch import nn

from .configuration_codecs import MegaTransformerImageAutoencoderConfig
from .reconstruction import ConvNeXtBlock, ReconstructionModel, ReconstructionOutput

COMPONENTS_SIZE = 0.5
"""Size of the principal components of a patch together, beside the constant; see `begin_with_components`."""
REFINEMENT_RATE = 0.03
"""Rate of the first step of `refine`, for numbers whose mean square is 1."""


class PatchBlocks(nn.Module):
    """Numbers of each patch to other numbers, by blocks whose convolutions compare it with those around."""

    def __init__(self, config: MegaTransformerImageAutoencoderConfig, num_inputs: int, num_outputs: int, count: int):
        super().__init__()
        self.embed = nn.Linear(num_inputs, config.hidden_size)
        # No norm stands behind the last one either: most of what an autoencoder does is linear.
        self.blocks = nn.ModuleList(ConvNeXtBlock(config, dimensions=2, has_linear_path=True) for _ in range(count))
        self.head = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(images, rows, columns, num_inputs) -> (images, rows, columns, num_outputs)."""
        hidden = self.embed(patches).movedim(-1, 1)  # (images, hidden, rows, columns)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.movedim(1, -1))


class Sphere(nn.Module):
    """Latents of mean square 1: sqrt(C) x / |x|. What is written one by one cannot drift away from them.

    Source: Ke and Xue 2025 (SphereAR), arXiv 2509.24335, without its distribution on the sphere: ours are points, with
    noise in training.
    """

    def __init__(self, config: MegaTransformerImageAutoencoderConfig):
        super().__init__()
        self.noise = config.latent_noise

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(images, tokens, C) -> the same."""
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-8)

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """The nearest ones on the sphere."""
        return self(latents)

    def perturb(self, latents: torch.Tensor) -> torch.Tensor:
        """Adds noise whose deviation is drawn for each image, and goes back to the sphere."""
        if not self.noise:
            return latents
        deviation = self.noise * torch.rand(len(latents), 1, 1, device=latents.device, dtype=latents.dtype)
        return self(latents + deviation * torch.randn_like(latents))


class FiniteScalars(nn.Module):
    """Latents of a few values each, from -1 to 1. Their gradient passes as if nothing were rounded.

    Source: Mentzer et al. 2023 (FSQ), arXiv 2309.15505.
    """

    def __init__(self, config: MegaTransformerImageAutoencoderConfig):
        super().__init__()
        self.levels = config.fsq_levels

    def _constants(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels, and how many codes one step of each number is; of the device and type of `like`."""
        steps = [math.prod(self.levels[:number]) for number in range(len(self.levels))]
        return like.new_tensor(self.levels), like.new_tensor(steps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(images, tokens, numbers) -> the same. An even number of levels has one more below 0 than above. Computed in
        float32: bfloat16 has no number between 1 and 1.001, and two levels would be infinite.
        """
        dtype, hidden = hidden.dtype, hidden.float()
        levels, _ = self._constants(hidden)
        half = (levels - 1) * (1 + 1e-3) / 2  # a little more than to the outer values, as two levels need it
        offset = (levels % 2 == 0) * 0.5
        bounded = torch.tanh(hidden + torch.atanh(offset / half)) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return (rounded / (levels // 2)).to(dtype)

    def project(self, latents: torch.Tensor) -> torch.Tensor:
        """The nearest values."""
        levels, _ = self._constants(latents)
        digits = (latents * (levels // 2)).round() + levels // 2
        return (digits.clamp(min=0).minimum(levels - 1) - levels // 2) / (levels // 2)

    def perturb(self, latents: torch.Tensor) -> torch.Tensor:
        """Leaves them as they are: rounding is noise enough."""
        return latents

    def ids(self, latents: torch.Tensor) -> torch.LongTensor:
        """(images, tokens, numbers) -> (images, tokens), from 0 to the product of the levels, exclusive."""
        levels, steps = self._constants(latents.float())
        digits = (latents.float() * (levels // 2)).round() + levels // 2
        return (digits * steps).sum(dim=-1).long()

    def latents(self, ids: torch.LongTensor) -> torch.Tensor:
        """The way back, float32."""
        levels, steps = self._constants(ids)
        digits = ids.unsqueeze(-1) // steps % levels
        return (digits - levels // 2) / (levels // 2)


class MegaTransformerImageAutoencoder(ReconstructionModel):
    """Images to latents and back."""

    config: MegaTransformerImageAutoencoderConfig
    _auto_class = "AutoModel"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MegaTransformerImageAutoencoderConfig):
        super().__init__(config)
        num_numbers = config.num_channels * config.patch_size**2  # of a patch
        self.encoder = PatchBlocks(config, num_numbers, config.latent_size, config.num_encoder_layers)
        self.bottleneck = {"sphere": Sphere, "fsq": FiniteScalars}[config.bottleneck](config)
        self.decoder = PatchBlocks(config, config.latent_size, num_numbers, config.num_decoder_layers)
        self.discriminators = self.build_discriminators([{"view": nn.Identity(), "channels": config.num_channels}])
        self.post_init()

    @property
    def num_tokens(self) -> int:
        """Latents of an image of the configured size."""
        return self.config.num_tokens

    @property
    def latent_size(self) -> int:
        """Numbers in a latent."""
        return self.config.latent_size

    @property
    def num_component_images(self) -> int:
        """Images that `begin_with_components` is to be given before training; 0: none."""
        return self.config.num_component_images if self.config.bottleneck == "sphere" else 0

    @property
    def num_refinement_steps(self) -> int:
        """Steps of `refine`; 0: none."""
        return self.config.num_refinement_steps if self.config.bottleneck == "sphere" else 0

    def loss_weights(self) -> dict[str, float]:
        return {"pixels": self.config.pixel_loss_weight, "gradients": self.config.gradient_loss_weight}

    def encode(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        """(images, channels, side, side) in -1 .. 1 -> (images, tokens, latent_size); ValueError if images are no
        squares of whole patches.
        """
        patch, channels = self.config.patch_size, self.config.num_channels
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or shape[2] % patch or not shape[2]:
            raise ValueError(
                f"pixel_values has shape {shape}, expected (images, {channels}, side, side), a multiple of patch_size "
                f"({patch})"
            )
        pixels = pixel_values.to(self.encoder.embed.weight.dtype)
        patches = nn.functional.pixel_unshuffle(pixels, patch)  # (images, numbers, rows, columns)
        return self.bottleneck(self.encoder(patches.movedim(1, -1)).flatten(1, 2))

    def refine(self, pixel_values: torch.FloatTensor, latents: torch.FloatTensor) -> torch.Tensor:
        """Latents that the decoder makes better images of: `num_refinement_steps` of Adam, on each image's error, from
        those that `encode` gave; (images, channels, side, side) in -1 .. 1, (images, tokens, latent_size) -> the
        latter, on the sphere and without gradient. An encoder is a guess at the best latents, good on average; what it
        misses for an image is found by looking at what the decoder made of the guess. Source: Yang et al. 2020, arXiv
        2006.04240, without its rounding.
        """
        count = self.num_refinement_steps
        if not count:
            return latents.detach()
        with torch.inference_mode(False), torch.enable_grad():
            images, moving = pixel_values.clone(), latents.detach().float().clone().requires_grad_()
            optimizer = torch.optim.Adam([moving], betas=(0.8, 0.99))
            for step in range(count):
                optimizer.param_groups[0]["lr"] = REFINEMENT_RATE * (1 - step / count)
                made = self.decode(self.project(moving).to(latents.dtype)).float()
                # Each image has an error of its own: who else is in the batch makes no difference.
                (moving.grad,) = torch.autograd.grad(logarithmic_loss(made, images) * len(images), moving)
                optimizer.step()
        return self.project(moving.detach()).to(latents.dtype)

    def decode(self, latents: torch.FloatTensor) -> torch.Tensor:
        """(images, tokens, latent_size) -> (images, channels, side, side), about -1 .. 1; ValueError if latents have
        another size, or make no square.
        """
        shape = tuple(latents.shape)
        if len(shape) != 3 or shape[2] != self.latent_size or math.isqrt(shape[1]) ** 2 != shape[1] or not shape[1]:
            raise ValueError(
                f"latents have shape {shape}, expected (images, tokens, {self.latent_size}), the tokens a square"
            )
        side = math.isqrt(shape[1])
        patches = self.decoder(latents.unflatten(1, (side, side)))
        return nn.functional.pixel_shuffle(patches.movedim(-1, 1), self.config.patch_size)

    @torch.no_grad()
    def begin_with_components(self, images: torch.FloatTensor) -> None:
        """Makes of the whole a linear map, through the principal components of the patches of images, (images,
        channels, side, side) in -1 .. 1. What training then finds by itself it finds sooner: the components are the
        best that a linear map can do. Blocks begin as the identity, and one number of a latent is constant, so that the
        sphere hardly bends the others. ValueError: there are fewer patches than latent_size.
        """
        patches = nn.functional.pixel_unshuffle(images.float(), self.config.patch_size).movedim(1, -1).flatten(0, -2)
        count = min(self.latent_size - 1, patches.shape[1])
        if len(patches) <= count:
            raise ValueError(f"{len(patches)} patches do not have {count} principal components; take more images")
        mean = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variances, directions = variances[-count:].flip(0).clamp(min=1e-8), directions[:, -count:].flip(1)
        # Those of small variance are amplified, by its fourth root; all together are half as large as the constant.
        gains = variances**-0.25
        gains *= COMPONENTS_SIZE / (gains.square() * variances).sum().sqrt()
        radius = math.sqrt((1 + COMPONENTS_SIZE**2) / self.latent_size)  # by which latents on the sphere are too large

        encoder, decoder = self.encoder, self.decoder
        for block in (*encoder.blocks, *decoder.blocks):
            nn.init.zeros_(block.down_proj.weight)
        for layer in (encoder.head, decoder.embed, decoder.head):
            nn.init.zeros_(layer.weight)
        encoder.embed.weight[:count] = (directions * gains).T
        encoder.embed.bias[:count] = -mean @ directions * gains
        encoder.head.weight[:count, :count].fill_diagonal_(1)
        encoder.head.bias[-1] = 1
        decoder.embed.weight[:count, :count].fill_diagonal_(1)
        decoder.head.weight[:, :count] = directions / gains * radius
        decoder.head.bias.copy_(mean)

    def project(self, latents: torch.FloatTensor) -> torch.Tensor:
        """The nearest latents that `encode` could have given, (..., latent_size)."""
        return self.bottleneck.project(latents)

    def encode_ids(self, pixel_values: torch.FloatTensor) -> torch.LongTensor:
        """The codes of images, (images, tokens), from 0 to `config.num_codes`, exclusive; ValueError if the bottleneck
        has no codes, or the images are those that `encode` refuses.
        """
        return self._codes().ids(self.encode(pixel_values))

    def decode_ids(self, ids: torch.LongTensor) -> torch.Tensor:
        """(images, tokens) -> (images, channels, side, side); ValueError where there are no codes, or not these."""
        codes = self._codes()
        if ids.numel() and not (ids.min() >= 0 and ids.max() < self.config.num_codes):
            raise ValueError(
                f"ids are from {int(ids.min())} to {int(ids.max())}, but there are codes 0 to "
                f"{self.config.num_codes - 1}"
            )
        return self.decode(codes.latents(ids).to(self.decoder.head.weight.dtype))

    def _codes(self) -> FiniteScalars:
        if self.config.bottleneck != "fsq":
            raise ValueError(
                f"bottleneck {self.config.bottleneck!r} has no codes; train an autoencoder with bottleneck 'fsq'"
            )
        return self.bottleneck

    def forward(self, pixel_values: torch.FloatTensor, step: int | None = None) -> ReconstructionOutput:
        """Images, (images, channels, side, side) in -1 .. 1, through the bottleneck, and how well they came through;
        `step` as in `compare`.
        """
        latents = self.encode(pixel_values)
        made = self.decode(self.bottleneck.perturb(latents) if self.training else latents).float()
        pixels = {"absolute": absolute_loss, "logarithmic": logarithmic_loss}[self.config.pixel_loss]
        losses = {"pixels": pixels(made, pixel_values), "gradients": gradient_loss(made, pixel_values)}
        return self.compare(made, pixel_values, losses, step)


def absolute_loss(made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of pixels."""
    return (made - images).abs().mean()


def logarithmic_loss(made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """log10 of the mean square error of an image, on average; a tenth of what its ratio of signal to noise lacks."""
    errors = (made - images).square().flatten(1).mean(dim=1)
    return (errors + 1e-8).log10().mean()  # an image of one colour may be right to the last bit


def gradient_loss(made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbours, down and across; (images, channels, height, width)."""
    error = made - images
    return (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
