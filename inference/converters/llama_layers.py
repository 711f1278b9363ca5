"""Weights of layers as Llama names them, which Qwen, SmolLM and Ouro do alike, in our names."""

from collections.abc import Mapping

import torch

from model import MegaTransformerTextConfig

from .foreign import ForeignCheckpoint


def llama_layer(
    source: ForeignCheckpoint, config: MegaTransformerTextConfig, theirs: str, ours: str, norms: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The weights of a layer. Biases that one of them lacks are 0, where another has one; `norms` are their names of
    ours.
    """
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    found = joined(source, [f"{attention}.{name}_proj" for name in "qkv"], f"{ours}.attention.qkv_proj")
    found |= joined(source, [f"{attention}.o_proj"], f"{ours}.attention.o_proj")
    found |= joined(source, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], f"{ours}.mlp.gate_up_proj")
    found |= joined(source, [f"{mlp}.down_proj"], f"{ours}.mlp.down_proj")
    for part, has_bias in (("attention", config.attention_bias), ("mlp", config.mlp_bias)):
        for name in [name for name in found if f".{part}." in name and name.endswith(".weight")] if has_bias else ():
            found.setdefault(name.replace(".weight", ".bias"), torch.zeros_like(found[name][:, 0]))
    if config.qk_norm:
        found |= {f"{ours}.attention.{name}.weight": source.take(f"{attention}.{name}.weight")
                  for name in ("q_norm", "k_norm")}  # fmt: skip
    return found | {f"{ours}.{name}.weight": source.take(f"{theirs}.{of}.weight") for name, of in norms.items()}


def joined(source: ForeignCheckpoint, names: list[str], ours: str) -> dict[str, torch.Tensor]:
    """The weight, and the bias if there is one, of several linear maps as one."""
    found = {f"{ours}.weight": torch.cat([source.take(f"{name}.weight") for name in names])}
    if f"{names[0]}.bias" in source.weights:
        found[f"{ours}.bias"] = torch.cat([source.take(f"{name}.bias") for name in names])
    return found


def head(source: ForeignCheckpoint, is_tied: bool) -> dict[str, torch.Tensor]:
    """Embedding, last norm and head. The head of a tied model may be saved as well, and is then left out."""
    found = {
        "model.embed_tokens.weight": source.take("model.embed_tokens.weight"),
        "model.norm.weight": source.take("model.norm.weight"),
    }
    if is_tied:
        source.drop(lambda name: name == "lm_head.weight")
        return found
    return found | {"lm_head.weight": source.take("lm_head.weight")}
