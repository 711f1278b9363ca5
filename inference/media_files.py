"""Pictures and sound that a model has written, to files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from model import write_audio

from .output import whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIXES: Mapping[str, tuple[str, ...]] = {"image": (".png", ".jpg", ".webp"), "audio": (".wav", ".flac", ".ogg")}
_GAP = 2  # pixels between the pictures of a sheet


def check_path(path: Path, modality: str) -> Path:
    """The path, if a medium can be written there.

    Raises:
        ValueError: the name is not that of such a file, or its folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES[modality]:
        raise ValueError(f"--out {path} is no name for {modality}: end it in {', '.join(SUFFIXES[modality])}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {path}: the folder {path.parent} does not exist; make it.")
    return path


def save_images(images: Sequence[Image.Image], path: Path) -> None:
    """One picture as it is, several as a sheet, row by row; ValueError if it cannot be written."""
    with whole_file(path) as beside:
        (images[0] if len(images) == 1 else contact_sheet(images)).save(beside)


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side, on white; by default in as many columns as rows, or one more."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = (side + _GAP for side in images[0].size)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * width, row * height))
    return sheet


def save_audio(clips: Sequence[torch.Tensor], sampling_rate: int, path: Path) -> list[Path]:
    """Each recording in a file of its own, numbered where there are several. Returns their paths.

    Args:
        clips: float (samples,) in -1 .. 1.

    Raises:
        ValueError: they cannot be written; then none is.
    """
    names = [path] if len(clips) == 1 else [path.with_stem(f"{path.stem}-{n}") for n in range(1, len(clips) + 1)]
    with ExitStack() as files:
        for name, clip in zip(names, clips, strict=True):
            write_audio(files.enter_context(whole_file(name)), clip, sampling_rate)
    return names
