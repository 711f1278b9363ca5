"""Weights of 8 and 4 bits by their formulas, as float matrices of a plain model: what bitsandbytes is compared with."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

# QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
BLOCK = 64
KEPT = r"lm_head|model\.(?:encoder\.)?core\.injection|model\.exit_probe|model\.writers"


def rounded_to_4_bits(weight: torch.Tensor) -> torch.Tensor:
    """Each 64 weights share a scale, their largest magnitude; a weight is the nearest of 16 values times it."""
    padding = -weight.numel() % BLOCK
    blocks = nn.functional.pad(weight.flatten(), (0, padding)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scales)[..., None].sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * scales).flatten()[: weight.numel()].view_as(weight)


def rounded_to_8_bits(rows: torch.Tensor) -> torch.Tensor:
    """Each row has a scale, its largest magnitude; a number is a multiple of a 127th of it."""
    rows = rows.half().float()
    scales = rows.abs().amax(dim=-1, keepdim=True)
    return torch.round(rows * (127 / scales)) * scales / 127


@torch.no_grad()
def round_model(model: PreTrainedModel, load_in: str, kept: str = KEPT) -> PreTrainedModel:
    """The model with rounded matrices, in place, but for modules whose name matches what is kept."""
    rounded = rounded_to_4_bits if load_in == "4bit" else rounded_to_8_bits
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not re.match(rf"(?:{kept})(?:\.|$)", name):
            module.weight.copy_(rounded(module.weight))
    return model
