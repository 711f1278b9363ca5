"""Few steps learn from many."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.cross_entropy import LOGITS_PER_CHUNK
from model.depth import keyed_generator

from .base import Objective, TrainingPass

LEFT_OUT = ("labels", "loss_weights", "skip_logits", "output_states", "num_steps", "use_cache")
"""Arguments of the pass that a shallower one, of the model without head, does not have or has of its own."""


class SelfDistillation(Objective):
    """L + weight KL(P_r || P_m), the mean over `passes` draws of m from 1 .. r - 1, each token weighing as in L. The
    distribution after all r steps is the teacher and has no gradient; the m steps of the student, from the same initial
    state, carry gradient in as many of the last of them as in the pass itself.
    """

    options_read = ("weight", "passes")
    is_read_after_steps = reads_tokens = True

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        total, with_gradient = sum(of.inputs["num_steps"]), of.inputs["num_steps"][1]
        if total == 1:
            return loss
        generator = keyed_generator("distillation", *of.key)
        given = {name: value for name, value in of.inputs.items() if name not in LEFT_OUT}
        for few in torch.randint(1, total, (self.options.passes,), generator=generator).tolist():
            depth = max(few - with_gradient, 0), min(few, with_gradient)
            student = of.model.base_model(**given, num_steps=depth, use_cache=False, return_dict=True)
            divergence = self.divergence(of.outputs.last_hidden_state, student.last_hidden_state, of)
            loss = loss + self.weight / self.options.passes * divergence
        return loss

    def divergence(self, teacher: torch.Tensor, student: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        """The weighted sum over tokens of KL(teacher || student), divided as the loss is; a chunk of tokens at a time,
        whose logits are computed again for the gradient. Both: (batch, sequence, hidden).
        """
        is_learned, head = of.label_weights > 0, of.model.compute_logits
        chunk = max(1, LOGITS_PER_CHUNK // of.model.config.get_text_config().vocab_size)

        def divergence_of(teacher: torch.Tensor, student: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = head(teacher).float().log_softmax(-1)
            log_q = head(student).float().log_softmax(-1)
            return (nn.functional.kl_div(log_q, target, reduction="none", log_target=True).sum(-1) * weights).sum()

        kept = (each[is_learned].split(chunk) for each in (teacher.detach(), student, of.label_weights))
        parts = [checkpoint(divergence_of, *part, use_reentrant=False) for part in zip(*kept, strict=True)]
        return sum(parts) / of.num_items
