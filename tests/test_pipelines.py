"""Pipelines of transformers on a saved checkpoint, against processor, `generate` and decoding by hand."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from model import MediaError
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor
from tests.tiny_reader import save_reader, tiny_reader

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "num_steps": 3}
QUESTION = "what is it?"
TASKS = pytest.mark.parametrize("pipe", ["image-text-to-text", "any-to-any"], indirect=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of the picture and the sound that `picture` and `sound` give."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.png").write_bytes(image_file(picture()))
    (folder / "a.wav").write_bytes(audio_file(sound(), subtype="FLOAT"))
    return {"image": str(folder / "a.png"), "audio": str(folder / "a.wav")}


@pytest.fixture(scope="module")
def pipes(checkpoint):
    return {task: pipeline(task, model=str(checkpoint)) for task in ("image-text-to-text", "any-to-any")}


@pytest.fixture
def pipe(pipes, request):
    return pipes[request.param]


def by_hand(text: str, images=(), audio=()) -> str:
    """What the model answers to a text with placeholders."""
    model, processor = tiny_reader(), tiny_processor()
    media = {name: list(given) for name, given in (("images", images), ("audio", audio)) if given}
    batch = processor(text=text, **media, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**batch, **OPTIONS)[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def chat(*media, text=QUESTION) -> list[dict]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def answer_of(pipe, messages) -> str:
    (record,) = pipe(text=messages, return_full_text=False, generate_kwargs=dict(OPTIONS))
    return record["generated_text"]


PROMPT = "<|begin|><|user|>{}" + QUESTION + "<|assistant|>"


@TASKS
def test_a_conversation_about_a_picture(pipe, files):
    """In memory, and by its path."""
    expected = by_hand(PROMPT.format("<|image|>"), [picture()])
    assert expected and expected != by_hand(PROMPT.format("<|image|>"), [picture(seed=1)])
    for part in ({"image": picture()}, {"image": files["image"]}, {"path": files["image"]}):
        assert answer_of(pipe, chat({"type": "image", **part})) == expected


@TASKS
def test_a_conversation_about_pictures_and_sounds(pipe, files):
    expected = by_hand(PROMPT.format("<|audio|><|image|><|audio|>"), [picture()], [sound(), sound(3000, seed=2)])
    second = {"type": "audio", "audio": sound(3000, seed=2)}
    messages = chat({"type": "audio", "path": files["audio"]}, {"type": "image", "image": files["image"]}, second)
    (record,) = pipe(text=messages, generate_kwargs=dict(OPTIONS))
    assert record["input_text"] == messages
    assert record["generated_text"] == [*messages, {"role": "assistant", "content": expected}]


@TASKS
def test_several_conversations(pipe):
    """One after the other, with media of any kind or none."""
    chats = [
        chat({"type": "image", "image": picture()}),
        chat(text="hello"),
        chat({"type": "audio", "audio": sound()}, {"type": "image", "image": picture(8, 8, seed=3)}, text="and this?"),
    ]
    expected = [
        by_hand(PROMPT.format("<|image|>"), [picture()]),
        by_hand("<|begin|><|user|>hello<|assistant|>"),
        by_hand("<|begin|><|user|><|audio|><|image|>and this?<|assistant|>", [picture(8, 8, seed=3)], [sound()]),
    ]
    records = pipe(text=chats, return_full_text=False, generate_kwargs=dict(OPTIONS))
    assert [record["generated_text"] for (record,) in records] == expected


@TASKS
def test_a_batch_of_conversations(pipe):
    """Texts of different lengths with media of one size, which is all that pipelines can join."""
    texts = ("a", "and what is it now?", "hello")
    chats = [
        chat({"type": "audio", "audio": sound(seed=seed)}, {"type": "image", "image": picture(seed=seed)}, text=text)
        for seed, text in enumerate(texts)
    ]
    records = pipe(text=chats, batch_size=3, return_full_text=False, generate_kwargs=dict(OPTIONS))
    prompt = "<|begin|><|user|><|audio|><|image|>{}<|assistant|>"
    expected = [
        by_hand(prompt.format(text), [picture(seed=seed)], [sound(seed=seed)]) for seed, text in enumerate(texts)
    ]
    assert [record["generated_text"] for (record,) in records] == expected


@TASKS
def test_an_answer_that_was_begun_is_continued(pipe):
    messages = chat({"type": "image", "image": picture()})
    messages += [{"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    expected = by_hand(PROMPT.format("<|image|>") + "It is", [picture()])
    (record,) = pipe(text=messages, generate_kwargs=dict(OPTIONS))
    assert record["generated_text"][-1]["content"][-1]["text"] == "It is" + expected


@TASKS
def test_texts_with_placeholders(pipe, files):
    """Without messages: read as they are written."""
    expected = by_hand("<|image|>this is", [picture()])
    for image in (picture(), files["image"]):
        (record,) = pipe(images=image, text="<|image|>this is", generate_kwargs=dict(OPTIONS))
        assert record["generated_text"] == "<|image|>this is" + expected


def test_text_with_sound(pipes, files):
    expected = by_hand("<|audio|>this is", audio=[sound()])
    for audio in (sound(), files["audio"]):
        (record,) = pipes["any-to-any"](
            text="<|audio|>this is", audio=audio, generation_mode="text", generate_kwargs=dict(OPTIONS)
        )
        assert record["generated_text"] == "<|audio|>this is" + expected


@TASKS
def test_options_of_recurrence_reach_the_model(pipe):
    messages = chat({"type": "image", "image": picture()})
    for steps in (1, 8):
        options = {**OPTIONS, "num_steps": steps}
        (record,) = pipe(text=messages, return_tensors=True, generate_kwargs=options)
        batch = tiny_processor().apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(record["generated_token_ids"], tiny_reader().generate(**batch, **options)[0])


@TASKS
def test_in_half_precision(checkpoint, pipe):
    """The pipeline casts what it reads."""
    half = pipeline(pipe.task, model=str(checkpoint), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    (record,) = half(text=chat({"type": "image", "image": picture()}), generate_kwargs=dict(OPTIONS))
    assert isinstance(record["generated_text"][-1]["content"], str)


@TASKS
@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image", "url": "https://a.b/c.png"}, "never fetched"),
        ({"type": "image", "path": "absent.png"}, "does not exist"),
        ({"type": "audio", "audio": np.array([np.nan])}, "NaN"),
    ],
)
def test_media_that_cannot_be_read(pipe, part, reason):
    with pytest.raises(MediaError, match=reason):
        pipe(text=chat(part), generate_kwargs=dict(OPTIONS))
