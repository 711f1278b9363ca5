"""What the core does with one prompt, step by step, and whether it settles:
`python -m evaluation.dynamics runs/recurrent_lm --prompt "A cup"`.
"""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from callbacks.pictures import as_rows, depth_of, exit_options, spread
from inference import arguments
from inference.decoding import FiniteLogits
from inference.devices import DTYPES, choose_device, choose_threads, device_report
from inference.loading import load_model
from inference.output import SUFFIXES, save_audio, whole_folder, writable_folder, write_result
from inference.prompts import (
    add_prompt_arguments,
    check_characters,
    check_length,
    encode_prompt,
    encode_question,
    prompt_limit,
    read_prompt,
)
from model import ExitOptions, draw_codes, tokenizer_of
from model.core_step import CoreStep
from model.exit_criteria import EXIT_CRITERIA, ExitController

from .dynamics_report import DynamicsReport, LensStep, PositionExits, dynamics_markdown, save_dynamics
from .iteration import Dynamics, measure_dynamics
from .media_generation import GeneratedItem

logger = logging.getLogger("evaluation.dynamics")  # __name__ is __main__ when run with -m

MOST_ITEMS = 8
"""Depths at which images or audio are generated, spread evenly, the first and the last among them."""

Inputs = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a prompt; writes tables to standard output, and JSON, Markdown and PNG files.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    logger.info("%s", device_report())
    with parser.one_line_errors():
        prompt = (args.prompt or "") if args.media else read_prompt(args.prompt)
        output = writable_folder(args.output or Path(args.checkpoint) / "dynamics")
        model, processor = load_model(args.checkpoint, choose_device(args.device), getattr(torch, args.dtype))
        choose_threads(model)
        check_core(model)
        inputs = encode(model, processor, args, prompt)
        num_steps = args.num_steps or depth_of(model)
        items, rate = {}, None
        if args.mode != "text":
            items, rate = generate_items(model, inputs, args.mode, num_steps)
        report = report_of(model, processor, inputs, num_steps, items)
        about = {"checkpoint": args.checkpoint, "prompt": prompt, "media": [list(it) for it in args.media]}
        write_result(dynamics_markdown(report))
        with whole_folder(output) as made:
            figures = save_dynamics(report, made, {**about, "mode": args.mode, "dtype": args.dtype})
            for depth, item in items.items() if rate is not None else ():
                save_audio([torch.as_tensor(item[0])], rate, made / f"item_{depth}.wav")
            names = sorted(path.name for path in made.iterdir())
        if args.tensorboard:
            write_events(report, figures, output)
        write_result("\nwritten to " + ", ".join(str(output / name) for name in names) + "\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(
        prog="evaluation.dynamics",
        description="What the core of a model does with a prompt, step by step: what each step would say, how far it "
        "moves the state, whether the iteration settles, and when it would exit.",
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run (its newest complete checkpoint)")
    parser.add_argument("--device", help="device such as cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="format of the weights")
    add_prompt_arguments(parser)
    parser.add_argument(
        "--num-steps", type=arguments.core_steps, help="core steps that are shown; default: the model's"
    )
    parser.add_argument("--max-prompt-tokens", type=arguments.prompt_tokens, help="most tokens of the prompt")
    parser.add_argument(
        "--mode",
        choices=["text", *SUFFIXES],
        default="text",
        help="image or audio: also generate one for the prompt at several depths",
    )
    parser.add_argument("--output", type=Path, help="folder for the files; default: dynamics in the given folder")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events into the folder")
    return parser


def check_core(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose step cannot be measured."""
    config = model.config.get_text_config()
    if config.num_core_layers == 0:
        raise ValueError("this model has no core (num_core_layers is 0), so nothing is iterated: give a recurrent one.")
    if config.recurrence.untied_core:
        raise ValueError("this model has a core for each step (untied_core), so nothing is iterated: give its twin.")
    if getattr(model, "is_quantized", False):  # transformers sets it on such models alone
        raise ValueError("the weights are quantized, and have no derivatives: give the checkpoint they were made from.")
    if config.recurrence.cache_policy == "first":
        raise ValueError(
            "the cache policy of this model is 'first', so a step depends on the first one and not on the state alone: "
            "give a model with another policy."
        )


def encode(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    args: argparse.Namespace,
    prompt: str,
) -> Inputs:
    """The inputs of the model, one row; a decoder behind an encoder reads its start token.

    Raises:
        ValueError: The prompt has no tokens or too many, or the model does not read such media.
    """
    tokenizer, limit = tokenizer_of(processor), prompt_limit(model, args.max_prompt_tokens)
    check_characters(tokenizer, prompt, limit)
    if args.mode != "text" and not isinstance(processor, ProcessorMixin):
        raise ValueError(f"--mode {args.mode} was given, but this model writes text alone: leave it out.")
    is_question = args.media or args.mode != "text"
    inputs = encode_question(processor, (args.media, prompt)) if is_question else encode_prompt(tokenizer, prompt)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"the prompt {prompt!r} has no tokens: give --prompt TEXT.")
    check_length(inputs, limit)
    return inputs.to(model.device, model.dtype)


# ------------------------------------------------------------------------------------------------------------- measures


def report_of(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    inputs: Inputs,
    num_steps: int,
    items: Mapping[int, GeneratedItem | None],
) -> DynamicsReport:
    """All that is measured of a prompt."""
    inputs, texts = with_decoder_start(model, inputs), partial(token_texts, tokenizer_of(processor))
    lens, exits = read_steps(model, inputs, num_steps, texts)
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])[0].tolist()
    return DynamicsReport(texts(ids), prompt_dynamics(model, inputs, num_steps), lens, exits, dict(items))


def with_decoder_start(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The same with the start token of a decoder behind an encoder, if that is what the model has."""
    if not model.config.is_encoder_decoder:
        return inputs
    start = torch.tensor([[model.config.decoder_start_token_id]], device=model.device)
    return {**inputs, "decoder_input_ids": start}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token by itself."""
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]


def prompt_dynamics(model: PreTrainedModel, inputs: Inputs, num_steps: int) -> Dynamics:
    """The iteration of the core for a prompt, from the model's initial state."""
    step = first_core_step(model, inputs)
    return measure_dynamics(lambda state, taken: step.after(taken).take(state), step.state, num_steps)


def first_core_step(model: PreTrainedModel, inputs: Inputs) -> CoreStep:
    """The step from the initial state, of all tokens."""
    core, calls = model.base_model.core, []
    hook = core.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with hook, torch.no_grad():
        model(**inputs, num_steps=1, use_cache=False)
    (state, embeds), given = calls[0]
    return CoreStep.of(core, state, embeds, most_tokens=state.shape[1], **given)


@torch.no_grad()
def read_steps(
    model: PreTrainedModel, inputs: Inputs, num_steps: int, texts: Any
) -> tuple[list[LensStep], dict[str, PositionExits]]:
    """What coda and head read after each step, by a run with so many; and after which of them each position would exit
    by each criterion, judged by itself, where all others take all steps.
    """
    states = model(**inputs, num_steps=num_steps, output_states=True, use_cache=False).states
    controllers = {options.criterion: build_controller(model, options) for options in all_exits(model)}
    steps = {name: torch.full((states[0].shape[1],), num_steps) for name in controllers}
    for controller in controllers.values():
        controller.begin(as_rows(states[0]), None)
    lens = []
    for step in range(1, num_steps + 1):
        logits = model(**inputs, num_steps=step, use_cache=False).logits.float()
        likeliest = logits[0].softmax(-1).max(-1)
        ids = likeliest.indices.tolist()
        lens.append(LensStep(step, ids, texts(ids), likeliest.values.tolist()))
        for name, controller in controllers.items():
            if step < num_steps and controller.is_due(step):
                read = as_rows(logits) if controller.criterion.reads_logits else None
                stops = controller.check(step, as_rows(states[step]), read, None).cpu()
                steps[name][stops & (steps[name] == num_steps)] = step
    exits = {name: PositionExits(controllers[name].threshold, it.tolist()) for name, it in steps.items()}
    return lens, exits


def all_exits(model: PreTrainedModel) -> Iterator[ExitOptions]:
    """The options of every criterion that the model has what it takes for; those of its configuration, if it names one,
    are among them.
    """
    configured = exit_options(model)
    for name in EXIT_CRITERIA:
        if name == configured.criterion:
            yield configured
        elif EXIT_CRITERIA[name].is_in(model.config.get_text_config()):
            yield ExitOptions(name)


def build_controller(model: PreTrainedModel, options: ExitOptions) -> ExitController:
    """A controller that is given logits."""
    return ExitController(options, lambda logits: logits, model.base_model)


def generate_items(
    model: PreTrainedModel, inputs: Inputs, mode: str, num_steps: int
) -> tuple[dict[int, GeneratedItem | None], int | None]:
    """The image or audio for the prompt at several depths, from the same noise, and the rate of audio; an image of
    codes that was not finished is None.
    """
    items, rate = {}, None
    for depth in (place + 1 for place in spread(num_steps, MOST_ITEMS)):
        if mode == "image" and getattr(model, "decode_image_tokens", None):
            options = {"num_steps": depth, "logits_processor": LogitsProcessorList([FiniteLogits()])}
            (items[depth],) = draw_codes(model, {**inputs, **options})
            continue
        output = model.generate(**inputs, generation_mode=mode, flow_seeds=[0], do_sample=False, num_steps=depth)
        if mode == "image":
            (items[depth],) = output.images
        else:
            rate = output.sampling_rate
            items[depth] = output.audio[0].cpu().float().numpy(), rate
    return items, rate


def write_events(report: DynamicsReport, figures: Mapping[str, Any], folder: Path) -> None:
    """TensorBoard's events: curves by core step, and the figures."""
    from torch.utils.tensorboard import SummaryWriter

    found = report.dynamics
    curves = {
        "step_size": (found.step_sizes, 1),
        "angle": (found.angles, 1),
        "residual": (found.residuals, 0),
        "spectral_radius": (found.spectral_radii, 0),
        "effective_rank": (found.effective_ranks, 0),
    }
    with SummaryWriter(str(folder)) as writer:
        for name, (values, first) in curves.items():
            for step, value in enumerate(values, start=first):
                writer.add_scalar(f"dynamics/{name}", value, step)
        for name, figure in figures.items():
            writer.add_figure(f"dynamics/{name}", figure, close=False)


if __name__ == "__main__":
    sys.exit(main())
