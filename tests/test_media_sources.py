"""Media as clients name them, each against the same medium given in memory; and what is refused of them."""

import base64
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch

from dataset_loading.sources.references import UnusableRow, reference_to
from model import MediaError, load_audio, load_image, media_sources
from model.media_sources import MAX_BYTES, read_source
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor

PROCESSOR = tiny_processor()
FILES = {"image": image_file(picture()), "audio": audio_file(sound(), subtype="FLOAT")}
PLAIN = {"image": picture(), "audio": sound()}
TYPES = {"image": "image/png", "audio": "audio/wav"}
CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
KINDS = pytest.mark.parametrize("kind", ["image", "audio"])


def encoded(kind: str) -> str:
    return base64.b64encode(FILES[kind]).decode()


def ways(kind: str, folder: Path) -> dict[str, str]:
    """Strings that stand for the file."""
    path = folder / "ä file#1 %41.bin"
    path.write_bytes(FILES[kind])
    text = encoded(kind)
    return {
        "path": str(path),
        "uri of data": f"data:{TYPES[kind]};base64,{text}",
        "uri of data, no type": f"data:;base64,{text}",
        "uri of data, parameters": f"DATA:{TYPES[kind]};name=a.png;Base64,{text}",
        "uri of data, any bytes": f"data:application/octet-stream;base64,{text}",
        "uri of data, base64 in percents": f"data:{TYPES[kind]};base64,{quote(text, safe='')}",
        "uri of data, percents": f"data:{TYPES[kind]},{quote(FILES[kind])}",
        "base64": text,
        "base64 in lines": base64.encodebytes(FILES[kind]).decode(),
        "uri of a file": f"file://{quote(str(path))}",
        "uri of a file on localhost": f"file://localhost{quote(str(path))}",
    }


def parts(kind: str, given: str, text: str) -> list[dict]:
    """Parts of a message that hold it, of our format and of those of others."""
    found = [{"type": kind, kind: given}, {"type": kind, "url": given}, {"type": kind, "path": given}]
    if kind == "image":
        found += [{"type": "image_url", "image_url": {"url": given, "detail": "low"}}]
        found += [{"type": "image_url", "image_url": given}, {"type": "input_image", "image_url": given}]
    else:
        found += [{"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}]
        found += [{"type": "input_audio", "input_audio": text}, {"type": "audio_url", "audio_url": {"url": given}}]
    return [*found, {"type": kind, "base64": text}, {"type": kind, "base64": f"data:;base64,{text}"}]


def same(batch, other) -> bool:
    return batch.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in batch.items())


@KINDS
def test_strings_are_read_in_every_call(kind, tmp_path):
    argument = "images" if kind == "image" else kind
    text = f"<|begin|><|user|><|{kind}|>what?<|assistant|>"
    plain = PROCESSOR(text=text, **{argument: PLAIN[kind]}, return_tensors="pt")
    alone = PROCESSOR(**{argument: PLAIN[kind]}, return_tensors="pt")
    part = PROCESSOR.image_processor if kind == "image" else PROCESSOR.feature_extractor
    for name, given in ways(kind, tmp_path).items():
        assert same(PROCESSOR(text=[text], **{argument: [[given]]}, return_tensors="pt"), plain), name
        assert same(PROCESSOR(**{argument: given}, return_tensors="pt"), alone), name
        assert same(part([given], return_tensors="pt"), alone), name
        assert PROCESSOR.item_size(kind, given) == PROCESSOR.item_size(kind, PLAIN[kind]), name
        for one in parts(kind, given, encoded(kind)):
            messages = [{"role": "user", "content": [one, {"type": "input_text", "text": "what?"}]}]
            assert same(PROCESSOR.apply_chat_template(messages, **CHAT), plain), (name, one)
            assert PROCESSOR.apply_chat_template(messages, add_generation_prompt=True) == text


def test_an_array_in_a_part_has_its_rate_beside_it():
    """As `post_process_multimodal_output` gives it."""
    ours = {"type": "audio", "audio": sound(), "sampling_rate": 16000}
    pair = {"type": "audio", "audio": (sound(), 16000)}
    batches = [PROCESSOR.apply_chat_template([{"role": "user", "content": [one]}], **CHAT) for one in (ours, pair)]
    assert same(*batches) and batches[0]["input_features"].shape[-1] == 26


BAD = {
    "not base64": ("data:image/png;base64,ab$c", "is neither a file nor valid base64"),
    "cut base64": ("data:image/png;base64," + encoded("image")[:-1], "is neither a file nor valid base64"),
    "other bytes": (base64.b64encode(b"hello there " * 5).decode(), "cannot be read as a picture"),
    "no comma": ("data:image/png;base64", "has no comma before its data"),
    "nothing": ("data:image/png;base64,", "the picture has 0 bytes"),
    "a sound": (f"data:audio/wav;base64,{encoded('audio')}", "is declared as audio, and not as image"),
    "a sound that says nothing": (encoded("audio"), "cannot be read as a picture"),
    "a page": ("data:text/html,<p>hello</p>", "is declared as text, and not as image"),
    "another machine": ("file://example.com/a.png", "is on host 'example.com'; give file:///path on this machine"),
    "absent": ("file:///nowhere/a%20b.png", "'/nowhere/a b.png' does not exist"),
    "a zero": ("file:///a%00.png", "does not exist"),
    "http": ("http://127.0.0.1/a.png", "is an address, which is never fetched unless allow_fetch=True is given"),
    "https": ("HTTPS://a.b/c.png", "is an address, which is never fetched unless allow_fetch=True is given"),
    "ftp": ("ftp://a.b/c.png", "is an address, and addresses are never fetched"),
    "long": ("data:image/png;base64," + "A" * 10_000, "cannot be read as a picture"),
    "long and wrong": ("data:image/png;base64," + "A" * 10_000 + "$", "is neither a file nor valid base64"),
    "long name": ("a/" * 5000 + "$.png", "does not exist"),
    "blanks": (" " * 100_000 + "!", "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_medium_is_one_line(case):
    given, reason = BAD[case]
    calls = [
        partial(PROCESSOR, images=given),
        partial(PROCESSOR, text="<|image|>", images=given),
        partial(PROCESSOR.image_processor, given),
        partial(PROCESSOR.load_item, "image", given),
    ]
    calls += [
        partial(PROCESSOR.apply_chat_template, [{"role": "user", "content": [part]}], tokenize=True)
        for part in ({"type": "image", "url": given}, {"type": "image_url", "image_url": {"url": given}})
    ]
    for call in calls:
        with pytest.raises(MediaError) as error:
            call()
        message = str(error.value)
        assert reason in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "$$$", "format": "wav"}},
        {"type": "audio", "base64": "photo.wav"},
        {"type": "audio", "base64": encoded("image")},
    ],
    ids=str,
)
def test_wrong_base64_is_named(part):
    with pytest.raises(MediaError, match=r"neither a file nor valid base64|cannot be read as a recording"):
        PROCESSOR.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)


@pytest.mark.parametrize(
    "part", [{"type": "image_url"}, {"type": "image_url", "image_url": {}}, {"type": "input_audio"}]
)
def test_a_part_without_a_medium_waits_for_one(part):
    with pytest.raises(ValueError, match="number 0 has no medium, and none is left of the 0 given beside them"):
        PROCESSOR.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "", "http://a.b/"])
def test_what_is_too_long_is_not_decoded(monkeypatch, head):
    monkeypatch.setattr(media_sources, "MAX_BYTES", 1000)
    with pytest.raises(MediaError, match=r"has [0-9]+ characters, and at most 1000 are read; scale it down"):
        PROCESSOR(images=head + "A" * 1001)
    with pytest.raises(MediaError, match="characters, and at most 1000"):
        PROCESSOR.encode_chat([{"role": "user", "content": [{"type": "audio", "base64": "A" * 1001}]}])


@KINDS
def test_rows_of_training_reach_no_more_than_before(kind, tmp_path):
    """What `dataset_loading` calls reads neither URIs nor base64."""
    load = PROCESSOR.modalities[kind].load
    given = ways(kind, tmp_path)
    assert np.array_equal(np.asarray(load(given.pop("path"))), np.asarray(load(FILES[kind])))
    for name, value in given.items():
        for call in (load, PROCESSOR.modalities[kind].size, PROCESSOR.modalities[kind].preprocess):
            with pytest.raises(MediaError):
                call(value)
        with pytest.raises(MediaError):
            load_image(value) if kind == "image" else load_audio(value, 8000)
        if "uri" in name:
            with pytest.raises(UnusableRow):
                reference_to(kind, value, tmp_path)


# ------------------------------------------------------------------------------------------------------------ fetching


class Site(BaseHTTPRequestHandler):
    """A picture, a detour to it, a way to a file and to another protocol, and what has no end."""

    places = {"/detour": "/a.png", "/file": "file:///etc/hostname", "/ftp": "ftp://127.0.0.1/a", "/round": "/round"}

    def do_GET(self):
        if self.path in self.places:
            self.send_response(302)
            self.send_header("Location", self.places[self.path])
            self.end_headers()
        elif self.path == "/absent":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\0" * 3000 if self.path == "/large" else FILES["image"])

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def site():
    server = HTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_fetched_where_that_is_allowed(site):
    plain = PROCESSOR(text="<|begin|><|user|><|image|><|assistant|>", images=picture(), return_tensors="pt")
    for address in (f"{site}/a.png", f"{site}/detour"):
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]
        assert same(PROCESSOR.apply_chat_template(messages, **CHAT, allow_fetch=True), plain)
        options = {"processor_kwargs": {"allow_fetch": True}}
        assert same(PROCESSOR.apply_chat_template(messages, **CHAT, **options), plain)
        texts = {"text": ["<|image|>"], "return_tensors": "pt"}
        assert same(PROCESSOR(images=[address], allow_fetch=True, **texts), PROCESSOR(images=[picture()], **texts))
        for refused in ({}, {"allow_fetch": False}, {"allow_fetch": None}):
            with pytest.raises(MediaError, match="never fetched unless"):
                PROCESSOR.apply_chat_template(messages, **CHAT, **refused)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent", "cannot be fetched: HTTP Error 404"),
        ("file", "cannot be fetched: HTTP Error 302"),
        ("ftp", "cannot be fetched: .*unknown url type: ftp"),
        ("round", "cannot be fetched: HTTP Error 302"),
        ("large", "has more than 2000 bytes"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(site, path, reason, monkeypatch):
    monkeypatch.setattr(media_sources, "MAX_BYTES", 2000)
    with pytest.raises(MediaError, match=reason) as error:
        read_source(f"{site}/{path}", "image", allow_fetch=True)
    assert "\n" not in str(error.value)


def test_what_takes_too_long_is_given_up(site, monkeypatch):
    monkeypatch.setattr(media_sources, "FETCH_SECONDS", 1e-9)
    with pytest.raises(MediaError, match=r"cannot be fetched|takes more than 1e-09 seconds"):
        read_source(f"{site}/a.png", "image", allow_fetch=True)
    assert MAX_BYTES == 2**28
