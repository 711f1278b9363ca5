"""Checkpoints of Huginn (`huginn_raven`; Geiping et al. 2025, arXiv 2502.05171) as ours. The architecture is the same;
its names, the order of rotated features and that of gates are others.
"""

import torch

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.attention import rotary_angles

from .foreign import ForeignCheckpoint, fill

CLOSE = 1e-3
"""How much a table of rotations in a checkpoint may differ from the one that is computed."""


def convert_huginn(source: ForeignCheckpoint) -> MegaTransformerForCausalLM:
    """The model of a checkpoint in our names: for the same initial state it has the same logits.

    Raises:
        ValueError: The checkpoint is of another architecture, or its weights do not fit its configuration.
    """
    config = huginn_config(source)
    check_rotations(source, config)
    weights = {
        "model.embed_tokens.weight": source.take("transformer.wte.weight"),
        "model.norm.weight": source.take("transformer.ln_f.weight"),
        "model.core.injection.proj.weight": source.take("transformer.adapter.weight"),
    }
    for theirs, ours, count in (
        ("prelude", "prelude", config.num_prelude_layers),
        ("core_block", "core", config.num_core_layers),
        ("coda", "coda", config.num_coda_layers),
    ):
        for layer in range(count):
            weights |= huginn_layer(source, config, f"transformer.{theirs}.{layer}", f"model.{ours}.layers.{layer}")
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = source.take("lm_head.weight")
    source.drop(lambda name: name == "lm_head.weight")  # that of a tied model, where it is saved twice
    return fill(config, weights, source)


def huginn_config(source: ForeignCheckpoint) -> MegaTransformerTextConfig:
    """The configuration in our names."""
    source.expect(
        model_type="huginn_raven",
        block_class_name="SandwichBlock",
        norm_class_name="RMSNorm_llama",
        mlp_class_name="GatedMLP",
        nonlin_name="SiLU",
        injection_type="linear",
        state_init=("like-init", "normal", "embed", "unit", "zero"),
        bias=False,
    )
    if "model_type" not in source.config:
        raise ValueError(f"{source.folder / 'config.json'} has no model_type, which is huginn_raven for these")
    heads = source.option("n_heads")
    return MegaTransformerTextConfig(
        vocab_size=source.option("padded_vocab_size", default=source.config.get("vocab_size")),
        hidden_size=source.option("n_embd"),
        intermediate_size=source.option("intermediate_size"),
        num_prelude_layers=source.option("n_layers_in_prelude"),
        num_core_layers=source.option("n_layers_in_recurrent_block"),
        num_coda_layers=source.option("n_layers_in_coda"),
        num_attention_heads=heads,
        num_key_value_heads=source.option("num_key_value_heads", default=heads),
        max_position_embeddings=source.option("block_size"),
        rope_theta=source.option("rope_base", (int, float), default=50_000),
        norm_eps=source.option("norm_eps", (int, float)),
        qk_bias=source.option("qk_bias", bool, default=False),
        embedding_scale=embedding_scale(source),
        tie_word_embeddings=source.option("tie_embeddings", bool, default=True),
        **{name: source.config.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        recurrence={
            "mean_steps": source.option("mean_recurrence"),
            "backprop_steps": source.option("mean_backprop_depth"),
            "state_init": source.config.get("state_init", "like-init"),
        },
    )


def embedding_scale(source: ForeignCheckpoint) -> float:
    """The factor on embeddings; without one in the configuration, that of its initialisation."""
    values = source.config.get("init_values")
    scale = values.get("embed_scale") if isinstance(values, dict) else None
    return float(scale) if isinstance(scale, int | float) else source.option("n_embd") ** 0.5


def check_rotations(source: ForeignCheckpoint, config: MegaTransformerTextConfig) -> None:
    """Takes the table of rotations, (1, positions, 1, head_dim / 2, 2), which is computed here. ValueError: it is that
    of another base.
    """
    table = source.weights.pop("freqs_cis", None)
    if table is None:
        return
    angles = rotary_angles(torch.arange(table.shape[1] if table.ndim > 1 else 0), config.head_dim, config.rope_theta)
    wanted = torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]
    if table.shape != wanted.shape or (table.float() - wanted).abs().max() > CLOSE:
        raise ValueError(
            f"freqs_cis in {source.folder} is not the table of rotations of rope_base {config.rope_theta}: its weights "
            "and its config.json do not belong together"
        )


def huginn_layer(
    source: ForeignCheckpoint, config: MegaTransformerTextConfig, theirs: str, ours: str
) -> dict[str, torch.Tensor]:
    """The weights of a layer in our names."""
    qkv = source.take(f"{theirs}.attn.Wqkv.weight")
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    if qkv.shape[0] != heads * config.head_dim:
        raise ValueError(f"{theirs}.attn.Wqkv.weight has {qkv.shape[0]} rows, and {heads} heads need "
                         f"{heads * config.head_dim}")  # fmt: skip
    by_head = qkv.unflatten(0, (heads, config.head_dim))
    rotated = by_head[: -config.num_key_value_heads, half_split(config.head_dim)]
    found = {
        f"{ours}.attention.qkv_proj.weight": torch.cat((rotated, by_head[-config.num_key_value_heads :])).flatten(0, 1),
        f"{ours}.attention.o_proj.weight": source.take(f"{theirs}.attn.proj.weight"),
        f"{ours}.mlp.gate_up_proj.weight": source.take(f"{theirs}.mlp.fc.weight"),
        f"{ours}.mlp.down_proj.weight": source.take(f"{theirs}.mlp.proj.weight"),
    }
    norms = ("attention_norm_in", "attention_norm_out", "mlp_norm_in", "mlp_norm_out")
    for number, norm in enumerate(norms, 1):
        found[f"{ours}.{norm}.weight"] = source.take(f"{theirs}.norm_{number}.weight")
    if config.qk_bias:
        bias = source.take(f"{theirs}.attn.qk_bias")  # (2, 1, heads, head_dim), of queries and of keys
        found[f"{ours}.attention.qk_bias"] = bias.flatten(0, 2)[:, half_split(config.head_dim)]
    return found


def half_split(head_dim: int) -> torch.LongTensor:
    """The order of features in which those that are rotated together, neighbours there, stand half a head apart."""
    return torch.arange(head_dim).unflatten(0, (-1, 2)).t().flatten()
