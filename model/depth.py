"""How deep the core is iterated: the depth of a training step, the `num_steps` of `forward`, the noise on the way, and
what `generate` was asked for.

Source of what has no other named: Geiping et al. 2025, arXiv 2502.05171 ("the paper" below).
"""

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from .configuration_megatransformer_text import MegaTransformerTextConfig, RecurrenceConfig
from .exit_criteria import ExitOptions

logger = logging.get_logger(__name__)


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on `key` alone: the same on every rank, after resuming, in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_depth(config: RecurrenceConfig, *key: int | str) -> tuple[int, int]:
    """Draws the depth of one micro-batch from `key`, usually (seed, global step, micro-batch), and from nothing else.

    p = Poisson(exp(Normal(ln mean - sigma^2/2, sigma))) + 1 (the paper's section 3.3; the mean of p is mean + 1). Of
    untied cores all take their step, and learn.

    Returns:
        (n, k): n = max(p - backprop_steps, 0) steps without gradient, then k = min(backprop_steps, p) steps with.
    """
    generator = keyed_generator("depth", *key)
    mean = config.mean_steps
    if config.untied_core:
        return 0, mean
    if config.step_distribution == "lognormal-poisson":
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        rate = torch.exp(math.log(mean) - config.step_sigma**2 / 2 + config.step_sigma * normal)
        steps = int(torch.poisson(rate, generator=generator)) + 1
    elif config.step_distribution == "poisson":
        steps = int(torch.poisson(torch.tensor(float(mean - 1)), generator=generator)) + 1
    elif config.step_distribution == "uniform":
        steps = int(torch.randint(1, 2 * mean, (), generator=generator))
    else:
        steps = mean
    return max(steps - config.backprop_steps, 0), min(config.backprop_steps, steps)


@dataclass(frozen=True)
class Depth:
    """A resolved depth: at most `total` steps, the first `no_grad` of them without gradient; where rows differ, `rows`,
    (batch,), on the CPU.
    """

    no_grad: int
    total: int
    rows: torch.Tensor | None = None


def resolve_depth(
    num_steps: int | tuple[int, int] | torch.Tensor | None,
    config: MegaTransformerTextConfig,
    batch_size: int,
    training: bool = False,
) -> Depth:
    """Turns the `num_steps` argument of `forward` into a depth; the only place that knows what it may be.

    Args:
        num_steps: Steps, all with gradient; or (n, k): n steps without gradient, then k with; or (batch,): steps of
            each row, all with gradient; or None: `config.num_steps`, else the mean, of which in training only the last
            `backprop_steps` carry gradient.

    Raises:
        ValueError: a number is below 1, a tensor has the wrong shape or type, or the model has no core, or untied ones
            and is asked for another depth than its own.
    """
    if config.num_core_layers and config.recurrence.untied_core:
        return _resolve_untied(num_steps, config.recurrence.mean_steps)
    if config.num_core_layers == 0:
        if num_steps is not None:
            raise ValueError(
                f"num_steps ({num_steps}) was given, but this model has no core to iterate (num_core_layers is 0)"
            )
        return Depth(0, 0)
    if num_steps is None:
        steps = config.num_steps or config.recurrence.mean_steps
        if training and torch.is_grad_enabled() and config.recurrence.step_distribution != "fixed":
            logger.warning_once(
                f"The model trains at {steps} core steps in every update, since no num_steps was given, and will work "
                f"best at that depth alone; to draw depths, give the trainer callbacks=[model.depth_callback()], or "
                f"forward num_steps={steps} to say that it is meant"
            )
        return Depth(max(steps - config.recurrence.backprop_steps, 0) if training else 0, steps)
    if isinstance(num_steps, torch.Tensor) and num_steps.ndim > 0:
        return _resolve_rows(num_steps, batch_size)
    if isinstance(num_steps, tuple):
        if len(num_steps) != 2 or any(_as_count(n, minimum=0) is None for n in num_steps) or sum(num_steps) < 1:
            raise ValueError(
                f"num_steps {num_steps} must be two counts (without gradient, with gradient), at least 1 in sum"
            )
        return Depth(int(num_steps[0]), int(num_steps[0]) + int(num_steps[1]))
    steps = _as_count(num_steps, minimum=1)
    if steps is None:
        raise ValueError(
            "num_steps must be an integer of at least 1, a tuple of two counts, or a tensor (batch,); "
            f"got {num_steps!r}"
        )
    return Depth(0, steps)


def _resolve_untied(num_steps: int | tuple[int, int] | torch.Tensor | None, only: int) -> Depth:
    """The one depth of untied cores, all with gradient, since each learns by its own step alone."""
    asked = num_steps.tolist() if isinstance(num_steps, torch.Tensor) else num_steps
    asked = sum(asked) if isinstance(asked, tuple) else asked
    if any(steps not in (None, only) for steps in (asked if isinstance(asked, list) else [asked])):
        raise ValueError(
            f"num_steps is {asked!r:.60}, but this model has {only} untied cores, each for one step (untied_core); "
            f"give {only}, or leave it out"
        )
    return Depth(0, only)


def _resolve_rows(num_steps: torch.Tensor, batch_size: int) -> Depth:
    if num_steps.shape != (batch_size,) or num_steps.is_floating_point() or num_steps.dtype == torch.bool:
        raise ValueError(
            f"num_steps as a tensor must hold one integer for each of the {batch_size} rows, got shape "
            f"{tuple(num_steps.shape)} of {num_steps.dtype}"
        )
    if int(num_steps.min()) < 1:
        raise ValueError(f"num_steps must be at least 1 in every row, got {num_steps.tolist()}")
    return Depth(0, int(num_steps.max()), rows=num_steps.cpu())


def _as_count(value, minimum: int) -> int | None:
    """`value` as an int of at least `minimum`, or None if it is no such number."""
    try:
        count = operator.index(value)
    except TypeError:
        return None
    return count if not isinstance(value, bool) and count >= minimum else None


# ---------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class NoiseOptions:
    """Normal noise in the state at test time: x <- norm((1 - w) x + w noise) before each step, where after i steps
    w = level * initializer_range * embedding_scale / (i + 1).

    Source: the released code of the paper, which draws from the global generator. Here the noise of a token depends on
    its position, the step and the seed alone. ValueError: the level is negative.

    Args:
        level: Amount of noise, at least 0, which is none; 1 is as much as the initial state has.
    """

    level: float = 0.0

    def __post_init__(self) -> None:
        if self.level < 0:
            raise ValueError(f"noise_level must be at least 0, got {self.level}")

    def mix(
        self, step: int, state: torch.Tensor, position_ids: torch.Tensor, config: MegaTransformerTextConfig
    ) -> torch.Tensor:
        """(1 - w) x + w noise after `step` steps, of a state (rows, sequence, hidden) at positions (1 or rows,
        sequence).
        """
        positions, indices = position_ids.cpu().unique(return_inverse=True)
        seed = config.recurrence.state_seed
        draws = [
            torch.randn(state.shape[-1], generator=keyed_generator("noise", seed, step, position))
            for position in positions.tolist()
        ]
        weight = self.level * config.initializer_range * config.embedding_scale / (step + 1)
        return torch.lerp(state, torch.stack(draws)[indices].to(state), weight)


@dataclass(frozen=True)
class ContrastOptions:
    """Contrast between the last state of a token and an earlier one: the distribution is read from s_r + strength *
    (s_r - s_e), and only tokens stay possible that have at least `alpha` of the largest probability that s_r gives. A
    token that took fewer than e steps has no contrast. Of a latent, v_r + strength * (v_r - v_e) is the velocity, where
    v_e is what the readout of s_e gives.

    Source: LoopCD, arXiv 2610.02185. Public code of it mixes logits; here states are mixed, before the readout.

    Args:
        strength: How far the state goes on in the direction of its steps.
        step: e.
        alpha: Share of the largest probability, from 0 to 1.

    Raises:
        ValueError: a value is outside its range.
    """

    strength: float
    step: int = 1
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not (isinstance(self.strength, int | float) and math.isfinite(self.strength)):
            raise ValueError(f"contrast_strength must be a finite number, got {self.strength!r}")
        if not isinstance(self.step, int) or isinstance(self.step, bool) or self.step < 1:
            raise ValueError(f"contrast_step must be an integer of at least 1, got {self.step!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"contrast_alpha must be from 0 to 1, got {self.alpha!r}")

    def mix(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """s_0 .. s_r, (batch, sequence, hidden) each -> what is read, of the same shape."""
        last, early = states[-1], states[min(self.step, len(states) - 1)]
        return last + self.strength * (last - early)

    @property
    def of_early(self) -> "ContrastOptions":
        """The contrast that mixes the states to s_e alone."""
        return replace(self, strength=-1.0)

    def mask(self, logits: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """Logits of the mixed state, -inf where those of the last state, `late`, say that a token is unlikely."""
        if not self.alpha:
            return logits
        return logits.masked_fill(late < late.amax(-1, keepdim=True) + math.log(self.alpha), -torch.inf)


CONTRAST_KEYWORDS = {"contrast_strength": "strength", "contrast_step": "step", "contrast_alpha": "alpha"}
"""Keywords of `generate`, and the fields of `ContrastOptions` that they fill."""


# ----------------------------------------------------------------------------------------------------------- `generate`


@dataclass(frozen=True)
class DepthOptions:
    """What `generate` is asked for: the steps of each token, and what ends or perturbs them."""

    num_steps: int | torch.Tensor | dict[str, int] | None = None
    """An int, or (rows,), or an int by what is generated: "text" and modalities; None: `config.num_steps`, else the
    mean.
    """
    exits: ExitOptions = field(default_factory=ExitOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    state_warm_start: bool = False
    contrast: ContrastOptions | None = None

    @staticmethod
    def names() -> list[str]:
        """The keywords of `generate` from which the options come."""
        others = ("noise_level", "noise_schedule", "state_warm_start")
        return ["num_steps", *EXIT_KEYWORDS, *others, *CONTRAST_KEYWORDS]

    @classmethod
    def resolve(
        cls, keywords: dict[str, Any], generation_config: GenerationConfig, recurrence: RecurrenceConfig
    ) -> "DepthOptions":
        """Each option: the keyword, then the generation config, then `config.recurrence`; ValueError for one outside
        its range, or for a keyword that has no effect beside the others.
        """
        sources = (keywords, vars(generation_config), vars(recurrence))

        def chosen(name: str) -> Any:
            return next((source[name] for source in sources if source.get(name) is not None), None)

        if (schedule := chosen("noise_schedule")) not in (None, "geom"):
            raise ValueError(
                f"noise_schedule is {schedule!r}, but noise falls with the number of steps alone, which was 'geom'; "
                "leave it out"
            )
        exits = {field: value for name, field in EXIT_KEYWORDS.items() if (value := chosen(name)) is not None}
        check_exit_keywords(keywords, exits.get("criterion", "none"))
        noise = NoiseOptions(chosen("noise_level") or 0.0)
        asked = {field: value for name, field in CONTRAST_KEYWORDS.items() if (value := chosen(name)) is not None}
        if asked and not asked.get("strength"):
            unread = [name for name in CONTRAST_KEYWORDS if keywords.get(name)]
            if unread:
                raise ValueError(f"{unread[0]} has no effect without contrast_strength; leave it out, or give that")
            asked = {}
        contrast = ContrastOptions(**asked) if asked else None
        return cls(chosen("num_steps"), ExitOptions(**exits), noise, bool(chosen("state_warm_start")), contrast)

    @property
    def is_fixed(self) -> bool:
        """Whether all tokens of a row take the same steps, and nothing else is asked for."""
        is_plain = not (self.noise.level or self.state_warm_start or self.contrast)
        return is_plain and self.exits.criterion == "none"

    def steps_of(self, modality: str) -> int | torch.Tensor | None:
        """Core steps of positions in which this is generated."""
        return self.num_steps.get(modality) if isinstance(self.num_steps, dict) else self.num_steps

    @property
    def of_states(self) -> dict[str, Any]:
        """The arguments of `forward` that say where an iteration begins, what perturbs it, and what is read of it."""
        asked = {"state_noise": self.noise} if self.noise.level else {}
        asked |= {"initial_state": "last"} if self.state_warm_start else {}
        return asked | ({} if self.contrast is None else {"contrast": self.contrast})

    def arguments_of_token(self, index: int, num_rows: int, most: int) -> dict[str, Any]:
        """The arguments of `forward` for new token number `index`, counted from 0, which is read off the prompt. The
        prompt takes all steps unless told otherwise, and a schedule is a number of steps; ValueError for one above
        `most`, the smallest `num_steps` of a row.
        """
        steps, exits = self.num_steps, self.exits
        if index == 0 and not exits.in_prefill:
            exits = ExitOptions()
        elif exits.criterion == "schedule":
            steps, exits = exits.scheduled_steps(index), ExitOptions()
            if steps > most:
                raise ValueError(
                    f"exit_schedule takes {steps} steps for new token {index}, but num_steps is {most}; raise num_steps"
                )
        if isinstance(steps, torch.Tensor) and steps.ndim and len(steps) < num_rows:  # several sequences of a prompt
            steps = steps.repeat_interleave(num_rows // len(steps))
        asked = {"num_steps": steps} if steps is not None else {}
        asked |= {"exits": exits} if exits.criterion != "none" else {}
        return asked | self.of_states


EXIT_KEYWORDS = {
    "exit_criterion": "criterion",
    "exit_threshold": "threshold",
    "min_steps": "min_steps",
    "exit_check_interval": "check_interval",
    "exit_in_prefill": "in_prefill",
    "exit_schedule": "schedule",
}
"""Keywords of `generate`, and the fields of `ExitOptions` that they fill."""


def check_exit_keywords(keywords: dict[str, Any], criterion: str) -> None:
    """Raises ValueError for an option of exits that is not read; a schedule may stand in a criterion's place."""
    read = {"none": {"exit_criterion"}, "schedule": EXIT_KEYWORDS.keys()}
    read = read.get(criterion, EXIT_KEYWORDS.keys() - {"exit_schedule"})
    unread = [name for name in EXIT_KEYWORDS if keywords.get(name) not in (None, False) and name not in read]
    if unread:
        needed = "'schedule'" if unread[0] == "exit_schedule" else "another"
        raise ValueError(f"{unread[0]} has no effect with exit_criterion {criterion!r}; leave it out, or name {needed}")
