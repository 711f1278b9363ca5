"""Continue a text: `python -m inference.generate CHECKPOINT --prompt "Once upon" --num-steps 32`; or write what it asks
for: `python -m inference.generate CHECKPOINT --mode image --prompt "a small red circle" --out out.png`.
"""

from .logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from model import draw_codes, length_before, tokenizer_of

from . import arguments
from .decoding import (
    FLOW_OPTIONS,
    FiniteLogits,
    add_decoding_arguments,
    add_flow_arguments,
    decoding_options,
    depth_option,
)
from .devices import device_report
from .loading import add_loading_arguments, load_as_asked
from .output import SUFFIXES, TerminalStreamer, check_path, save_audio, save_images, whole_file, write_result
from .prompts import (
    add_prompt_arguments,
    check_characters,
    check_length,
    check_prompts,
    encode_prompt,
    encode_question,
    prompt_limit,
    read_prompt,
    read_prompts,
    write_answers,
)

logger = logging.getLogger("inference.generate")  # __name__ is __main__ when run with -m

BATCH_SIZE = 8
"""Prompts of a file that are continued together."""


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(
        prog="inference.generate",
        description="Continue a text with a trained model, or answer to images and audio; what it generates goes to "
        "standard output, and images and audio to files.",
    )
    add_loading_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='many prompts, one JSON object a line: {"prompt": TEXT}, with "image", "images" or "audio" if they are '
        'about files; each is written with its "text", a line each',
    )
    parser.add_argument("--batch-size", type=arguments.batch_rows, help="prompts of --prompts at a time (default: 8)")
    parser.add_argument("--mode", choices=["text", *SUFFIXES], default="text", help="what is written")
    parser.add_argument(
        "--out",
        type=Path,
        help="file of the image or audio; several images are a sheet, several audio files numbered. With --prompts: "
        "file of the lines; default: standard output",
    )
    parser.add_argument(
        "--count", type=arguments.media_count, default=1, help="how many images or audio files to generate"
    )
    add_flow_arguments(parser)
    what = "largest relative error of drafts of latents that are kept, with --decoding wavefront"
    parser.add_argument("--latent-tolerance", type=arguments.guidance, help=what)
    add_decoding_arguments(parser)
    parser.add_argument("--no-stream", action="store_true", help="write the text at once when it is finished")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: the input is bad; the code is 2, after one line on standard error.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    options = decoding_options(parser, args)
    check_mode(parser, args)
    logger.info("%s", device_report())
    with parser.one_line_errors():
        if args.prompts is not None:
            prompts = read_prompts(args.prompts)
        else:
            prompt = (args.prompt or "") if args.media else read_prompt(args.prompt)
        model, processor = load_as_asked(args.checkpoint, args)
        tokenizer = tokenizer_of(processor)
        options |= depth_option(model, args.num_steps)
        limit = prompt_limit(model, args.max_prompt_tokens)
        if args.prompts is not None:
            check_prompts(args.prompts, processor, prompts, limit)
            with ExitStack() as files:
                out = sys.stdout
                if args.out is not None:
                    out = files.enter_context(files.enter_context(whole_file(args.out)).open("w", encoding="utf-8"))
                write_answers(model, processor, prompts, args.batch_size or BATCH_SIZE, args.seed, options, out)
            return 0
        set_seed(args.seed)
        check_characters(tokenizer, prompt, limit)
        if args.mode != "text":
            answer_with_media(model, processor, args, prompt, limit)
            return 0
        inputs = encode_question(processor, (args.media, prompt)) if args.media else encode_prompt(tokenizer, prompt)
        check_length(inputs, limit)
        inputs = inputs.to(model.device, model.dtype)
        write_continuation(model, tokenizer, inputs, stream=not args.no_stream, options=options)
    return 0


def check_mode(parser: arguments.OneLineParser, args: argparse.Namespace) -> None:
    """Refuse options of media for text, and media without a file; options of one prompt for many, and the reverse."""
    if args.prompts is not None:
        given = [name for name in ("prompt", "media") if getattr(args, name)] + ["mode"] * (args.mode != "text")
        if given:
            flag = args.media[0][0] if given[0] == "media" else given[0]
            parser.error(f"--{flag} has no effect with --prompts, whose lines say it: leave one of the two out.")
    elif args.batch_size is not None:
        parser.error("--batch-size has no effect without --prompts: leave it out.")
    of_media = (*FLOW_OPTIONS, "latent_tolerance", *(["out"] if args.prompts is None else []))
    given = next((name for name in of_media if getattr(args, name) is not None), None)
    if args.mode == "text" and (given or args.count > 1):
        parser.error(f"--{(given or 'count').replace('_', '-')} has no effect with --mode text: leave it out.")
    if args.mode != "text" and args.out is None:
        parser.error(f"--mode {args.mode} needs a file for what is written: name it with --out.")


def answer_with_media(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    args: argparse.Namespace,
    prompt: str,
    limit: int,
) -> None:
    """Write as many media as asked for, of the same prompt of at most `limit` tokens, and their paths to standard
    output; ValueError where the model does not write such media, or the file cannot be written.
    """
    path = check_path(args.out, args.mode)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"--mode {args.mode} was given, but this model writes text alone: leave it out.")
    inputs = encode_question(processor, *[(args.media, prompt)] * args.count)
    check_length(inputs, limit)
    inputs = inputs.to(model.device, model.dtype)
    names = (*FLOW_OPTIONS, "latent_tolerance", "decoding", "num_steps", "exit_criterion", "exit_threshold")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    paths = [path]
    if args.mode == "image" and getattr(model, "decode_image_tokens", None):
        images = draw_codes(model, {**inputs, **options, "logits_processor": LogitsProcessorList([FiniteLogits()])})
        if missing := images.count(None):
            raise ValueError(f"{missing} of {len(images)} answers are no image; the model has to learn more")
        save_images(images, path)
    else:
        seeds = [args.seed + number for number in range(args.count)]
        output = model.generate(**inputs, generation_mode=args.mode, flow_seeds=seeds, do_sample=False, **options)
        if args.mode == "image":
            save_images(output.images, path)
        else:
            paths = save_audio(output.audio, output.sampling_rate, path)
    write_result("".join(f"{name}\n" for name in paths))


def write_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    stream: bool,
    options: Mapping[str, Any],
) -> None:
    """Generate and write the text after the prompt, one row, to standard output, word by word (`stream`) or at once.
    The streamer holds text back until a word is complete, so a character of bytes in several tokens comes whole.
    """
    decoding = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    output = model.generate(
        **inputs,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TerminalStreamer(tokenizer, skip_prompt=True, **decoding) if stream else None,
        return_dict_in_generate=True,
        **options,
    )
    if not stream:
        write_result(
            tokenizer.decode(output.sequences[0, length_before(model, inputs["input_ids"]) :], **decoding) + "\n"
        )
    steps = getattr(output, "exit_steps", None)
    if steps is not None:
        logger.info("core steps per new token: %.2f", steps[steps > 0].float().mean())


if __name__ == "__main__":
    sys.exit(main())
