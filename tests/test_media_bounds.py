"""Pictures and recordings that would take much memory, time, or further files, and what the largest of them take."""

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from model import MediaError, load_audio, load_image, media
from model.media import MAX_PIXELS
from model.media_sources import read_source
from tests.peak_memory import peak_of
from tests.tiny_processor import audio_file, image_file, picture

MOST = 550e6
"""What docs/data.md says of pictures."""


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reference(image):
    """The picture as RGB, made of it as a whole."""
    if image.mode[0] in "IF":
        values = np.asarray(image)
        scaled = values * 255.0 if image.mode == "F" else values.clip(0, 65535).astype(np.uint16) / 257
        gray = (scaled + 0.5).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def kinds_of_pictures():
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    for mode in ("RGBA", "LA", "RGB", "L", "P", "CMYK", "1"):
        yield base.convert(mode)
    yield Image.fromarray(rng.integers(0, 65536, (37, 23)).astype(np.uint16))
    yield Image.fromarray(rng.integers(-5, 70_000, (37, 23)).astype(np.int32))
    yield Image.fromarray(rng.random((37, 23)).astype(np.float32))
    color = base.convert("RGB").getpixel((3, 3))
    for image, transparency in (
        (base.convert("RGB").quantize(256), 3),
        (base.convert("RGB").quantize(256), bytes(range(256))),
        (base.convert("RGB"), color),
        (base.convert("L"), 7),
    ):
        yield Image.open(io.BytesIO(encoded(image, "PNG", transparency=transparency)))


@pytest.mark.parametrize("strip", [1, 50, 2**20])
def test_strips_are_the_whole_picture(monkeypatch, strip):
    monkeypatch.setattr(media, "_STRIP", strip)
    for image in kinds_of_pictures():
        found = np.asarray(load_image(image)).astype(int)
        assert np.abs(found - reference(image)).max() <= 1, (image.mode, image.info)  # `paste` rounds in its own way


SCAN = b"\xff\xda"


def without_interleaving(content):
    """A JPEG whose scan says that it has one component."""
    place = content.index(SCAN)
    return content[: place + 2] + b"\0\x08\x01\x01\x00\0\x3f\0" + content[place + 14 :]


@pytest.mark.parametrize(
    ("content", "per_pixel"),
    [
        (encoded(picture(100, 100), "PNG"), 8),
        (encoded(picture(100, 100).convert("RGBA"), "PNG"), 8),
        (encoded(picture(100, 100), "JPEG"), 8),
        (encoded(picture(100, 100).convert("L"), "JPEG", progressive=True), 8),
        (encoded(picture(100, 100), "JPEG", progressive=True), 10),
        (encoded(picture(100, 100).convert("CMYK"), "JPEG", progressive=True), 12),
        (without_interleaving(encoded(picture(100, 100), "JPEG")), 10),
        (encoded(picture(100, 100), "TIFF"), 8),
        (encoded(picture(100, 100), "WEBP"), 17),
        (encoded(picture(100, 100), "AVIF"), 17),
        (encoded(picture(100, 100), "JPEG2000"), 25),
    ],
)
def test_the_largest_picture_is_the_smaller_the_more_its_decoder_takes(content, per_pixel):
    """By the header alone, of which both calls say the same."""
    most = -(-100 * 100 * per_pixel // 8)
    assert media.image_size(content, most) == (100, 100)
    for call in (load_image, media.image_size):
        with pytest.raises(MediaError, match=rf"has 100 x 100 pixels, of which 1 to {(most - 1) * 8 // per_pixel} can"):
            call(content, most - 1)


def tiff(entries, data):
    """A picture of 16 x 16 with the tags (number, type, count, value); None: where the data are."""
    plain = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries = sorted([*plain, *entries], key=lambda entry: entry[0])
    start = 8 + 2 + 12 * len(entries) + 4
    found = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for number, kind, count, value in entries:
        found += struct.pack("<HHII", number, kind, count, start if value is None else value)
    return found + struct.pack("<I", 0) + data


def png_with(kind, content):
    file = image_file(picture(8, 8))
    check = zlib.crc32(kind + content)
    return file[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check) + file[33:]


ZEROS = zlib.compress(b"\0" * 30_000_000, 1)
BOMBS = {
    "tiles": (
        tiff([(322, 4, 1, 20_000), (323, 4, 1, 20_000), (324, 4, 1, None), (325, 4, 1, 99)], ZEROS),
        "has tiles of",
    ),
    "text": (png_with(b"zTXt", b"a\0\0" + ZEROS), "cannot be read as a picture"),
    "profile": (png_with(b"iCCP", b"a\0\0" + ZEROS), "cannot be read as a picture"),
    "numbers as text": (b"P3\n2000 2000\n255\n" + b"1 " * 100, "of which 1 to 1048576 can be read as PPM"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>', "it is none of"),
    "icon": (encoded(picture(16, 16), "ICO"), "it is none of"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_what_is_larger_than_it_looks_is_refused_in_one_line(case):
    content, reason = BOMBS[case]
    with pytest.raises(MediaError, match=reason) as error:
        load_image(content)
    assert "\n" not in str(error.value)


def test_a_file_of_a_picture_has_a_bound(tmp_path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(image_file(picture()))
        file.truncate(2**27 + 1)
    with pytest.raises(MediaError, match=r"a\.png' has 134217729 bytes, of which a picture may have 134217728"):
        load_image(path)


def test_a_data_uri_of_percents_has_a_bound_of_its_own():
    """Each takes a hundred times its size."""
    with pytest.raises(MediaError, match=r"has 9000003 characters with percents, and at most 8388608 .*; give base64"):
        read_source("data:image/png," + "%41" * 3_000_001, "image")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "format", "per_pixel", "options"),
    [
        ("RGB", "JPEG", 8, {}),
        ("RGBA", "PNG", 8, {"compress_level": 1}),
        ("I;16", "PNG", 8, {"compress_level": 1}),
        ("RGB", "JPEG", 10, {"progressive": True, "subsampling": 0}),
        ("F", "TIFF", 8, {"compression": "tiff_deflate"}),
        ("P", "GIF", 8, {}),
        ("RGBA", "WEBP", 17, {"method": 0}),
        ("RGBA", "AVIF", 17, {"speed": 10}),
    ],
)
def test_the_largest_pictures_take_what_is_promised(tmp_path, mode, format, per_pixel, options):
    side = int((MAX_PIXELS * 8 / per_pixel) ** 0.5)
    path = tmp_path / "a.image"
    # In a process of its own too, or the memory that writing it leaves free would be taken for the reading.
    peak_of(lambda: Image.new(mode, (side, side)).save(path, format, **options))
    assert media.image_size(path) == (side, side)
    assert MOST / 4 < peak_of(lambda: load_image(path)) < MOST


# --------------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("format", ["VOC", "SD2", "PAF", "HTK", "NIST", "IRCAM"])
def test_recordings_of_other_formats_are_refused(tmp_path, format):
    """SD2 has a further file, which libsndfile would look for."""
    path = tmp_path / f"a.{format.lower()}"
    soundfile.write(path, np.zeros(100), 8000, format=format)
    with pytest.raises(MediaError) as error:
        load_audio(path, 8000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "RF64", "W64"])
def test_recordings_of_usual_formats_are_read_by_path_and_by_content(tmp_path, format):
    path = tmp_path / "a.of_any_name"
    samples = np.sin(np.arange(4000) / 10)
    path.write_bytes(audio_file(samples, format=format))
    found = load_audio(path, 8000)
    assert np.array_equal(found, load_audio(path.read_bytes(), 8000))
    assert np.abs(found[:4000] - samples).max() < (0.2 if format in ("OGG", "MP3") else 1e-3)


def lying(place, field):
    content = bytearray(audio_file(np.zeros(100)))
    content[place : place + len(field)] = field
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        lying(22, struct.pack("<H", 65535)),  # channels
        lying(22, struct.pack("<H", 0)),
        lying(24, struct.pack("<I", 1)),  # samples a second
        lying(24, struct.pack("<I", 2**31)),
        lying(40, struct.pack("<I", 2**31 - 2**17)),  # bytes
        lying(34, struct.pack("<H", 65535)),  # bits
    ],
)
def test_headers_of_recordings_that_lie_cost_nothing(content):
    def load():
        with pytest.raises(MediaError) as error:
            load_audio(content, 8000)
        assert "\n" not in str(error.value)
        raise error.value

    with pytest.raises(MediaError):
        load()
    assert peak_of(load) < 20e6


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "channels"), [(1_000_000, 1), (8000, 1024)])
def test_the_largest_recordings_take_what_is_promised(tmp_path, rate, channels):
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", rate, channels, subtype="PCM_U8") as file:
        for _ in range(31):
            file.write(np.zeros((rate, channels), dtype=np.float32))
    assert peak_of(lambda: load_audio(path, 16_000)) < 350e6
