"""The logs that a run has written for TensorBoard, read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.errors import OpError

EVENTS = "events.out.tfevents.*"
TEXT = "/text_summary"
SAMPLES = ("samples/", "generated_samples/", "media_samples/")
MOST_POINTS = 2000
"""Points that are kept of a curve, drawn from all of them, the last among them."""


@dataclass
class Logs:
    """Curves, and the last of everything else."""

    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Values by step, by name."""
    texts: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Step and text, by name."""
    images: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Step and file, by name, as `sounds`; of samples alone."""
    sounds: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, log: EventAccumulator) -> None:
        """Add what one process has logged; of two values for a step, the later one counts."""
        tags = log.Tags()
        for name in tags["scalars"]:
            self.curves.setdefault(name, {}).update((it.step, it.value) for it in log.Scalars(name))
        for name in tags["tensors"]:
            if name.endswith(TEXT):
                last = log.Tensors(name)[-1]
                text = last.tensor_proto.string_val[0].decode("utf-8", "replace")
                self.texts[name.removesuffix(TEXT)] = last.step, text
        for name in filter(is_sample, tags["images"]):
            last = log.Images(name)[-1]
            self.images[name] = last.step, last.encoded_image_string
        for name in filter(is_sample, tags["audio"]):
            last = log.Audio(name)[-1]
            self.sounds[name] = last.step, last.encoded_audio_string

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Steps and values, by step; none for a name that was not logged."""
        return sorted(self.curves.get(name, {}).items())


def is_sample(name: str) -> bool:
    """Whether a name is that of a sample, and not of a picture of the inside of the model."""
    return name.removeprefix("train/").startswith(SAMPLES)


def read_logs(folder: Path) -> tuple[Logs, list[str]]:
    """All logs below a folder, in the order of their names, which begin with their time; and what is wrong with some of
    them.
    """
    logs, faults = Logs(), []
    for place in event_folders(folder):
        log = EventAccumulator(str(place), {"scalars": MOST_POINTS, "images": 1, "audio": 1, "tensors": 1})
        try:
            if not any(log.Reload().Tags().values()):
                raise ValueError("not one event can be read")
            logs.add(log)
        except (OSError, ValueError, LookupError, DecodeError, OpError) as error:
            faults.append(f"{place} is damaged ({type(error).__name__}: {error})")
    return logs, faults


def event_folders(folder: Path) -> Iterator[Path]:
    """Folders with files of events, each once."""
    yield from sorted({path.parent for path in folder.rglob(EVENTS)}, key=newest)


def newest(folder: Path) -> str:
    """The name of the latest file of events, which has its time."""
    return max(path.name for path in folder.glob(EVENTS))
