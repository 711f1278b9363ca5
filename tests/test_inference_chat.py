"""Talking with a model in the terminal."""

import io
import json
import os
import pty
import select
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from inference import chat
from inference.conversation import Conversation
from inference.loading import load_model
from tests.tiny_language_model import save_checkpoint
from tests.tiny_processor import image_file, picture
from tests.tiny_reader import save_reader
from tests.tiny_talker import TALK, TOWER, save_talker

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that knows `TALK` by heart, and what was saved of it."""
    return save_talker(tmp_path_factory.mktemp("chat"))


def talk(checkpoint, capsys, monkeypatch, *lines):
    """Standard output and error of a session with these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert chat.main([str(checkpoint), "--greedy", "--max-new-tokens", "40"]) == 0
    return capsys.readouterr()


def record(model, tokenizer, answer):
    """Let a model answer with a text, whatever it is asked; returns the dict in which its last arguments are kept."""
    seen = {}

    def generate(**inputs):
        seen.update(inputs)
        ids = [*inputs["input_ids"][0].tolist(), *tokenizer.encode(answer), tokenizer.eos_token_id]
        return types.SimpleNamespace(sequences=torch.tensor([ids]))

    model.generate = generate
    return seen


def test_the_model_calls_the_calculator_and_goes_on_with_what_it_says(checkpoint, capsys, monkeypatch, tmp_path):
    """History, a call, a hostile call, and the file, against the conversation that the model knows by heart."""
    saved = tmp_path / "saved.jsonl"
    said = talk(checkpoint, capsys, monkeypatch, "What is 2*21?", "A tower!", f"/save {saved}", f"/save {saved}")
    assert said.out == (
        "calculator(2*21)\n[calculator] 42\nIt is 42\n"
        f"{TOWER}\n[calculator] error: a number of more than 100 digits\nNo\n"
    )
    assert said.err == ""
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [{"messages": TALK}] * 2


def test_an_answer_needs_room_beside_it(checkpoint, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(checkpoint), "--max-new-tokens", "256"])
    assert stop.value.code == 2
    assert "max_new_tokens is 256, but this model has 256 positions for a conversation" in capsys.readouterr().err


def test_what_the_model_reads_is_what_was_said(checkpoint):
    """Token by token: begin, and for each message its role and its bytes; the depth is the one asked for."""
    model, tokenizer = load_model(checkpoint)
    conversation = Conversation(model, tokenizer, {"max_new_tokens": 9, "do_sample": False}, system="Be brief.")
    conversation.set_steps(5)
    seen = record(model, tokenizer, "Hello")
    assert list(conversation.ask("Hi<|end|>")) == [{"role": "assistant", "content": "Hello"}]
    list(conversation.ask("Bye"))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    system, user, assistant, tool = (
        tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user", "assistant", "tool")
    )
    brief, hi, hello, bye = (
        [tokenizer.encode(letter)[0] for letter in text] for text in ("Be brief.", "Hi<|end|>", "Hello", "Bye")
    )
    assert seen["input_ids"][0].tolist() == (
        [begin, system, *brief, user, *hi, assistant, *hello, end, user, *bye, assistant]
    )
    assert seen["num_steps"] == 5 and set(seen["eos_token_id"]) == {end, system, user, assistant, tool}


def test_commands(checkpoint, capsys, monkeypatch, tmp_path):
    lines = (
        *("/steps 0", "/steps", "/step 3", "/nonsense", "/steps 4", "/image x.png", "/save x.txt", "/help me", "/help"),
        *("", "/new", f"/save {tmp_path}/a.jsonl", "/quit", "What is 2*21?"),
    )
    said = talk(checkpoint, capsys, monkeypatch, *lines)
    assert said.err.splitlines() == [
        "/steps 0 is less than 1: give the number of times the core is applied, 1 or more.",
        "'/steps' is not how it is used: type /steps N",
        "/step is unknown: did you mean /steps?",
        "/nonsense is unknown: /help lists all.",
        "/image x.png: this model reads text alone.",
        "nothing has been said that could be saved.",
        "'/help me' is not how it is used: type /help",
        "nothing has been said that could be saved.",
    ]
    assert said.out.splitlines()[0].split() == ["/steps", "N", "apply", "the", "core", "N", "times", "per", "token"]
    assert len(said.out.splitlines()) == len(chat.COMMANDS)


def interrupt(**inputs):
    raise KeyboardInterrupt


def test_what_cannot_be_said_is_taken_back(checkpoint, capsys, monkeypatch, tmp_path):
    """A lone surrogate and an interrupt; the conversation goes on as if they had not been."""
    saved, answer = tmp_path / "saved.jsonl", chat.answer

    def answer_or_stop(conversation, text):
        with monkeypatch.context() as patch:
            if text == "stop":
                patch.setattr(conversation.model, "generate", interrupt)
            answer(conversation, text)

    monkeypatch.setattr(chat, "answer", answer_or_stop)
    said = talk(checkpoint, capsys, monkeypatch, "\udce9", "stop", "What is 2*21?", f"/save {saved}")
    assert "cannot be written as UTF-8" in said.err and "(stopped; the last message is taken back)" in said.out
    assert json.loads(saved.read_text()) == {"messages": TALK[:4]}


def test_the_oldest_is_forgotten_where_there_is_no_room(checkpoint, caplog):
    model, tokenizer = load_model(checkpoint)
    model.config.max_position_embeddings = 90
    conversation = Conversation(model, tokenizer, {"max_new_tokens": 40, "do_sample": False})
    for _ in range(2):
        list(conversation.ask("What is 2*21?"))
    assert conversation.messages == TALK[:4]
    assert "what was said first is forgotten" in caplog.text


def test_pictures_are_shown_with_the_next_message(tmp_path):
    folder, file = save_reader(tmp_path / "reader"), tmp_path / "a.png"
    file.write_bytes(image_file(picture(16, 16)))
    model, processor = load_model(folder)
    conversation = Conversation(model, processor, {"max_new_tokens": 3, "do_sample": False})
    with pytest.raises(ValueError, match=r"nothing\.png"):
        conversation.attach("image", str(tmp_path / "nothing.png"))
    conversation.attach("image", str(file))
    seen = record(model, processor.tokenizer, "Noise")
    assert list(conversation.ask("What is it?")) == [{"role": "assistant", "content": "Noise"}]
    assert processor.decode(seen["input_ids"][0]) == (
        f"<|begin|><|user|><|image_start|>{'<|image|>' * 4}<|image_end|>What is it?<|assistant|>"
    )
    assert conversation.attached == [] and seen["pixel_values"].numel() == 3 * 16 * 16
    conversation.save(tmp_path / "saved.jsonl")
    shown = json.loads((tmp_path / "saved.jsonl").read_text())["messages"][0]["content"]
    assert shown == [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]


def test_a_model_without_a_template_is_refused(tmp_path, capsys):
    folder = save_checkpoint(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        chat.main([str(folder)])
    assert exit_info.value.code == 2
    assert "has no chat template, as it has never seen conversations" in capsys.readouterr().err


def read_until(terminal, ending, seconds=300.0):
    """What a program writes up to `ending`."""
    written, deadline = b"", time.monotonic() + seconds
    while not written.endswith(ending):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"waited for {ending!r} after {written!r}"
        written += os.read(terminal, 1)
    return written.replace(b"\r\n", b"\n").decode()


@pytest.mark.slow
def test_a_session_at_a_terminal(checkpoint, tmp_path):
    """A process of its own behind a pseudo-terminal: the prompt, what is typed, answers, a hostile call, Ctrl-D."""
    command = [sys.executable, "-m", "inference.chat", str(checkpoint), "--greedy", "--max-new-tokens", "40"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, command, {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull})
    read_until(terminal, b"> ")
    os.write(terminal, b"What is 2*21?\n")
    assert read_until(terminal, b"\n> ") == "What is 2*21?\ncalculator(2*21)\n[calculator] 42\nIt is 42\n> "
    os.write(terminal, b"A tower!\n")
    assert TOWER in read_until(terminal, b")\r\n")
    assert read_until(terminal, b"\n") == "[calculator] error: a number of more than 100 digits\n"
    assert read_until(terminal, b"\n> ") == "No\n> "
    os.write(terminal, f"/save {tmp_path}/a.jsonl\n".encode())
    read_until(terminal, b"\n> ")
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"messages": TALK}
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
