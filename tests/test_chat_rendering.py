"""Chat templates of others: rendered as transformers does, or refused in one line, within bounds."""

import json
import os
import resource
import shutil
import time

import pytest
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from dataset_loading.packing.media_reader import MediaReader
from inference import chat, generate
from inference.conversation import Conversation
from model.chat import CHAT_TEMPLATE, encode_conversation, prepare_tokenizer, render_outline
from model.chat_rendering import UnboundedTemplateError, render_template, template_of
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer
from tests.tiny_processor import tiny_processor

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PLAIN = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}" + PLAIN
FAILING = {
    "{% for %}": "TemplateSyntaxError",
    "{% include 'other' %}": "no loader",
    "{{ messages | no_such_filter }}": "no_such_filter",
    "{{ missing.attribute.of }}": "'missing' is undefined",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ raise_exception('first\nsecond') }}": "first",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}": "RecursionError",
    "{{ range(10**9) | list }}": "Range too big",
    "{% break %}": "SyntaxError",
    "{{ '\\ud800' }}": "surrogates",
    f"{{{{ {'(' * 5000}1{')' * 5000} }}}}": "RecursionError",
    "  ": "writes nothing",
}
UNBOUNDED = {
    "{{ 'a' * 10**10 }}": "memory",
    "{{ '%0999999999d' % 1 }}": "memory",
    "{{ 'a' | center(999999999) }}": "memory",
    "{% set it = namespace(s='aa') %}{% for i in range(99) %}{% set it.s = it.s ~ it.s %}{% endfor %}": "memory",
    "x" * 2_000_000: "2000000 characters",
}


def refused(template, kind=ValueError, **variables):
    """The line with which a template is refused."""
    with pytest.raises(kind) as caught:
        render_template(template, MESSAGES, **variables)
    return str(caught.value)


@pytest.mark.parametrize("template", [PLAIN, CHAT_TEMPLATE])
def test_a_template_in_a_child_writes_what_transformers_does(template):
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    texts, spans = render_jinja_template(
        conversations=[MESSAGES], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    expected = texts[0], [tuple(span) for span in spans[0]]
    assert render_template(template, MESSAGES, **variables) == expected
    assert render_template(template, MESSAGES, is_trusted=True, **variables) == expected


@pytest.mark.parametrize("template", FAILING, ids=lambda text: text[:20])
def test_a_template_that_fails_is_refused(template):
    line = refused(template)
    assert FAILING[template] in line and "correct it, or use another checkpoint" in line


@pytest.mark.parametrize("template", UNBOUNDED, ids=lambda text: text[:20])
def test_a_template_that_takes_too_much_is_refused(template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert UNBOUNDED[template] in refused(template, UnboundedTemplateError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # of the child nothing is counted


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr("model.chat_rendering.MAX_SECONDS", 1)
    before = time.process_time()
    assert "not done after 1 seconds" in refused(ENDLESS, UnboundedTemplateError)
    assert time.process_time() - before < 0.5
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no child is left behind


def test_the_template_that_is_meant():
    several = {"default": "one", "other": "two"}
    assert template_of(several) == "one" and template_of(several, "other") == "two"
    assert (
        template_of("one") == "one" and template_of("one", "{{ own }}") == template_of(None, "{{ own }}") == "{{ own }}"
    )
    for wrong, reason in (({"other": "two"}, "none is called 'default'"), (None, "no chat template"), (5, "type int")):
        with pytest.raises(ValueError, match=reason):
            template_of(wrong)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | length }} messages", "leaves out what a message says"),
        (PLAIN + "\ue0007\ue001", "writes what no message says"),
        (PLAIN + "\ue000" + "9" * 5000 + "\ue001", "writes what no message says"),
    ],
)
def test_a_template_that_changes_what_is_said_is_refused(template, reason):
    with pytest.raises(ValueError, match=reason):
        render_outline(template, (("user", None), ("assistant", None)), ())


def test_a_template_that_only_ends_as_ours_does_is_not_trusted(monkeypatch):
    def in_child(*args):
        raise ValueError("in a child")

    monkeypatch.setattr("model.chat_rendering._attempt_in_child", in_child)
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer, 320)
    expected = encode_conversation(tokenizer, MESSAGES)
    tokenizer.chat_template = "{{ 'a' * 10 }}{# guarded #}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="in a child"):
        encode_conversation(tokenizer, MESSAGES)
    prepare_tokenizer(tokenizer, 320)  # what stands before is made anew
    assert encode_conversation(tokenizer, MESSAGES) == expected


def test_preparing_a_tokenizer_refuses_a_template_that_takes_too_much_and_none_that_refuses_roles():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 10**10 }}"
    with pytest.raises(UnboundedTemplateError):
        prepare_tokenizer(tokenizer, 320)
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    prepare_tokenizer(tokenizer, 320)
    text = tokenizer.decode(encode_conversation(tokenizer, MESSAGES))
    assert text == "[user] a[assistant] b"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "leaves out the image"),
        ("{% for m in messages %}<|image|><|image|>{{ m.content[0].text }}{% endfor %}", "more places for image"),
        ("{{ 'a' * 10**10 }}", "memory"),
    ],
)
def test_a_processor_refuses_a_template_that_places_media_wrongly(template, reason):
    processor = tiny_processor(chat_template=template)
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": Image.new("RGB", (16, 16))}]
    with pytest.raises(ValueError, match=reason):
        processor.encode_chat([{"role": "user", "content": parts}])


def test_a_processor_writes_text_by_a_template_of_others_within_bounds():
    processor = tiny_processor(chat_template={"default": PLAIN, "endless": "{{ 'a' * 10**10 }}"})
    assert processor.apply_chat_template(MESSAGES) == "[user] a[assistant] b"
    with pytest.raises(UnboundedTemplateError):
        processor.apply_chat_template(MESSAGES, chat_template="endless")


def test_training_data_is_not_encoded_by_a_template_that_fails():
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer, 320)
    tokenizer.chat_template = "{{ raise_exception('not these roles') }}"
    (problem,) = MediaReader(tokenizer).encode([MESSAGES])
    assert "the chat template cannot be used: it fails with TemplateError: not these roles" in str(problem)
    tokenizer.chat_template = "{{ 'a' * 10**10 }}"
    with pytest.raises(UnboundedTemplateError):
        MediaReader(tokenizer).encode([MESSAGES])


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def with_template(checkpoint, folder, template):
    """A checkpoint with a template, or with several, in its tokenizer_config.json."""
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return str(folder)


def error_of(command, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        command(argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**10 }}", "memory"),
        ([{"name": "other", "template": PLAIN}], "none is called 'default'"),
        ([{"name": "default", "template": "{{ 'a' * 10**10 }}"}], "memory"),
        (5, "type int"),
        ({"a": 5}, "chat template"),
    ],
)
def test_commands_refuse_a_checkpoint_with_such_a_template_in_one_line(checkpoint, tmp_path, capsys, template, reason):
    folder = with_template(checkpoint, tmp_path / "own", template)
    for command, more in ((generate.main, ["--prompt", "a"]), (chat.main, [])):
        assert reason in error_of(command, [folder, *more], capsys)


def test_a_conversation_says_why_a_template_fails():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    conversation = Conversation(tiny_model(), tokenizer, {"max_new_tokens": 4})
    with pytest.raises(ValueError, match="not today"):
        list(conversation.ask("a"))
    assert conversation.messages == []
