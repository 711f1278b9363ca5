"""DeepSpeed's Muon, which orthogonalises whole matrices where ZeRO divides them among ranks."""

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn
from transformers import TrainingArguments


class ZeroMuon(MuonWithAuxAdam):
    """DeepSpeed's Muon with updates of the size that torch's has with `match_rms_adamw`, so that a rate means the same
    with ZeRO and without it. Each group of matrices has the factor as its `scale`.
    """

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step, as that of DeepSpeed's, at scaled rates; the weight decay stays what it is."""
        scaled = [group for group in self.param_groups if group["use_muon"]]
        given = [(group["lr"], group["weight_decay"]) for group in scaled]
        for group in scaled:
            group["lr"] *= group["scale"]
            group["weight_decay"] /= group["scale"]
        loss = super().step(*args, **kwargs)
        for group, (rate, decay) in zip(scaled, given, strict=True):
            group |= {"lr": rate, "weight_decay": decay}
        return loss


def build_zero_muon(
    groups: list[dict[str, Any]], args: TrainingArguments, matrices: Collection[nn.Parameter]
) -> ZeroMuon:
    """Muon for matrices, of which those in a group have one scale, and AdamW for the rest of the groups."""
    chosen, parts = set(matrices), []
    for options in groups:
        by_scale: dict[float | None, list[nn.Parameter]] = defaultdict(list)
        for parameter in options["params"]:
            parameter.use_muon = parameter in chosen  # by which DeepSpeed knows them
            by_scale[scale_of(parameter) if parameter.use_muon else None].append(parameter)
        parts += [
            {"params": members, "weight_decay": options["weight_decay"], **settings_of(args, scale)}
            for scale, members in by_scale.items()
        ]
    return ZeroMuon(parts)


def settings_of(args: TrainingArguments, scale: float | None) -> dict[str, Any]:
    """Options of a group of matrices, or, where there is no scale, of others."""
    if scale is None:
        betas = (args.adam_beta1, args.adam_beta2)
        return {"use_muon": False, "lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
    rate = args.muon_learning_rate
    return {"use_muon": True, "lr": rate, "momentum": 0.95, "ns_method": "standard", "scale": scale}


def scale_of(matrix: nn.Parameter) -> float:
    """The ratio of two sizes of updates: 0.2 sqrt(greater side), and DeepSpeed's sqrt(max(1, rows / columns))."""
    rows, columns = getattr(matrix, "ds_shape", matrix.shape)  # ZeRO-3 leaves parts of it, and its shape there
    return 0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1, rows / columns))
