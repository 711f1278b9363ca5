"""When a row may stop iterating: what is read after a step, the criteria that judge it, and who asks them.

Source: Geiping et al. 2025, arXiv 2502.05171, section 6.1, and its released code. P_i is the next-token distribution
that coda and head read from the state s_i.

    | criterion          | value after step i                                            | stops when  | default |
    |--------------------|---------------------------------------------------------------|-------------|---------|
    | kl_divergence      | KL(P_{i-1} || P_i), P_0 uniform                               | < threshold | 5e-4    |
    | min_p_kl           | the same after p < 0.1 max p became 1 / vocab, and sum 1      | < threshold | 1e-5    |
    | entropy_difference | |H(P_i) - H(P_{i-1})|, H(P_0) = 100                           | < threshold | 1e-3    |
    | latent_difference  | mean over tokens of |s_i - s_{i-1}| / |s_i|                   | < threshold | 0.03    |
    | cosine             | 1 - mean over tokens of cos(s_i, s_{i-1})                     | < threshold | 1e-3    |
    | argmax_stability   | checks in a row that left the likeliest token as it was       | >= threshold | 5      |
    | probe              | probability that more steps would change P, by a trained head | < threshold | 0.05    |
    | q_exit             | 1 - the product of 1 - g_j, g_j a trained head's for s_j      | >= threshold | 0.5    |

Where not every step is checked, i - 1 is the check before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .configuration_megatransformer_text import MegaTransformerTextConfig


@dataclass
class ExitCheck:
    """What is read of some rows after a step."""

    step: int  # steps taken
    state: torch.Tensor | None = None  # s_i, (rows, sequence, hidden); None: it is not looked at
    logits: torch.Tensor | None = None  # of the last token, (rows, vocab); None: before the first check
    is_token: torch.Tensor | None = None  # (rows, sequence), False for padding; None: there is none
    value: torch.Tensor | None = None  # what the criterion made of it, (rows,)
    last: torch.Tensor | None = None  # (rows,), where the last token stands; None: at the end

    @property
    def last_state(self) -> torch.Tensor:
        """That of the last token, (rows, hidden)."""
        return at_last(self.state, self.last)

    def of(self, rows: torch.Tensor) -> "ExitCheck":
        """The same of some rows, by their indices."""
        parts = {name: getattr(self, name) for name in ("state", "logits", "is_token", "value", "last")}
        return replace(self, **{name: part.index_select(0, rows) for name, part in parts.items() if part is not None})


class ExitCriterion:
    """Gives each row a value at a check; a row whose value falls below the threshold stops.

    A new criterion is a class like those below, and an entry in `EXIT_CRITERIA`.
    """

    default_threshold: float
    largest_threshold = float("inf")
    reads_logits = True
    """Whether it needs a coda and a head, or the state alone."""
    starts_uniform = False
    """Whether logits that are all alike stand for those before the first check, and no other value counts."""
    adds_up = False
    """Whether a value follows from that of the check before."""
    part: str | None = None
    """The trained part of the model that it needs: an attribute of the text model, and an option of `recurrence`."""

    def of(self, model: nn.Module | None) -> "ExitCriterion":
        """The criterion with what it needs of a text model. ValueError: the model has no such part."""
        trained = None if self.part is None else getattr(model, self.part, None)
        if self.part is not None and trained is None:
            raise ValueError(self.advice)
        return self if trained is None else type(self)(trained)

    def is_in(self, config: MegaTransformerTextConfig) -> bool:
        """Whether models of a configuration have what it needs."""
        return self.part is None or getattr(config.recurrence, self.part)

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        """(rows,). At the first check, `before` holds s_0 and no logits."""
        raise NotImplementedError

    def stops(self, value: torch.Tensor, threshold: float) -> torch.Tensor:
        """(rows,) of bool."""
        return value < threshold


class KLDivergence(ExitCriterion):
    """KL(P_{i-1} || P_i): the distribution of the next token does not change any more."""

    default_threshold = 5e-4
    starts_uniform = True

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        logits_before = torch.zeros_like(now.logits) if before.logits is None else before.logits
        log_p, log_q = self.log_probabilities(now.logits), self.log_probabilities(logits_before)
        return nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().log_softmax(-1)


class MinPKL(KLDivergence):
    """The same over the likely tokens: what is below a tenth of the largest probability counts as equally unlikely."""

    default_threshold = 1e-5

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        p = logits.float().softmax(-1)
        p = torch.where(p < 0.1 * p.amax(-1, keepdim=True), 1 / p.shape[-1], p)
        return (p / p.sum(-1, keepdim=True)).log()


class EntropyDifference(ExitCriterion):
    """|H(P_i) - H(P_{i-1})|, in nats."""

    default_threshold = 1e-3

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        entropy = self.entropy(now.logits)
        return (entropy - (100.0 if before.logits is None else self.entropy(before.logits))).abs()

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        log_p = logits.float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)


class LatentDifference(ExitCriterion):
    """|s_i - s_{i-1}| / |s_i|, the mean over tokens."""

    default_threshold = 0.03
    reads_logits = False

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        return mean_over_tokens(relative_change(now.state, before.state), now.is_token)


class Cosine(ExitCriterion):
    """1 - cos(s_i, s_{i-1}), the mean over tokens."""

    default_threshold = 1e-3
    largest_threshold = 2.0
    reads_logits = False

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        cosine = nn.functional.cosine_similarity(now.state.float(), before.state.float(), dim=-1)
        return 1 - mean_over_tokens(cosine, now.is_token)


class ArgmaxStability(ExitCriterion):
    """The likeliest token has stayed the same for a number of checks."""

    default_threshold = 5

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        likeliest = now.logits.argmax(-1)
        if before.logits is None:
            return torch.zeros_like(likeliest)
        return torch.where(likeliest == before.logits.argmax(-1), before.value + 1, 0)

    def stops(self, value: torch.Tensor, threshold: float) -> torch.Tensor:
        return value >= threshold


class ExitProbe(nn.Module):
    """A small head that says from the state whether further steps would still change the output distribution.

    Trained by `trainer: exit_probe`. It sees the direction of s_i, and how much it has changed since the check before;
    13 numbers are multiplied for each of the state, against about 14 hidden_size in a layer of the core.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size + 1, 12)
        self.out = nn.Linear(12, 1)

    def forward(self, state: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """s_i and s_{i-1}, (..., hidden) -> logit that P_i is as good as final, (...)."""
        features = (nn.functional.layer_norm(state, state.shape[-1:]), relative_change(state, before).log()[..., None])
        features = torch.cat(features, dim=-1).to(self.hidden.weight.dtype)
        return self.out(nn.functional.gelu(self.hidden(features))).squeeze(-1)


class LearnedProbe(ExitCriterion):
    """1 - the probability that an `ExitProbe` gives, for the last token."""

    default_threshold = 0.05
    largest_threshold = 1.0
    reads_logits = False
    part = "exit_probe"
    advice = "exit_criterion 'probe' needs a model with a probe; train one with trainer: exit_probe"

    def __init__(self, probe: ExitProbe | None = None):
        self.probe = probe

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        return torch.sigmoid(-self.probe(now.last_state, before.last_state).float())


class QExit(ExitCriterion):
    """1 - (1 - g_1) ... (1 - g_i), the probability that a row has stopped by step i, where a gate stops it at step j
    with probability g_j = sigmoid(w s_j + b) of its last token. Steps that are not checked are not among the factors.

    Source: Zhu et al. 2025 (Ouro), arXiv 2510.25741.
    """

    default_threshold = 0.5
    largest_threshold = 1.0
    reads_logits = False
    adds_up = True
    part = "exit_gate"
    advice = "exit_criterion 'q_exit' needs a model with a gate, as checkpoints of Ouro have; choose another"

    def __init__(self, gate: nn.Linear | None = None):
        self.gate = gate

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        goes_on = torch.sigmoid(-self.gate(now.last_state).float().squeeze(-1))
        return 1 - (goes_on if before.value is None else goes_on * (1 - before.value))

    def stops(self, value: torch.Tensor, threshold: float) -> torch.Tensor:
        return value >= threshold


EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "kl_divergence": KLDivergence(),
    "min_p_kl": MinPKL(),
    "entropy_difference": EntropyDifference(),
    "latent_difference": LatentDifference(),
    "cosine": Cosine(),
    "argmax_stability": ArgmaxStability(),
    "probe": LearnedProbe(),
    "q_exit": QExit(),
}


def relative_change(state: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """|s_i - s_{i-1}| / |s_i|, (..., hidden) -> (...), above 0."""
    state, before = state.float(), before.float()
    change, length = (torch.linalg.vector_norm(each, dim=-1) for each in (state - before, state))
    return change.clamp(min=1e-12) / length.clamp(min=1e-12)


def at_last(values: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
    """What stands at `last`, (rows,), or at the end: (rows, sequence, ...) -> (rows, ...)."""
    return values[:, -1] if last is None else values[torch.arange(len(values), device=last.device), last]


def mean_over_tokens(values: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """(rows, sequence) -> (rows,), padding left out."""
    if is_token is None:
        return values.mean(-1)
    return (values * is_token).sum(-1) / is_token.sum(-1).clamp(min=1)


# ----------------------------------------------------------------------------------------------- options, controller


@dataclass(frozen=True)
class ExitOptions:
    """What ends the iteration of rows before their last step; ValueError for a value outside its range.

    Args:
        criterion: Name of an entry of `EXIT_CRITERIA`; "schedule", in `generate` alone; or "none".
        threshold: Value below which a row stops, or, for "argmax_stability" and "q_exit", from which. Default: the
            criterion's.
        min_steps: Steps that are taken before the first check.
        check_interval: Steps from one check to the next.
        in_prefill: Whether, in `generate`, the prompt may exit too, all its tokens together.
        schedule: Steps of each new token for the criterion "schedule", the last for all that follow; or a function of
            the token's index.
    """

    criterion: str = "none"
    threshold: float | None = None
    min_steps: int = 1
    check_interval: int = 1
    in_prefill: bool = False
    schedule: Sequence[int] | Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        if self.criterion == "none":
            return
        if self.criterion == "schedule":
            if self.schedule is None or (not callable(self.schedule) and len(self.schedule) == 0):
                raise ValueError("exit_criterion 'schedule' needs an exit_schedule: steps of each new token")
            return
        if self.criterion not in EXIT_CRITERIA:
            raise ValueError(
                f"exit_criterion {self.criterion!r} is unknown; choose one of none, schedule, "
                f"{', '.join(EXIT_CRITERIA)}"
            )
        largest = EXIT_CRITERIA[self.criterion].largest_threshold
        if self.threshold is not None and not 0 < self.threshold <= largest:
            raise ValueError(
                f"exit_threshold of {self.criterion} must be above 0 and at most {largest}, got {self.threshold}"
            )
        for name, value in (("min_steps", self.min_steps), ("exit_check_interval", self.check_interval)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def scheduled_steps(self, index: int) -> int:
        """Steps of new token number `index`, counted from 0, by the schedule."""
        return self.schedule(index) if callable(self.schedule) else self.schedule[min(index, len(self.schedule) - 1)]


class ExitController:
    """Checks the rows of one forward pass after their steps, and keeps what was read. ValueError: it cannot judge so.

    Args:
        options: Criterion, threshold, and when it is asked.
        head: (rows, hidden), after coda and norm -> logits (rows, vocab).
        model: The text model, for criteria that need a trained part of it.
    """

    def __init__(
        self, options: ExitOptions, head: Callable[[torch.Tensor], torch.Tensor], model: nn.Module | None = None
    ):
        if options.criterion == "schedule":
            raise ValueError("exit_criterion 'schedule' is for texts that `generate` writes; give num_steps")
        self.options, self.head, self.criterion = options, head, EXIT_CRITERIA[options.criterion].of(model)
        self.before: ExitCheck | None = None
        self.rows: torch.Tensor | None = None  # that `before` holds
        self.hidden: torch.Tensor | None = None  # what was read of each row last, (batch, sequence, hidden)
        self.logits: torch.Tensor | None = None  # (batch, vocab)
        self.steps_at_check: torch.Tensor | None = None  # (batch,), on the CPU
        self.last: torch.Tensor | None = None  # (batch,), where the last token of each row stands; None: at the end

    @property
    def threshold(self) -> float:
        """The criterion's, where none was given."""
        return self.criterion.default_threshold if self.options.threshold is None else self.options.threshold

    def begin(self, state: torch.Tensor, is_token: torch.Tensor | None) -> None:
        """Before the first step. state: s_0; is_token: (batch, sequence), None if there is no padding."""
        if is_token is not None and is_token.shape[1] > 1 and not is_token[:, -1].all():  # padded on the right
            self.last = is_token.shape[1] - 1 - is_token.flip(1).int().argmax(dim=1)
        self.before = ExitCheck(0, state, is_token=is_token, last=self.last)
        self.steps_at_check = torch.zeros(len(state), dtype=torch.long)

    def is_due(self, step: int) -> bool:
        """Whether rows are checked after `step` steps."""
        first = self.options.min_steps
        return step >= first and (step - first) % self.options.check_interval == 0

    def check(
        self, step: int, state: torch.Tensor, hidden: torch.Tensor | None, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Which of the rows stop after `step` steps, (rows,) of bool. state: s_i of these rows; hidden: the same after
        coda and norm, if the criterion reads logits; rows: their indices in the batch, None for all of them.
        """
        before = self.before
        if len(before.state) > len(state):  # some have left since
            before = before.of(rows if self.rows is None else torch.searchsorted(self.rows, rows))
        now = replace(before, step=step, state=state)
        if hidden is not None:
            now.logits = self.keep(hidden, rows)
            self.steps_at_check[slice(None) if rows is None else rows.cpu()] = step
        now.value = self.criterion.value(now, before)
        self.before, self.rows = now, rows
        return self.criterion.stops(now.value, self.threshold)

    def read(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """What a criterion compares, of some rows of the batch, or of all. hidden: (rows, hidden) -> (rows, vocab)."""
        return self.head(hidden)

    def keep(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Remembers what was read of some rows, or of all. hidden: (rows, sequence, hidden) -> logits (rows, vocab)."""
        last = self.last if self.last is None or rows is None else self.last.index_select(0, rows)
        logits = self.read(at_last(hidden, last), rows)
        if rows is None:
            self.hidden, self.logits = hidden, logits
        else:
            if self.hidden is None:
                batch = len(self.steps_at_check)
                self.hidden, self.logits = (it.new_zeros(batch, *it.shape[1:]) for it in (hidden, logits))
            self.hidden = self.hidden.index_copy(0, rows, hidden)
            self.logits = self.logits.index_copy(0, rows, logits)
        return logits
