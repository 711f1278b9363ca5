"""How fast data arrive, for each kind of source with one worker, beside how fast a training step uses them.

python -m benchmarks.data
python -m benchmarks.data --config configs/recurrent_vlm.yaml --sources scenes melodies --workers 2
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import argparse
import io
import itertools
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks import timing
from configs import RunConfig, load_config
from configs.pretraining import build_model
from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets, build_tokenizer, get_task
from dataset_loading.tasks.registry import generate_row
from inference.arguments import OneLineParser
from inference.devices import choose_device, choose_threads, cpu_model
from model import build_processor, media_tokens
from model.recurrence import draw_training_states
from trainers.muon import Muon
from trainers.optimizers import combine, matrices_of

CONFIG = Path(__file__).parent.parent / "configs" / "recurrent_vlm.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = timing.parsed(parser, argv)
    try:
        device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    run = load_config(["--config", str(args.config), "--training.report_to", "none"])
    model, processor = build(run, device)
    choose_threads(model, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, source, run, model, processor, args) for name, source in sources(Path(folder), args)]
    sys.stdout.write(report(args, run, device, rows))
    return 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.data", description="Speed of the data loader, by kind of source.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML of a run: model, tokenizer, rows, batches")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="kinds of source")
    for flag, default, what in (
        ("documents", 1024, "documents of each source"),
        ("batches", 30, "batches that are timed, as they arrive and as they are trained on"),
        ("warmup", 3, "batches before them that do not count"),
        ("picture-side", 64, "pixels of a side of the pictures in files"),
        ("workers", 1, "processes of the loader"),
    ):
        parser.add_argument(f"--{flag}", type=timing.count, default=default, help=what)
    parser.add_argument(
        "--threads", type=timing.count, help="threads of torch on the CPU; default: by the size of the model"
    )
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser


def build(run: RunConfig, device: torch.device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A fresh model of the run and its processor."""
    tokenizer = build_tokenizer(run.tokenizer, run.data, media_tokens=media_tokens(run.model))
    model = build_model(run.model, run.training, tokenizer)
    processor = build_processor(model.config, tokenizer, **model.model.count_tokens())
    return model.to(device).train(), processor


# -------------------------------------------------------------------------------------------------------------- sources


def generated(task: str) -> Callable[[Path, argparse.Namespace], SourceConfig]:
    """A source of a task."""
    return lambda folder, args: SourceConfig("generated", task=task, num_rows=args.documents)


def media(task: str, args: argparse.Namespace) -> Iterator[tuple[bytes, str]]:
    """Files of a task, with what they show: JPEG of the size that is asked for, or WAV."""
    made = get_task(task)
    for number in range(args.documents):
        row = generate_row(made, made.default_difficulty, "train", (0,), number)
        medium, buffer = made.render(row["medium"]), io.BytesIO()
        if isinstance(medium, Image.Image):
            medium.resize((args.picture_side, args.picture_side)).save(buffer, "JPEG")
        else:
            soundfile.write(buffer, *medium, format="WAV")
        yield buffer.getvalue(), row["answer"]


def write_folder(folder: Path, task: str, ending: str, args: argparse.Namespace) -> Path:
    """Files with metadata.jsonl."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as lines:
        for number, (content, text) in enumerate(media(task, args)):
            (folder / f"{number}.{ending}").write_bytes(content)
            lines.write(json.dumps({"file_name": f"{number}.{ending}", "text": text}) + "\n")
    return folder


def imagefolder(folder: Path, args: argparse.Namespace) -> SourceConfig:
    return SourceConfig("imagefolder", path=str(write_folder(folder, "scenes", "jpg", args)))


def audiofolder(folder: Path, args: argparse.Namespace) -> SourceConfig:
    return SourceConfig("audiofolder", path=str(write_folder(folder, "melodies", "wav", args)))


def chat(folder: Path, args: argparse.Namespace) -> SourceConfig:
    write_folder(folder, "scenes", "jpg", args)
    with (folder / "chat.jsonl").open("w") as lines:
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            parts = [{"type": "image", "path": row["file_name"]}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": row["text"]}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return SourceConfig("chat", paths=[str(folder / "chat.jsonl")])


def parquet(folder: Path, args: argparse.Namespace) -> SourceConfig:
    folder.mkdir()
    rows = list(media("scenes", args))
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    columns = {"image": [{"bytes": it, "path": None} for it, _ in rows], "text": [text for _, text in rows]}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / "train.parquet")
    return SourceConfig("files", paths=[str(folder / "train.parquet")], image_column="image")


def webdataset(folder: Path, args: argparse.Namespace, streaming: bool = False) -> SourceConfig:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, (content, text) in enumerate(media("melodies", args)):
            for ending, member in (("wav", content), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(member)
                tar.addfile(entry, io.BytesIO(member))
    columns = {"audio_column": "wav", "text_column": "txt"}
    return SourceConfig("webdataset", paths=[str(folder / "0.tar")], streaming=streaming, **columns)


def webdataset_stream(folder: Path, args: argparse.Namespace) -> SourceConfig:
    return webdataset(folder, args, streaming=True)


SOURCES: dict[str, Callable[[Path, argparse.Namespace], SourceConfig]] = {
    **{task: generated(task) for task in ("stories", "scenes", "scene_questions", "melodies", "melody_questions")},
    "imagefolder": imagefolder,
    "audiofolder": audiofolder,
    "chat": chat,
    "parquet": parquet,
    "webdataset": webdataset,
    "webdataset, streaming": webdataset_stream,
}


def sources(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, SourceConfig]]:
    """Each kind that is asked for, written when its turn comes."""
    for name in args.sources:
        yield name, SOURCES[name](folder / name, args)


# ---------------------------------------------------------------------------------------------------------- measurement


def measure(
    name: str,
    source: SourceConfig,
    run: RunConfig,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    args: argparse.Namespace,
) -> list[str]:
    """One line of the table."""
    validation = [SourceConfig("generated", task="addition", num_rows=1)]
    config = DataConfig([source], validation, block_size=run.data.block_size, packing=run.data.packing)
    rows = build_datasets(config, processor).train
    count = args.warmup + args.batches
    batch_size = run.training.per_device_train_batch_size
    sampler = None
    if not isinstance(rows, IterableDataset):
        sampler = RandomSampler(rows, replacement=True, num_samples=count * batch_size)
    loader = DataLoader(
        rows,
        batch_size,
        sampler=sampler,
        num_workers=args.workers,
        collate_fn=Collator(processor),
        drop_last=True,
        persistent_workers=True,
    )
    batches, stamps = [], []
    for batch in itertools.islice(endless(loader), count):
        batches.append(batch)
        stamps.append(time.perf_counter())
    seconds = stamps[-1] - stamps[args.warmup - 1]
    tokens = sum(batch["input_ids"].numel() for batch in batches[args.warmup :])
    step = TrainingStep(model, run)
    used = [timing.seconds_of(lambda batch=batch: step(batch), model.device) for batch in batches]
    step_seconds = float(np.median(used[args.warmup :])) * args.batches
    return [
        name,
        f"{args.batches * batch_size / seconds:.0f}",
        f"{tokens / seconds:.0f}",
        f"{tokens / step_seconds:.0f}",
        f"{step_seconds / seconds:.1f}",
    ]


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """A stream comes to an end; begin it anew."""
    while True:
        yield from loader


class TrainingStep:
    """Forward, backward, clipping and update at the mean depth, as the trainer does them, without its logs."""

    def __init__(self, model: PreTrainedModel, run: RunConfig):
        self.model, self.max_norm = model, run.training.max_grad_norm
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if run.training.muon_learning_rate is not None:
            self.optimizer = combine(self.optimizer, matrices_of(model), lambda own: Muon(own, lr=1e-4))
        config = model.config.get_text_config()
        self.text_config, self.depth = config, {}
        if config.num_core_layers:
            mean, most = config.recurrence.mean_steps, config.recurrence.backprop_steps
            self.depth = {"num_steps": (max(0, mean - most), min(mean, most))}
        self.count = itertools.count()

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        inputs: dict[str, Any] = {
            name: values.to(self.model.device) for name, values in batch.items() if name != "modality_ids"
        }
        inputs |= self.depth
        if self.depth:
            rows, length = batch["input_ids"].shape
            keys = [(0, next(self.count), row) for row in range(rows)]
            inputs["initial_state"] = draw_training_states(self.text_config, length, keys, self.model.device)
        self.model(**inputs, use_cache=False, skip_logits=True).loss.backward()
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def report(args: argparse.Namespace, run: RunConfig, device: torch.device, rows: list[list[str]]) -> str:
    """The setting, and a table with a line for each source."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    header = ["source", "rows per second", "tokens per second", "used by training", "times as fast"]
    packing = "packed" if run.data.packing else "padded"
    return (
        f"{args.config.name}: batches of {run.training.per_device_train_batch_size} rows, {packing}, "
        f"block_size {run.data.block_size}; workers: {args.workers}; pictures in files {args.picture_side} x "
        f"{args.picture_side}; {chip}, threads of the training step: {torch.get_num_threads()}, "
        f"torch {torch.__version__}\n\n{timing.markdown_table(header, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
