"""What commands write: files and folders that are there whole, or not at all, and standard output."""

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from PIL import Image
from transformers import TextStreamer

from model import write_audio
from model.terminal import visible

SUFFIXES: Mapping[str, tuple[str, ...]] = {"image": (".png", ".jpg", ".webp"), "audio": (".wav", ".flac", ".ogg")}
_GAP = 2  # pixels between the images of a sheet


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside, to write to; what is there becomes the file if nothing fails.

    What is no ordinary file, such as a pipe or /dev/stdout, is written as it is.

    Raises:
        ValueError: it cannot be written; then nothing has changed.
    """
    path = path.resolve()
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if path.exists() and not path.is_file():
            yield path
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as beside:
            made = Path(beside) / path.name
            yield made
            made.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder, to write to; what is there becomes the folder if nothing fails. In a folder that is there
    already, its files take the places of those with their names.

    Raises:
        ValueError: it cannot be written; then nothing has changed.
    """
    folder = folder.resolve()
    with writing(folder):
        is_new = not folder.exists()
        if is_new:
            folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder.parent if is_new else folder
        with tempfile.TemporaryDirectory(dir=place, prefix=".writing-") as beside:
            made = Path(beside) / "made"
            made.mkdir()
            yield made
            if is_new:
                made.replace(folder)
            else:
                for path in sorted(made.iterdir()):
                    path.replace(folder / path.name)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of whatever fails that a path cannot be written; libraries raise all sorts when a disk is full.

    Raises:
        ValueError: every other exception is raised as one.
    """
    try:
        yield
    except ValueError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be written: {type(error).__name__}: {error}") from error


def writable_folder(folder: Path) -> Path:
    """The folder, which may be missing, if a file could be written there just now.

    Raises:
        ValueError: none could.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return folder
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): name another folder with --output."
        ) from error


def append(path: Path, line: str) -> None:
    """Add a line to a file, or nothing.

    Raises:
        ValueError: it cannot be written.
    """
    content = f"{line}\n".encode()
    with writing(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError("there is no room for a line on its disk")
        except OSError:
            file.truncate(end)
            raise


def write_result(text: str) -> None:
    """Write to standard output at once: on a terminal without characters that command it, elsewhere as it is.

    Raises:
        ValueError: standard output takes no more, since its disk is full or its reader is gone.
    """
    try:
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nothing:  # else Python tries again at its end, and complains
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise ValueError(f"standard output cannot be written: {error.strerror}") from error


class TerminalStreamer(TextStreamer):
    """Writes text while it is generated, as `write_result` does."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece, and a line break after the last one."""
        write_result(text + "\n" * stream_end)


# ----------------------------------------------------------------------------------------------------- images and audio


def check_path(path: Path, modality: str) -> Path:
    """The path, if an image or audio can be written there.

    Raises:
        ValueError: the name is not that of such a file, or its folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES[modality]:
        raise ValueError(f"--out {path} is no name for {modality}: end it in {', '.join(SUFFIXES[modality])}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {path}: the folder {path.parent} does not exist; make it.")
    return path


def save_images(images: Sequence[Image.Image], path: Path) -> None:
    """One image as it is, several as a sheet, row by row; ValueError if it cannot be written."""
    with whole_file(path) as beside:
        (images[0] if len(images) == 1 else image_sheet(images)).save(beside)


def image_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size side by side, on white; by default in as many columns as rows, or one more."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = (side + _GAP for side in images[0].size)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * width, row * height))
    return sheet


def save_audio(waveforms: Sequence[torch.Tensor], sampling_rate: int, path: Path) -> list[Path]:
    """Each waveform in a file of its own, numbered where there are several. Returns their paths.

    Args:
        waveforms: float (samples,) in -1 .. 1.

    Raises:
        ValueError: they cannot be written; then none is.
    """
    names = (
        [path] if len(waveforms) == 1 else [path.with_stem(f"{path.stem}-{n}") for n in range(1, len(waveforms) + 1)]
    )
    with ExitStack() as files:
        for name, waveform in zip(names, waveforms, strict=True):
            write_audio(files.enter_context(whole_file(name)), waveform, sampling_rate)
    return names
