"""A learned distribution over the step after which a token is read.

Sources: Zhu et al. 2025, arXiv 2510.25741 (Ouro), section 3; with the mean of a batch, arXiv 2610.09013.
"""

from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from .base import Objective, TrainingPass


class ExitDistribution(Objective):
    """sum_i p(i) L_i + weight KL(p || prior) for each token, over all steps i = 1 .. r, all with gradient.

    The gate is the exit probe of the model: it gives lambda_i = sigmoid(probe(s_i, s_{i-1})), the probability to exit
    after step i if not before, and p(i) = lambda_i prod_{j < i} (1 - lambda_j); the last step takes what is left. At
    inference the exit criterion `probe` reads it, with a threshold of 1 - lambda. Ouro has - weight H(p), which is the
    divergence from equally likely steps but for a constant. With the prior "batch" the divergence is that of the mean
    of p over the tokens of a micro-batch, so that single tokens may be sure of their steps.
    """

    options_read = ("weight", "prior", "prior_steps")
    default_weight = 0.1
    is_read_after_steps = reads_tokens = trains_exit_probe = True

    def check_model(self, model: PreTrainedModel) -> None:
        if model.base_model.exit_probe is None:
            raise ValueError(
                "training.objective.name is 'exit_distribution', whose gate is the exit probe, which this model has "
                "not; set model.recurrence.exit_probe to true"
            )

    def depth(self, without_gradient: int, with_gradient: int) -> tuple[int, int]:
        return 0, without_gradient + with_gradient

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        probe = of.model.base_model.exit_probe
        log_p = log_exit_probabilities([probe(now, before) for before, now in pairwise(of.states)])
        hidden = [*map(of.read, of.states[1:-1]), of.outputs.last_hidden_state]
        losses = [of.token_loss(each, weights) for each, weights in zip(hidden, log_p.exp(), strict=True)]
        log_prior = log_exit_prior(len(log_p), self.options.prior_steps).to(log_p.device)
        weights = of.label_weights / of.num_items
        if self.options.prior == "batch":
            weights = weights.sum()  # for the one distribution that there is
            mean = (log_p.exp() * of.label_weights).sum((1, 2)) / of.label_weights.sum().clamp(min=1e-9)
            log_p = mean.clamp(min=1e-9).log()
        divergences = (log_p.exp() * (log_p - log_prior.view(-1, *[1] * (log_p.ndim - 1)))).sum(0)
        return sum(losses) + self.weight * (weights * divergences).sum()


def log_exit_probabilities(logits: list[torch.Tensor]) -> torch.Tensor:
    """Logits of lambda_1 .. lambda_r, (...) each -> ln p(1) .. ln p(r), float32 (r, ...)."""
    stacked = torch.stack(logits).float()
    stays = nn.functional.logsigmoid(-stacked).cumsum(0)
    before = torch.cat((torch.zeros_like(stays[:1]), stays[:-1]))  # ln of the probability to be there in step i
    return torch.cat((nn.functional.logsigmoid(stacked[:-1]) + before[:-1], before[-1:]))


def log_exit_prior(num_steps: int, mean: float | None) -> torch.Tensor:
    """ln of the prior over r steps, (r,): uniform, or geometric with this mean, of which the last step takes what is
    left.
    """
    if mean is None:
        return torch.zeros(num_steps).log_softmax(0)
    exits = torch.full((num_steps,), 1 / mean)
    return log_exit_probabilities(list(exits.logit()))
