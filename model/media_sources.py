"""Media as clients name them: `data:` URIs, base64, `file://`, and addresses where they may be fetched.

Only the calls of processors read these. Rows of training data do not, and reach no more files than their paths do.
"""

import base64
import binascii
import os
import re
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib import request
from urllib.error import URLError
from urllib.parse import unquote_to_bytes, urlsplit

from .media import MediaError, quoted

MAX_BYTES = 256 * 2**20
"""Most characters of a `data:` URI or of base64, and most bytes that are fetched."""
MAX_PERCENTS = 2**23
"""Most characters of a `data:` URI in which some stand as percents: each of those takes a hundred times its size."""
FETCH_SECONDS = 30.0
"""Within which an item is fetched as a whole."""

_WORDS = {"image": "picture", "audio": "recording"}
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]{32,}")


def read_source(source: Any, kind: str, allow_fetch: bool = False) -> Any:
    """What `load_image` and `load_audio` take, of what a client gives in its place.

    Args:
        source: A path, a `file://` or `data:` URI, an address, or base64, if it is a string; else it stays as it is.
        kind: "image", "audio" or the name of another modality.
        allow_fetch: Whether http and https are fetched: whatever this machine reaches, at most `MAX_BYTES`, within
            `FETCH_SECONDS`.

    Raises:
        MediaError: it is none of these, of another kind, too large, or may not or cannot be fetched.
    """
    if not isinstance(source, str) or os.path.isfile(source):
        return source
    _check_length(source)
    scheme = (re.match(r"([a-z][a-z0-9+.-]*):", source[:20], re.IGNORECASE) or [""])[0].lower()
    if scheme == "data:":
        return _read_data(source, kind)
    if scheme == "file:":
        return _read_file_uri(source)
    if scheme in ("http:", "https:"):
        if not allow_fetch:
            raise MediaError(
                f"{quoted(source)} is an address, which is never fetched unless allow_fetch=True is given; download "
                f"the {_WORDS.get(kind, kind)} before"
            )
        return fetch_bytes(source, None, MAX_BYTES, FETCH_SECONDS)
    return decode_base64(source, source) if _BASE64.fullmatch(source) else source


def _check_length(source: str) -> None:
    if len(source) > MAX_BYTES:
        raise MediaError(
            f"{quoted(source)} has {len(source)} characters, and at most {MAX_BYTES} are read; scale it down"
        )


def decode_base64(text: str, source: str) -> bytes:
    """The bytes of base64, in which blanks and line breaks may stand; MediaError, with `source`, if it is none."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{quoted(source)} is neither a file nor valid base64: {error}; encode it anew") from error


def _read_data(source: str, kind: str) -> bytes:
    head, comma, data = source.removeprefix(source[:5]).partition(",")
    if not comma:
        raise MediaError(f"{quoted(source)} has no comma before its data; give data:{kind}/...;base64,...")
    media_type, *options = head.split(";")
    declared = media_type.split("/")[0].strip().lower()
    if declared not in ("", kind, "application"):
        raise MediaError(
            f"{quoted(source)} is declared as {declared}, and not as {kind}; give a {_WORDS.get(kind, kind)}"
        )
    if len(data) > MAX_PERCENTS and "%" in data:
        raise MediaError(
            f"{quoted(source)} has {len(data)} characters with percents, and at most {MAX_PERCENTS} of them are "
            "read; give base64"
        )
    if "base64" not in (option.strip().lower() for option in options):
        return unquote_to_bytes(data)
    return decode_base64(unquote_to_bytes(data).decode("latin-1") if "%" in data else data, source)


def _read_file_uri(source: str) -> str:
    parts = urlsplit(source)
    if parts.netloc.lower() not in ("", "localhost"):
        raise MediaError(f"{quoted(source)} is on host {parts.netloc!r:.80}; give file:///path on this machine")
    return request.url2pathname(parts.path)


def fetch_bytes(source: str, may_reach: Callable[[str], bool] | None, max_bytes: int, seconds: float) -> bytes:
    """The bytes at an http or https address.

    Args:
        source: The address.
        may_reach: Which addresses may be asked, also where others lead; None: all, by the proxies of this machine.
        max_bytes: The most that is read.
        seconds: Within which it has to come.

    Raises:
        MediaError: it may not or cannot be fetched, is too large or too slow.
    """

    class Redirects(request.HTTPRedirectHandler):
        def redirect_request(self, req: request.Request, *found: Any) -> request.Request | None:
            check_reach(found[-1])
            return super().redirect_request(req, *found)

    def check_reach(address: str) -> None:
        if may_reach is not None and not may_reach(address):
            raise MediaError(f"{quoted(address)} is on a host that may not be asked; send the data itself")

    check_reach(source)
    opener = request.OpenerDirector()  # the usual one would follow addresses to ftp
    for handler in (
        *([request.ProxyHandler] if may_reach is None else []),
        request.HTTPHandler,
        request.HTTPSHandler,
        Redirects,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    ends, data = time.monotonic() + seconds, bytearray()
    try:
        with opener.open(source, timeout=seconds) as response:
            while chunk := response.read1(2**20):
                data += chunk
                if len(data) > max_bytes:
                    raise MediaError(
                        f"{quoted(source)} has more than {max_bytes} bytes; download it before, and scale it down"
                    )
                if time.monotonic() > ends:
                    raise MediaError(f"{quoted(source)} takes more than {seconds:g} seconds; download it before")
    except (HTTPException, URLError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise MediaError(f"{quoted(source)} cannot be fetched: {reason}; correct the address") from error
    return bytes(data)


# -------------------------------------------------------------------------------------------------- parts of messages


_FOREIGN = {
    "audio_url": ("audio", "url", "audio_url", "url"),
    "image_url": ("image", "url", "image_url", "url"),
    "input_audio": ("audio", "base64", "input_audio", "data"),
    "input_image": ("image", "url", "image_url", "url"),
    "input_text": ("text", "text", "text", None),
    "output_text": ("text", "text", "text", None),
}
"""Types of parts in OpenAI's format: our type and key, and where the value stands, which may be a dict around it."""


def own_part(part: Any) -> Any:
    """A part of OpenAI's format, such as "image_url" and "input_audio", as a part of ours; others stay as they are."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _FOREIGN:
        return part
    own, key, place, inner = _FOREIGN[kind]
    given = part.get(place)
    return {"type": own, key: given.get(inner) if inner and isinstance(given, dict) else given}


def source_of(part: dict[str, Any], allow_fetch: bool = False) -> Any:
    """The item of a part, {"type": KIND, and KIND, "path", "bytes", "url" or "base64": item}; None: it has none.
    MediaError: the cases of `read_source`.
    """
    name = part["type"]
    kind = name.removeprefix("written_")
    key = next((key for key in (name, "path", "bytes", "url", "base64") if part.get(key) is not None), None)
    if key is None:
        return None
    medium = part[key]
    if key == "base64" and isinstance(medium, str) and medium[:5].lower() != "data:":
        _check_length(medium)
        return decode_base64(medium, medium)
    # What a string means that stands for a further modality itself, that modality knows.
    return read_source(medium, kind, allow_fetch) if kind in _WORDS or key == "url" else medium
