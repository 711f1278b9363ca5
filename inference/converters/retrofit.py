"""Plain language models of a folder as recurrent ones: some layers become the prelude, some the core, some the coda.

The injection adds nothing at first (s + a e with a = 0), the state begins as e, and no norm stands between core and
coda, so that one step with all layers is the model as it was; training goes on from there ("healing").

Source: McLeish et al. 2025 ("Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence"), arXiv
2511.07384, with an injection that keeps what the model computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig

from ..checkpoints import blamed_on
from .foreign import ForeignCheckpoint, fill
from .llama_layers import head, llama_layer

LLAMA_NORMS = {"attention_norm_in": "input_layernorm", "mlp_norm_in": "post_attention_layernorm"}
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A kind of plain model.

    Args:
        options: Its configuration -> options of ours.
        shared: Source, options -> weights beside the layers.
        layer: Source, our configuration, number of theirs, name of ours -> weights of a layer.
    """

    options: Callable[[PreTrainedConfig], dict[str, Any]]
    shared: Callable[[ForeignCheckpoint, bool], Weights]
    layer: Callable[[ForeignCheckpoint, MegaTransformerTextConfig, int, str], Weights]


def retrofit(source: ForeignCheckpoint, parts: Mapping[str, range], mean_steps: int) -> MegaTransformerForCausalLM:
    """A recurrent model of the layers of a plain one.

    Args:
        source: The checkpoint.
        parts: "prelude", "core" and "coda", each the numbers of its layers; those in none of them are left out.
        mean_steps: Core steps on average in training, and where nothing else is said.

    Raises:
        ValueError: The architecture is not known, or has what cannot be kept, such as scaled positions; the parts do
            not follow each other, the core is empty, or there are not so many layers; weights do not fit.
    """
    name = source.config.get("model_type")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{source.folder} has model_type {name!r:.60}, of which no recurrent model can be made; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    with blamed_on(f"{source.folder / 'config.json'} is no configuration of {name}", "use another checkpoint"):
        theirs = CONFIG_MAPPING[name].from_dict(source.config)
    check_order(parts, theirs.num_hidden_layers)
    architecture = ARCHITECTURES[name]
    config = MegaTransformerTextConfig(
        **architecture.options(theirs),
        **{f"num_{part}_layers": len(layers) for part, layers in parts.items()},
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_attention_heads=theirs.num_attention_heads,
        max_position_embeddings=theirs.max_position_embeddings,
        norm_placement="pre",
        embedding_scale=1.0,
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=theirs.tie_word_embeddings,
        **{name: getattr(theirs, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        recurrence={
            "mean_steps": mean_steps,
            "backprop_steps": mean_steps,
            "state_init": "embedding",
            "injection": "scalar",
            "state_norm": "none",
        },
    )
    weights = architecture.shared(source, config.tie_word_embeddings)
    weights["model.core.injection.weight"] = torch.zeros(1)
    for part, layers in parts.items():
        for ours, number in enumerate(layers):
            weights |= architecture.layer(source, config, number, f"model.{part}.layers.{ours}")
    dropped = set(range(theirs.num_hidden_layers)) - {number for layers in parts.values() for number in layers}
    source.drop(lambda it: any(f".{number}." in it for number in dropped) or it.endswith("rotary_emb.inv_freq"))
    return fill(config, weights, source)


def check_order(parts: Mapping[str, range], count: int) -> None:
    """Raises ValueError for parts that are out of order or of the model, or a core without layers."""
    end = 0
    for part, layers in parts.items():
        if layers.start < end or layers.stop > count or layers.stop < layers.start:
            raise ValueError(
                f"--{part} is {layers.start}:{layers.stop}; the parts follow each other, begin:end of layers 0 to "
                f"{count}, the end not among them, and here the next may begin at {end}"
            )
        end = layers.stop
    if not parts["core"]:
        raise ValueError("--core has no layers; a model without a core has no steps")


def llama_options(theirs: PreTrainedConfig) -> dict[str, Any]:
    """Options of Llama and of what is built like it."""
    refuse_unless(theirs, hidden_act="silu", use_sliding_window=False)
    refuse_unless(theirs, layer_types=["full_attention"] * theirs.num_hidden_layers)
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"its positions are scaled (rope_parameters {dict(rope)!r:.120}), which is not supported; use a model "
            "with rope_type 'default'"
        )
    has_qkv_bias = theirs.model_type == "qwen2"  # always, of queries, keys and values
    return {
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "rope_theta": rope["rope_theta"],
        "norm_eps": theirs.rms_norm_eps,
        "qk_norm": theirs.model_type == "qwen3",
        "attention_bias": has_qkv_bias or bool(getattr(theirs, "attention_bias", False)),
        "mlp_bias": bool(getattr(theirs, "mlp_bias", False)),
    }


def llama_weights(source: ForeignCheckpoint, config: MegaTransformerTextConfig, number: int, ours: str) -> Weights:
    """A layer of Llama and of what is built like it."""
    return llama_layer(source, config, f"model.layers.{number}", ours, LLAMA_NORMS)


def gpt2_options(theirs: PreTrainedConfig) -> dict[str, Any]:
    """Options of GPT-2."""
    refuse_unless(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    refuse_unless(theirs, activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu"))
    return {
        "intermediate_size": theirs.n_inner or 4 * theirs.hidden_size,
        "mlp": "mlp" if theirs.activation_function == "gelu" else "mlp_tanh",
        "norm": "layernorm",
        "norm_eps": theirs.layer_norm_epsilon,
        "position_embedding": "learned",
        "attention_bias": True,
        "mlp_bias": True,
    }


def gpt2_name(source: ForeignCheckpoint, name: str) -> str:
    """A name of the base model, which is saved with or without that of the base."""
    return name if name in source.weights else f"transformer.{name}"


def gpt2_shared(source: ForeignCheckpoint, is_tied: bool) -> Weights:
    """Weights of GPT-2 beside its layers."""
    source.drop(lambda name: name.endswith((".attn.bias", ".attn.masked_bias")))  # tables of a mask
    names = {
        "model.embed_tokens.weight": "wte.weight",
        "model.embed_positions.weight": "wpe.weight",
        "model.norm.weight": "ln_f.weight",
        "model.norm.bias": "ln_f.bias",
    }
    found = {ours: source.take(gpt2_name(source, theirs)) for ours, theirs in names.items()}
    if is_tied:
        source.drop(lambda name: name == "lm_head.weight")
        return found
    return found | {"lm_head.weight": source.take("lm_head.weight")}


def gpt2_weights(source: ForeignCheckpoint, config: MegaTransformerTextConfig, number: int, ours: str) -> Weights:
    """A layer of GPT-2, whose maps are stored the other way round."""
    maps = {
        "attention.qkv_proj": "attn.c_attn",
        "attention.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
        "attention_norm_in": "ln_1",
        "mlp_norm_in": "ln_2",
    }
    found = {}
    for name, theirs in maps.items():
        weight, bias = (source.take(gpt2_name(source, f"h.{number}.{theirs}.{it}")) for it in ("weight", "bias"))
        found |= {f"{ours}.{name}.weight": weight.t().contiguous() if weight.ndim == 2 else weight,
                  f"{ours}.{name}.bias": bias}  # fmt: skip
    return found


def refuse_unless(theirs: PreTrainedConfig, **wanted: Any) -> None:
    """Raises ValueError for an option with another value than one that is known here; one that is missing has it."""
    for name, value in wanted.items():
        found, known = getattr(theirs, name, None), value if isinstance(value, tuple) else (value,)
        if found is not None and found not in known:
            raise ValueError(f"its {name} is {found!r:.120}, which is not supported; it must be one of {known!r:.160}")


LLAMA_LIKE = Architecture(llama_options, head, llama_weights)
ARCHITECTURES = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gpt2": Architecture(gpt2_options, gpt2_shared, gpt2_weights),
}
