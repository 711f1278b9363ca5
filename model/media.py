"""Images and waveforms from paths, bytes and arrays, within limits, and never from the network.

What cannot be used raises `MediaError`, a `ValueError` of one line with the value, the reason and the fix. Sizes and
durations come from headers, so that a batch can be planned without decoding.
"""

import io
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging
from transformers.utils.import_utils import is_torchaudio_available, is_vision_available

if is_vision_available():
    from PIL import Image, UnidentifiedImageError
if is_torchaudio_available():
    from torchaudio.transforms import Resample
try:
    import soundfile
except (ImportError, OSError):  # OSError: the package without its C library
    soundfile = None

logger = logging.get_logger(__name__)

MAX_PIXELS = 64_000_000
"""Largest image that is decoded, where that takes eight bytes of memory for each pixel: 512 MB. Where it takes more,
the largest has as many pixels fewer."""
MAX_FILE_BYTES = 2**27
"""Largest file of an image, which some decoders read as a whole, and of which texts are copied."""
_BYTES_PER_PIXEL = 8
_BYTES_PER_PIXEL_OF = {"WEBP": 17, "JPEG2000": 25, "AVIF": 17}
"""Bytes that decoders which hold an image more than once take for a pixel. Measured."""
MAX_SECONDS = 30.0
"""Most seconds that are read of an audio file."""
CUT_SECONDS = 0.1
"""Seconds that may be cut off audio without a word: no word is as short."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow knows more, some of which start other programs (EPS)."""
AUDIO_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "RF64", "W64")
"""libsndfile knows more, some of which nobody has written for decades."""
SAMPLING_RATES = (100, 1_000_000)
MAX_AMPLITUDE = 1000.0
"""Samples lie within -1 .. 1, or were forgotten to be scaled; larger ones overflow as power."""
_STRIP = _MAX_PLAIN = 2**20
_TILE_WIDTH, _TILE_LENGTH, _BITS_PER_SAMPLE = 322, 323, 258
_EXIF_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What makes an image upright, by its orientation."""


class MediaError(ValueError):
    """An image or waveform that cannot be used."""


# ------------------------------------------------------------------------------------------------------------- images


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> "Image.Image":
    """An image as 8-bit RGB, upright, on white where it is transparent, the first frame of an animation.

    Where it says how it lies, in EXIF or else in XMP, it is turned by that, and says nothing of it any more.

    Args:
        source: PIL image; array or tensor (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, uint8 or float in
            0 .. 1; path; bytes of a file; or {"bytes", "path"} as `datasets` has them.
        max_pixels: Larger images are refused by their header, before they are decoded.

    Raises:
        MediaError: missing, empty, truncated or too large, no image, or not finite.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _image_from_array(source)
    with _opened_image(source, max_pixels) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        upright = _as_rgb(image)
    del image  # before there is a third of them
    upright = upright if turn is None else upright.transpose(Image.Transpose[turn])
    upright.info = {}  # or it would be turned again wherever it goes
    return upright


def image_size(source: Any, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of what `load_image` gives, from the header; MediaError if that tells that it cannot be used."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _image_from_array(source).size[::-1]
    with _opened_image(source, max_pixels) as image:
        if image.format == "TIFF":  # turned by Pillow: by its own tag before it is decoded, by XMP while it is
            if "xmp" in image.info:
                image.load()
            return image.size[::-1]
        if image.format == "PNG" and _says_more_behind(image):
            image.load()
        return image.size if _orientation(image) in (5, 6, 7, 8) else image.size[::-1]


@contextmanager
def _opened_image(source: Any, max_pixels: int) -> "Iterator[Image.Image]":
    """A PIL image that is open, but not decoded; one that came as such stays open. What fails with it is named."""
    if not is_vision_available():
        raise ImportError("pictures are read by Pillow, which is not installed; pip install pillow")
    try:
        is_open = isinstance(source, Image.Image)
        file = nullcontext(source) if is_open else Image.open(_file(source, "picture"), formats=IMAGE_FORMATS)
        with file as image:
            _check_pixels(source, image, max_pixels)
            yield image
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise _unreadable("picture", source, f"it is none of {', '.join(IMAGE_FORMATS)}") from error
    except Exception as error:  # Pillow raises whatever its decoders run into
        raise _unreadable("picture", source, error) from error


def _check_pixels(source: Any, image: "Image.Image", max_pixels: int) -> None:
    width, height = image.size
    most = max_pixels * _BYTES_PER_PIXEL // _bytes_per_pixel(image)
    if any(tile[0] == "ppm_plain" for tile in getattr(image, "tile", ())):  # numbers as text, which take minutes
        most = min(most, _MAX_PLAIN)
    if not 0 < width * height <= most:
        as_format = f" as {image.format}" if most < max_pixels else ""
        raise MediaError(
            f"{_name(source)} has {width} x {height} pixels, of which 1 to {most} can be read{as_format}; scale the "
            "picture down"
        )
    tags = getattr(image, "tag_v2", {})
    if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > most:
        raise MediaError(f"{_name(source)} has tiles of more than {most} pixels; write it in smaller ones")


def _bytes_per_pixel(image: "Image.Image") -> int:
    """The most memory that decoding takes, and making it RGB after that."""
    if image.format == "TIFF":  # a strip may be all of it
        return max(_BYTES_PER_PIXEL, 4 + sum(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) // 8)
    if image.format in ("JPEG", "MPO") and not _is_one_scan(image):  # its coefficients are held, of two bytes
        return max(_BYTES_PER_PIXEL, 4 + 2 * len(image.getbands()))
    return _BYTES_PER_PIXEL_OF.get(image.format, _BYTES_PER_PIXEL)


def _is_one_scan(image: "Image.Image") -> bool:
    """Whether the first scan of a JPEG that is open, behind the header of which Pillow stands, has all components."""
    file, count = getattr(image, "fp", None), len(image.getbands())
    if file is None:  # decoded already
        return True
    if "progressive" in image.info:
        return False
    file.seek(-(4 + 2 * count), os.SEEK_CUR)
    found = file.read(1)
    file.seek(3 + 2 * count, os.SEEK_CUR)
    return found == bytes([count])


def _says_more_behind(image: "Image.Image") -> bool:
    """Whether a PNG that is open has texts or EXIF behind its pixels, which Pillow reads when it decodes them."""
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        return False
    place, is_behind, found = file.tell(), False, False
    file.seek(8)
    while not found and len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        is_behind |= kind == b"IDAT"
        found = is_behind and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)
    return found


def _orientation(image: "Image.Image") -> int:
    """How the image is to be turned, 1 .. 8 as in EXIF, which comes before XMP where both say it. EXIF that is
    damaged says nothing.
    """
    try:
        orientation = _exif_of(image).get(_EXIF_ORIENTATION)
    except (SyntaxError, ValueError, KeyError, TypeError, IndexError, EOFError, struct.error) as error:
        name = quoted(str(getattr(image, "filename", "") or f"a picture of {image.width} x {image.height} pixels"))
        logger.warning_once(f"{name} has damaged EXIF ({error}), which is not read; only XMP may turn it upright")
        orientation = None
    if orientation in range(1, 9):
        return orientation
    found = _XMP_ORIENTATION.search(_xmp_of(image.info))
    return int(found[1]) if found else 1


def _exif_of(image: "Image.Image") -> "Image.Exif":
    info = image.info
    if "exif" not in info and "Raw profile type exif" not in info:
        profile = _raw_profile(info, "Raw profile type APP1")
        if profile.startswith(b"Exif"):
            exif = Image.Exif()
            exif.load(profile)
            return exif
    # By the class of all pictures: that of PNG would decode it to look behind its pixels.
    return Image.Image.getexif(image)


def _xmp_of(info: dict[str, Any]) -> bytes:
    """XMP, without the zeros that UTF-16 has."""
    for name in ("XML:com.adobe.xmp", "xmp"):
        value = info.get(name)
        if isinstance(value, (str, bytes)) and value:
            return (value.encode() if isinstance(value, str) else value).replace(b"\0", b"")
    try:
        return _raw_profile(info, "Raw profile type xmp") + _raw_profile(info, "Raw profile type APP1")
    except ValueError:  # no hexadecimal numbers: damaged, as is then said of EXIF
        return b""


def _raw_profile(info: dict[str, Any], name: str) -> bytes:
    """What ImageMagick puts into a text of a PNG: an empty line, the kind, the number of bytes, and these as
    hexadecimal numbers.
    """
    return bytes.fromhex("".join(str(info.get(name, "")).split("\n")[3:]))


def _as_rgb(image: "Image.Image") -> "Image.Image":
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _in_strips(_on_white, image)
    return _in_strips(_from_numbers, image) if image.mode[0] in "IF" else image.convert("RGB")


def _in_strips(convert: "Callable[[Image.Image], Image.Image]", image: "Image.Image") -> "Image.Image":
    """RGB of an image, of which what is between them never has the whole size."""
    rgb, rows = Image.new("RGB", image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _on_white(image: "Image.Image") -> "Image.Image":
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_numbers(image: "Image.Image") -> "Image.Image":
    """RGB of integers and floats: Pillow's own conversion cuts all above 255 off."""
    values = np.asarray(image)
    return _image_from_array(values if image.mode == "F" else values.clip(0, 65535).astype(np.uint16))


def _image_from_array(source: np.ndarray | torch.Tensor) -> "Image.Image":
    name = f"array {tuple(source.shape)} of {source.dtype}"
    array = np.asarray(source.detach().cpu()) if isinstance(source, torch.Tensor) else source
    channels_first = isinstance(source, torch.Tensor)
    if array.ndim == 3:
        axes = (0, -1) if channels_first else (-1, 0)
        axis = next((axis for axis in axes if array.shape[axis] in (1, 3, 4)), None)
        array = array if axis in (None, -1) else np.moveaxis(array, axis, -1)
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))):
        raise MediaError(f"{name} is no picture; give (H, W), (H, W, 3) or (3, H, W), none of them 0")
    array = array[..., 0] if array.shape[2:] == (1,) else array
    return _as_rgb(Image.fromarray(np.ascontiguousarray(_as_bytes(array, name))))


def _as_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """Pixels as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array / 257 + 0.5).astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    largest = 1 if np.issubdtype(array.dtype, np.floating) else 255
    if not (array.min() >= 0 and array.max() <= largest):  # so that NaN is refused as well
        raise MediaError(
            f"{name} has values from {array.min()} to {array.max()}; give uint8 in 0 .. 255 or float in 0 .. 1"
        )
    return (array * (255 / largest) + 0.5).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- recordings


def load_audio(
    source: Any, sampling_rate: int, max_seconds: float = MAX_SECONDS, warns_of_cut: bool = True
) -> np.ndarray:
    """A waveform as float32 (samples,), mono (the mean of its channels), at `sampling_rate` samples per second.

    Args:
        source: array or tensor (samples,) at `sampling_rate`, or with channels, which are the shorter side; (array,
            rate) or {"array", "sampling_rate"}; path; bytes of a file; or {"bytes", "path"} as `datasets` has them.
            Integers are scaled to -1 .. 1.
        max_seconds: What is read of the front; the rest of a longer file is not decoded.
        warns_of_cut: Whether a warning says, once for each source, that there is a rest of more than `CUT_SECONDS`.

    Raises:
        MediaError: missing, empty, truncated, no waveform, not finite, or far above 1.
    """
    array, rate = _as_array(source, sampling_rate)
    if array is None:
        waveform, rate, num_samples = _read_file(source, max_seconds)
    else:
        _check_rate(source, rate)
        waveform, num_samples = _as_mono(array, math.ceil(max_seconds * rate)), max(array.shape, default=0)
    _check_samples(waveform, source)
    if warns_of_cut and num_samples / rate > max_seconds + CUT_SECONDS:
        logger.warning_once(
            f"{_name(source)} has {num_samples / rate:.1f} seconds, of which the first {max_seconds:g} are read; cut "
            "it, or raise max_seconds of the model's audio"
        )
    if rate != sampling_rate:
        waveform = _resample(waveform, rate, sampling_rate)
    return waveform[: math.ceil(max_seconds * sampling_rate)]


def audio_seconds(source: Any, sampling_rate: int | None = None) -> float:
    """Duration of the whole waveform of a source in seconds, from the header; `sampling_rate` is that of an array
    without one. MediaError: the header tells that it cannot be used; ValueError: an array without a rate.
    """
    array, rate = _as_array(source, sampling_rate)
    if array is None:
        with _opened_audio(source) as file:
            return file.frames / file.samplerate
    if rate is None:
        raise ValueError(f"{_name(source)} has no sampling rate; give (array, rate)")
    _check_rate(source, rate)
    return max(array.shape, default=0) / rate


def write_audio(path: Any, waveform: np.ndarray | torch.Tensor, sampling_rate: int) -> None:
    """A waveform, float (samples,), to a file of the format that its name ends in; beyond -1 .. 1 it is cut off."""
    if soundfile is None:
        raise ImportError("recordings are written by soundfile, which is not installed; pip install soundfile")
    soundfile.write(path, torch.as_tensor(waveform).float().clamp(-1, 1).cpu().numpy(), sampling_rate)


def _as_array(source: Any, sampling_rate: int | None) -> tuple[np.ndarray | None, int | None]:
    """Samples and rate of what lies in memory decoded; (None, None) for a file."""
    if isinstance(source, dict) and "array" in source:
        source = (source["array"], source["sampling_rate"])
    if isinstance(source, tuple) and len(source) == 2:
        source, sampling_rate = source
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, list):
        source = np.asarray(source)
    return (source, sampling_rate) if isinstance(source, np.ndarray) else (None, None)


def _as_mono(array: np.ndarray, max_samples: int) -> np.ndarray:
    """float32 (samples,) of integers or floats with or without channels."""
    is_known = array.dtype.kind == "f" or array.dtype in (np.uint8, np.int8, np.int16, np.int32)
    if array.ndim not in (1, 2) or not is_known:
        raise MediaError(
            f"array {array.shape} of {array.dtype} is no recording; give (samples,) or (channels, samples) of float"
        )
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    array = array[:max_samples]
    if array.size == 0:
        return np.zeros(0, np.float32)
    if np.issubdtype(array.dtype, np.integer):
        zero = 128 if array.dtype == np.uint8 else 0
        array = (array.astype(np.float32) - zero) / (128 if zero else -float(np.iinfo(array.dtype).min))
    array = array.astype(np.float32)
    return array if array.ndim == 1 else array.mean(1)


def _read_file(source: Any, max_seconds: float) -> tuple[np.ndarray, int, int]:
    """The front of a file, a block at a time, so that many channels do not fill the memory; its rate, and the samples
    of the whole.
    """
    with _opened_audio(source) as file:
        frames, size = min(file.frames, math.ceil(max_seconds * file.samplerate)), 2**20 // file.channels
        waveform = np.concatenate([_read_block(file, min(size, frames - start)) for start in range(0, frames, size)])
        if len(waveform) < frames:
            raise MediaError(f"{_name(source)} is truncated: {len(waveform)} of {frames} samples; replace the file")
        return waveform, file.samplerate, file.frames


def _read_block(file: "soundfile.SoundFile", frames: int) -> np.ndarray:
    block = file.read(frames, dtype="float32", always_2d=True)
    return block[:, 0] if block.shape[1] == 1 else block.mean(1)


@contextmanager
def _opened_audio(source: Any) -> "Iterator[soundfile.SoundFile]":
    """A file whose header is intact. What fails with it is named."""
    if soundfile is None:
        raise ImportError("recordings are read by soundfile, which is not installed; pip install soundfile")
    try:
        path = _file(source, "recording")
        # Without its name, by which libsndfile would look for further files of the same name.
        with open(path, "rb") if isinstance(path, str) else path as stream, soundfile.SoundFile(stream) as file:
            if file.format not in AUDIO_FORMATS:
                raise MediaError(f"{_name(source)} is {file.format}, none of {', '.join(AUDIO_FORMATS)}; convert it")
            _check_rate(source, file.samplerate)
            _check_size(source, file)
            yield file
    except soundfile.LibsndfileError as error:
        raise _unreadable("recording", source, error.error_string) from error
    except TypeError as error:  # a .raw file, which has no header
        raise _unreadable("recording", source, error) from error


def _check_size(source: Any, file: "soundfile.SoundFile") -> None:
    notes = file.extra_info  # what libsndfile found odd and read all the same
    declared = re.search(r"^ *(?:data|SSND|riff|Data Size) *: (\d+) \(should be (\d+)\)", notes, re.MULTILINE)
    # A size near the largest number stands for "unknown" in a file that was written to a pipe.
    is_cut = declared is not None and int(declared[2]) + 1 < int(declared[1]) < 2**31 - 2**16
    if is_cut or re.search("^Ogg ?: (File ended unexpectedly|Last page lacks|Junk after)", notes, re.MULTILINE):
        raise MediaError(f"{_name(source)} is truncated: its header promises more; replace the file")
    if file.frames <= 0:
        raise MediaError(f"{_name(source)} has no samples; remove it")


def _check_rate(source: Any, rate: float) -> None:
    least, most = SAMPLING_RATES
    if not least <= rate <= most:
        raise MediaError(f"{_name(source)} has {rate} samples per second; give a rate from {least} to {most}")


def _check_samples(waveform: np.ndarray, source: Any) -> None:
    if not len(waveform):
        raise MediaError(f"{_name(source)} has no samples; remove it")
    largest = np.abs(waveform).max()
    if not np.isfinite(largest):
        raise MediaError(f"{_name(source)} has samples that are NaN or infinite; record or convert it anew")
    if largest > MAX_AMPLITUDE:
        raise MediaError(f"{_name(source)} has samples up to {largest:g}; scale them to -1 .. 1")


def _resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    # The kernel has as many phases as the ratio's numerator: a millionth of detuning keeps it small for any rate.
    ratio = Fraction(int(new_rate), int(rate)).limit_denominator(1000)
    resampled = _resampler(ratio)(torch.from_numpy(waveform)).numpy()
    length = -(-len(waveform) * int(new_rate) // int(rate))
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length]


@lru_cache(maxsize=16)
def _resampler(ratio: Fraction) -> "Resample":
    if not is_torchaudio_available():
        raise ImportError("recordings are resampled by torchaudio, which is not installed; pip install torchaudio")
    return Resample(ratio.denominator, ratio.numerator)


# -------------------------------------------------------------------------------------------------------------- files


def _file(source: Any, kind: str) -> str | io.BytesIO:
    """What a decoder can open."""
    if isinstance(source, dict) and source.keys() & {"bytes", "path"}:
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise MediaError(f"the {kind} has 0 bytes; remove it")
        _check_file_size(source, kind, len(source))
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise MediaError(f"a {kind} cannot be read from {type(source).__name__}; give a path, bytes or an array")
    path = os.fspath(source)
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.IGNORECASE):
        raise MediaError(f"{path[:100]!r} is an address, and addresses are never fetched; download the {kind} before")
    if not os.path.isfile(path):
        is_there = os.path.exists(path)
        raise MediaError(f"{quoted(path)} {'is no file' if is_there else 'does not exist'}; correct the path")
    if not os.path.getsize(path):
        raise MediaError(f"{quoted(path)} has 0 bytes; remove it")
    _check_file_size(source, kind, os.path.getsize(path))
    return path


def _check_file_size(source: Any, kind: str, size: int) -> None:
    if kind == "picture" and size > MAX_FILE_BYTES:
        raise MediaError(
            f"{_name(source)} has {size} bytes, of which a picture may have {MAX_FILE_BYTES}; scale it down"
        )


def quoted(source: str) -> str:
    """A string as it stands in an error: its beginning, if it is longer than names of files are."""
    return repr(source if len(source) <= 300 else source[:100] + "...")


def _name(source: Any) -> str:
    """The source in an error."""
    if isinstance(source, dict) and source.keys() & {"bytes", "path"}:
        source = source.get("path") or source.get("bytes")
    if isinstance(source, (str, Path)):
        return quoted(str(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a file of {len(source)} bytes"
    return f"a {type(source).__name__}"


def _unreadable(kind: str, source: Any, error: Exception | str) -> MediaError:
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return MediaError(f"{_name(source)} cannot be read as a {kind}: {reason}; replace the file")
