"""The files of the server's page, as they are sent."""

import re

import pytest
from starlette.testclient import TestClient

from inference.serving.app import build_app
from inference.serving.limits import Limits
from inference.serving.metrics import Metrics
from inference.serving.pool import Pool
from inference.serving.worker import Settings

TYPES = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"}


@pytest.fixture(scope="module")
def client():
    """Of a server that asks for a key, with no worker."""
    limits, metrics = Limits(), Metrics()
    return TestClient(build_app(Pool(Settings((), limits), 1, metrics), limits, metrics, ["first-key"]))


@pytest.mark.parametrize("path", TYPES)
def test_the_page_is_sent_to_everybody_and_names_no_other_host(client, path):
    response = client.get(path)
    assert response.status_code == 200 and response.headers["content-type"] == f"{TYPES[path]}; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy.pop("img-src") == "'self' data: blob:" and policy.pop("media-src") == "data: blob:"
    from_here = {"script-src", "style-src", "connect-src"}
    nothing = {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert policy == dict.fromkeys(from_here, "'self'") | dict.fromkeys(nothing, "'none'")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?:|[\"'(]//", response.text)
    assert client.get("/v1/models").status_code == 401


def test_no_text_becomes_markup_and_nothing_is_written_into_html(client):
    script, page = client.get("/page.js").text, client.get("/").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage|cookie", script)
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?! src=\"/page\.js\")", page)
