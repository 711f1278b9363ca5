"""What others have written is seen on a terminal, and commands nothing there."""

import io
import logging
import sys

import pytest
import torch

from configs import load_config
from inference import arguments
from inference.logs import set_up_logging
from inference.output import TerminalStreamer, write_result
from model.terminal import one_line, visible
from tests.tiny_language_model import tiny_tokenizer

ESCAPES = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \r over \u202eright to left\u2069 \x00 \x7f \u2028 \ud800"
SHOWN = (
    "\\x1b[31mred\\x1b[0m \\x1b]0;title\\x07 \\x9b2J \\r over \\u202eright to left\\u2069 \\x00 \\x7f \\u2028 \\ud800"
)
HARMLESS = "naïve café — 日本語 😀 👩‍👩‍👧 עברית می‌خواهم\n\ttab"


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self):
        return True


def test_commands_are_shown_and_nothing_else_changes():
    assert visible(ESCAPES) == SHOWN
    assert visible(HARMLESS) == HARMLESS
    codes = [*range(0xD800), *range(0xE000, 0x2FFFF)]
    changed = {code for code in codes if visible(chr(code)) != chr(code)}
    controls = {*range(32), *range(0x7F, 0xA0)} - {9, 10}
    directions = {0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    assert changed == controls | directions | {0x2028, 0x2029}


def test_an_error_is_one_line_with_an_end():
    assert one_line("a\n b\x85c\u2028d\x1b[0m") == "a b c d\\x1b[0m"
    assert one_line("x" * 2000) == "x" * 2000 and one_line("x" * 2001) == "x" * 1997 + "..."


@pytest.mark.parametrize(("stream", "expected"), [(Terminal, SHOWN), (io.StringIO, ESCAPES)])
def test_results_are_shown_on_a_terminal_and_are_what_they_are_in_a_pipe(monkeypatch, stream, expected):
    monkeypatch.setattr(sys, "stdout", stream())
    write_result(ESCAPES)
    assert sys.stdout.getvalue() == expected


def test_what_is_generated_is_shown_piece_by_piece(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    tokenizer = tiny_tokenizer()
    streamer = TerminalStreamer(tokenizer, skip_special_tokens=True)
    for token in tokenizer("\x1b[2J the cat \x1b]0;x\x07 sat\n\u202eon")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert sys.stdout.getvalue() == "\\x1b[2J the cat \\x1b]0;x\\x07 sat\n\\u202eon\n"


def test_logs_errors_and_options_show_what_is_in_them(monkeypatch, capsys):
    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    try:
        set_up_logging("warning")
        try:
            raise ValueError("\x1b[31m")
        except ValueError:
            logging.getLogger("dataset_loading").warning("row %s: bad", "\x1b]0;x\x07\r.png", exc_info=True)
        assert "row \\x1b]0;x\\x07\\r.png: bad" in sys.stderr.getvalue() and "\x1b" not in sys.stderr.getvalue()
    finally:
        logging.getLogger().setLevel(level)
        logging.getLogger().handlers[:] = handlers
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        load_config(["--model.\x1b[2J", "1"])
    with pytest.raises(SystemExit):
        arguments.OneLineParser(prog="x").parse_args(["--\x1b[2J"])
    assert "\x1b" not in (found := capsys.readouterr().err) and found.count("\\x1b[2J") == 2
