"""Prompts that are longer than a model has positions for."""

import io
import json
import sys
import time

import pytest

from evaluation.__main__ import check_lengths
from inference import generate
from inference.conversation import Conversation
from inference.loading import load_model
from inference.prompts import check_characters, encode_prompt, encode_question, prompt_limit
from model.chat import encode_conversation, prepare_tokenizer
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer
from tests.tiny_processor import image_file, picture
from tests.tiny_reader import save_reader

POSITIONS = 128
LINE = "the prompt has {} tokens, more than {}; shorten it, or raise --max-prompt-tokens."
LONG = "the cat sat on the mat. " * 5000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return str(save_reader(tmp_path_factory.mktemp("reader")))


def prompt_of(num_tokens: int) -> str:
    """A prompt of so many tokens, the begin token included."""
    prompt = " z" * ((num_tokens - 1) // 2) + "z" * ((num_tokens - 1) % 2)
    assert encode_prompt(tiny_tokenizer(), prompt)["input_ids"].shape[1] == num_tokens
    return prompt


def refused(capsys, *argv):
    before = time.process_time()
    with pytest.raises(SystemExit) as caught:
        generate.main([*argv, "--max-new-tokens", "2"])
    assert caught.value.code == 2 and time.process_time() - before < 10
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_prompt_has_as_many_tokens_as_there_are_positions(checkpoint, capsys):
    argv = [checkpoint, "--prompt", prompt_of(POSITIONS + 1)]
    assert LINE.format(POSITIONS + 1, POSITIONS) in refused(capsys, *argv)
    assert LINE.format(POSITIONS + 1, 100) in refused(capsys, *argv, "--max-prompt-tokens", "100")
    assert generate.main([*argv, "--max-prompt-tokens", str(POSITIONS + 1), "--max-new-tokens", "2"]) == 0
    assert generate.main([checkpoint, "--prompt", prompt_of(POSITIONS), "--max-new-tokens", "2"]) == 0


def test_a_very_long_prompt_is_refused_by_its_characters(checkpoint, capsys, monkeypatch):
    reason = f"the prompt has {len(LONG)} characters, more than {POSITIONS} tokens have"
    monkeypatch.setattr(generate, "encode_prompt", None)  # which would take long
    assert reason in refused(capsys, checkpoint, "--prompt", LONG)
    monkeypatch.setattr(sys, "stdin", io.StringIO(LONG + "\n"))
    assert reason in refused(capsys, checkpoint)


def test_characters_refuse_no_text_that_could_have_so_few_tokens():
    tokenizer = tiny_tokenizer()
    longest = max(tokenizer.get_vocab(), key=lambda token: len(token) if token.isascii() else 0)
    texts = [longest * 20, "the" * 20, "日本語😀" * 20, " " * 500, "\n" * 500]
    for text in texts:
        check_characters(tokenizer, text, len(tokenizer(text)["input_ids"]))
    with pytest.raises(ValueError, match="characters, more than 1 tokens have"):
        check_characters(tokenizer, "z" * 1000, 1)


def test_long_prompts_of_a_file_are_named_before_the_first_is_answered(checkpoint, tmp_path, capsys):
    prompts = ["a", prompt_of(POSITIONS + 1), LONG]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    error = refused(capsys, checkpoint, "--prompts", str(tmp_path / "prompts.jsonl"))
    assert f"2 of 3 lines cannot be used: line 2: the prompt has {POSITIONS + 1} tokens" in error
    assert f"line 3: the prompt has {len(LONG)} characters" in error


def test_a_line_of_lists_in_lists_is_a_bad_one(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("[" * 100_000 + "\n")
    assert "line 1: lists stand too deep" in refused(capsys, checkpoint, "--prompts", str(tmp_path / "prompts.jsonl"))


def test_places_of_media_count(reader, tmp_path, capsys):
    file = tmp_path / "a.png"
    file.write_bytes(image_file(picture(16, 16)))
    _, processor = load_model(reader)
    length = encode_question(processor, ([("image", str(file))] * 3, "a"))["input_ids"].shape[1]
    argv = [reader, "--prompt", "a", *["--image", str(file)] * 3]
    assert LINE.format(length, length - 1) in refused(capsys, *argv, "--max-prompt-tokens", str(length - 1))
    assert generate.main([*argv, "--max-prompt-tokens", str(length), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_a_table_has_no_positions_beyond_its_rows(kind):
    model = tiny_model(position_embedding=kind)
    assert prompt_limit(model, None) == prompt_limit(model, POSITIONS) == POSITIONS
    with pytest.raises(ValueError, match=f"the {kind} table of this model has {POSITIONS} positions"):
        prompt_limit(model, POSITIONS + 1)
    assert prompt_limit(tiny_model(position_embedding="rope"), POSITIONS + 1) == POSITIONS + 1


def test_a_message_that_is_too_long_is_not_said_and_the_talk_goes_on():
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer, 320)
    conversation = Conversation(tiny_model(), tokenizer, {"max_new_tokens": 20, "do_sample": False})
    assert conversation.room == POSITIONS - 20
    conversation.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = list(conversation.messages)
    message = prompt_of(POSITIONS)
    length = len(encode_conversation(tokenizer, [{"role": "user", "content": message}], add_generation_prompt=True))
    around = "tokens, with what stands around it, and there is room for"
    for text, reason in (
        (message, f"the message has {length} {around} {POSITIONS - 20}"),
        (LONG, f"the prompt has {len(LONG)} characters, more than {POSITIONS - 20} tokens have"),
    ):
        with pytest.raises(ValueError, match=reason):
            list(conversation.ask(text))
        assert conversation.messages == before
    longer = Conversation(tiny_model(), tokenizer, {"max_new_tokens": 20}, max_prompt_tokens=length)
    longer.messages = [{"role": "user", "content": message}]
    assert longer._inputs()["input_ids"].shape == (1, length)
    with pytest.raises(ValueError, match="characters, more than"):
        Conversation(tiny_model(), tokenizer, {"max_new_tokens": 20}, system=LONG)


def test_a_question_that_is_too_long_is_refused_before_an_evaluation():
    rows = [{"input_ids": [0] * length} for length in (3, 9, 5)]
    check_lengths({"a": rows, "b": []}, 9)
    with pytest.raises(ValueError, match="source 'a' has an example of 9 tokens, more than 8"):
        check_lengths({"a": rows}, 8)
