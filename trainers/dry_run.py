"""The estimates of a run as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .estimates import (
    PEAK_TFLOPS,
    UTILISATION,
    ActivationBytes,
    Flops,
    Precision,
    StepCounts,
    activation_bytes,
    expected_steps,
    flops_per_token,
    precision_of,
    state_bytes,
)
from .parameter_groups import freeze
from .planned_arguments import PlannedTrainingArguments

ENCODERS_LEFT_OUT = (
    "Encoders of images and sound run once per medium, of which a row may have none: their weights are counted above, "
    "their operations and activations are not."
)


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
        model: On any device, the meta device too. What the arguments freeze is frozen in it.
        block_size: Tokens in a row.
        packing: Whether a row holds several documents.

    Raises:
        ValueError: for a number of GPUs that is none, and patterns of parameters that match none.
    """
    plan, config = Plan(args, args.deepspeed_settings, block_size), model.config.get_text_config()
    freeze(model, args.freeze)
    steps = StepCounts(0, 0, 0)
    if config.num_core_layers:
        steps = expected_steps(config.recurrence, args.seed)
    kept = activation_bytes(config, plan.precision_at(plan.stage), steps.most_grad, block_size, packing)
    flops = flops_per_token(model, steps, block_size)
    states = states_by_stage(model, plan)
    parts = (
        describe_states(states, plan),
        describe_activations(kept, plan, steps),
        describe_sum(states[plan.stage], kept, plan),
        describe_flops(flops, plan, steps),
        describe_speed(flops, plan),
    )
    if config is not model.config:
        parts += (ENCODERS_LEFT_OUT,)
    return "\n\n".join(parts)


def states_by_stage(model: PreTrainedModel, plan: Plan) -> dict[int | None, tuple[float, float, float]]:
    """Bytes of weights, gradients and optimizer states on each GPU, without DeepSpeed (None) and at each stage."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        stage: state_bytes(parameters, plan.precision_at(stage), stage or 0, plan.args.world_size, trained)
        for stage in (None, 0, 1, 2, 3)
    }


def describe_states(states_by_stage: dict[int | None, tuple[float, float, float]], plan: Plan) -> str:
    """Weights, gradients and optimizer states on each GPU."""
    rows = []
    for stage, states in states_by_stage.items():
        precision = plan.precision_at(stage)
        name = ("no DeepSpeed" if stage is None else f"ZeRO {stage}") + ", this run" * (stage == plan.stage)
        sizes = f"{precision.weight + precision.cast} + {precision.gradient} + {precision.optimizer}"
        rows.append([name, *(gigabytes(size) for size in (*states, sum(states))), sizes])
    lines = [
        f"Weights, gradients and AdamW's states, GB on each of {plan.args.world_size} GPU(s):",
        "",
        *table(["", "weights", "gradients", "optimizer", "all", "bytes per parameter"], rows),
    ]
    if plan.is_half:
        lines += [
            "",
            "Without DeepSpeed the weights stay in float32 (4 bytes), and autocast computes on copies of 2; with it "
            "they have 2 bytes, and their float32 master copy is counted with the optimizer.",
        ]
    return "\n".join(lines)


def describe_activations(kept: ActivationBytes, plan: Plan, steps: StepCounts) -> str:
    """What a micro-batch keeps for its backward pass, with and without activation checkpointing."""
    sizes = {f"all, at {steps.most_grad} steps with gradient": (kept.whole, kept.checkpointed)}
    if steps.most_grad:
        sizes = {"a core step with gradient": (kept.step, kept.checkpointed_step), **sizes}
    rows = [[name, *(gigabytes(size * plan.micro_batch) for size in pair)] for name, pair in sizes.items()]
    names = ["without checkpointing", "with activation checkpointing"]
    names[int(plan.args.activation_checkpointing)] += ", this run"
    lines = [
        f"Activations of a micro-batch of {plan.args.per_device_train_batch_size} x {plan.row:,} tokens, "
        "GB on each GPU:",
        "",
        *table(["", *names], rows),
        "",
        f"Training computes the logits in chunks; all at once would be {gigabytes(kept.logits * plan.micro_batch)} GB.",
    ]
    return "\n".join(lines)


def describe_sum(states: tuple[float, float, float], kept: ActivationBytes, plan: Plan) -> str:
    """States and activations of this run together."""
    activations = kept.checkpointed if plan.args.activation_checkpointing else kept.whole
    text = f"Together {gigabytes(sum(states) + activations * plan.micro_batch)} GB on each GPU"
    moved = [name.removeprefix("offload_") for name in ("offload_param", "offload_optimizer") if name in plan.zero]
    if moved:
        text += f", less {' and '.join(moved)}, which DeepSpeed's file moves to the memory of the machine"
    return (
        f"{text}. Not counted: buffers of communication, weights that ZeRO 3 gathers, fragmentation, the CUDA context."
    )


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
    return "\n".join([f"{title}:", "", *table(["per", "FLOPs"], rows)])


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
    lines = [
        f"Speed, if {UTILISATION:.0%} of the peak is reached (an assumption, in which what is computed again counts):",
        "",
        *table(names[: len(rows[0])], rows),
    ]
    if not plan.is_half:
        lines += ["", "This run is in float32, whose peak is a fraction of these; set training.bf16: true."]
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    """10^9 bytes."""
    return f"{size / 1e9:,.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
