"""What a run will need, from its shapes alone: memory, floating-point operations and time, and these as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from model.depth import sample_depth
from model.peer import PeerFeedForward
from model.recurrence import INJECTIONS

from .arguments import PlannedTrainingArguments
from .objectives import ObjectiveOptions, build_objective
from .optimizers import bytes_of_states
from .parameter_groups import freeze

# Dense bf16 peaks in TFLOPS, from NVIDIA's data sheets (the SXM versions, without sparsity).
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}
# Share of the peak that training is assumed to reach. Well-tuned dense models of a billion parameters and more report
# 35 to 45 %; narrow models, short rows and slow networks reach less. A run logs `train/tokens_per_second`.
UTILISATION = 0.4
NUM_DRAWS = 20_000
ENCODERS_LEFT_OUT = (
    "Encoders of images and sound run once per medium, of which a row may have none: their weights are counted above, "
    "their operations and activations are not."
)


# ---------------------------------------------------------------------------------------------------------------- depth


@dataclass(frozen=True)
class StepCounts:
    """Core steps of a micro-batch: means of those without and with gradient, and the most with gradient."""

    no_grad: float
    grad: float
    most_grad: int


def expected_steps(recurrence: PreTrainedConfig, seed: int, objective: ObjectiveOptions | None = None) -> StepCounts:
    """Means over `NUM_DRAWS` draws, those of the run's own first micro-batches; their standard error is below half a
    percent of the mean depth. The objective says which steps carry gradient; by default the last `backprop_steps`.

    The mean of the configured distribution need not be `mean_steps`: that of the log-normal Poisson is mean_steps + 1.
    """
    depth = build_objective(objective or ObjectiveOptions()).depth
    draws = [depth(*sample_depth(recurrence, seed, step, 0)) for step in range(NUM_DRAWS)]
    no_grad, grad = (sum(counts) / NUM_DRAWS for counts in zip(*draws, strict=True))
    return StepCounts(no_grad, grad, max(steps for _, steps in draws))


# ----------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, one multiplication and one addition each counted as one."""

    forward: float
    training: float
    """Forward and backward."""
    recomputed: float
    """On top of these: what activation checkpointing computes a second time."""


def linear_parameters(module: nn.Module | None) -> int:
    """Elements of the weight matrices in a module that tokens are multiplied with, and of the experts that one has
    chosen.
    """
    parts = list(module.modules()) if module is not None else []
    experts = sum(part.num_active_weights for part in parts if isinstance(part, PeerFeedForward))
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear)) + experts


def executed_parameters(unit: nn.Module | None) -> int:
    """Elements that tokens are multiplied with in prelude, core or coda, of shared layers as often as they run."""
    if unit is None:
        return 0
    again = sum(linear_parameters(unit.layers[index]) for index in unit.order)
    return linear_parameters(unit) - linear_parameters(unit.layers) + again


def flops_per_token(model: PreTrainedModel, steps: StepCounts, row: int) -> Flops:
    """Operations of the matrix products, per token of a row of `row` tokens.

    A weight costs 2 per token and execution, and attention 4 * row * heads * head_dim per layer and execution (queries
    with keys, probabilities with values). As in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) the half
    that a causal mask hides is counted. A backward pass costs twice its forward pass; core steps without gradient have
    none. Left out: norms, activations, softmax, loss and optimizer, which are no matrix products, logits that are
    computed twice by a loss in chunks, and the encoders of images and sound, which run once per medium.
    """
    config, base = model.config.get_text_config(), model.base_model
    attention = 4 * row * config.num_attention_heads * config.head_dim
    ends = 2 * (executed_parameters(base.prelude) + executed_parameters(base.coda))
    ends += attention * (config.num_prelude_layers + config.num_coda_layers)
    core = base.core.cores[0] if config.recurrence.untied_core and base.core is not None else base.core
    step = 2 * executed_parameters(core) + attention * config.num_core_layers
    head = 2 * linear_parameters(model.get_output_embeddings())
    with_gradient = ends + head + steps.grad * step
    forward = with_gradient + steps.no_grad * step
    return Flops(forward, training=forward + 2 * with_gradient, recomputed=ends + steps.grad * step)


# --------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Precision:
    """Bytes for each parameter (weight, gradient, master, cast) and for each number that a forward pass keeps."""

    weight: int
    gradient: int
    master: int
    """The float32 weights, which the optimizer has where the model's own are shorter."""
    cast: int
    """The bf16 copies that autocast makes of float32 weights and keeps until the backward pass has ended."""
    activation: int
    residual: int
    """For numbers of the residual stream, which autocast leaves in float32."""


def precision_of(is_half: bool, by_deepspeed: bool, is_compiled: bool = False) -> Precision:
    """Without `is_half` (bf16 or fp16) all is float32: 4 + 4 bytes for weight and gradient.

    With it, DeepSpeed keeps weights and gradients in 2 bytes beside float32 weights, 2 + 2 + 4 (the ZeRO paper).
    Without DeepSpeed it is autocast: 4 + 4 as before, and the products run on copies of 2 bytes. A norm of bf16 numbers
    with float32 weights is not fused then, and keeps its input twice in float32, unless it is compiled.
    """
    if not is_half:
        return Precision(weight=4, gradient=4, master=0, cast=0, activation=4, residual=4)
    if by_deepspeed:
        return Precision(weight=2, gradient=2, master=4, cast=0, activation=2, residual=2)
    return Precision(weight=4, gradient=4, master=0, cast=2, activation=2, residual=4 if is_compiled else 8)


def state_bytes(
    parameters: int, trained: int, kept: int, precision: Precision, stage: int, ranks: int
) -> tuple[float, float, float]:
    """Bytes of parameters, gradients and optimizer states on each GPU, of so many parameters, and of so many that are
    trained, of which the optimizer keeps `kept` bytes (`bytes_of_states`).

    ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054, figure 1) divides among the ranks the optimizer states from stage 1
    on, the gradients from stage 2 on, the parameters in stage 3.
    """
    shares = (ranks if stage >= least else 1 for least in (3, 2, 1))
    weights = parameters * (precision.weight + precision.cast)
    sizes = weights, trained * precision.gradient, trained * precision.master + kept
    return tuple(size / share for size, share in zip(sizes, shares, strict=True))


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per token that a forward pass keeps for the backward pass."""

    step: int
    """One core step with gradient."""
    whole: int
    """All of them, prelude, coda and norms, at the most steps with gradient."""
    checkpointed_step: int
    checkpointed: int
    """With activation checkpointing: what all units keep, and the largest unit while it is computed again."""
    logits: int
    """The logits and their gradient in the working precision, and both in float32, if they are all held at once."""


def block_bytes(config: PreTrainedConfig, precision: Precision, row: int, packed: bool) -> int:
    """What one transformer block keeps per token, for a fused attention kernel and without dropout.

    With r bytes for a number of the residual stream and a bytes for one inside a layer:

        r h                for the input of each norm
        a 2 h              for the two normalised inputs of the layers
        a (H + 2 K) d      for queries, keys and values as projected, once more without the values where RoPE turns them
        a H d              for what attention puts out
        a 4 m              for gate, up, activation and product of a gated feed-forward layer; 2 m of a plain one
        a 2 h              for what both layers put out, where ReZero multiplies it
        a (2 q + E (2 h + 4)) + 32 E
                           in place of these for PEER: its queries of q numbers in all, before and behind their norm,
                           and of each of E experts, as many as all heads choose, both vectors, four numbers, and four
                           indices
        a row              for the mask, where documents are packed: each layer makes its own

    Compiled units keep less, as they compute cheap parts again. Left out: the bias of ALiBi, which all layers share.
    """
    hidden, row_mask = config.hidden_size, row if packed else 0
    norms = {"sandwich": 4, "peri": 4, "none": 0}.get(config.norm_placement, 2)
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = 2 * query + 2 * key + (query + key if config.position_embedding == "rope" else 0)
    feedforward = (2 if config.mlp in ("mlp", "mlp_tanh") else 4) * config.intermediate_size
    indices = 0
    if config.mlp == "peer":
        chosen = config.peer_num_heads * config.peer_top_k
        feedforward = config.peer_num_heads * 2 * config.peer_key_dim + chosen * (2 * hidden + 4)
        indices = 4 * chosen
    scaled = 2 * hidden if config.residual == "rezero" else 0
    inner = 2 * hidden + attention + feedforward + scaled + row_mask
    return precision.residual * norms * hidden + precision.activation * inner + 8 * indices


def injection_widths(name: str) -> int:
    """Numbers per token, divided by the width of the model, that autograd keeps of an injection, such as [s; e]: each
    storage once, without its weights and without e, which all steps share.
    """
    width, kept = 8, {}
    injection = INJECTIONS[name](width)
    state, embeds = (torch.ones(1, 1, width, requires_grad=True) for _ in range(2))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        injection(state, embeds)
    shared = {tensor.untyped_storage().data_ptr() for tensor in (embeds, *injection.parameters())}
    sizes = [it.untyped_storage().nbytes() // it.element_size() for place, it in kept.items() if place not in shared]
    return sum(sizes) // width


def activation_bytes(
    config: PreTrainedConfig, precision: Precision, most_grad: int, row: int, packed: bool
) -> ActivationBytes:
    """What the model keeps per token: `block_bytes` for each block that runs with gradient, and for each core step what
    its injection keeps. Checkpointing keeps the input of prelude, coda and each core step, and e.
    """
    hidden, block = config.hidden_size, block_bytes(config, precision, row, packed)
    injection = injection_widths(config.recurrence.injection) * hidden * precision.activation
    step = config.num_core_layers * block + (injection if config.num_core_layers else 0)
    prelude, coda = (layers * block for layers in (config.num_prelude_layers, config.num_coda_layers))
    norms = hidden * (2 * precision.residual + precision.activation)
    stream = hidden * precision.residual
    return ActivationBytes(
        step=step,
        whole=prelude + coda + norms + most_grad * step,
        checkpointed_step=stream,
        checkpointed=3 * stream + norms + most_grad * stream + max(prelude, coda, step),
        logits=config.vocab_size * (2 * precision.activation + 2 * 4),
    )


# -------------------------------------------------------------------------------------------------------------- as text


@dataclass(frozen=True)
class Plan:
    """What the estimates take from the training arguments.

    Args:
        deepspeed: Content of the DeepSpeed file; None for a run without.
        row: Tokens in a row.
    """

    args: PlannedTrainingArguments
    deepspeed: dict[str, Any] | None
    row: int

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return self.args.per_device_train_batch_size * self.row

    @property
    def step(self) -> int:
        """Tokens of an optimizer step on all GPUs."""
        return self.micro_batch * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's settings of ZeRO."""
        return (self.deepspeed or {}).get("zero_optimization", {})

    @property
    def stage(self) -> int | None:
        """Stage of ZeRO, None without DeepSpeed."""
        return None if self.deepspeed is None else self.zero.get("stage", 0)

    @property
    def is_half(self) -> bool:
        """Whether the run is in bf16 or fp16: as the arguments say, where DeepSpeed's file does not decide it."""
        chosen = {name: (self.deepspeed or {}).get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
        return any(getattr(self.args, name) if value == "auto" else value for name, value in chosen.items())

    def precision_at(self, stage: int | None) -> Precision:
        """The precision of this run, if it ran at another stage."""
        return precision_of(self.is_half, stage is not None, self.args.compile_units)


def describe_needs(model: PreTrainedModel, args: PlannedTrainingArguments, block_size: int, packing: bool) -> str:
    """Memory, operations and time of a run, as Markdown.

    Args:
        model: Model on any device, the meta device too. What the arguments freeze is frozen in it.
        block_size: Tokens in a row.
        packing: Whether a row holds several documents.

    Raises:
        ValueError: The number of GPUs is none, or a pattern of parameters matches none.
    """
    plan, config = Plan(args, args.deepspeed_settings, block_size), model.config.get_text_config()
    freeze(model, args.freeze)
    steps = StepCounts(0, 0, 0)
    if config.num_core_layers:
        steps = expected_steps(config.recurrence, args.seed, args.objective)
    kept = activation_bytes(config, plan.precision_at(plan.stage), steps.most_grad, block_size, packing)
    flops = flops_per_token(model, steps, block_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_states = bytes_of_states(args, model)
    states = {  # without DeepSpeed, and at each stage
        stage: state_bytes(parameters, trained, of_states, plan.precision_at(stage), stage or 0, plan.args.world_size)
        for stage in (None, 0, 1, 2, 3)
    }
    parts = [describe_states(states, plan, of_states / max(trained, 1)), describe_activations(kept, plan, steps)]
    parts += [describe_sum(states[plan.stage], kept, plan), describe_flops(flops, plan, steps)]
    parts += [describe_speed(flops, plan), *([] if config is model.config else [ENCODERS_LEFT_OUT])]
    return "\n\n".join(parts)


def describe_states(by_stage: dict[int | None, tuple[float, float, float]], plan: Plan, of_weight: float) -> str:
    """Weights, gradients and optimizer states on each GPU; of a weight, the optimizer keeps `of_weight` bytes."""
    rows = []
    for stage, states in by_stage.items():
        precision = plan.precision_at(stage)
        name = ("no DeepSpeed" if stage is None else f"ZeRO {stage}") + ", this run" * (stage == plan.stage)
        sizes = f"{precision.weight + precision.cast} + {precision.gradient} + {precision.master + of_weight:.3g}"
        rows.append([name, *(gigabytes(size) for size in (*states, sum(states))), sizes])
    title = f"Weights, gradients and states of the optimizer, GB on each of {plan.args.world_size} GPU(s):"
    text = table(title, ["", "weights", "gradients", "optimizer", "all", "bytes per parameter"], rows)
    if plan.is_half:
        text += (
            "\n\nWithout DeepSpeed the weights stay in float32 (4 bytes), and autocast computes on copies of 2; with "
            "it they have 2 bytes, and their float32 master copy is counted with the optimizer."
        )
    return text


def describe_activations(kept: ActivationBytes, plan: Plan, steps: StepCounts) -> str:
    """What a micro-batch keeps for its backward pass, with and without activation checkpointing."""
    sizes = {f"all, at {steps.most_grad} steps with gradient": (kept.whole, kept.checkpointed)}
    if steps.most_grad:
        sizes = {"a core step with gradient": (kept.step, kept.checkpointed_step), **sizes}
    rows = [[name, *(gigabytes(size * plan.micro_batch) for size in pair)] for name, pair in sizes.items()]
    names = ["without checkpointing", "with activation checkpointing"]
    names[int(plan.args.activation_checkpointing)] += ", this run"
    size = f"{plan.args.per_device_train_batch_size} x {plan.row:,} tokens"
    text = table(f"Activations of a micro-batch of {size}, GB on each GPU:", ["", *names], rows)
    logits = gigabytes(kept.logits * plan.micro_batch)
    return f"{text}\n\nTraining computes the logits in chunks; all at once would be {logits} GB."


def describe_sum(states: tuple[float, float, float], kept: ActivationBytes, plan: Plan) -> str:
    """States and activations of this run together."""
    activations = kept.checkpointed if plan.args.activation_checkpointing else kept.whole
    text = f"Together {gigabytes(sum(states) + activations * plan.micro_batch)} GB on each GPU"
    moved = [name.removeprefix("offload_") for name in ("offload_param", "offload_optimizer") if name in plan.zero]
    if moved:
        text += f", less {' and '.join(moved)}, which DeepSpeed's file moves to the memory of the machine"
    left_out = "buffers of communication, weights that ZeRO 3 gathers, fragmentation, the CUDA context"
    if build_objective(plan.args.objective).is_read_after_steps:
        left_out += f", what the objective {plan.args.objective.name} computes from the states after its steps"
    return f"{text}. Not counted: {left_out}."


def describe_flops(flops: Flops, plan: Plan, steps: StepCounts) -> str:
    """Operations per token, per optimizer step and in all."""
    rows = [
        ["token, forward", f"{flops.forward:.3e}"],
        ["token, forward and backward", f"{flops.training:.3e}"],
        ["token, computed again by activation checkpointing", f"{flops.recomputed:.3e}"],
        [f"optimizer step, {plan.step:,} tokens", f"{flops.training * plan.step:.3e}"],
    ]
    if plan.args.max_steps > 0:
        tokens = plan.step * plan.args.max_steps
        rows.append([f"run, {plan.args.max_steps:,} steps, {tokens:.3g} tokens", f"{flops.training * tokens:.3e}"])
    title = "Floating-point operations"
    if steps.most_grad:
        title += f", at {steps.no_grad:.2f} core steps without gradient and {steps.grad:.2f} with (means of the draws)"
    return table(f"{title}:", ["per", "FLOPs"], rows)


def describe_speed(flops: Flops, plan: Plan) -> str:
    """Tokens per second and time of the run on several kinds of GPU."""
    work = flops.training + (flops.recomputed if plan.args.activation_checkpointing else 0)
    gpus, tokens = plan.args.world_size, plan.step * plan.args.max_steps
    rows = []
    for name, peak in PEAK_TFLOPS.items():
        speed = peak * 1e12 * UTILISATION / work
        hours = [f"{tokens / (speed * gpus) / 3600:,.2f}"] if tokens > 0 else []
        rows.append([name, f"{peak:,}", f"{speed:,.0f}", f"{speed * gpus:,.0f}", *hours])
    names = ["GPU", "peak, dense bf16 TFLOPS", "tokens/s on one", f"tokens/s on {gpus}", "hours of the run"]
    title = (
        f"Speed, if {UTILISATION:.0%} of the peak is reached (an assumption, in which what is computed again counts):"
    )
    text = table(title, names[: len(rows[0])], rows)
    if not plan.is_half:
        text += "\n\nThis run is in float32, whose peak is a fraction of these; set training.bf16: true."
    return text


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3f}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table below its title, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])
