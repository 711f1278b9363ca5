"""The `openai` package and `transformers chat` as clients of a server of two models."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from inference.calculator import calculate
from tests.serving import server
from tests.tiny_artist import save_artist
from tests.tiny_processor import audio_file, image_file, picture, sound
from tests.tiny_talker import save_talker

pytestmark = pytest.mark.slow

QUESTION = {"role": "user", "content": "What is 2*21?"}
TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The client of the project that tests have, which knows the port."""
    folder = tmp_path_factory.mktemp("runs")
    for name, save in (("talker", save_talker), ("artist", save_artist)):
        (folder / name).mkdir()
        save(folder / name)
    with server(folder / "talker", folder / "artist", "--max-new-tokens", 64, "--max-prompt-tokens", 190) as client:
        yield client


@pytest.fixture(scope="module")
def package(client):
    from openai import OpenAI  # here, since the fast tests are collected without it

    return OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0, timeout=120)


def test_models(package):
    assert [model.id for model in package.models.list()] == ["talker", "artist"]
    assert package.models.retrieve("artist").id == "artist"


def test_a_conversation_with_a_tool(package):
    """The client calculates what it is asked to, and hands the result back."""
    options = {"model": "talker", "temperature": 0, "max_tokens": 20, "tools": TOOLS}
    reply = package.chat.completions.create(messages=[QUESTION], **options).choices[0]
    (call,) = reply.message.tool_calls
    result = calculate(json.loads(call.function.arguments)["expression"])
    answer = {"role": "tool", "tool_call_id": call.id, "content": result}
    messages = [QUESTION, reply.message.model_dump(exclude_none=True), answer]
    last = package.chat.completions.create(messages=messages, **options).choices[0]
    assert (reply.finish_reason, result, last.message.content) == ("tool_calls", "42", "It is 42")


def test_streams(package):
    """Of text, of the call of a tool, with the steps of each token, and with their sums."""
    options = {"model": "talker", "messages": [QUESTION], "temperature": 0, "max_tokens": 20, "stream": True}
    own = {"num_steps": 3, "exit_steps": True}
    chunks = list(package.chat.completions.create(**options, stream_options={"include_usage": True}, extra_body=own))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    steps = [step for chunk in chunks for choice in chunk.choices for step in getattr(choice, "exit_steps", [])]
    assert text == "calculator(2*21)" and set(steps) == {3}
    assert chunks[-1].usage.core_steps == 3 * chunks[-1].usage.completion_tokens >= sum(steps)
    with package.chat.completions.stream(
        **{name: value for name, value in options.items() if name != "stream"}, tools=TOOLS
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"expression": "2*21"}


def test_texts_that_go_on(package):
    reply = package.completions.create(model="artist", prompt="What", max_tokens=4, n=2, seed=1, logprobs=2)
    assert [choice.index for choice in reply.choices] == [0, 1] and reply.usage.completion_tokens <= 8
    assert len(reply.choices[0].logprobs.tokens) == len(reply.choices[0].logprobs.token_logprobs)
    likely = package.chat.completions.create(
        model="talker", messages=[QUESTION], temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert [token.token for token in likely.choices[0].logprobs.content] == ["c", "a", "l"]
    assert all(len(token.top_logprobs) == 2 for token in likely.choices[0].logprobs.content)


def test_what_is_seen_and_heard_changes_the_answer(package):
    """The likeliest tokens depend on the image and the sound."""
    image = f"data:image/png;base64,{base64.b64encode(image_file(picture())).decode()}"
    black = f"data:image/png;base64,{base64.b64encode(image_file(Image.new('RGB', (32, 32)))).decode()}"
    heard = base64.b64encode(audio_file(sound())).decode()

    def likelihood(*parts: dict) -> float:
        content = [*parts, {"type": "text", "text": "?"}]
        reply = package.chat.completions.create(
            model="artist", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=1, logprobs=True
        )
        return reply.choices[0].logprobs.content[0].logprob

    values = [likelihood({"type": "image_url", "image_url": {"url": url}}) for url in (image, black)]
    values.append(likelihood({"type": "input_audio", "input_audio": {"data": heard, "format": "wav"}}))
    assert len({round(value, 5) for value in values}) == 3
    spoken = package.audio.transcriptions.create(model="artist", file=("a.wav", audio_file(sound())))
    assert isinstance(spoken.text, str)


def test_images(package):
    options = {"model": "artist", "prompt": "a red circle", "extra_body": {"seed": 3, "num_steps": 2}}
    (image,) = package.images.generate(**options, n=1).data
    assert Image.open(io.BytesIO(base64.b64decode(image.b64_json))).size == (32, 32)
    events = list(package.images.generate(**options, stream=True, partial_images=3))
    assert [event.type.partition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert events[-1].b64_json == image.b64_json
    chat = package.chat.completions.create(
        model="artist",
        messages=[{"role": "user", "content": "a red circle"}],
        seed=3,
        extra_body={"modalities": ["image"], "num_steps": 2},
    )
    assert chat.choices[0].message.images[0]["image_url"]["url"].endswith(image.b64_json)


def test_sounds(package):
    spoken = package.audio.speech.create(
        model="artist", input="hello", voice="default", response_format="wav", extra_body={"seed": 7}
    )
    samples, rate = soundfile.read(io.BytesIO(spoken.content))
    chat = package.chat.completions.create(
        model="artist",
        messages=[{"role": "user", "content": "hello"}],
        modalities=["text", "audio"],
        audio={"voice": "default", "format": "wav"},
        seed=7,
    )
    again, _ = soundfile.read(io.BytesIO(base64.b64decode(chat.choices[0].message.audio.data)))
    assert rate == 8000 and len(samples) > 0
    np.testing.assert_array_equal(samples, again)


def test_errors_have_their_classes(package):
    from openai import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError, match="is not served here; choose one of talker, artist"):
        package.chat.completions.create(model="absent", messages=[QUESTION])
    with pytest.raises(BadRequestError, match="frequency_penalty"):
        package.chat.completions.create(model="talker", messages=[QUESTION], frequency_penalty=1.0)


def test_transformers_chat(client):
    """The command of transformers, which is spoken to as from a terminal."""
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "chat",
        "talker",
        f"http://127.0.0.1:{client.port}/v1",
    ]
    flags = ["do_sample=False", "max_new_tokens=20"]
    spoken = f"{QUESTION['content']}\n!exit\n"
    environment = {
        name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"
    }  # it reaches no server
    done = subprocess.run(
        [*command, *flags], input=spoken, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "talker was already loaded" in done.stdout and "calculator(2*21)" in done.stdout
