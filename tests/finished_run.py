"""The folder of a finished and evaluated run, written by hand, without a model."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from evaluation.controls import CURVES, SHARES, ControlRow, ControlTable
from evaluation.depth import DepthRow, ExactMatch
from evaluation.efficiency import EfficiencyPoint, EfficiencyTable, Slope
from evaluation.intervals import Interval
from evaluation.iteration import Verdict
from evaluation.media_generation import MediaRow, MediaScores

HOSTILE = "<script>alert(1)</script> | `x` ![a](http://example.com/a.png) [b](http://example.com)"
LOSSES = {10: 4.125, 20: 2.0625, 30: 1.5}
CONFIG = """\
trainer: pretrain
data:
  train:
  - {kind: generated, name: null, task: drawings, num_rows: 777, weight: 2.0, direction: text -> image}
  validation:
  - {kind: files, name: "<b>mine</b>", paths: [a.txt], weight: 1.0}
"""
SIZES = (
    "| part | parameters |\n|---|---:|\n| core | 110,976 |\n| all | 703,440 |\n\n1 layers, 4 executed at the mean depth"
)


def picture(size: tuple[int, int] = (40, 20)) -> bytes:
    """A PNG."""
    stream = io.BytesIO()
    Image.new("RGB", size, "green").save(stream, "PNG")
    return stream.getvalue()


def depth_rows() -> list[DepthRow]:
    """Two depths."""
    return [
        DepthRow(
            *(steps, loss, 2.71828, None, 0.0125 * steps, {"sums": {"loss": loss}}),
            exact_match={"sums": ExactMatch(0.5 * steps, 40, {1: 0.25 * steps, 2: 0.125}, Interval(0.1, 0.9))},
            intervals={"loss": Interval(loss - 0.25, loss + 0.25)},
        )
        for steps, loss in ((1, 1.234567), (2, 0.987654))
    ]


def control_table() -> ControlTable:
    """Two numbers of steps."""
    scores, around = dict.fromkeys(CURVES, 1.5), {name: Interval(1.25, 1.75) for name in CURVES}
    shares, of_shares = (dict.fromkeys((*SHARES, "last steps"), value) for value in (0.375, Interval(0.25, 0.5)))
    fewer = ControlRow(1, scores, around, 0.4375, Interval(0.375, 0.5), shares, of_shares)
    return ControlTable("validation", "loss", 12, 6, [fewer, ControlRow(2, scores, around, 0.0, Interval(0, 0))])


def efficiency() -> EfficiencyTable:
    """Two points."""
    around = {"loss": Interval(1.0, 2.0), "exact": Interval(0.25, 0.75)}
    points = [
        EfficiencyPoint(1, "fixed depth", None, 123456.0, 0.5, 1.0, 1.6875, 0.5, around, ["loss"]),
        EfficiencyPoint(2, "kl_divergence", 5e-4, 234567.0, 0.75, 1.5, 1.4375, 0.625, around, []),
    ]
    return EfficiencyTable(8, 40, points, [Slope("fixed depth", "loss", -0.3125, Interval(-0.5, -0.125))])


def write_logs(folder: Path) -> None:
    """Curves, sizes and samples, as the callbacks log them."""
    with SummaryWriter(str(folder / "runs" / "now")) as writer:
        for step, loss in LOSSES.items():
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/tokens_per_second", 1000 * step, step)
        writer.add_scalar("eval/loss", 1.75, 30)
        writer.add_text("train/model_size", SIZES, 1)
        writer.add_text("train/samples/mine_0", f"    prompt: {HOSTILE}\n    4 steps: fine", 30)
        writer.add_image("train/samples/mine_0/image_0", np.full((8, 8, 3), 200, np.uint8), 30, dataformats="HWC")
        writer.add_image("train/attention", np.zeros((8, 8, 3), np.uint8), 30, dataformats="HWC")
        writer.add_audio("train/samples/mine_0/audio_0", np.sin(np.arange(800) / 5)[None], 30, 8000)


def write_evaluation(folder: Path) -> None:
    """What `python -m evaluation` and its options write."""
    folder.mkdir()
    media = MediaScores("image", 5, {"all": 0.4375, "colour": 0.5625}, {}, {}, None, 12.5, None)
    contents = {
        "depth": {"rows": [asdict(row) for row in depth_rows()]},
        "controls": {"tables": [asdict(control_table())]},
        "efficiency": asdict(efficiency()),
        "media": {"real": {"drawn": {"all": 1.0, "colour": 1.0}}, "rows": [asdict(MediaRow(2, {"drawn": media}))]},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
        (folder / f"{name}.png").write_bytes(picture())
    (folder / "media_drawn.png").write_bytes(picture((2400, 1200)))
    lines = []
    for steps in (1, 2):
        lines.append({"num_steps": steps, "source": "sums", "row": 0, "nats": 3.0, "tokens": 17.0})
        said = {
            "is_right": steps == 2,
            "difficulty": 1,
            "reference": "42",
            "generated": "42" if steps == 2 else HOSTILE,
        }
        lines.append({"num_steps": steps, "source": "sums", "question": 0, **said})
    (folder / "depth_examples.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_dynamics(folder: Path) -> None:
    """What `python -m evaluation.dynamics` writes, as far as a report reads it."""
    folder.mkdir()
    content = {
        "prompt": HOSTILE,
        "tokens": ["a", "b"],
        "num_steps": 4,
        "verdict": asdict(Verdict("settles", None, 0.8125, 0.6875)),
        "exits": {"kl_divergence": {"threshold": 0.0005, "steps": [2, 3]}},
    }
    (folder / "dynamics.json").write_text(json.dumps(content))
    for name in ("dynamics", "lens"):
        (folder / f"{name}.png").write_bytes(picture())
    soundfile.write(folder / "item_4.wav", np.zeros(80), 8000)


def write_finished_run(folder: Path) -> Path:
    """All of it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    history = [{"step": step, "loss": loss} for step, loss in LOSSES.items()]
    state = {"global_step": 30, "max_steps": 30, "epoch": 0.5, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "README.md").write_text("# mine\n\n## Versions\n\n- python 3.11.7\n- torch 2.11.0\n")
    write_logs(folder)
    write_evaluation(folder / "evaluation")
    write_dynamics(folder / "dynamics")
    return folder
