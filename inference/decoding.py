"""How tokens are chosen and how deep each is computed: arguments that all commands which write text share."""

import argparse
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from model.exit_criteria import EXIT_CRITERIA

from . import arguments

FLOW_OPTIONS = ("guidance_scale", "num_flow_steps", "flow_temperature")
SAMPLING_DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}


class FiniteLogits(LogitsProcessor):
    """Refuses logits of which none is the largest, since they are no numbers, or all equal, as where a norm has
    overflowed: the likeliest token would be the first of the vocabulary, whatever that is.

    Raises:
        ValueError: when the model is computed to such logits.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores as they are. Both are (rows, ...)."""
        largest = scores.amax(dim=-1)
        fault = "" if largest.isfinite().all() else "infinite or no numbers"
        if fault or (largest == scores.amin(dim=-1)).any():
            fault = fault or "all equal"
            raise ValueError(
                f"the model's logits are {fault} after {input_ids.shape[1]} tokens: its weights are too "
                "large or damaged; use a checkpoint from before training diverged, or another --dtype."
            )
        return scores


def add_flow_arguments(parser: argparse.ArgumentParser) -> None:
    """How latents of images and audio are drawn."""
    what = "how much the prompt counts, 1: as it is; default: the model's"
    parser.add_argument("--guidance-scale", type=arguments.guidance, help=what)
    what = "steps from noise to a latent; default: the model's"
    parser.add_argument("--num-flow-steps", type=arguments.flow_steps, help=what)
    what = "variance of a latent's noise; default: the model's"
    parser.add_argument("--flow-temperature", type=arguments.guidance, help=what)


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Depth, exits, length and choice of tokens."""
    parser.add_argument(
        "--num-steps", type=arguments.core_steps, help="times the core is applied per token; default: the model's"
    )
    parser.add_argument(
        "--exit-criterion",
        choices=["none", *EXIT_CRITERIA],
        help="what ends a token's steps earlier; default: the model's",
    )
    parser.add_argument(
        "--exit-threshold",
        type=arguments.finite,
        help="value below which a token's steps end; default: the criterion's",
    )
    what = (
        "wavefront: drafts of the next token follow one that is not finished, for the same text; default: the model's"
    )
    parser.add_argument("--decoding", choices=["plain", "wavefront"], help=what)
    parser.add_argument("--max-new-tokens", type=arguments.new_tokens, default=100, help="most tokens to generate")
    parser.add_argument(
        "--max-prompt-tokens",
        type=arguments.prompt_tokens,
        help="most tokens of a prompt or conversation; default: as many as the model has positions (in a conversation "
        "less --max-new-tokens)",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--sample", action="store_true", help="draw each token (this is the default)")
    choice.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    for name, kind, what in (
        ("temperature", arguments.temperature, "divides the logits before a draw, above 0"),
        ("top-k", arguments.top_tokens, "draw from this many likeliest tokens; 0: from all"),
        ("top-p", arguments.nucleus, "draw from the likeliest tokens that together have this probability"),
    ):
        default = SAMPLING_DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: {default})")
    parser.add_argument(
        "--repetition-penalty", type=arguments.penalty, default=1.0, help="divides the logits of tokens already there"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="seed of the draws; the same seed gives the same text"
    )


def decoding_options(parser: arguments.OneLineParser, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` that they come to, but for the depth, which not every model has."""
    if args.exit_threshold is not None and args.exit_criterion in (None, "none"):
        parser.error("--exit-threshold has no effect without --exit-criterion: name one, or leave it out.")
    options = {"max_new_tokens": args.max_new_tokens, "repetition_penalty": args.repetition_penalty}
    exits = {"exit_criterion": args.exit_criterion, "exit_threshold": args.exit_threshold}
    options |= {name: value for name, value in (exits | {"decoding": args.decoding}).items() if value is not None}
    options["logits_processor"] = LogitsProcessorList([FiniteLogits()])
    given = {name: getattr(args, name) for name in SAMPLING_DEFAULTS if name in args}
    if not args.greedy:
        return {**options, "do_sample": True, **SAMPLING_DEFAULTS, **given}
    if given:
        name = next(iter(given)).replace("_", "-")
        parser.error(f"--{name} has no effect with --greedy: leave one of the two out.")
    return {**options, "do_sample": False}


def depth_option(model: PreTrainedModel, num_steps: int | None, name: str = "--num-steps") -> dict[str, int]:
    """The argument of `generate` for a depth, if one is asked for; ValueError if the model has none."""
    if num_steps is not None and model.config.get_text_config().num_core_layers == 0:
        raise ValueError(
            f"{name} {num_steps} was given, but this model has no core to repeat (num_core_layers is 0): leave it out."
        )
    return {} if num_steps is None else {"num_steps": num_steps}
