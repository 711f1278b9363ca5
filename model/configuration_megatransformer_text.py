"""Configurations of the text model: typed, ranged, and strict about unknown keys.

Every class raises ``ValueError`` for a wrong type, a value outside its range or an unknown choice, whether it is built
through the Python API, from YAML, or from a nested ``config.json``. An unknown key is an error as well, except in a
``config.json``, where other programs and later versions leave keys of their own: there it is named in a warning.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.type_validators import interval

logger = logging.get_logger(__name__)

# Keys that transformers itself hands to a config besides its fields: from files of other versions, or in
# `from_pretrained`.
KEYS_OF_TRANSFORMERS = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}

MOST_LABELS = 1_000_000
MOST_STEPS = 10_000
"""Core steps of a token: a hundred times as many as are of any use."""
MOST_LAYERS = 10_000
"""Layers of one part: ten times as many as anybody has trained."""


def validated(cls):
    """Class decorator: `@strict` of huggingface_hub, with every failed check raised as a one-line `ValueError`.

    Source: `huggingface_hub.dataclasses.strict`, whose own errors are no `ValueError` and span two lines.
    """
    cls = strict(cls)

    def as_value_error(method):
        @functools.wraps(method)
        def wrapper(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                field = re.match("Validation error for field '(.+)'", str(error))
                raise ValueError(f"{cls.__name__}{'.' + field[1] if field else ''}: {reason}") from error

        return wrapper

    cls.__init__ = as_value_error(cls.__init__)
    cls.__setattr__ = as_value_error(cls.__setattr__)
    return cls


def under_new_names(values: dict[str, Any], attribute_map: dict[str, str]) -> dict[str, Any]:
    """The same values, where one that has an old name gets its new one, which a warning names. ValueError if a value is
    given under both names.
    """
    renamed = dict(values)
    for old, new in attribute_map.items():
        if old in renamed:
            if new in renamed:
                raise ValueError(f"{old} and {new} are two names of the same option; give {new} alone")
            logger.warning_once(f"{old} is now called {new}; the old name will not be known to the next version")
            renamed[new] = renamed.pop(old)
    return renamed


class StrictConfig(PreTrainedConfig):
    """A `PreTrainedConfig` that refuses, with ValueError, keys that are neither its fields nor transformers' own, and
    leaves out those of a file with a warning. Keys of `attribute_map` are old names of others, which are taken with a
    warning too.
    """

    encoder_hidden_size = None  # of the encoder that a decoder's cross-attention sees
    path_of_recurrence = ()  # of the part whose fields `from_pretrained` takes by their names alone

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.keys() & self.attribute_map.keys():
            kwargs = under_new_names(kwargs, self.attribute_map)
            for name in kwargs.keys() & set(self.attribute_map.values()):
                setattr(self, name, kwargs.pop(name))
        unknown = sorted(kwargs.keys() - KEYS_OF_TRANSFORMERS)
        if unknown:
            inherited = {item.name for item in dataclasses.fields(PreTrainedConfig)}
            own = sorted({item.name for item in dataclasses.fields(self)} - inherited)
            advice = " ".join((*self.nearest(unknown[0]), f"known keys: {', '.join(own)}"))
            raise ValueError(f"{type(self).__name__}: unknown key {unknown[0]!r}; {advice}")
        check_num_labels(kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a `config.json`; as in transformers, `from_pretrained` comes through here. Keys that no class
        knows, at the top or in a part, are named in one warning and left out, so that what is saved again says only
        what the model does.

        Args:
            config_dict: What the file says.
            kwargs: Fields, in the place of the file's, those of the `RecurrenceConfig` of the part that writes text
                too, such as `mean_steps=4`; and what transformers itself takes.
        """
        known, unknown = cls.split_unknown(config_dict)
        if unknown:
            logger.warning_once(
                f"{cls.__name__}: the config has keys that are not known here and have no effect: {', '.join(unknown)}"
            )
        own = set(RecurrenceConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
        flat = {name: kwargs.pop(name) for name in own & kwargs.keys()} if cls.path_of_recurrence else {}
        return super().from_dict(cls.with_flat(known, flat, kwargs) if flat else known, **kwargs)

    @classmethod
    def with_flat(cls, config_dict: dict[str, Any], flat: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        """The config with fields of its `RecurrenceConfig` that were given flat in their one place. ValueError for one
        that would have no effect beside the other arguments of `from_pretrained`, or that asks for other weights.
        """
        *outer, last = cls.path_of_recurrence
        if (whole := cls.path_of_recurrence[0]) in others:
            raise ValueError(f"{min(flat)} is given beside {whole}, where it stands; give it in that alone")
        config_dict = part = dict(config_dict)
        for name in outer:
            part[name] = part = dict(part.get(name) or {})
        recurrence = part[last] = dict(part.get(last) or {})
        steps, own_steps = others.get("num_steps") or part.get("num_steps"), flat.get("mean_steps")
        if own_steps is not None and steps is not None:
            raise ValueError(f"mean_steps has no effect beside num_steps, which is {steps}; give num_steps alone")
        if recurrence.get("untied_core") and own_steps not in (None, recurrence.get("mean_steps")):
            raise ValueError("mean_steps is the number of untied cores (untied_core), which have weights; leave it out")
        recurrence |= flat
        return config_dict

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """The config of a file, as `from_dict` reads it."""
        return cls.from_dict(cls.get_config_dict(json_file)[0])

    @classmethod
    def split_unknown(cls, config_dict: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
        """The keys that are known, here and in the parts, and the dotted names of the others, with the nearest known
        name where there is one.
        """
        config_dict, known, unknown = under_new_names(config_dict, cls.attribute_map), {}, []
        names = cls.known_keys(config_dict)
        for key, value in config_dict.items():
            if key not in names:
                unknown.append(" ".join((f"{prefix}{key}", *(f"({advice})" for advice in cls.nearest(key)))))
                continue
            part = cls.sub_configs.get(key)
            if part is not None and isinstance(value, dict):
                value, inner = part.split_unknown(value, f"{prefix}{key}.")
                unknown += inner
            known[key] = value
        return known, unknown

    @classmethod
    def known_keys(cls, config_dict: dict[str, Any]) -> set[str]:
        """The fields of the class and what transformers itself hands to every config."""
        return {item.name for item in dataclasses.fields(cls)} | KEYS_OF_TRANSFORMERS

    @classmethod
    def nearest(cls, key: str) -> list[str]:
        """Advice about a key that looks like a known one, or nothing."""
        near = difflib.get_close_matches(key, sorted(cls.known_keys({})), n=1, cutoff=0.75)
        return [f"did you mean {near[0]}?"] if near else []

    def validate_finite_numbers(self) -> None:
        """Raises ValueError for a number that is infinite or none."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; give a finite number")


def check_num_labels(values: dict[str, Any]) -> None:
    """Raises ValueError for a number of labels for which transformers could not make as many names."""
    count = values.get("num_labels")
    if count is not None and not (isinstance(count, int) and 0 <= count <= MOST_LABELS):
        raise ValueError(f"num_labels is {count!r:.60}; give a whole number of at most {MOST_LABELS}")


def check_positive(config: StrictConfig, *names: str) -> None:
    """Raises ValueError for an option that is given and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} ({value}) must be greater than 0")


class TransformerConfig(StrictConfig):
    """What transformers have in common: the language model, and encoders.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward layer.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads, at least 1; divides the number of query heads. Default: as many
            as query heads.
        head_dim: Width of a head. Default: hidden_size / num_attention_heads, which must then divide hidden_size.
        rope_theta: Base of the RoPE frequencies.
        norm: Kind of all norms but those of `qk_norm`: "rmsnorm" or "layernorm".
        norm_eps: Epsilon of the norms.
        norm_placement: "sandwich" is N2(f(N1 x) + x), "pre" is x + f(N1 x), "post" is N2(x + f(x)), "peri" is
            x + N2(f(N1 x)) (Kim et al. 2025, arXiv 2502.02732).
        mlp: Feed-forward layer: "swiglu", "geglu", "mlp" (two linear maps with a GELU between), or "mlp_tanh" (the same
            with the approximation of the GELU by tanh, as in GPT-2).
        mlp_bias: Whether the maps of the feed-forward layer have biases.
        qk_norm: RMSNorm over the features of each query and key head.
        qk_bias: Learned bias on queries and keys.
        attention_bias: Whether the maps of queries, keys, values and output have biases.
        attn_logit_softcapping: c in c tanh(logit / c) on attention logits, above 0 (Gemma 2, arXiv 2408.00118,
            uses 50). Default: none.
        attention_dropout: Dropout on attention probabilities.
        hidden_dropout: Dropout on the output of each attention and feed-forward layer.
        initializer_range: Standard deviation of the weights, above 0. Default: sqrt(2 / (5 hidden_size)) (Takase et al.
            2023, arXiv 2312.16903).
    """

    hidden_size: int = interval(min=1)(default=256)
    intermediate_size: int = interval(min=1)(default=768)
    num_attention_heads: int = interval(min=1)(default=4)
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | int = interval(min=0.0, exclude_min=True)(default=100.0)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float | int = interval(min=0.0, exclude_min=True)(default=1e-6)
    norm_placement: Literal["sandwich", "pre", "post", "peri"] = "pre"
    mlp: Literal["swiglu", "geglu", "mlp", "mlp_tanh"] = "swiglu"
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_bias: bool = False
    attention_bias: bool = False
    attn_logit_softcapping: float | int | None = None
    attention_dropout: float | int = interval(min=0.0, max=1.0, exclude_max=True)(default=0.0)
    hidden_dropout: float | int = interval(min=0.0, max=1.0, exclude_max=True)(default=0.0)
    initializer_range: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"{type(self).__name__}: hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}); change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(2 / (5 * self.hidden_size))
        super().__post_init__(**kwargs)

    def validate_heads(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim < 1:
            raise ValueError(f"head_dim ({self.head_dim}) must be at least 1")
        check_positive(self, "attn_logit_softcapping", "initializer_range")


@validated
class RecurrenceConfig(StrictConfig):
    """How the core is iterated.

    Source: Geiping et al. 2025, "Scaling up Test-Time Compute with Latent Reasoning", arXiv 2502.05171.

    Args:
        mean_steps: Mean number of core steps in training, and the number of steps taken when nothing else names one.
        backprop_steps: Number of last steps that carry gradient in training; the steps before them run without.
        step_distribution: Distribution of the number of steps in training. "lognormal-poisson" is the paper's,
            Poisson(exp(Normal(ln mean - sigma^2/2, sigma))) + 1; "poisson" is Poisson(mean - 1) + 1; "uniform" draws
            from 1 .. 2 mean - 1; "fixed" always takes the mean.
        step_sigma: Spread sigma of the log-normal rate.
        state_init: Initial state: "like-init" is truncated normal noise of the embeddings' own scale, "normal" is
            N(0, 1), "embed" is N(0, 1)/sqrt(hidden_size), "unit" is noise standardised over the features of each token,
            "zero" is 0, and "embedding" is e, the input itself, as in Ouro (Zhu et al. 2025, arXiv 2510.25741).
        state_scale: Factor on the initial state.
        state_seed: Seed of the one draw that serves as initial state whenever none is passed.
        injection: How the embedded input e enters each step: "concat" is Linear([s; e]), "add" is s + e, "gate" is
            g s + (1 - g) e with g = sigmoid(Linear([s; e])), "scalar" is s + a e with one learned number a, 1 at first,
            and "none" is s, which needs state_init "embedding".
        state_norm: Where the model's last norm, which stands before the head, is applied to states as well: "shared"
            norms the last state before the coda, "in_loop" each state, by a norm of the core's own, after its step, and
            "none" no state. With "in_loop" and without a coda the head reads the state, and there is no other norm.
        cache_policy: Which steps of a past token are kept in the cache: "full" keeps all, "ring" the last
            `num_kept_steps`, "last" the last one, "first" the first, and all of the last `num_kept_tokens` tokens,
            "residual" all, but those before the last in 2 bits a number. See `RecurrentCache`. With "first" alone the
            model attends without a cache, in training, as it does with one: steps after the first see tokens before
            the last `num_kept_tokens` as the first step left them. It is no option of its own, since a model that is
            trained so has to be run so.
        num_kept_steps: Steps that a "ring" keeps; the other policies do not read it.
        num_kept_tokens: Last tokens, the reader's own counted, of which "first" keeps all steps; the other policies do
            not read it.
        exit_criterion: What ends the iteration of a row in `generate` before the last step, unless `generate` is told
            otherwise. See `EXIT_CRITERIA`.
        exit_threshold: Value below which a row stops, or, for "argmax_stability" and "q_exit", from which. Default: the
            criterion's.
        min_steps: Steps that `generate` takes before it first checks whether a row may stop.
        exit_check_interval: Steps from one exit check to the next.
        exit_in_prefill: Whether a prompt may exit too, all its tokens together.
        exit_probe: Whether the model has the trained head of the criterion "probe". `finetune.py` adds it.
        exit_gate: Whether the model has the head of the criterion "q_exit", which checkpoints of Ouro come with.
        loop_scale_steps: N in 1 / (N sqrt(num_core_layers)), by which the output of each sub-layer of the core is
            multiplied (arXiv 2606.18524); at least 1, usually `mean_steps`. A number of its own, since what the model
            computes would otherwise change with the steps taken. Default: no factor.
        step_embedding: What is added behind the injection of step i: "sinusoidal" is the sinusoid of i, as of a
            position (Universal Transformer, Dehghani et al. 2018, arXiv 1807.03819), which needs an even hidden_size;
            "none" is nothing.
        untied_core: Whether each of `mean_steps` steps has a core of its own, layers and injection: the same executed
            layers, of which none is executed twice, to compare a recurrent model with. Its depth is always
            `mean_steps`, in training too, all with gradient, and there are no exits; it needs cache_policy "full".
        state_warm_start: Whether, in `generate`, the iteration of a token starts where that of the token before ended.
    """

    model_type = "megatransformer_recurrence"
    base_config_key = "recurrence"
    attribute_map = {"exit_first_step": "min_steps", "exit_every": "exit_check_interval"}

    mean_steps: int = interval(min=1, max=MOST_STEPS)(default=8)
    backprop_steps: int = interval(min=1, max=MOST_STEPS)(default=4)
    step_distribution: Literal["lognormal-poisson", "poisson", "uniform", "fixed"] = "lognormal-poisson"
    step_sigma: float | int = interval(min=0.0)(default=0.5)
    state_init: Literal["like-init", "normal", "embed", "unit", "zero", "embedding"] = "like-init"
    state_scale: float | int = interval(min=0.0)(default=1.0)
    state_seed: int = interval(min=0, max=2**63 - 1)(default=0)
    injection: Literal["concat", "add", "gate", "scalar", "none"] = "concat"
    state_norm: Literal["shared", "none", "in_loop"] = "shared"
    cache_policy: Literal["full", "ring", "last", "first", "residual"] = "full"
    num_kept_steps: int = interval(min=1, max=MOST_STEPS)(default=4)
    num_kept_tokens: int = interval(min=1)(default=16)
    exit_criterion: Literal[
        "none",
        "kl_divergence",
        "min_p_kl",
        "entropy_difference",
        "latent_difference",
        "cosine",
        "argmax_stability",
        "probe",
        "q_exit",
    ] = "none"
    exit_threshold: float | int | None = None
    min_steps: int = interval(min=1)(default=1)
    exit_check_interval: int = interval(min=1)(default=1)
    exit_in_prefill: bool = False
    exit_probe: bool = False
    exit_gate: bool = False
    loop_scale_steps: int | None = None
    step_embedding: Literal["none", "sinusoidal"] = "none"
    untied_core: bool = False
    state_warm_start: bool = False

    def validate_untied_core(self) -> None:
        """Checks that untied cores are asked for nothing but their own steps."""
        if not self.untied_core:
            return
        for name, needed in (
            *(("exit_criterion", "none"), ("exit_probe", False), ("exit_gate", False)),
            ("cache_policy", "full"),
        ):
            value = getattr(self, name)
            if value != needed:
                raise ValueError(f"{name} is {value!r}, which untied_core makes impossible; give {needed!r}")

    def validate_injection(self) -> None:
        """Checks that a core sees its input."""
        if self.injection == "none" and self.state_init != "embedding":
            raise ValueError(
                f"injection is 'none', and state_init {self.state_init!r}: the core would not see its input; set "
                "state_init to 'embedding', or another injection"
            )

    def validate_loop_scale(self) -> None:
        """Checks the one number that may be none."""
        check_positive(self, "loop_scale_steps")


@validated
class MegaTransformerTextConfig(TransformerConfig):
    """A causal language model: prelude, a core that is iterated, coda.

    Args:
        vocab_size: Number of rows of the embedding; token ids are below it.
        num_prelude_layers: Layers that run once, before the core.
        num_core_layers: Layers of the core, which runs `num_steps` times. 0 makes a plain transformer.
        num_coda_layers: Layers that run once, after the core.
        num_unique_prelude_layers: Layers of the prelude that have weights of their own, at least 1 and at most
            `num_prelude_layers`; the others share theirs. Default: all.
        num_unique_core_layers: The same of the core, within one step; at least 1.
        num_unique_coda_layers: The same of the coda; at least 1.
        layer_sharing: Order in which fewer unique layers are executed: "sequence" is AABB, "cycle" is ABAB, "cycle_rev"
            is ABBA (Takase and Kiyono 2021, arXiv 2104.06022).
        head_dim: Width of a head, at least 1; even for "rope". Default: hidden_size / num_attention_heads, which must
            then divide hidden_size.
        norm_placement: "sandwich" is N2(f(N1 x) + x), "pre" is x + f(N1 x), "post" is N2(x + f(x)), "peri" is
            x + N2(f(N1 x)) (Kim et al. 2025, arXiv 2502.02732), "none" is x + f(x).
        residual: How the output f of a sub-layer joins the stream x: "add" is x + f; "rezero" is x + a f with a learned
            number a, 0 at first (Bachlechner et al. 2020, arXiv 2003.04887), with norm_placement "pre" or "none";
            "admin" is w x + f with a number w, measured before training and fixed then (Liu et al. 2020, arXiv
            2004.08249), with norm_placement "post".
        mlp: Feed-forward layer: "swiglu", "geglu", "mlp" (two linear maps with a GELU between), "mlp_tanh" (the same
            with the approximation of the GELU by tanh, as in GPT-2), or "peer" (a mixture of many experts of one
            neuron; He 2024, arXiv 2407.04153), which reads neither intermediate_size nor mlp_bias.
        peer_num_experts: Experts of a layer with "peer", the square of a whole number.
        peer_num_heads: Queries of a token to the experts.
        peer_top_k: Experts that each query chooses, at most the square root of all.
        peer_key_dim: Width of a query and of the key of an expert, even.
        position_embedding: "rope" and "alibi" extrapolate; "learned" and "sinusoidal" are tables of
            `max_position_embeddings` rows added to the embeddings; "none" adds nothing. "sinusoidal" needs an even
            hidden_size.
        max_position_embeddings: Rows of the position table; for "rope" and "alibi" only the length meant for training.
        final_logit_softcapping: c in c tanh(logit / c) on the output logits, above 0 (Gemma 2 uses 30). Default: none.
        embedding_scale: Factor on the token embeddings, above 0. Default: sqrt(hidden_size) (Takase et al. 2023, arXiv
            2312.16903).
        tie_word_embeddings: Whether the head shares the embedding matrix.
        use_cache: Whether `forward` returns a key/value cache when nothing else says so.
        num_steps: Core steps, at least 1, taken when neither the call nor the generation config names them. Default:
            the mean.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of the token that begins a document.
        eos_token_id: Id of the token that ends a document.
        recurrence: How the core is iterated.
    """

    model_type = "megatransformer_text"
    _auto_class = "AutoConfig"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = [
        *("cache", "past_key_values"),  # its name from transformers 5.24 on, and before
        *("state", "states", "exit_steps", "token_losses", "last_hidden_state"),
    ]
    is_causal = True
    num_executed_layers = None  # at `num_steps` steps, in a file that `convert.py serve` has written for engines
    path_of_recurrence = ("recurrence",)
    sub_configs_defaults = {"recurrence": RecurrenceConfig}

    vocab_size: int = interval(min=1)(default=32000)
    hidden_size: int = interval(min=1)(default=512)
    intermediate_size: int = interval(min=1)(default=1536)
    num_prelude_layers: int = interval(min=0, max=MOST_LAYERS)(default=1)
    num_core_layers: int = interval(min=0, max=MOST_LAYERS)(default=2)
    num_coda_layers: int = interval(min=0, max=MOST_LAYERS)(default=1)
    num_unique_prelude_layers: int | None = None
    num_unique_core_layers: int | None = None
    num_unique_coda_layers: int | None = None
    layer_sharing: Literal["cycle", "sequence", "cycle_rev"] = "cycle"
    num_attention_heads: int = interval(min=1)(default=8)
    position_embedding: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"
    max_position_embeddings: int = interval(min=1)(default=2048)
    rope_theta: float | int = interval(min=0.0, exclude_min=True)(default=50000.0)
    norm_placement: Literal["sandwich", "pre", "post", "peri", "none"] = "sandwich"
    residual: Literal["add", "rezero", "admin"] = "add"
    mlp: Literal["swiglu", "geglu", "mlp", "mlp_tanh", "peer"] = "swiglu"
    peer_num_experts: int = interval(min=1)(default=4096)
    peer_num_heads: int = interval(min=1)(default=8)
    peer_top_k: int = interval(min=1)(default=16)
    peer_key_dim: int = interval(min=1)(default=128)
    final_logit_softcapping: float | int | None = None
    embedding_scale: float | int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    num_steps: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    recurrence: RecurrenceConfig | dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_scale is None:
            self.embedding_scale = math.sqrt(self.hidden_size)
        executed = kwargs.pop("num_executed_layers", None)
        if executed is not None:
            self.num_executed_layers = executed
            if kwargs.get("num_hidden_layers") == executed:
                del kwargs["num_hidden_layers"]  # beside it in a file, since engines may read that without this class
        # `_auto_class` holds one class only, so the map of all of them is written here.
        model = "modeling_megatransformer_text.MegaTransformer"
        auto_map = {
            "AutoConfig": "configuration_megatransformer_text.MegaTransformerTextConfig",
            "AutoModel": f"{model}TextModel",
            "AutoModelForCausalLM": f"{model}ForCausalLM",
            "AutoModelForSequenceClassification": f"{model}ForSequenceClassification",
        }
        old = [target.replace("_text.", ".") for target in auto_map.values()]  # in checkpoints of before
        given = kwargs.get("auto_map") or {}
        kwargs["auto_map"] = auto_map | {name: target for name, target in given.items() if target not in old}
        super().__post_init__(**kwargs)
        steps = self.num_steps or self.recurrence.mean_steps
        if executed not in (None, self.count_executed_layers(steps)):
            raise ValueError(
                f"num_executed_layers is {executed!r:.60}, but {self.count_executed_layers(steps)} are executed at "
                f"{steps} steps; write the folder for engines again with `python convert.py serve`, or leave it out"
            )

    @property
    def num_layers_of_one_step(self) -> int:
        """Number of layers, one that is shared as often as it is executed, the core counted once."""
        return self.count_executed_layers(1)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers for which others make room: `num_executed_layers`, or that with the core once."""
        return self.num_layers_of_one_step if self.num_executed_layers is None else self.num_executed_layers

    @property
    def num_unique_layers(self) -> int:
        """Number of layers that have weights of their own."""
        unique = {part: most if own is None else own for part, (own, most) in self._layer_counts.items()}
        return sum(unique.values()) + (self.num_cores - 1) * unique["core"]

    @property
    def has_depths(self) -> bool:
        """Whether it can take other numbers of steps than the mean: it has a core, and that one for all of them."""
        return self.num_core_layers > 0 and not self.recurrence.untied_core

    @property
    def num_cores(self) -> int:
        """Number of cores with weights of their own."""
        return self.recurrence.mean_steps if self.recurrence.untied_core else 1

    @property
    def _layer_counts(self) -> dict[str, tuple[int | None, int]]:
        """Unique and executed layers of each part; unique ones are None where all are."""
        return {
            "prelude": (self.num_unique_prelude_layers, self.num_prelude_layers),
            "core": (self.num_unique_core_layers, self.num_core_layers),
            "coda": (self.num_unique_coda_layers, self.num_coda_layers),
        }

    @property
    def mean_executed_layers(self) -> int:
        """Number of layers executed per token at the mean depth: l_P + mean_steps l_R + l_C."""
        return self.count_executed_layers(self.recurrence.mean_steps)

    def count_executed_layers(self, num_steps: int) -> int:
        """Number of layers executed for a token of so many steps."""
        return self.num_prelude_layers + num_steps * self.num_core_layers + self.num_coda_layers

    @classmethod
    def known_keys(cls, config_dict: dict[str, Any]) -> set[str]:
        """Those of all, and those of a file for engines."""
        further = {"num_executed_layers", "num_hidden_layers"} if "num_executed_layers" in config_dict else set()
        return super().known_keys(config_dict) | further

    def to_dict(self) -> dict[str, Any]:
        """The original's, and for engines `num_hidden_layers`, which some read without this class."""
        values = super().to_dict()
        if self.num_executed_layers is None:
            return values
        steps = self.num_steps or self.recurrence.mean_steps
        if self.num_executed_layers != self.count_executed_layers(steps):  # changed since: no more a folder for engines
            del values["num_executed_layers"]
            return values
        return values | {"num_hidden_layers": self.num_hidden_layers}

    def validate_architecture(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        self.validate_heads()
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(
                f"position_embedding 'rope' rotates pairs of features: head_dim ({self.head_dim}) must be even"
            )
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"position_embedding 'sinusoidal' needs an even hidden_size, got {self.hidden_size}")
        if self.num_layers_of_one_step == 0:
            raise ValueError(
                "num_prelude_layers, num_core_layers and num_coda_layers are all 0; the model needs a layer"
            )
        for part, (unique, executed) in self._layer_counts.items():
            if unique is not None and not 1 <= unique <= executed:
                raise ValueError(
                    f"num_unique_{part}_layers ({unique}) must be at least 1 and at most num_{part}_layers "
                    f"({executed}), the layers that are executed; change one of them, or leave it out"
                )
        if self.num_steps is not None and not 1 <= self.num_steps <= MOST_STEPS:
            raise ValueError(f"num_steps ({self.num_steps}) must be at least 1 and at most {MOST_STEPS}")
        if self.recurrence.untied_core and self.num_steps not in (None, self.recurrence.mean_steps):
            raise ValueError(
                f"num_steps ({self.num_steps}) is not mean_steps ({self.recurrence.mean_steps}), the one depth of "
                "untied_core; leave it out"
            )
        check_positive(self, "final_logit_softcapping", "embedding_scale")

    def validate_blocks(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.residual == "rezero" and self.norm_placement not in ("pre", "none"):
            raise ValueError(
                f"residual 'rezero' needs norm_placement 'pre' or 'none', not {self.norm_placement!r}, with which a "
                "block does not begin as the identity"
            )
        if self.residual == "admin" and self.norm_placement != "post":
            raise ValueError(
                f"residual 'admin' weighs the stream in a sum that is normed: it needs norm_placement 'post', not "
                f"{self.norm_placement!r}"
            )
        if self.residual != "add" and self.recurrence.loop_scale_steps is not None:
            raise ValueError(
                f"loop_scale_steps is {self.recurrence.loop_scale_steps}, but residual {self.residual!r} has a factor "
                "of its own; leave one of them out"
            )
        if self.recurrence.step_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"step_embedding 'sinusoidal' needs an even hidden_size, got {self.hidden_size}")
        if self.mlp != "peer":
            return
        side = math.isqrt(self.peer_num_experts)
        if side**2 != self.peer_num_experts:
            raise ValueError(
                f"peer_num_experts ({self.peer_num_experts}) must be a square, of the number of half-keys, such as "
                f"{side**2} or {(side + 1) ** 2}"
            )
        if self.peer_top_k > side:
            raise ValueError(f"peer_top_k ({self.peer_top_k}) must be at most sqrt(peer_num_experts) ({side})")
        if self.peer_key_dim % 2:
            raise ValueError(f"peer_key_dim ({self.peer_key_dim}) must be even: a key is two halves")

    def validate_special_tokens(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(0 <= token < self.vocab_size for token in ids):
                raise ValueError(f"{name} ({value!s:.60}) is outside the vocabulary (vocab_size {self.vocab_size})")
