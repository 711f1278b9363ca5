"""Pictures and recordings from whatever holds them: what is read, and what is refused, in one line."""

import io
import random
import struct
import tracemalloc
import wave
import zlib

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageOps, PngImagePlugin

from model.media import MediaError, audio_seconds, image_size, load_audio, load_image
from tests.tiny_processor import audio_file, image_file, picture, sound


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def refused(function, *args, match, **options) -> None:
    """One line that has the reason."""
    with pytest.raises(MediaError, match=match) as error:
        function(*args, **options)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value) and "object at 0x" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "dict", "dict of a path", "pil", "lazy pil"])
def test_a_picture_comes_from_anywhere(kind, tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    source = {
        "path": tmp_path / "a.png",
        "str": str(tmp_path / "a.png"),
        "bytes": data,
        "dict": {"bytes": data, "path": None},
        "dict of a path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "pil": image,
        "lazy pil": Image.open(tmp_path / "a.png"),
    }[kind]
    assert image_size(source) == (16, 32)
    loaded = load_image(source)
    assert loaded.mode == "RGB" and np.array_equal(pixels(loaded), pixels(image))


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_arrays_are_pictures_whatever_their_layout(make):
    values = np.asarray(picture()).copy()
    expected = values.astype(int)
    for array in (values, values.astype(np.int64), values / 255, values.astype(np.float32) / 255):
        assert np.array_equal(pixels(load_image(make(array))), expected)
        assert np.array_equal(pixels(load_image(make(np.moveaxis(array, -1, 0).copy()))), expected)
        assert image_size(make(array)) == (16, 32)
    gray = np.repeat(expected[..., :1], 3, axis=-1)
    for array in (values[..., 0], values[..., :1], values[..., 0] / 255, values[..., 0].astype(np.uint16) * 257):
        assert np.array_equal(pixels(load_image(make(array))), gray)
    assert np.array_equal(pixels(load_image(make(values[..., 0] > 127))), (gray > 127) * 255)
    assert pixels(load_image(make(np.array([[0.1, 0.5, 0.9]]))))[0, :, 0].tolist() == [
        26,
        128,
        230,
    ]  # 25.5, 127.5, 229.5


def test_an_array_of_three_rows_is_read_by_its_channels():
    """(3, W, 3): an array has its channels last, a tensor first."""
    values = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert np.array_equal(pixels(load_image(values)), values)
    tensor = torch.from_numpy(np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3))
    assert load_image(tensor).size == (3, 5)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((0, 4, 3), np.uint8), "no picture"),
        (np.zeros((5, 5, 2), np.uint8), "no picture"),
        (np.zeros(7, np.uint8), "no picture"),
        (np.zeros((1, 4, 4, 3), np.uint8), "no picture"),
        (np.full((4, 4), np.nan), "values from nan"),
        (np.full((4, 4), np.inf), "to inf"),
        (np.full((4, 4), 200.0), "values from 200.0 to 200.0; give uint8 in 0 .. 255 or float in 0 .. 1"),
        (np.full((4, 4), -1), "values from -1"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array, reason):
    refused(load_image, array, match=reason)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "HSV", "LAB", "P"])
def test_other_modes_become_rgb_as_pillow_has_it(mode):
    image = picture().convert(mode)
    expected = pixels(image.convert("RGB"))
    assert np.array_equal(pixels(load_image(image)), expected)
    if mode in ("L", "1", "CMYK", "P"):
        data = image_file(image, "TIFF")
        assert Image.open(io.BytesIO(data)).mode == mode
        assert np.array_equal(pixels(load_image(data)), expected)


def test_a_cmyk_jpeg_has_the_colours_of_the_picture():
    """Flat colours survive the compression; what is written from RGB is seen as that RGB."""
    for colour in [(255, 0, 0), (0, 128, 255), (255, 255, 255), (10, 10, 10)]:
        data = image_file(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
        assert np.abs(pixels(load_image(data)) - colour).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(format):
    """Pillow's own conversion would cut off all above 255."""
    values = np.array([[0, 257 * 7, 257 * 200, 65535, 1000]], dtype=np.uint16)
    loaded = load_image(image_file(Image.fromarray(values), format))
    assert pixels(loaded)[0, :, 0].tolist() == [0, 7, 200, 255, 4]  # 1000 / 257 = 3.89
    assert (pixels(loaded).ptp() if hasattr(np.ndarray, "ptp") else np.ptp(pixels(loaded), axis=-1)).max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_lies_on_white(mode):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    loaded = load_image(image_file(image.convert(mode), "PNG") if mode != "PA" else image.convert(mode))
    assert pixels(loaded)[0, :, 0] == pytest.approx([0, 255, 127], abs=1)


def test_a_palette_with_transparency_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    loaded = load_image(image_file(image, "GIF", transparency=1))
    assert pixels(loaded)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = image_file(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert pixels(load_image(data)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


# How row 0 and column 0 of what is to be seen are stored, by the definition of EXIF.
STORED = {
    1: lambda it: it,
    2: np.fliplr,
    3: lambda it: np.rot90(it, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda it: np.rot90(it, 1),  # to be turned clockwise: row 0 is the right side
    7: lambda it: np.rot90(np.transpose(it), 2),
    8: lambda it: np.rot90(it, -1),
}
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)
UPRIGHT = np.kron(np.array([[1, 2], [3, 4]]), np.ones((16, 24), int))


def exif_of(orientation: int | None) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    if orientation is not None:
        exif[0x0112] = orientation
    return exif.tobytes()


def xmp_of(orientation: int, form: str = '<rdf:Description tiff:Orientation="{}"/>') -> bytes:
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{form.format(orientation)}</x:xmpmeta>".encode()


def texts(**profiles: bytes) -> PngImagePlugin.PngInfo:
    """Chunks as ImageMagick writes them."""
    info = PngImagePlugin.PngInfo()
    for name, profile in profiles.items():
        info.add_text(f"Raw profile type {name}", f"\n{name}\n{len(profile):8}\n{profile.hex()}\n", zip=True)
    return info


def itxt(xmp: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return info


def behind_its_pixels(data: bytes) -> bytes:
    """A PNG whose texts and EXIF stand behind its pixels."""
    place, head, pixels_, said = 8, data[:8], b"", b""
    while place < len(data):
        size = int.from_bytes(data[place : place + 4]) + 12
        kind, chunk = data[place + 4 : place + 8], data[place : place + size]
        place += size
        if kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            said += chunk
        elif kind == b"IEND":
            return head + pixels_ + said + chunk
        else:
            pixels_ += chunk
    raise AssertionError("no end")


PLACES = {
    "JPEG, EXIF": ("JPEG", lambda n: {"exif": exif_of(n)}),
    "JPEG, XMP": ("JPEG", lambda n: {"xmp": xmp_of(n)}),
    "JPEG, XMP beside EXIF that does not say": ("JPEG", lambda n: {"xmp": xmp_of(n), "exif": exif_of(None)}),
    "JPEG, XMP beside EXIF that says none": ("JPEG", lambda n: {"xmp": xmp_of(n), "exif": exif_of(9)}),
    "JPEG, XMP beside damaged EXIF": ("JPEG", lambda n: {"xmp": xmp_of(n), "exif": b"Exif\0\0what is this?"}),
    "JPEG, XMP as an element": ("JPEG", lambda n: {"xmp": xmp_of(n, "<tiff:Orientation>{}</tiff:Orientation>")}),
    "JPEG, XMP in other quotes": ("JPEG", lambda n: {"xmp": xmp_of(n, "<rdf:Description tiff:Orientation = '{}'/>")}),
    "JPEG, both unequal": ("JPEG", lambda n: {"exif": exif_of(n), "xmp": xmp_of(n % 8 + 1)}),
    "MPO, EXIF": ("MPO", lambda n: {"exif": exif_of(n), "save_all": True, "append_images": [picture(8, 8)]}),
    "PNG, EXIF": ("PNG", lambda n: {"exif": exif_of(n)}),
    "PNG, XMP": ("PNG", lambda n: {"pnginfo": itxt(xmp_of(n))}),
    "PNG, both unequal": ("PNG", lambda n: {"pnginfo": itxt(xmp_of(n % 8 + 1)), "exif": exif_of(n)}),
    "PNG, raw EXIF": ("PNG", lambda n: {"pnginfo": texts(exif=exif_of(n))}),
    "PNG, raw APP1": ("PNG", lambda n: {"pnginfo": texts(APP1=exif_of(n))}),
    "PNG, raw XMP": ("PNG", lambda n: {"pnginfo": texts(xmp=xmp_of(n))}),
    "PNG, raw XMP as APP1": (
        "PNG",
        lambda n: {"pnginfo": texts(APP1=b"http://ns.adobe.com/xap/1.0/\0" + xmp_of(n))},
    ),
    "WebP, EXIF": ("WEBP", lambda n: {"exif": exif_of(n), "lossless": True}),
    "WebP, XMP": ("WEBP", lambda n: {"xmp": xmp_of(n), "lossless": True}),
    "TIFF, tag": ("TIFF", lambda n: {"exif": exif_of(n)}),
    "TIFF, XMP": ("TIFF", lambda n: {"tiffinfo": {700: xmp_of(n)}}),
    "TIFF, both unequal": ("TIFF", lambda n: {"tiffinfo": {274: n, 700: xmp_of(n % 8 + 1)}}),
    "AVIF, irot and imir": ("AVIF", lambda n: {"exif": exif_of(n), "quality": 95}),
    "AVIF, XMP": ("AVIF", lambda n: {"xmp": xmp_of(n), "quality": 95}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", PLACES)
def test_pictures_are_turned_upright(place, orientation):
    """Wherever they say how they lie, EXIF before XMP; against the definition of EXIF."""
    format, options = PLACES[place]
    options = ({"quality": 95} if format in ("JPEG", "MPO") else {}) | options(orientation)
    stored = Image.fromarray(COLOURS[STORED[orientation](UPRIGHT)])
    data = image_file(stored, format, **options)
    opened = Image.open(io.BytesIO(data))
    for source in [data, opened, opened, *([behind_its_pixels(data)] if format == "PNG" else [])]:
        assert image_size(source) == (32, 48)
        loaded = pixels(load_image(source))
        assert loaded.shape == (32, 48, 3)
        for number, (row, column) in enumerate([(8, 12), (8, 36), (24, 12), (24, 36)], start=1):
            assert np.abs(loaded[row, column] - COLOURS[number]).max() < 30, (orientation, number)


@pytest.mark.parametrize("place", PLACES)
def test_an_upright_picture_is_not_turned_again(place):
    format, options = PLACES[place]
    data = image_file(Image.fromarray(COLOURS[STORED[6](UPRIGHT)]), format, **options(6))
    once = load_image(data)
    assert once.size == (48, 32) and load_image(once).size == (48, 32) and image_size(once) == (32, 48)
    by_pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if by_pillow.size == (48, 32):  # it does not know all places
        assert load_image(by_pillow).size == (48, 32) and image_size(by_pillow) == (32, 48)


def test_the_size_of_a_png_is_known_without_decoding_it():
    damaged = bytearray(image_file(picture(64, 48), "PNG"))
    place = damaged.index(b"IDAT") + 20
    damaged[place : place + 8] = bytes(8)
    assert image_size(bytes(damaged)) == (48, 64)
    with pytest.raises(MediaError):
        load_image(bytes(damaged))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II",
        b"Exif\0\0what is this?",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\1\x12\0\3\0\0\0\1",
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\4ABC\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\0\0\6\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "raw"])
def test_damaged_exif_turns_and_stops_nothing(format, exif):
    kind, options = ("PNG", {"pnginfo": texts(APP1=exif)}) if format == "raw" else (format, {"exif": exif})
    data = image_file(picture(32, 16), kind, **options)
    assert image_size(data) == (16, 32) and load_image(data).size == (32, 16)


def test_an_orientation_that_is_none_is_left_alone():
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09\0\0\0\0\0\0", b"Exif\0\0"):
        data = image_file(picture(32, 16), "JPEG", exif=exif)
        assert image_size(data) == (16, 32) and load_image(data).size == (32, 16)


def test_one_pixel_is_a_picture():
    assert load_image(image_file(picture(1, 1))).size == (1, 1)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(format):
    data = image_file(picture(64, 64), format)
    for length in (1, 10, len(data) // 2, len(data) * 9 // 10):
        refused(load_image, data[:length], match=f"a file of {length} bytes cannot be read as a picture: ")


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for function in (load_image, image_size):
        refused(function, tmp_path / "absent.png", match="absent.png' does not exist; correct the path")
        refused(function, tmp_path, match="is no file")
        refused(function, tmp_path / "empty.png", match="empty.png' has 0 bytes")
        refused(function, b"", match="the picture has 0 bytes")
        refused(function, {"bytes": b"", "path": "a.png"}, match="has 0 bytes")
        refused(function, tmp_path / "text.png", match="text.png' cannot be read as a picture: it is none of JPEG, PNG")
        refused(function, tmp_path / "vector.eps", match="cannot be read as a picture: it is none of")
        refused(function, audio_file(sound()), match="cannot be read as a picture: ")
        refused(function, 7, match="a picture cannot be read from int")
        refused(function, None, match="a picture cannot be read from NoneType")


@pytest.mark.parametrize(
    "address", ["http://a.b/c.png", "https://a.b/c.png", "ftp://a.b/c", "data:image/png;base64,aaa"]
)
def test_addresses_are_never_fetched(address):
    for function in (load_image, image_size, audio_seconds):
        refused(function, address, match="never fetched")
    refused(load_audio, address, 8000, match="never fetched")


def test_too_many_pixels_are_refused_before_they_are_decoded():
    """100 megapixels of one colour are a small file; of 900, Pillow refuses the header itself."""
    data = image_file(Image.new("1", (10_000, 10_000)), "PNG")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data)).close()
    tracemalloc.start()
    with pytest.warns(Image.DecompressionBombWarning):
        refused(load_image, data, match="has 10000 x 10000 pixels, of which 1 to 64000000 can be read; scale")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    huge = bytearray(data)
    huge[16:24] = struct.pack(">II", 30_000, 30_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    refused(load_image, bytes(huge), match="cannot be read as a picture: .*900000000 pixels")
    refused(load_image, picture(), max_pixels=500, match="has 32 x 16 pixels, of which 1 to 500 ")
    assert load_image(picture(), max_pixels=512).size == (32, 16)


def damaged(data: bytes, count: int):
    """Copies of a file with some bytes changed, most of them in front, where the headers are."""
    generator = random.Random(0)
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            end = generator.choice([60, 200, len(copy)])
            copy[generator.randrange(min(end, len(copy)))] = generator.randrange(256)
        yield bytes(copy)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_picture_is_refused_or_as_large_as_its_header_says(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in damaged(
        image_file(picture(40, 24), format, **({} if format in ("GIF", "BMP") else {"exif": exif})), 150
    ):
        try:
            image = load_image(data, max_pixels=10**6)
        except MediaError:
            continue
        assert image_size(data) == image.size[::-1] and image.mode == "RGB"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["WAV", "FLAC", "AIFF"])
def test_a_damaged_recording_is_refused_or_as_long_as_its_header_says(format):
    for data in damaged(audio_file(sound(4000), format=format), 100):
        try:
            samples = load_audio(data, 8000)
        except MediaError:
            continue
        assert len(samples) == pytest.approx(8000 * min(30, audio_seconds(data)), abs=2)


# --------------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "dict", "dict of a path"])
@pytest.mark.parametrize("format, subtype", [("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("WAV", "PCM_16")])
def test_a_recording_comes_from_anywhere(kind, format, subtype, tmp_path):
    samples = sound()
    data = audio_file(samples, format=format, subtype=subtype)
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    source = {
        "path": path,
        "str": str(path),
        "bytes": data,
        "dict": {"bytes": data, "path": None},
        "dict of a path": {"bytes": None, "path": str(path)},
    }[kind]
    loaded = load_audio(source, 8000)
    assert loaded.dtype == np.float32 and loaded.shape == (4000,)
    assert np.abs(loaded - samples).max() <= {"FLOAT": 0, "PCM_24": 2**-23, "PCM_16": 2**-15}[subtype]
    assert audio_seconds(source) == 0.5


@pytest.mark.parametrize("format", ["OGG", "MP3"])
def test_compressed_recordings_are_read(format):
    samples = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)
    loaded = load_audio(audio_file(samples, 16000, format), 16000)
    assert len(loaded) == pytest.approx(16000, abs=2000)
    spectrum = np.abs(np.fft.rfft(loaded[2000:10000] * np.hanning(8000)))
    assert spectrum.argmax() * 2 == pytest.approx(440, abs=2)


def test_arrays_are_recordings():
    samples = sound()
    stereo = np.stack([samples, -0.5 * samples])
    for source, expected in [
        (samples, samples),
        (samples.astype(np.float64), samples),
        (samples.tolist(), samples),
        (torch.from_numpy(samples), samples),
        ((samples, 8000), samples),
        ({"array": samples, "sampling_rate": 8000}, samples),
        (stereo, samples / 4),
        (stereo.T, samples / 4),
    ]:
        np.testing.assert_allclose(load_audio(source, 8000), expected, atol=1e-7)
        assert audio_seconds(source, 8000) == 0.5
    assert audio_seconds((samples, 16000)) == 0.25
    with pytest.raises(ValueError, match="has no sampling rate"):
        audio_seconds(samples)


@pytest.mark.parametrize("dtype, full", [(np.int16, 2**15), (np.int32, 2**31), (np.int8, 2**7)])
def test_integers_are_scaled(dtype, full):
    values = np.array([0, full // 2, -full, full // 4], dtype=dtype)
    np.testing.assert_allclose(load_audio(values, 8000), [0, 0.5, -1, 0.25])


def test_eight_bits_lie_around_128(tmp_path):
    """As in a file, read by another library."""
    values = np.array([128, 0, 255, 192], dtype=np.uint8)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 4, "NONE", ""))
        file.writeframes(values.tobytes())
    for source in (values, tmp_path / "a.wav"):
        np.testing.assert_allclose(load_audio(source, 8000), [0, -1, 127 / 128, 0.5])


def test_a_stereo_file_is_the_mean_of_its_channels():
    stereo = np.stack([sound(seed=1), sound(seed=2)], axis=1)
    loaded = load_audio(audio_file(stereo, subtype="FLOAT"), 8000)
    np.testing.assert_allclose(loaded, stereo.mean(1), atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 11025, 22050, 44101, 7919, 192000])
def test_other_rates_are_resampled(rate):
    """A tone keeps its pitch and loudness, whatever the rate; and what is too high for the new one is gone."""
    time = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 500 * time)
    loaded = load_audio((tone + (0.3 * np.sin(2 * np.pi * 7000 * time) if rate > 15000 else 0), rate), 8000)
    assert len(loaded) == 8000 and loaded.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 500 * np.arange(8000) / 8000)
    np.testing.assert_allclose(loaded[200:-200], expected[200:-200], atol=0.01)


def test_an_odd_rate_takes_no_more_memory_than_another():
    """Exactly resampled, a prime rate takes a kernel of its square."""
    tracemalloc.start()
    load_audio((sound(99_991), 999_983), 16000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_the_length_after_resampling_is_known_before():
    for rate in (11025, 44100, 44101, 7919):
        for length in (1, 100, 4410, 7919, 12345):
            assert len(load_audio((sound(length), rate), 8000)) == -(-length * 8000 // rate)


def test_no_more_than_asked_for_is_read(tmp_path):
    samples = sound(24000)
    data = audio_file(samples, subtype="FLOAT")
    assert np.array_equal(load_audio(data, 8000, max_seconds=2.0), samples[:16000])
    assert np.array_equal(load_audio(samples, 8000, max_seconds=2.0), samples[:16000])
    assert np.array_equal(load_audio((samples, 8000), 8000, max_seconds=0.5), samples[:4000])
    assert load_audio((samples, 16000), 8000, max_seconds=1.0).shape == (8000,)
    assert audio_seconds(data) == 3.0


@pytest.mark.parametrize("seconds", [1.0, 1.09, 1.2])
def test_what_is_cut_is_said(tmp_path, caplog, seconds):
    """Of a file and of an array, but for less than a tenth of a second."""
    samples = sound(int(8000 * seconds))
    path = tmp_path / f"{seconds}.wav"
    path.write_bytes(audio_file(samples))
    for source in (str(path), (samples, 8000)):
        caplog.clear()
        assert len(load_audio(source, 8000, max_seconds=1.0)) == 8000
        assert ("has 1.2 seconds, of which the first 1 are read; cut it" in caplog.text) == (seconds == 1.2)


def test_ten_hours_are_read_no_further_than_needed(tmp_path):
    """By the header 288 million samples; memory is that of 30 seconds."""
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\1\0" * 8000 * 60)
    size = 2 * 8000 * 36000
    with open(path, "r+b") as file:  # the rest is a hole in the file, which takes no disk
        file.truncate(44 + size)
        file.seek(4)
        file.write(struct.pack("<I", 36 + size))
        file.seek(40)
        file.write(struct.pack("<I", size))
    assert audio_seconds(path) == 36000
    tracemalloc.start()
    loaded = load_audio(path, 8000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.shape == (240_000,) and peak < 8 * 2**20


def test_many_channels_take_no_more_memory_than_one(tmp_path):
    data = audio_file(np.zeros((20_000, 200), np.float32), subtype="PCM_16")
    tracemalloc.start()
    loaded = load_audio(data, 8000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.shape == (20_000,) and peak < 20_000 * 200 * 4 * 0.75


@pytest.mark.parametrize(
    "samples, reason",
    [
        (np.array([0.1, np.nan, 0.1], np.float32), "NaN or infinite"),
        (np.array([0.1, np.inf], np.float32), "NaN or infinite"),
        (np.array([], np.float32), "has no samples"),
        (np.zeros((2, 0), np.float32), "has no samples"),
        (np.array([0.1, 32767.0], np.float32), "samples up to 32767; scale them to -1 .. 1"),
        (np.zeros((2, 2, 2), np.float32), "is no recording"),
        (np.array(0.5), "is no recording"),
        (np.array(["a"]), "is no recording"),
        (np.array([0, 1, -1]), "of int64 is no recording"),
        (np.array([True]), "is no recording"),
    ],
)
def test_arrays_that_are_no_recordings_are_refused(samples, reason):
    refused(load_audio, samples, 8000, match=reason)
    if "is no recording" not in reason:
        refused(load_audio, audio_file(samples.T, subtype="FLOAT"), 8000, match=reason)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "W64", "AU"])
def test_a_truncated_recording_is_refused(format):
    """libsndfile reads what there is of some, without a word."""
    data = audio_file(sound(80_000), 16000, format)
    assert len(load_audio(data, 16000)) > 79_000
    for length in (1, 20, len(data) // 2, len(data) * 9 // 10, len(data) - 9):
        refused(load_audio, data[:length], 16000, match=r"truncated|cannot be read|no samples")


def test_an_ogg_file_without_its_last_page_is_refused():
    data = audio_file(sound(80_000), 16000, "OGG")
    refused(load_audio, data[: data.rfind(b"OggS")], 16000, match="truncated")


def test_a_file_that_was_written_to_a_pipe_is_whole():
    """ffmpeg leaves the largest number where it does not know the size."""
    data = bytearray(audio_file(sound()))
    data[4:8] = data[40:44] = struct.pack("<I", 2**32 - 1)
    assert len(load_audio(bytes(data), 8000)) == 4000


def test_what_is_no_recording_is_refused(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "a.raw").write_text("hello")
    for function in (audio_seconds, lambda source: load_audio(source, 8000)):
        refused(function, tmp_path / "absent.wav", match="absent.wav' does not exist; correct the path")
        refused(function, tmp_path / "empty.wav", match="empty.wav' has 0 bytes")
        refused(function, b"", match="the recording has 0 bytes")
        refused(
            function, tmp_path / "text.wav", match="text.wav' cannot be read as a recording: Format not recognised; "
        )
        refused(function, tmp_path / "a.raw", match="a.raw' cannot be read as a recording: ")
        refused(function, image_file(picture()), match="cannot be read as a recording: ")
        refused(function, audio_file(np.zeros(0)), match="has no samples")
        refused(function, 7, match="a recording cannot be read from int")
        refused(function, (sound(), 0), match="has 0 samples per second; give a rate from 100 to 1000000")
        refused(function, (sound(), 10**7), match="has 10000000 samples per second")
    data = bytearray(audio_file(sound()))
    data[24:28] = struct.pack("<I", 2**31 - 1)
    refused(load_audio, bytes(data), 8000, match="samples per second|cannot be read")


def test_a_silent_recording_is_a_recording():
    assert load_audio(np.zeros(100, np.float32), 8000).tolist() == [0] * 100
    assert soundfile.SoundFile(io.BytesIO(audio_file(np.zeros(100)))).frames == 100
