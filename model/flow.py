"""The flow head: a hidden state and noise to a latent, by a rectified flow of each token's own.

    x_t = (1 - t) eps + t z          eps ~ N(0, I),  t = sigmoid(N(0, 1)),  t = 1 is data
    v   = z - eps                    what is predicted, of x_t, t and the condition c(h)
    x_{t + dt} = x_t + dt v          from t = 0 to 1, to sample

Sources: Liu et al. 2022, arXiv 2209.03003 (rectified flow); Li et al. 2024, arXiv 2406.11838 (a small network for each
token); Peebles and Xie 2022, arXiv 2212.09748 (AdaLN-Zero); Esser et al. 2024, arXiv 2403.03206 (times).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from .configuration_megatransformer import WriterConfig

TIME_FEATURES = 256
SAMPLING_MIN_SIGMA = 0.05
"""Smallest 1 - t by which a sampler divides, with prediction "x"; the loss has its own."""


class OutputProjection(nn.Linear):
    """A linear map that begins as zero, so that what it adds begins as nothing."""

    is_zero_at_first = True


class TimeEmbedding(nn.Module):
    """Times in 0 .. 1 to vectors: cosines and sines of 1000 t at frequencies 1 .. 1/10000, linear, SiLU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(TIME_FEATURES, width)
        self.down_proj = nn.Linear(width, width)

    def forward(self, times: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(tokens,) -> (tokens, width) of `dtype`, that of the weights."""
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=times.device) / half)
        angles = 1000 * times.float().unsqueeze(-1) * frequencies
        features = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        return self.down_proj(nn.functional.silu(self.up_proj(features)))


class FlowBlock(nn.Module):
    """x + gate * MLP(scale * LN(x) + shift), with gate, scale and shift from the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = OutputProjection(width, 3 * width)
        self.up_proj = nn.Linear(width, width)
        self.down_proj = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(tokens, width) each."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        inner = self.norm(hidden) * (1 + scale) + shift
        return hidden + gate * self.down_proj(nn.functional.silu(self.up_proj(inner)))


class FlowHead(nn.Module):
    """Hidden states of width `hidden_size` to latents of `latent_size` numbers; places of an item behind `num_places`
    count as the last.
    """

    def __init__(self, config: WriterConfig, hidden_size: int, latent_size: int, num_places: int, norm_eps: float):
        super().__init__()
        width = config.flow_hidden_size
        self.latent_size, self.num_draws, self.min_sigma = latent_size, config.num_draws, config.flow_min_sigma
        self.predicts_latent = (config.flow_prediction or ("v" if latent_size <= 64 else "x")) == "x"
        self.condition_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.condition_proj = nn.Linear(hidden_size, width)
        self.place_embedding = nn.Embedding(num_places, width)
        self.time_embedding = TimeEmbedding(width)
        self.in_proj = nn.Linear(latent_size, width)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(config.flow_num_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = OutputProjection(width, 2 * width)
        self.out_proj = OutputProjection(width, latent_size)

    def condition(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden_size), and (tokens,) positions in their item -> (tokens, width)."""
        places = places.clamp(max=self.place_embedding.num_embeddings - 1)
        return self.condition_proj(self.condition_norm(hidden)) + self.place_embedding(places)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """f(x_t, t, c): (tokens, latent_size), (tokens,), (tokens, width) -> (tokens, latent_size)."""
        condition = nn.functional.silu(condition + self.time_embedding(times, condition.dtype))
        hidden = self.in_proj(noisy)
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.out_proj(self.norm(hidden) * (1 + scale) + shift)

    def velocity(
        self, noisy: torch.Tensor, times: torch.Tensor, condition: torch.Tensor, min_sigma: float = SAMPLING_MIN_SIGMA
    ) -> torch.Tensor:
        """v(x_t, t, c), also where the network predicts the latent: (z - x_t) / max(1 - t, min_sigma)."""
        prediction = self(noisy.to(condition.dtype), times, condition).float()
        if not self.predicts_latent:
            return prediction
        return (prediction - noisy) / (1 - times).clamp(min=min_sigma).unsqueeze(-1)

    def losses(
        self, condition: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """|v(x_t) - v|^2 of each token, float32 (tokens,): the mean over its numbers and draws. Shapes: condition
        (tokens, width), latents (tokens, latent_size), standard normal noise (tokens, draws, latent_size), times
        (tokens, draws).
        """
        draws = times.shape[1]
        condition = condition.repeat_interleave(draws, dim=0)
        latents = latents.float().repeat_interleave(draws, dim=0)
        noise, times = noise.flatten(0, 1), times.flatten()
        noisy = torch.lerp(noise, latents, times.unsqueeze(-1))
        predicted = self.velocity(noisy, times, condition, self.min_sigma)
        target = latents - noise
        if self.predicts_latent:  # the same bound as above, so that a right prediction has no loss
            target = (latents - noisy) / (1 - times).clamp(min=self.min_sigma).unsqueeze(-1)
        return (predicted - target).square().mean(dim=-1).view(-1, draws).mean(dim=1)

    def sample(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor,
        num_steps: int,
        shift: float = 1.0,
        away: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> torch.Tensor:
        """Latents, float32 (tokens, latent_size), by Euler's method.

        Args:
            condition: (tokens, width).
            noise: (tokens, latent_size), x_0.
            num_steps: Steps from t = 0 to 1.
            shift: Steps are denser near the noise where it is above 1.
            away: Strengths, (tokens,), and conditions, (tokens, width), from which the velocity is led away: the sum of
                strength * (v - v_other) is added to v. Guidance of scale w leads away from the condition without the
                prompt, with w - 1.
        """
        times = torch.linspace(0, 1, num_steps + 1, device=noise.device)
        times = times / (shift - (shift - 1) * times)
        latents = noise.float()
        conditions = torch.cat([condition, *(other for _, other in away)])
        for time, following in pairwise(times):
            here = latents.repeat(1 + len(away), 1)
            first, *others = self.velocity(here, time.expand(len(here)), conditions).split(len(latents))
            velocity = first
            for (strength, _), other in zip(away, others, strict=True):
                velocity = velocity + strength.to(first).unsqueeze(-1) * (first - other)
            latents = latents + (following - time) * velocity
        return latents


def draw_times(shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """Times of training, logit-normal."""
    return torch.randn(shape, generator=generator).sigmoid()
