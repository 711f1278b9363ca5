"""Cross-entropy over a large vocabulary, a chunk of tokens at a time."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2**24
"""64 MiB in float32: large enough for fast matrix products and few sums of the head's gradient, small beside the
weights of the head."""


def count_labels(
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    loss_weights: torch.Tensor | None = None,
    is_shifted: bool = False,
) -> int | torch.Tensor:
    """What the sum of the losses is divided by: the trainer's count, or the labels that remain after the shift, by
    their weights; all of them, if they are shifted already.

    Never 0, so that a batch in which nothing is to be learned has loss 0; 0 / 0 would end the training around it.
    """
    if isinstance(num_items_in_batch, int):
        return max(num_items_in_batch, 1)
    if num_items_in_batch is None:
        first = 0 if is_shifted else 1
        is_label = labels[:, first:] != -100
        counted = is_label.sum() if loss_weights is None else (loss_weights[:, first:] * is_label).sum()
    else:
        counted = num_items_in_batch
    return torch.where(counted > 0, counted, torch.ones_like(counted))


def causal_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: int | torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    is_shifted: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of transformers' `ForCausalLMLoss`, without ever holding the logits of all tokens.

    A chunk's logits are forgotten after its loss and computed again for its gradient: one more matrix product of the
    head, against (batch, sequence, vocab) of memory in the logits, their probabilities and their gradient.

    Args:
        head: (tokens, hidden) -> (tokens, vocab).
        hidden: (batch, sequence, hidden).
        labels: (batch, sequence), shifted here: position i predicts label i + 1; -100 where there is no loss.
        num_items_in_batch: The sum of the losses is divided by it.
        loss_weights: (batch, sequence), factor on the loss of each label.
        is_shifted: Whether position i predicts label i.
        label_smoothing: Share of each label that is spread evenly over the vocabulary.

    Returns:
        A float32 scalar; and the loss of each label in its place, (batch, sequence), without weight and gradient.
    """
    targets = labels if is_shifted else nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    targets = targets.reshape(-1).to(hidden.device)
    chunk = max(1, LOGITS_PER_CHUNK // vocab_size)

    def losses_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options = {"ignore_index": -100, "reduction": "none", "label_smoothing": label_smoothing}
        return nn.functional.cross_entropy(head(hidden).float(), targets, **options)

    parts = list(zip(hidden.flatten(0, 1).split(chunk), targets.split(chunk), strict=True))
    if len(parts) == 1:  # nothing to save
        losses = losses_of(*parts[0])
    else:
        losses = torch.cat([checkpoint(losses_of, *part, use_reentrant=False) for part in parts])
    losses = losses.view_as(labels)
    if not is_shifted:
        losses = nn.functional.pad(losses[:, :-1], (1, 0))  # of label i at place i
    weighted = losses if loss_weights is None else losses * loss_weights.to(losses)
    return weighted.sum() / num_items_in_batch, losses.detach()
