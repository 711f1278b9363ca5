"""Pictures of what goes on in a language model while it trains: where it attends, how large activations and gradients
are, after how many steps tokens would exit, and which way their states take.
"""

import functools
import inspect
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import unwrap_peft_model

from model.depth import DepthOptions
from model.exit_criteria import ExitController, ExitOptions, relative_change

from .figures import exits_figure, flow_figure, maps_figure, trajectories_figure
from .reporting import Reporter, ReportingCallback, aside

logger = logging.getLogger(__name__)

LARGEST_MAPS = 8
"""Core steps whose attention is shown, spread evenly, the first and the last among them."""
DRAWN_TOKENS = 8
"""Tokens whose states are followed, spread evenly over a row."""
SAMPLED_GRADIENTS = 20_000
"""Most numbers of a layer that its part's histogram counts, spread evenly."""
TRIED_ROWS = 32
"""Rows that are looked at to find some that are short enough."""

Inputs = dict[str, torch.Tensor]


@dataclass
class PicturesConfig:
    """Pictures of what goes on in a language model, most of them of fixed validation rows, where the run reports to
    TensorBoard, wandb or trackio.
    """

    attention_every_steps: int = 500
    """Optimizer steps between attention maps of the first row, of each layer and core step, means over the heads; at
    least 0; 0: none.
    """

    activations_every_steps: int = 500
    """Optimizer steps between histograms of what embeddings, encoders, prelude and core put out, and of what the head
    reads; at least 0; 0: none.
    """

    gradients_every_steps: int = 500
    """Optimizer steps between histograms of gradients by part, and pictures of their means and largest values by layer;
    at least 0; 0: none. DeepSpeed and FSDP, which divide gradients among ranks, show none.
    """

    exits_every_steps: int = 500
    """Optimizer steps between pictures of the core steps after which tokens would exit, by the criterion of the model's
    configuration, or kl_divergence where it names none; at least 0; 0: none.
    """

    trajectories_every_steps: int = 500
    """Optimizer steps between pictures of the ways that the states of some tokens of the first row take over the core
    steps; at least 0; 0: none.
    """

    num_rows: int = 4
    """Rows that are shown, at least 1; of several validation sources in turn."""

    max_tokens: int = 128
    """Tokens of a row that are shown, at least 2: of texts the first ones; rows with longer media are passed over."""

    def __post_init__(self) -> None:
        least = {"num_rows": 1, "max_tokens": 2}
        for option in fields(self):
            value, minimum = getattr(self, option.name), least.get(option.name, 0)
            if value < minimum:
                raise ValueError(f"pictures.{option.name} is {value}, must be at least {minimum}.")


@dataclass
class LayerGradient:
    """The gradient of the weights of a layer: mean and largest absolute value, and some of its numbers."""

    mean: float
    largest: float
    sample: torch.Tensor


class PicturesCallback(ReportingCallback):
    """Shows each picture after every so many steps. All ranks run the model (under ZeRO-3 none has the whole of it),
    rank 0 draws. The random state of the training is left as it was.
    """

    def __init__(self, config: PicturesConfig, reporter: Reporter) -> None:
        super().__init__(reporter)
        self.config = config
        self.gradients: dict[str, LayerGradient] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say what cannot be shown."""
        if self.config.gradients_every_steps and not self.has_gradients:
            logger.info("There are no pictures of gradients, which DeepSpeed and FSDP divide among ranks")

    @property
    def has_gradients(self) -> bool:
        """Whether a parameter has its whole gradient before the update."""
        return not (self.reporter.trainer.is_deepspeed_enabled or self.reporter.trainer.is_fsdp_enabled)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Keep what is shown of the gradients of the step in progress, if it is due."""
        every = self.config.gradients_every_steps
        if every and (state.global_step + 1) % every == 0 and self.has_gradients and state.is_world_process_zero:
            self.gradients = layer_gradients(unwrap_peft_model(model))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """Show what is due."""
        config, of_model = self.config, model.config.get_text_config()
        intervals = {
            self.show_attention: config.attention_every_steps,
            self.show_activations: config.activations_every_steps,
            self.show_exits: config.exits_every_steps * of_model.has_depths,
            self.show_trajectories: config.trajectories_every_steps * (of_model.num_core_layers > 0),
        }
        due = [show for show, every in intervals.items() if every and state.global_step % every == 0]
        self.show_gradients()
        for show in due if due and self.rows else ():
            show(model)

    @functools.cached_property
    def rows(self) -> list[Inputs]:
        """Inputs of the model, one row each."""
        trainer = self.reporter.trainer
        with aside(trainer.model):
            rows = list(fixed_rows(trainer, self.config))
        if not rows:
            logger.info(
                "There are no pictures of attention, activations, exits and trajectories: among the first validation "
                "rows none has input_ids, and at most %d tokens",
                self.config.max_tokens,
            )
        return rows

    def observe(self, model: PreTrainedModel, inputs: Inputs, **asked: Any) -> Any:
        """What the model puts out for a row, in evaluation mode, without compiling anything."""
        given = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        is_compiled = unwrap_peft_model(model).base_model.units_are_compiled
        eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        with aside(model), self.reporter.trainer.compute_loss_context_manager(), eager:
            return model(**given, use_cache=False, **asked)

    # ------------------------------------------------------------------------------------------------------- pictures

    def show_gradients(self) -> None:
        """Draw what was kept of the gradients."""
        parts = defaultdict(list)
        for layer, gradient in self.gradients.items():
            parts[layer.split(" ")[0]].append(gradient.sample)
        for part, samples in parts.items():
            self.reporter.histogram(f"pictures/gradients/{part}", torch.cat(samples))
        if self.gradients:
            layers = {layer: (gradient.mean, gradient.largest) for layer, gradient in self.gradients.items()}
            self.reporter.figure("pictures/gradient_flow", flow_figure(layers))
        self.gradients = {}

    def show_attention(self, model: PreTrainedModel) -> None:
        """Draw the attention maps of the first row."""
        attentions = self.observe(model, self.rows[0], output_attentions=True).attentions
        if self.reporter.backends:
            lines = attention_maps(attentions, model.config.get_text_config())
            self.reporter.figure("pictures/attention", maps_figure(lines))

    def show_activations(self, model: PreTrainedModel) -> None:
        """Show histograms of the activations of all rows, by part."""
        parts = defaultdict(list)
        for inputs in self.rows:
            outputs = self.observe(model, inputs, output_hidden_states=True, output_states=True)
            for part, values in activations(outputs, model.config.get_text_config()):
                parts[part].append(values.flatten())
        for part, values in parts.items():
            self.reporter.histogram(f"pictures/activations/{part}", torch.cat(values))

    def show_exits(self, model: PreTrainedModel) -> None:
        """Draw after how many steps the tokens of all rows would exit, and log the mean."""
        options = exit_options(model)
        steps = torch.cat([self.exit_steps(model, inputs, options) for inputs in self.rows])
        if self.reporter.backends:
            trainer, counts = self.reporter.trainer, steps.bincount(minlength=depth_of(model) + 1)[1:].tolist()
            self.reporter.figure("pictures/exits", exits_figure(counts, options.criterion))
            mean = {"pictures/exit_step": steps.float().mean().item()}
            self.reporter.write(trainer.args, trainer.state, trainer.control, mean)

    def exit_steps(self, model: PreTrainedModel, inputs: Inputs, options: ExitOptions) -> torch.Tensor:
        """Core steps after which each token of a row would exit, judged by itself, where all others take all steps,
        (tokens,) on the CPU; all steps for those that never would.
        """
        base, full = unwrap_peft_model(model).base_model, depth_of(model)
        states = self.observe(model, inputs, output_states=True, num_steps=full).states
        controller = ExitController(options, lambda logits: logits, base)
        controller.begin(as_rows(states[0]), None)
        steps = torch.full((states[0].shape[1],), full)
        for step in filter(controller.is_due, range(1, full)):
            logits = None
            if controller.criterion.reads_logits:
                # One more step from the state before, unless steps are not all the same.
                depth = {"num_steps": 1, "initial_state": states[step - 1]}
                depth = depth if not base.core.depends_on_step else {"num_steps": step}
                logits = as_rows(self.observe(model, inputs, **depth).logits)
            stops = controller.check(step, as_rows(states[step]), logits, None).cpu()
            steps[stops & (steps == full)] = step
        return steps

    def show_trajectories(self, model: PreTrainedModel) -> None:
        """Draw the ways of the states of some tokens of the first row."""
        states = torch.cat(self.observe(model, self.rows[0], output_states=True).states).float()
        tokens = spread(states.shape[1], DRAWN_TOKENS)
        states = states[:, tokens].cpu()  # (steps + 1, tokens, hidden)
        if not states.isfinite().all():
            logger.warning("There is no picture of trajectories: states are not finite")
        elif self.reporter.backends:
            distances = relative_change(states[-1], states[:-1])
            self.reporter.figure("pictures/trajectories", trajectories_figure(in_plane(states), distances))


# ----------------------------------------------------------------------------------------------------- what is observed


def fixed_rows(trainer: Trainer, config: PicturesConfig) -> Iterator[Inputs]:
    """Inputs of the model, each of one row, of the validation sources in turn, or else of what is learned, unless that
    is a stream, which others read. Texts are cut, rows with media that are too long are left out.
    """
    datasets = trainer.eval_dataset or trainer.train_dataset
    datasets = list(datasets.values()) if isinstance(datasets, dict) else [datasets]
    datasets = [dataset for dataset in datasets if not isinstance(dataset, IterableDataset)]
    tried = (dataset[index] for index in range(TRIED_ROWS) for dataset in datasets if index < len(dataset))
    accepted = inspect.signature(unwrap_peft_model(trainer.model).forward).parameters.keys() - {"labels"}
    batches = (trainer.data_collator([row]) for row in itertools.islice(tried, TRIED_ROWS) if "input_ids" in row)
    fitting = (cut({name: batch[name] for name in accepted & batch.keys()}, config.max_tokens) for batch in batches)
    yield from itertools.islice(filter(None, fitting), config.num_rows)


def cut(inputs: Inputs, max_tokens: int) -> Inputs | None:
    """The first tokens of a row, or, where it has media, the whole of it; None where that is too long."""
    shape = inputs["input_ids"].shape
    if all(value.shape == shape for value in inputs.values()):
        return {name: value[:, :max_tokens] for name, value in inputs.items()}
    return inputs if shape[1] <= max_tokens else None


def spread(count: int, most: int) -> list[int]:
    """Some of the numbers 0 .. count - 1, at most `most`, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in torch.linspace(0, count - 1, most).tolist()})


def attention_maps(attentions: Sequence[torch.Tensor], config: PreTrainedConfig) -> dict[str, dict[int, torch.Tensor]]:
    """Means over the heads, (query, key), by layer and core step, 0 for layers that run once.

    Args:
        attentions: (1, heads, query, key) of each layer, in the order in which they ran.
    """
    maps = iter([each[0].float().mean(0) for each in attentions])
    lines: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for layer in range(config.num_prelude_layers):
        lines[f"prelude {layer}"][0] = next(maps)
    num_once = config.num_prelude_layers + config.num_coda_layers
    num_steps = (len(attentions) - num_once) // config.num_core_layers if config.num_core_layers else 0
    shown = spread(num_steps, LARGEST_MAPS) if num_steps else []
    for step, layer in itertools.product(range(num_steps), range(config.num_core_layers)):
        values = next(maps)
        if step in shown:
            lines[f"core {layer}"][step + 1] = values
    for layer in range(config.num_coda_layers):
        lines[f"coda {layer}"][0] = next(maps)
    return dict(lines)


def activations(outputs: Any, config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """What each part puts out, by its name; "output" is what the head reads."""
    hidden = outputs.hidden_states
    yield "embeddings", hidden[0]
    if config.num_prelude_layers:
        yield "prelude", hidden[config.num_prelude_layers]
    if outputs.states:
        yield "core", outputs.states[-1]
    yield "output", hidden[-1]
    for name in ("image", "audio"):
        for features in getattr(outputs.get(f"{name}_outputs"), "pooler_output", ()):
            yield name, features


def layer_gradients(model: PreTrainedModel) -> dict[str, LayerGradient]:
    """The gradients of all parameters that have one, by layer, in the order of the model."""
    layers: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.numel():
            layers[layer_of(name)].append(parameter.grad)
    return {layer: summarize(gradients) for layer, gradients in layers.items()}


def summarize(gradients: Sequence[torch.Tensor]) -> LayerGradient:
    """The figures of a layer."""
    count = sum(gradient.numel() for gradient in gradients)
    sums, largest = (
        [torch.linalg.vector_norm(gradient, order, dtype=torch.float32).item() for gradient in gradients]
        for order in (1, float("inf"))
    )
    stride = -(-count // SAMPLED_GRADIENTS)
    sample = torch.cat([gradient.flatten()[::stride].float().cpu() for gradient in gradients])
    return LayerGradient(sum(sums) / count, max(largest), sample)


def layer_of(name: str) -> str:
    """The layer or the part that a parameter belongs to, "core 0" or "embed_tokens"."""
    words = name.removeprefix("model.").split(".")[:-1]
    end = words.index("layers") + 2 if "layers" in words else 2
    return " ".join(word for word in words[:end] if word != "layers")


def depth_of(model: PreTrainedModel) -> int:
    """Core steps of an evaluation."""
    config = model.config.get_text_config()
    return config.num_steps or config.recurrence.mean_steps


def exit_options(model: PreTrainedModel) -> ExitOptions:
    """Those of the configurations of a model, by the divergence of outputs where they name no criterion."""
    recurrence = model.config.get_text_config().recurrence
    options = DepthOptions.resolve({}, model.generation_config, recurrence).exits
    if options.criterion in ("none", "schedule"):
        return replace(options, criterion="kl_divergence", threshold=None)
    return options


def as_rows(values: torch.Tensor) -> torch.Tensor:
    """(1, tokens, ...) -> (tokens, 1, ...)."""
    return values.transpose(0, 1)


def in_plane(states: torch.Tensor) -> torch.Tensor:
    """(..., hidden) -> (..., 2), by their two principal components."""
    points = states.flatten(0, -2)
    points = points - points.mean(0)
    directions = torch.linalg.svd(points, full_matrices=False).Vh[:2]
    return (points @ directions.T).unflatten(0, states.shape[:-1])
