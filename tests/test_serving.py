"""The server by HTTP: what it answers is what `generate` gives, and what it refuses it names."""

import asyncio
import base64
import io
import json
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from inference.loading import load_model
from inference.prompts import encode_prompt
from inference.serving.streams import all_of, merged
from model.chat import encode_conversation
from tests.serving import Client, server
from tests.tiny_artist import save_artist
from tests.tiny_processor import audio_file, image_file, picture, sound
from tests.tiny_talker import save_talker

QUESTION = {"role": "user", "content": "What is 2*21?"}
TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]
GREEDY = {"temperature": 0, "max_tokens": 20}
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
IMAGE = f"data:image/png;base64,{base64.b64encode(image_file(picture())).decode()}"
SOUND = base64.b64encode(audio_file(sound())).decode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, save in (("talker", save_talker), ("artist", save_artist)):
        (folder / name).mkdir()
        save(folder / name)
    return folder


@pytest.fixture(scope="module")
def client(runs):
    limits = ("--max-new-tokens", 64, "--max-prompt-tokens", 190, "--max-steps", 8, "--read-seconds", 2)
    limits += ("--max-media", 2, "--max-megapixels", 1, "--max-audio-seconds", 2, "--max-body-mib", 1)
    limits += ("--allow-hosts", "example.org")
    with server(runs / "talker", runs / "artist", *limits) as client:
        yield client


@pytest.fixture(scope="module")
def talker(runs):
    return load_model(runs / "talker")


@pytest.fixture(scope="module")
def artist(runs):
    return load_model(runs / "artist")


def message_of(reply):
    return reply["choices"][0]["message"]


# ---------------------------------------------------------------------------------------------------------------- texts


def test_a_conversation_with_the_calculator(client):
    """The call is that of a client that has tools, and text for one that has none."""
    plain = client.ask(CHAT, {"messages": [QUESTION], **GREEDY})
    assert message_of(plain)["content"] == "calculator(2*21)" and plain["choices"][0]["finish_reason"] == "stop"
    reply = client.ask(CHAT, {"messages": [QUESTION], "tools": TOOLS, **GREEDY})
    (call,) = message_of(reply)["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"expression": "2*21"}
    assert reply["choices"][0]["finish_reason"] == "tool_calls" and message_of(reply)["content"] is None
    assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "content": "42", "tool_call_id": call["id"]}
    reply = client.ask(CHAT, {"messages": [QUESTION, assistant, answer], "tools": TOOLS, **GREEDY})
    assert message_of(reply)["content"] == "It is 42" and "tool_calls" not in message_of(reply)


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {"logprobs": True}])
@pytest.mark.parametrize("messages", [[QUESTION], [QUESTION, {"role": "assistant", "content": "It is 42"}]])
def test_a_stream_is_the_whole_in_pieces(client, messages, options):
    body = {"messages": messages, **GREEDY, "exit_steps": True, **options}
    whole = client.ask(CHAT, body)
    (choice,) = whole["choices"]
    events = client.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    parts = [event["choices"][0] for event in events[:-1]]
    assert parts[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["delta"].get("content", "") for part in parts) == (choice["message"]["content"] or "")
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    calls = [call["function"] for part in parts for call in part["delta"].get("tool_calls", ())]
    assert calls == [call["function"] for call in choice["message"].get("tool_calls", ())]
    if not calls:
        assert [step for part in parts for step in part.get("exit_steps", ())] == choice["exit_steps"]
        assert [text for part in parts for text in part.get("tokens", ())] == choice["tokens"]
        assert sum(choice["exit_steps"]) == whole["usage"]["core_steps"]
    if options.get("logprobs"):
        found = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
        assert found == choice["logprobs"]["content"]


@pytest.mark.parametrize("decoding", ["plain", "wavefront"])
@pytest.mark.parametrize("exits", [{}, {"exit_criterion": "kl_divergence", "exit_threshold": 0.5}])
def test_texts_are_those_of_generate(client, talker, exits, decoding):
    """Sampled by seeds that follow each other, each as long as it likes, with the steps of each token."""
    model, tokenizer = talker
    options = {"max_tokens": 12, "num_steps": 5, "temperature": 1.3, "top_p": 0.9, "top_k": 40, **exits}
    reply = client.ask(
        COMPLETE, {"prompt": "What", "n": 3, "seed": 5, "exit_steps": True, "decoding": decoding, **options}
    )
    inputs = encode_prompt(tokenizer, "What")
    for choice, seed in zip(reply["choices"], (5, 6, 7), strict=True):
        sampling = {"do_sample": True, "sampling_seed": seed, "temperature": 1.3, "top_p": 0.9, "top_k": 40}
        expected = model.generate(
            **inputs, **sampling, **exits, max_new_tokens=12, num_steps=5, return_dict_in_generate=True
        )
        new = expected.sequences[0, inputs["input_ids"].shape[1] :]
        assert choice["text"] == tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")
        assert choice["exit_steps"] == expected.exit_steps[0].tolist()


def test_probabilities_are_those_of_the_model(client, talker):
    model, tokenizer = talker
    reply = client.ask(CHAT, {"messages": [QUESTION], **GREEDY, "logprobs": True, "top_logprobs": 2})
    prompt = encode_conversation(tokenizer, [QUESTION], add_generation_prompt=True)
    new = [*tokenizer.encode("calculator(2*21)", add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [it["token"] for it in content] == [tokenizer.decode([token]) for token in new]
    assert [it["logprob"] for it in content] == pytest.approx(expected[range(len(new)), new].tolist(), abs=1e-4)
    tops = [[it["logprob"] for it in place["top_logprobs"]] for place in content]
    torch.testing.assert_close(torch.tensor(tops), expected.topk(2).values, atol=1e-4, rtol=0)
    ids = client.ask(COMPLETE, {"prompt": prompt, **GREEDY, "logprobs": 1})  # the prompt as token ids
    assert ids["choices"][0]["text"].startswith("calculator(2*21)")
    assert ids["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(content[0]["logprob"], abs=1e-4)


@pytest.mark.parametrize("stop", ["(2*", ["zzz", "tor("]])
def test_text_ends_before_a_stop_string(client, stop):
    body = {"messages": [QUESTION], **GREEDY, "stop": stop}
    expected = "calculator(2*21)".partition(stop if isinstance(stop, str) else stop[1])[0]
    reply = client.ask(CHAT, body)
    assert message_of(reply)["content"] == expected and reply["choices"][0]["finish_reason"] == "stop"
    deltas = [event["choices"][0]["delta"].get("content", "") for event in client.events(CHAT, body)]
    assert "".join(deltas) == expected


def test_a_text_that_is_cut_says_so(client):
    reply = client.ask(CHAT, {"messages": [QUESTION], "temperature": 0, "max_completion_tokens": 3})
    assert message_of(reply)["content"] == "cal" and reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


def test_control_tokens_in_texts_are_text(client, talker):
    """The end of a message that a user writes is read as its letters, and ends nothing."""
    _, tokenizer = talker
    text = f"a{tokenizer.eos_token}b"
    length = len(encode_conversation(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True))
    usage = client.ask(CHAT, {"messages": [{"role": "user", "content": text}], **GREEDY})["usage"]
    assert usage["prompt_tokens"] == length > len(text)
    usage = client.ask(COMPLETE, {"prompt": text, **GREEDY})["usage"]
    assert usage["prompt_tokens"] == len(text) + (tokenizer.bos_token_id is not None)


# ---------------------------------------------------------------------------------------------------------------- media


def test_images_are_those_of_generate(client, artist):
    model, processor = artist
    body = {"model": "artist", "prompt": "a red circle", "n": 2, "seed": 3, "size": "32x32", "num_steps": 2}
    reply = client.ask("/v1/images/generations", body)
    chat = [{"role": "user", "content": "a red circle"}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for image, seed in zip(reply["data"], (3, 4), strict=True):
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))), dtype=int)
        expected = model.generate(**inputs, generation_mode="image", flow_seeds=[seed], num_steps=2).images[0]
        assert np.abs(found - np.asarray(expected, dtype=int)).max() <= 1
    body = {"model": "artist", "messages": chat, "modalities": ["image"], "seed": 3, "num_steps": 2}
    url = message_of(client.ask(CHAT, body))["images"][0]["image_url"]["url"]
    assert url == f"data:image/png;base64,{reply['data'][0]['b64_json']}"


def test_an_image_is_shown_as_it_is_drawn(client):
    """Each part is the whole up to where it has been drawn; the last event of a choice that has one is the whole."""
    chat = [{"role": "user", "content": "a red circle"}]
    body = {"model": "artist", "messages": chat, "modalities": ["image"], "seed": 3, "num_steps": 2}
    (whole,) = message_of(client.ask(CHAT, body))["images"]
    events = client.events(CHAT, {**body, "exit_steps": True, "stream_options": {"include_usage": True}})
    drawn = [event["choices"][0] for event in events if event["choices"] and "images" in event["choices"][0]["delta"]]
    images = [choice["delta"]["images"][0] for choice in drawn]
    assert [image["partial"] for image in images] == [True] * 15 + [False]
    assert images[-1]["image_url"] == whole["image_url"]
    assert set(drawn[-1]["exit_steps"]) == {2} and events[-1]["usage"]["core_steps"] == sum(drawn[-1]["exit_steps"])
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    expected = pixels_of(whole["image_url"]["url"])
    for number, image in enumerate(images[:-1], 1):  # 16 patches of 8 x 8, of which one comes after another
        found, (row, column) = pixels_of(image["image_url"]["url"]), divmod(number - 1, 4)
        assert (found[: 8 * row] == expected[: 8 * row]).all()
        place = np.s_[8 * row : 8 * row + 8, : 8 * column + 8]
        assert (found[place] == expected[place]).all()
        assert (found[8 * row + 8 :] == found[-1, -1]).all() and number < 16


def pixels_of(url: str) -> np.ndarray:
    """The pixels of an image, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_images_that_are_made_for_the_package_are_streams_too(client):
    """Events have names, partial images numbers, and the last is that of a request without a stream."""
    body = {"model": "artist", "prompt": "a red circle", "seed": 3, "num_steps": 2}
    expected = client.ask("/v1/images/generations", body)["data"][0]["b64_json"]
    status, content = client.send("/v1/images/generations", {**body, "stream": True, "partial_images": 3})
    assert status == 200
    *events, end = content.decode().split("\n\n")
    parts = [event.partition("\ndata: ") for event in events]
    found = [json.loads(data) for _, _, data in parts]
    names = ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [it["type"] for it in found] == names == [head.removeprefix("event: ") for head, _, _ in parts] and not end
    assert [it.get("partial_image_index") for it in found] == [0, 1, 2, None]
    assert found[-1]["b64_json"] == expected not in [it["b64_json"] for it in found[:-1]]


def test_exits_of_images_take_fewer_steps(client):
    body = {"model": "artist", "messages": [{"role": "user", "content": "a red circle"}], "modalities": ["image"]}
    body |= {"seed": 3, "num_steps": 8, "exit_steps": True}
    full, cut = (
        client.ask(CHAT, {**body, **exits})
        for exits in ({}, {"exit_criterion": "kl_divergence", "exit_threshold": 1000.0})
    )
    assert full["usage"]["core_steps"] == 8 * len(full["choices"][0]["exit_steps"])
    assert cut["usage"]["core_steps"] == sum(cut["choices"][0]["exit_steps"]) < full["usage"]["core_steps"]


def test_sound_is_that_of_generate(client, artist):
    model, processor = artist
    status, content = client.send("/v1/audio/speech", {"input": "hello", "seed": 7, "voice": "default"})
    assert status == 200
    samples, rate = soundfile.read(io.BytesIO(content))
    chat = [{"role": "user", "content": "hello"}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, generation_mode="audio", flow_seeds=[7], do_sample=False)
    assert rate == output.sampling_rate
    np.testing.assert_allclose(samples, np.asarray(output.audio[0]).clip(-1, 1), atol=1e-3)
    body = {"model": "artist", "messages": chat, "modalities": ["text", "audio"], "audio": {"format": "wav"}, "seed": 7}
    assert base64.b64decode(message_of(client.ask(CHAT, body))["audio"]["data"]) == content


def test_images_and_sounds_are_read(client, artist):
    """What is said to them is what `generate` says."""
    model, processor = artist
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}]
    parts += [{"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}}, {"type": "text", "text": "?"}]
    chat = [{"role": "user", "content": parts}]
    body = {"model": "artist", "messages": chat, "temperature": 0, "max_tokens": 9, "logprobs": True}
    reply = client.ask(CHAT, body)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert reply["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    new = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    content = reply["choices"][0]["logprobs"]["content"]
    assert [it["token"] for it in content] == [processor.tokenizer.decode([token]) for token in new]


def test_a_recording_is_transcribed(client):
    boundary = b"xxxx"
    fields = [(b'name="model"', b"artist"), (b'name="prompt"', b"What is said?"), (b'name="num_steps"', b"2")]
    fields.append((b'name="file"; filename="a.wav"', audio_file(sound())))
    content = b"".join(b"--xxxx\r\ncontent-disposition: form-data; %s\r\n\r\n%s\r\n" % field for field in fields)
    headers = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
    status, reply = client.send("/v1/audio/transcriptions", content + b"--xxxx--\r\n", headers)
    assert status == 200
    chat = [{"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}}]
    chat.append({"type": "text", "text": "What is said?"})
    body = {"model": "artist", "messages": [{"role": "user", "content": chat}], "temperature": 0, "num_steps": 2}
    assert json.loads(reply)["text"] == message_of(client.ask(CHAT, body))["content"]
    bad = content.replace(b'name="prompt"', b'name="promt"') + b"--xxxx--\r\n"
    assert client.refusal("/v1/audio/transcriptions", bad, headers) == (
        400,
        "'promt' is not known to this server; leave it out",
    )


# ------------------------------------------------------------------------------------------------------------- refusals


def body_of(**changes):
    return {"messages": [QUESTION], **changes}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (body_of(foo=1), 400, "foo: is not known to this server; leave it out"),
        (body_of(frequency_penalty=0.5), 400, "frequency_penalty: is not supported by this server; leave it out"),
        (body_of(model="gpt"), 404, "the model 'gpt' is not served here; choose one of talker, artist"),
        (body_of(max_tokens=65), 400, "max_tokens is 65, and at most 64 are written"),
        (body_of(max_tokens=0), 400, "max_tokens: Input should be greater than or equal to 1"),
        (body_of(max_tokens="5"), 400, "max_tokens: Input should be a valid integer"),
        (body_of(num_steps=9), 400, "num_steps is 9, and at most 8 are taken here"),
        (body_of(n=17), 400, "n: Input should be less than or equal to 16"),
        (body_of(seed=-1), 400, "seed: Input should be greater than or equal to 0"),
        (body_of(temperature=float("nan")), 400, "temperature: Input should be a finite number"),
        (body_of(exit_threshold=0.1), 400, "exit_threshold has no effect without exit_criterion"),
        (body_of(top_logprobs=2), 400, "top_logprobs has no effect without logprobs; leave it out"),
        (body_of(tools=[{"type": "function", "function": {"name": "search"}}]), 400, "the tool 'search' is not known"),
        (body_of(modalities=["image"]), 400, "this model writes text; it has no image to give"),
        (body_of(messages=[]), 400, "messages: List should have at least 1 item"),
        (body_of(messages=[{"role": "user", "content": "a" * 191}]), 400, "tokens, more than 190; shorten it"),
        (body_of(messages=[{"role": "user", "content": "a" * 10**5}]), 400, "more than 190 tokens have; shorten it"),
        (b"{", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "parsing the body"),
        (b'{"messages": ' + b"9" * 5000 + b"}", 400, ""),
        (b"x" * (2**20 + 1), 413, "the body is larger than 1 MiB; send less"),
    ],
)
def test_what_is_refused_is_named(client, body, status, said):
    found = client.refusal(CHAT, body)
    assert found[0] == status and said in found[1]
    assert "/" not in found[1].replace("/v1/", "") and "Traceback" not in found[1]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "nothing is fetched from where it is"),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "nothing is fetched from where it is"),
        (
            [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}],
            "is on a host that may not be asked",
        ),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "read as a picture"),
        ([{"type": "image_url", "image_url": {"url": IMAGE}}] * 3, "3 images and sounds are more than 2; send fewer"),
        ([{"type": "input_audio", "input_audio": {"data": "/etc/passwd"}}], "neither a file nor valid base64"),
        ([{"type": "input_audio", "input_audio": {"data": SOUND, "path": "/etc/passwd"}}], "path: is not known"),
    ],
)
def test_media_that_are_refused(client, parts, said):
    status, message = client.refusal(CHAT, {"model": "artist", "messages": [{"role": "user", "content": parts}]})
    assert status == 400 and said in message and "root:" not in message


def test_images_are_measured_before_they_are_decoded(client):
    """Three million pixels of one colour, in a few kilobytes."""
    bomb = base64.b64encode(image_file(Image.new("RGB", (1500, 2000)))).decode()
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{bomb}"}}]
    status, message = client.refusal(CHAT, {"model": "artist", "messages": [{"role": "user", "content": parts}]})
    assert status == 400 and "1500 x 2000 pixels, more than 1 millions" in message
    long = base64.b64encode(audio_file(np.zeros(8000 * 3, dtype=np.float32))).decode()
    parts = [{"type": "input_audio", "input_audio": {"data": long, "format": "wav"}}]
    status, message = client.refusal(CHAT, {"model": "artist", "messages": [{"role": "user", "content": parts}]})
    assert status == 400 and "3 seconds, more than 2" in message


@pytest.mark.parametrize("prompt", [[], [[]], ["a", []], [-1], [10**6], [1.5], [True]])
def test_prompts_that_are_none_are_refused(client, prompt):
    status, message = client.refusal(COMPLETE, {"prompt": prompt, **GREEDY})
    assert status == 400 and "prompt" in message


def test_what_a_model_cannot_do_is_refused(client):
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}]
    status, message = client.refusal(CHAT, {"messages": [{"role": "user", "content": parts}]})
    assert (status, message) == (400, "this model reads text alone; leave images and sounds out")
    status, message = client.refusal("/v1/images/generations", {"model": "talker", "prompt": "a"})
    assert (status, message) == (400, "talker writes text, and no image")
    status, message = client.refusal("/v1/images/generations", {"prompt": "a", "size": "64x64"})
    assert (status, message) == (400, "size is 64x64, and this model draws 32x32; give that, or 'auto'")
    assert client.refusal("/v1/nothing", {})[0] == 404
    assert client.refusal(CHAT, None)[0] == 405


def received(connection: socket.socket) -> bytes:
    """All until the server closes."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def test_slow_clients_are_let_go(client):
    """A head and a body that do not come, within the two seconds that they have; the server goes on answering."""
    with socket.create_connection(("127.0.0.1", client.port)) as head:
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n")
        with socket.create_connection(("127.0.0.1", client.port)) as body:
            body.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{")
            assert client.ask("/health")["status"] == "ok"
            assert received(body).startswith(b"HTTP/1.1 408 ")
        assert received(head) == b""


def test_a_client_that_goes_frees_its_place(client):
    body = json.dumps({"messages": [QUESTION], "n": 16, "num_steps": 8, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", client.port)) as gone:
        gone.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" % CHAT.encode())
        gone.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)
        gone.recv(1)
    wait_for(lambda: metric(client, "jobs") == 0)


def metric(client: Client, name: str) -> float:
    status, text = client.send("/metrics")
    assert status == 200
    return next(
        float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(f"megatransformer_{name} ")
    )


def wait_for(condition) -> None:
    """Until a condition holds; pytest ends what never does."""
    while not condition():
        pass


def test_what_is_told_of_models_and_counted(client):
    (talker, artist) = client.ask("/v1/models")["data"]
    assert talker["id"] == "talker" and talker["reads"] == ["text"] and talker["num_steps"] == 3
    assert artist["reads"] == artist["writes"] == ["text", "image", "audio"]
    assert client.ask("/v1/models/artist") == artist
    status, content = client.send("/load_model", {"model": "talker@main"})
    assert status == 200 and json.loads(content.removeprefix(b"data: "))["status"] == "ready"
    before, steps = metric(client, "new_tokens_total"), metric(client, "steps_per_token_sum")
    usage = client.ask(CHAT, {"messages": [QUESTION], **GREEDY, "num_steps": 4})["usage"]
    assert metric(client, "new_tokens_total") - before == usage["completion_tokens"]
    assert metric(client, "steps_per_token_sum") - steps == usage["core_steps"]


# -------------------------------------------------------------------------------------------------------- keys and ends


def test_a_key_is_asked_for_and_a_server_that_is_told_to_end_finishes_first(runs, tmp_path):
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")
    with server(runs / "talker", "--api-key-file", tmp_path / "keys", "--max-queue", 1, "--max-places", 1) as client:
        assert client.ask("/health")["status"] == "ok"
        for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": "Basic first-key"}):
            status, message = client.refusal(CHAT, body_of(), headers)
            assert (status, message) == (401, "a key is needed: send it as Authorization: Bearer KEY")
        key = {"authorization": "Bearer second-key"}
        status, message = client.refusal(CHAT, body_of(n=3), key)
        assert (status, message) == (429, "too many requests are waiting; ask again in a few seconds")
        body = json.dumps(body_of(max_tokens=30, temperature=0, stream=True)).encode()
        with socket.create_connection(("127.0.0.1", client.port)) as running:
            running.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\nauthorization: Bearer first-key\r\n" % CHAT.encode())
            running.sendall(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            first = running.recv(15)
            client.process.send_signal(signal.SIGTERM)
            rest = received(running)
        assert first == b"HTTP/1.1 200 OK" and b"[DONE]" in rest and b"error" not in rest
        assert client.process.wait() == 0


def test_what_cannot_be_served_is_one_line(runs, tmp_path, capsys):
    from inference.serve import main

    (tmp_path / "talker").mkdir()
    (tmp_path / "keys").write_text("short\n")
    for argv, said in (
        ([str(tmp_path / "talker")], "talker"),
        ([str(runs / "talker"), str(runs / "talker")], "have the same name, talker; serve one, or rename its folder"),
        ([str(runs / "talker"), "--api-key-file", str(tmp_path / "keys")], "needs keys of 8 characters or more"),
        ([str(runs / "talker"), "--port", "70000"], "--port 70000 is above 65535"),
        ([str(runs / "talker"), "--max-steps", "0"], "0 is less than 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        *_, last = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and said in last


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(runs):
    """Its requests fail with one line; those of the other worker go on; a new one takes its place."""
    import psutil

    with server(runs / "talker", "--num-workers", 2, "--max-new-tokens", 200, "--max-places", 1) as client:
        children = psutil.Process(client.process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        long = body_of(n=2, max_tokens=200, num_steps=8, temperature=50.0, seed=1, stream=True)
        body = json.dumps(long).encode()
        with socket.create_connection(("127.0.0.1", client.port)) as running:
            running.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" % CHAT.encode())
            running.sendall(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            running.recv(15)
            workers[0].kill()
            assert b"the worker that had this request has died; ask again" in received(running)
        assert message_of(client.ask(CHAT, body_of(**GREEDY)))["content"] == "calculator(2*21)"
        wait_for(lambda: client.ask("/health")["ready"] == 2)
        assert metric(client, "worker_deaths_total") == 1


# ------------------------------------------------------------------------------------------------------ several streams


async def numbers(upto: int, closed: list[int], fails: bool = False) -> AsyncGenerator[int]:
    """Counts; says when it is closed."""
    try:
        for number in range(1, upto + 1):
            await asyncio.sleep(0)
            yield number
        if fails:
            raise ValueError("no more")
        await asyncio.sleep(0)
    finally:
        closed.append(upto)


def test_streams_are_merged_each_in_its_order() -> None:
    async def merge() -> list[tuple[int, int]]:
        return [found async for found in merged([numbers(3, closed), numbers(5, closed)])]

    closed: list[int] = []
    found = asyncio.run(merge())
    assert [[number for index, number in found if index == which] for which in (0, 1)] == [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert closed == [3, 5]


def test_a_stream_that_fails_ends_the_others() -> None:
    async def merge() -> None:
        with pytest.raises(ValueError, match="no more"):
            async with aclosing(merged([numbers(2, closed, fails=True), numbers(1000, closed)])) as messages:
                async for message in messages:
                    seen.append(message)
        assert sorted(closed) == [2, 1000]  # here, since the loop ends what is left

    closed: list[int] = []
    seen: list[tuple[int, int]] = []
    asyncio.run(merge())
    assert [number for index, number in seen if index == 0] == [1, 2]


def test_what_fails_ends_what_it_was_awaited_with() -> None:
    async def both() -> None:
        streams = [numbers(0, closed, fails=True), numbers(1000, closed)]
        with pytest.raises(ValueError, match="no more"):
            await all_of([anext(streams[0]), forever(streams[1])])
        assert sorted(closed) == [0, 1000]  # here, since the loop ends what is left

    async def forever(stream: AsyncGenerator[int]) -> None:
        async with aclosing(stream):
            async for _ in stream:
                pass

    closed: list[int] = []
    asyncio.run(both())
