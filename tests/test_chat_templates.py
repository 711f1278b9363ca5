"""Chat templates of others: the same tokens in rows of training, in chats, and through `apply_chat_template`."""

import json
import os
import random
from types import SimpleNamespace

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from dataset_loading import DataConfig, SourceConfig, build_datasets, build_examples, train_tokenizer
from inference.calculator import answer_call
from inference.conversation import Conversation
from model import chat_rendering
from model.chat import CHAT_TEMPLATE, ConversationEncoder, encode_conversation, prepare_tokenizer
from tests.test_data_chat import build, learned
from tests.tiny_language_model import tiny_model
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor, writing_processor

_CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<|' ~ p.type ~ '|>' }}{% endfor %}{% endif %}"
)
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "by what a message adds": "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}]\n"
    + _CONTENT
    + "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]\n{% endif %}",
    "by its marks": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    + _CONTENT
    + "{{ eos_token }}{% endgeneration %}{% else %}"
    + _CONTENT
    + "{% endif %};\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "of lists alone": "{% for m in messages %}{{ bos_token if loop.first }}{{ m.role }}:{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif p.type %}<|{{ p.type }}|>{% endif %}{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
}
MEDIA = {"image": ["0.png", "1.png"], "audio": ["0.wav", "1.wav"]}
WORDS = ["What", " is", " 1 < 2", "größer\n", "<|end|>", "{{ x }}", "[USER]", "\t🙂", "assistant:", "yes. "]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Templates are rendered in this process, which is faster; `test_chat_rendering.py` has what bounds others."""
    monkeypatch.setattr(chat_rendering, "_attempt_in_child", chat_rendering._attempt)


@pytest.fixture
def folder(tmp_path):
    """A folder with pictures and recordings."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(image_file(picture(16 + 16 * number, 16, number)))
        (tmp_path / f"{number}.wav").write_bytes(audio_file(sound(900 + 700 * number, number)))
    return tmp_path


def conversations(folder, kinds, count=200):
    """Talks of a user who shows media, and of an assistant who calls the calculator."""
    rng, talks = random.Random(0), []

    def text():
        return "".join(rng.choices(WORDS, k=rng.randint(1, 4))) + "."

    for _ in range(count):
        talk = [{"role": "system", "content": text()}] * rng.randint(0, 1)
        for _ in range(rng.randint(1, 2)):
            shown = [
                {"type": kind, "path": str(folder / rng.choice(MEDIA[kind]))} for kind in kinds if rng.random() < 0.4
            ]
            said = text()
            talk.append({"role": "user", "content": [*shown, {"type": "text", "text": said}] if shown else said})
            if rng.random() < 0.4:
                expression = f"{rng.randrange(9)}*{rng.randrange(9)}"
                talk.append({"role": "assistant", "content": f"calculator({expression})"})
                talk.append({"role": "tool", "content": answer_call(expression)})
            talk.append({"role": "assistant", "content": text()})
        talks.append(talk)
    return talks


def rows_of(folder, talks, processor):
    """What is learned of talks."""
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": relative(talk)}) + "\n" for talk in talks))
    source = SourceConfig("chat", paths=[str(folder / "talks.jsonl")])
    held_out = SourceConfig("generated", task="addition", num_rows=2)
    config = DataConfig([source], [held_out], block_size=512, packing=False, max_invalid_rows=0)
    return build_datasets(config, processor).train


def relative(talk):
    parts = [[{**it, "path": os.path.basename(it["path"])} if "path" in it else it for it in message["content"]]
             if isinstance(message["content"], list) else message["content"] for message in talk]  # fmt: skip
    return [{**message, "content": content} for message, content in zip(talk, parts, strict=True)]


class Reciter:
    """A model that says what it is told to, and remembers what it was asked."""

    device, dtype, config = torch.device("cpu"), torch.float32, tiny_model(max_position_embeddings=4096).config

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.asked = tokenizer, list(answers), []

    def generate(self, input_ids, **options):
        ids = self.tokenizer(self.answers.pop(0), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self.asked.append(input_ids[0].tolist())
        new = torch.tensor([[*ids, self.tokenizer.eos_token_id]])
        return SimpleNamespace(sequences=torch.cat([input_ids, new], dim=1))


def asked_in_chat(talk, processor, tokenizer):
    """The tokens of each prompt of a chat in which this talk comes up."""
    model = Reciter(tokenizer, [message["content"] for message in talk if message["role"] == "assistant"])
    system = talk[0]["content"] if talk[0]["role"] == "system" else None
    chat = Conversation(model, processor, {"max_new_tokens": 8}, system)
    for message in talk:
        if message["role"] == "user":
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            for part in parts[:-1]:
                chat.attach(part["type"], part["path"])
            list(chat.ask(parts[-1]["text"]))
    assert [*chat.first, *chat.messages] == talk
    return model.asked


def check(row, talk, asked, tokenizer):
    """Each prompt is the beginning of the row, and from there on what was said then is learned."""
    ids, is_learned = row["input_ids"].tolist(), row["labels"] != -100
    for prompt in asked:
        assert ids[: len(prompt)] == prompt and is_learned[len(prompt)] and not is_learned[len(prompt) - 1]
    said = [message["content"] + tokenizer.eos_token for message in talk if message["role"] == "assistant"]
    assert len(asked) == len(said) and learned(row, tokenizer) == "|".join(said)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_with_media_and_tools_have_the_same_tokens_everywhere(folder, name):
    processor = tiny_processor(chat_template=TEMPLATES[name])
    talks = conversations(folder, ("image", "audio"))
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for talk, row in zip(talks, rows_of(folder, talks, processor), strict=True):
        batch = processor.apply_chat_template(talk, **options)
        assert row["input_ids"].tolist() == batch["input_ids"][0]
        assert (row["labels"] != -100).int().tolist() == batch["assistant_masks"][0]
        check(row, talk, asked_in_chat(talk, processor, processor.tokenizer), processor.tokenizer)


@pytest.mark.parametrize("name", ["ours", "by what a message adds", "by its marks"])
def test_conversations_of_text_have_the_tokens_that_transformers_gives(folder, name):
    tokenizer = train_tokenizer([], 259)
    tokenizer.chat_template = None if name == "ours" else TEMPLATES[name]
    prepare_tokenizer(tokenizer, 263)
    talks = conversations(folder, ())
    for talk, row in zip(talks, rows_of(folder, talks, tokenizer), strict=True):
        assert row["input_ids"].tolist() == tokenizer.apply_chat_template(talk)["input_ids"]
        assert row["input_ids"].tolist() == encode_conversation(tokenizer, talk)
        check(row, talk, asked_in_chat(talk, tokenizer, tokenizer), tokenizer)


def test_pictures_that_are_written_are_learned_by_a_template_of_others(folder):
    processor = writing_processor(chat_template=TEMPLATES["by what a message adds"])
    parts = [{"type": "text", "text": "this"}, {"type": "image", "path": str(folder / "0.png")}]
    talk = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": parts}]
    (row,) = rows_of(folder, [talk], processor)
    assert learned(row, processor.tokenizer) == "this<|image_start|>|<|end|>"
    assert processor.decode(row["input_ids"]).startswith("<|begin|>[USER]\na cat\n[ASSISTANT]\nthis<|image_start|>")
    assert list(row["media"]) == ["written_image"]


def test_examples_are_asked_up_to_the_last_answer_of_a_template_of_others():
    tokenizer = train_tokenizer([], 259)
    tokenizer.chat_template = TEMPLATES["by what a message adds"]
    prepare_tokenizer(tokenizer, 259)
    example = build_examples(SourceConfig("generated", task="calculator", num_rows=3), DataConfig(), tokenizer)[0]
    asked, whole = (tokenizer.decode(example[name]) for name in ("prompt_ids", "input_ids"))
    assert asked.endswith("[ASSISTANT]\n") and whole == f"{asked}{example['answer']}<|end|>"


LAST_ALONE = (
    "{% for m in messages %}{{ '<now>' if loop.last }}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_that_does_not_tell_what_the_assistant_says_is_refused_for_what_is_learned():
    """It can be talked with."""
    tokenizer = train_tokenizer([], 259)
    tokenizer.chat_template = LAST_ALONE
    prepare_tokenizer(tokenizer, 259)
    with pytest.raises(
        ValueError, match="the chat template does not tell what the assistant says, as a message"
    ) as error:
        build(SourceConfig("generated", task="calculator", num_rows=3), tokenizer)
    assert "\n" not in str(error.value)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.decode(encode_conversation(tokenizer, talk)) == "user:a<|end|><now>assistant:b<|end|>"


def test_a_template_that_changes_the_order_of_media_is_refused(folder):
    template = "{% for m in messages %}{% for p in m.content | reverse %}<|{{ p.type }}|>{% endfor %}{% endfor %}"
    processor = tiny_processor()
    encoder = ConversationEncoder(processor.tokenizer, processor.modalities, template)
    with pytest.raises(ValueError, match="the chat template writes media in another order than messages"):
        encoder.encode([{"role": "user", "content": [{"type": "image"}, {"type": "audio"}]}])


_FIELDS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}WRITE{% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WRITINGS = {
    "as JSON": "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>",
    "whole": "{{ c | tojson }}",
    "value by value": "<{{ c.function.name }}>"
    "{% for key, value in c.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}",
}


@pytest.mark.parametrize("name", WRITINGS)
def test_calls_and_reasoning_are_written_as_a_template_of_others_does(folder, name):
    """Against transformers itself, whose templates take arguments as objects."""
    tokenizer = train_tokenizer([], 259)
    template = tokenizer.chat_template = _FIELDS.replace("WRITE", WRITINGS[name])
    prepare_tokenizer(tokenizer, 263)
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": {"größe": 'a "b"\n', "n": [1, "x", {"y": True}]}}},
        {"type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    talk = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "hm", "reasoning_content": "so\nit is", "tool_calls": calls},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "it rains"},
    ]
    if name == "value by value":
        del calls[0]["function"]["arguments"]["n"]
    (text,), _ = render_jinja_template(conversations=[talk], chat_template=template, **tokenizer.special_tokens_map)
    expected = tokenizer.encode(text, add_special_tokens=False)
    given = json.loads(json.dumps(talk))
    for one in given[1]["tool_calls"]:
        one["function"]["arguments"] = json.dumps(one["function"]["arguments"])  # as OpenAI has them
    assert encode_conversation(tokenizer, talk) == encode_conversation(tokenizer, given) == expected
    (row,) = rows_of(folder, [given], tokenizer)
    assert row["input_ids"].tolist() == expected
    first, second = text.split("<assistant>")[1:]
    said = first.partition("<|end|>")[0] + "<|end|>\n", second
    assert learned(row, tokenizer).replace("|", "") == "".join(said).replace("|", "")


def test_a_template_that_drops_calls_is_refused():
    tokenizer = train_tokenizer([], 259)
    tokenizer.chat_template = TEMPLATES["by what a message adds"]
    prepare_tokenizer(tokenizer, 263)
    call = {"function": {"name": "f", "arguments": {}}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    with pytest.raises(ValueError, match="the chat template leaves out what a message says"):
        encode_conversation(tokenizer, talk)
