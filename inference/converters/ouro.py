"""Checkpoints of Ouro (Zhu et al. 2025, arXiv 2510.25741) as ours: a whole stack is the core, the state begins as the
embedding and is normed in the loop, and nothing is injected.
"""

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig

from .foreign import ForeignCheckpoint, fill
from .llama_layers import head, llama_layer

NORMS = {
    "attention_norm_in": "input_layernorm",
    "attention_norm_branch": "input_layernorm_2",
    "mlp_norm_in": "post_attention_layernorm",
    "mlp_norm_branch": "post_attention_layernorm_2",
}
"""Their names of our norms."""
GATE = "model.early_exit_gate"


def convert_ouro(source: ForeignCheckpoint) -> MegaTransformerForCausalLM:
    """The model of a checkpoint in our names; its gate for exits becomes the criterion "q_exit".

    Raises:
        ValueError: The checkpoint is of another architecture, or its weights do not fit its configuration.
    """
    config = ouro_config(source)
    weights = head(source, config.tie_word_embeddings)
    weights["model.core.norm.weight"] = weights.pop("model.norm.weight")
    for layer in range(config.num_core_layers):
        weights |= llama_layer(source, config, f"model.layers.{layer}", f"model.core.layers.{layer}", NORMS)
    if config.recurrence.exit_gate:
        weights |= {f"model.exit_gate.{name}": source.take(f"{GATE}.{name}") for name in ("weight", "bias")}
    source.drop(lambda name: name.endswith("rotary_emb.inv_freq"))
    return fill(config, weights, source)


def ouro_config(source: ForeignCheckpoint) -> MegaTransformerTextConfig:
    """The configuration in our names."""
    if "model_type" not in source.config:
        raise ValueError(f"{source.folder / 'config.json'} has no model_type, which is ouro for these")
    source.expect(
        model_type="ouro", hidden_act="silu", use_sliding_window=False, attention_bias=False, rope_scaling=None
    )
    rope = source.option("rope_parameters", dict, default={})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters in {source.folder / 'config.json'} scale positions, which is not supported")
    heads, steps = source.option("num_attention_heads"), source.option("total_ut_steps")
    threshold = source.option("early_exit_threshold", (int, float), default=1.0)
    return MegaTransformerTextConfig(
        vocab_size=source.option("vocab_size"),
        hidden_size=source.option("hidden_size"),
        intermediate_size=source.option("intermediate_size"),
        num_prelude_layers=0,
        num_core_layers=source.option("num_hidden_layers"),
        num_coda_layers=0,
        num_attention_heads=heads,
        num_key_value_heads=source.option("num_key_value_heads", default=heads),
        head_dim=source.config.get("head_dim"),
        max_position_embeddings=source.option("max_position_embeddings"),
        rope_theta=rope.get("rope_theta", source.config.get("rope_theta", 10_000.0)),
        norm_eps=source.option("rms_norm_eps", (int, float)),
        norm_placement="peri",
        embedding_scale=1.0,
        tie_word_embeddings=source.option("tie_word_embeddings", bool, default=False),
        **{name: source.config.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        recurrence={
            "mean_steps": steps,
            "backprop_steps": steps,
            "state_init": "embedding",
            "injection": "none",
            "state_norm": "in_loop",
            "exit_gate": f"{GATE}.weight" in source.weights,
            "exit_threshold": threshold if 0 < threshold < 1 else None,
        },
    )
