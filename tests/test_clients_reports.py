"""What wandb, offline, and trackio show of a run, beside TensorBoard."""

import html
import io
import json
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from callbacks import CallbacksConfig, PicturesConfig, SamplesConfig
from callbacks.reporting import Reporter, ReportingCallback
from tests.test_callbacks import build_trainer, events, texts

pytestmark = pytest.mark.slow

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
WAVE = torch.linspace(-0.5, 0.25, 800)
VALUES = torch.tensor([0.0, 1.0, 1.0, 4.0])


class Shows(ReportingCallback):
    """One of each kind, after the first step and when the training has ended."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.show("shown", args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.show("late", args, state, control)

    def show(self, name, args, state, control):
        self.reporter.write(args, state, control, {f"{name}/text": "<a> | b", f"{name}/number": 1.5})
        self.reporter.image(f"{name}/image", PIXELS)
        self.reporter.audio(f"{name}/audio", WAVE, 8000)
        self.reporter.histogram(f"{name}/histogram", VALUES)


INTERVALS = {f"{name}_every_steps": 2 for name in ("attention", "activations", "gradients", "exits", "trajectories")}
CALLBACKS = CallbacksConfig(
    samples=SamplesConfig(prompts=["the cat"], num_steps=[2], every_steps=2, max_new_tokens=3),
    pictures=PicturesConfig(**INTERVALS),
)
OF_THE_END = {f"train/{name}" for name in ("train_runtime", "train_loss", "total_flos")}
OF_THE_END |= {f"train/train_{name}_per_second" for name in ("samples", "steps")}


@dataclass
class Run:
    """What a run has left: its folder, the last values in wandb, and in trackio (metrics,) in order, and its runs."""

    folder: Path
    wandb: dict[str, Any]
    trackio: list[dict[str, Any]]
    trackio_runs: set[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that reports to all three."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            patch.delitem(sys.modules, name)  # it reads the variable when it is imported, which others may have done
        import trackio  # here, since the fast tests are collected without them
        import wandb

        targets = ["tensorboard", "wandb", "trackio"]
        trainer = build_trainer(folder, callbacks=CALLBACKS, max_steps=2, report_to=targets, logging_steps=1)
        trainer.add_callback(Shows(Reporter(trainer)))
        trainer.train()
        values = {name: wandb.run.summary[name] for name in wandb.run.summary.keys()}  # noqa: SIM118, it is no dict
        media = {name: Path(wandb.run.dir, it["path"]) for name, it in values.items() if "path" in keys_of(it)}
        wandb.finish()
        trackio.finish()
    with sqlite3.connect(folder / "trackio" / "huggingface.db") as connection:
        lines = connection.execute("select run_name, metrics from metrics order by id").fetchall()
    return Run(folder, values | media, [json.loads(metrics) for _, metrics in lines], {name for name, _ in lines})


def keys_of(value: Any) -> list[str]:
    """The keys of what wandb keeps of a medium; of a number none."""
    return [] if isinstance(value, (int, float)) else list(value.keys())


def shown_in_tensorboard(folder: Path) -> set[str]:
    """The names of all that is shown."""
    tags = events(folder).Tags()
    names = {
        name.removesuffix("/text_summary")
        for kind in ("scalars", "images", "audio", "histograms", "tensors")
        for name in tags[kind]
    }
    return {name for name in names if name.startswith("train/")} - OF_THE_END


def in_trackio(run: Run, name: str) -> dict[int, Any]:
    """{step: value}."""
    return {line["train/global_step"]: line[name] for line in run.trackio if name in line}


def trackio_file(run: Run, name: str, step: int) -> Path:
    return run.folder / "trackio" / "media" / in_trackio(run, name)[step]["file_path"]


def test_all_three_show_the_same(run):
    names = shown_in_tensorboard(run.folder)
    assert {"train/loss", "train/model_size", "train/samples/num_steps_2", "train/pictures/attention"} < names
    assert {"train/pictures/activations/core", "train/late/audio", "train/late/image"} < names
    own = {name for name in run.wandb if name.startswith("train/")} - {"train/global_step"}
    assert own == names
    assert {name for line in run.trackio for name in line} - {"train/global_step"} == names
    assert len(run.trackio_runs) == 1  # what comes after the end of the training included


def test_numbers_are_the_same(run):
    losses = {event.step: event.value for event in events(run.folder).Scalars("train/loss")}
    assert list(losses) == [1, 2]
    assert in_trackio(run, "train/loss") == pytest.approx(losses)
    assert run.wandb["train/loss"] == pytest.approx(losses[2])
    assert in_trackio(run, "train/shown/number") == {1: 1.5} and run.wandb["train/shown/number"] == 1.5


def test_texts_are_the_same(run):
    sample = texts(run.folder, "samples/num_steps_2")
    assert in_trackio(run, "train/samples/num_steps_2") == {2: {"_type": "trackio.markdown", "_value": sample[2]}}
    assert html.escape(sample[2]) in run.wandb["train/samples/num_steps_2"].read_text()
    assert "<pre>&lt;a&gt; | b</pre>" in run.wandb["train/shown/text"].read_text()


@pytest.mark.parametrize(("name", "step"), [("train/shown/image", 1), ("train/late/image", 2)])
def test_images_are_the_same(run, name, step):
    (event,) = events(run.folder).Images(name)
    assert event.step == step
    for file in (io.BytesIO(event.encoded_image_string), run.wandb[name], trackio_file(run, name, step)):
        np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), PIXELS)


@pytest.mark.parametrize(("name", "step"), [("train/shown/audio", 1), ("train/late/audio", 2)])
def test_sounds_are_the_same(run, name, step):
    """As loud as they were."""
    (event,) = events(run.folder).Audio(name)
    assert event.step == step
    for file in (io.BytesIO(event.encoded_audio_string), run.wandb[name], trackio_file(run, name, step)):
        heard, rate = soundfile.read(file, dtype="float32")
        assert rate == 8000
        np.testing.assert_allclose(heard, WAVE, atol=2 / 2**15)


def test_histograms_are_the_same(run):
    (event,) = events(run.folder).Histograms("train/shown/histogram")
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (1, 4, 6)
    for found in (run.wandb["train/shown/histogram"], in_trackio(run, "train/shown/histogram")[1]):
        edges, counts = np.asarray(found["bins"]), np.asarray(found["values"])
        assert edges[0] == 0 and edges[-1] == 4 and counts.sum() == 4
        assert counts[np.searchsorted(edges, 1, side="right") - 1] == 2  # the bin that holds 1
