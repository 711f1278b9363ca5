"""Media that are generated for clients: what is shown before the end, and that jobs end with their clients."""

import asyncio
import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from inference.serving.jobs import fetch_images, is_at
from inference.serving.limits import Limits
from inference.serving.media import CancelledJobError, MediaWriter
from inference.serving.messages import AnswerJob
from inference.serving.replies import RequestError
from inference.serving.schema import ChatRequest
from tests.test_media_sources import FILES, Site, site  # noqa: F401 - a fixture
from tests.tiny_artist import CODES, artist_processor, tiny_artist, write_codes


def prompt(processor) -> dict[str, torch.Tensor]:
    chat = [{"role": "user", "content": "a red circle"}]
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_images_that_are_tokens_are_those_of_generate(monkeypatch):
    write_codes(monkeypatch)
    model, inputs, shown = tiny_artist(image=CODES), prompt(artist_processor(CODES)), []
    job = AnswerJob(0, "artist", "image", [], 1, num_steps=2, seed=5, num_parts=3)
    content, steps = MediaWriter(model, job, inputs, {"num_steps": 2}, shown.append, lambda: False).write()
    options = {"do_sample": True, "sampling_seed": 5, "top_k": 0, "num_steps": 2, "max_new_tokens": 17}
    new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    (expected,) = model.decode_image_tokens(new)
    assert (pixels(content) == np.asarray(expected)).all() and steps == [2] * 17
    for number, part in enumerate(shown, 1):  # codes that are missing are the first code
        padded = torch.where(torch.arange(17) <= 4 * number, new, model.config.image_code_offset)
        (expected,) = model.decode_image_tokens(padded)
        assert (pixels(part) == np.asarray(expected)).all()
    assert len(shown) == 3


def test_an_answer_without_an_image_is_refused():
    model, inputs = tiny_artist(image=CODES), prompt(artist_processor(CODES))
    with pytest.raises(ValueError, match="is no image; it has to learn more"):
        MediaWriter(model, AnswerJob(0, "artist", "image", [], 1), inputs, {}, print, lambda: False).write()


@pytest.mark.parametrize("image", [None, CODES], ids=["latents", "codes"])
def test_a_job_ends_when_its_client_has_gone(image, monkeypatch):
    if image:
        write_codes(monkeypatch)
    model, inputs, asked = tiny_artist(image=image), prompt(artist_processor(image)), []

    def is_cancelled() -> bool:
        asked.append(None)
        return len(asked) > 4

    with pytest.raises(CancelledJobError):
        MediaWriter(model, AnswerJob(0, "artist", "image", [], 1), inputs, {}, print, is_cancelled).write()
    assert len(asked) == 5


# ------------------------------------------------------------------------------------------------------------- fetching


def request_of(*addresses: str) -> ChatRequest:
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]})


def fetched(request: ChatRequest, hosts: list[str], **limits: int) -> list[str]:
    asyncio.run(fetch_images(request, hosts, Limits(**limits)))
    return [part.image_url.url for part in request.messages[0].content]


def test_images_are_fetched_from_hosts_that_are_allowed(site):  # noqa: F811
    host, plain = site.removeprefix("http://"), "data:image/png;base64,AAAA"
    expected = f"data:image/*;base64,{base64.b64encode(FILES['image']).decode()}"
    found = fetched(request_of(f"{site}/a.png", plain, f"{site}/detour"), [host])
    assert found == [expected, plain, expected]
    assert fetched(request_of(f"{site}/a.png"), []) == [f"{site}/a.png"]


@pytest.mark.parametrize(
    ("path", "hosts", "said"),
    [
        ("/a.png", ["127.0.0.1", "127.0.0.1:1"], "is on a host that may not be asked"),
        ("/away", [], "'http://localhost:9/a' is on a host that may not be asked"),
        ("/file", [], "cannot be fetched: HTTP Error 302"),
        ("/absent", [], "cannot be fetched: HTTP Error 404"),
        ("/endless", [], "has more than 1048576 bytes"),
    ],
)
def test_images_elsewhere_are_not_fetched(path, hosts, said, site, monkeypatch):  # noqa: F811
    monkeypatch.setitem(Site.places, "/away", "http://localhost:9/a")
    monkeypatch.setitem(FILES, "image", b"0" * (2**20 + 1) if path == "/endless" else FILES["image"])
    with pytest.raises(RequestError) as error:
        fetched(request_of(site + path), hosts or [site.removeprefix("http://")], max_body_mib=1)
    assert said in str(error.value) and error.value.status == 400


def test_no_more_are_fetched_than_are_read(site):  # noqa: F811
    with pytest.raises(RequestError, match="3 images are more than 2; send fewer"):
        fetched(request_of(*[f"{site}/a.png"] * 3), [site.removeprefix("http://")], max_media=2)


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("https://a.org/x", True),
        ("HTTPS://A.org:443/x", True),
        ("http://a.org:80", True),
        ("http://b.org:8080/x", True),
        ("http://b.org/x", False),
        ("http://a.org:8080/x", False),
        ("http://u:p@a.org/x", False),
        ("http://u@b.org:8080/x", False),
        ("http://a.org.evil/x", False),
        ("http://evil/a.org", False),
        ("http://a.org\\@evil/", False),
        ("ftp://a.org/x", False),
        ("http://a.org:x/", False),
        ("http:///x", False),
    ],
)
def test_hosts(address, is_allowed):
    assert is_at(["a.org", "b.org:8080"], address) is is_allowed
