"""Talk with a model in the terminal: `python -m inference.chat runs/finetune_lora`."""

from .logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import contextlib
import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import set_seed

from model.terminal import one_line

from . import arguments
from .conversation import Conversation
from .decoding import add_decoding_arguments, decoding_options, depth_option
from .devices import device_report
from .loading import add_loading_arguments, load_as_asked
from .output import TerminalStreamer, write_result

logger = logging.getLogger("inference.chat")  # __name__ is __main__ when run with -m

COMMANDS = {
    "/steps N": "apply the core N times per token",
    "/image PATH": "attach an image to the next message",
    "/audio PATH": "attach audio to the next message",
    "/save FILE.jsonl": "append the conversation to a file that `kind: chat` reads",
    "/new": "begin again",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(
        prog="inference.chat", description="Talk with a model in the terminal; /help lists what else it understands."
    )
    add_loading_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before anything else")
    add_decoding_arguments(parser)
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
    logger.info("%s", device_report())
    with parser.one_line_errors():
        model, processor = load_as_asked(args.checkpoint, args)
        options |= depth_option(model, args.num_steps)
        conversation = Conversation(model, processor, options, args.system, args.max_prompt_tokens)
    set_seed(args.seed)
    converse(conversation)
    return 0


def converse(conversation: Conversation) -> None:
    """Answer what is typed, until /quit or the end of the input. What goes wrong is said, and the talk goes on."""
    for line in typed_lines():
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                obey(conversation, line)
            elif line or conversation.attached:
                answer(conversation, line)
        except (ValueError, OSError) as error:
            logger.debug("Where it failed:", exc_info=True)
            sys.stderr.write(f"{one_line(error)}\n")
        except KeyboardInterrupt:
            sys.stdout.write("\n(stopped; the last message is taken back)\n")


def typed_lines() -> Iterator[str]:
    """Lines of standard input; at a terminal they can be edited, and come after a prompt."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401  input() uses it once it is imported
    while True:
        try:
            yield input("> " if is_terminal else "").removeprefix("\ufeff").strip()  # a byte-order mark
        except UnicodeDecodeError as error:
            sys.stderr.write(f"the line is not UTF-8 ({error.reason}); it is passed over\n")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n" if is_terminal else "")
            return


def answer(conversation: Conversation, text: str) -> None:
    """Write what the assistant says, word by word, and what the calculator says to it."""
    streamer = TerminalStreamer(
        conversation.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    for message in conversation.ask(text, streamer):
        if message["role"] == "tool":
            write_result(f"[calculator] {message['content']}\n")


def obey(conversation: Conversation, line: str) -> None:
    """Carry out a command; ValueError or OSError if there is no such command, or it cannot be done."""
    command, _, argument = line.partition(" ")
    argument, usage = argument.strip(), {usage.partition(" ")[0]: usage for usage in COMMANDS}
    if command not in usage:
        near = difflib.get_close_matches(command, usage, n=1)
        raise ValueError(f"{command} is unknown: " + (f"did you mean {near[0]}?" if near else "/help lists all."))
    if bool(argument) != (" " in usage[command]):
        raise ValueError(f"{line!r} is not how it is used: type {usage[command]}")
    if command == "/help":
        sys.stdout.write("".join(f"{usage:<18}{what}\n" for usage, what in COMMANDS.items()))
    elif command == "/steps":
        try:
            conversation.set_steps(arguments.core_steps(argument))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"/steps {error}") from error
    elif command in ("/image", "/audio"):
        conversation.attach(command[1:], str(Path(argument).expanduser()))
    elif command == "/save":
        conversation.save(Path(argument).expanduser())
    else:
        conversation.forget()


if __name__ == "__main__":
    sys.exit(main())
