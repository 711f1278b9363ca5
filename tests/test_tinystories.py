"""`configs/tinystories.yaml` with the flags that its comment has for a CPU, on a local folder of the same format."""

import json
import shlex
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pretrain
from configs import load_config
from tests.test_pretrain import losses

FILE = Path(__file__).parent.parent / "configs" / "tinystories.yaml"
STORIES = [
    f"Once upon a time, there was a {size} {animal} named {name}. One day, {name} went to the {place}.\n\nThe end."
    for size in ("big", "little")
    for animal in ("dog", "cat", "bird", "frog")
    for name in ("Tim", "Lily", "Max")
    for place in ("park", "pond", "farm")
]


def cpu_flags():
    """Those of the second command in the comment."""
    lines = [line.removeprefix("#").strip() for line in FILE.read_text(encoding="utf-8").splitlines()]
    first = next(number for number, line in enumerate(lines) if "runs/tinystories_cpu" in line)
    last = next(number for number, line in enumerate(lines) if number >= first and not line.endswith("\\"))
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines[first : last + 1]))
    assert words[:4] == ["python", "pretrain.py", "--config", "configs/tinystories.yaml"]
    return ["--config", str(FILE), *words[4:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The stories as on the hub: parquet files of both splits in `data`, with one column."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "TinyStories/data").mkdir(parents=True)
    for name, rows in (("train-00000-of-00002", STORIES[:40]), ("train-00001-of-00002", STORIES[40:])):
        pq.write_table(pa.table({"text": rows}), tmp_path / f"TinyStories/data/{name}-2d5a1467fff1081b.parquet")
    pq.write_table(
        pa.table({"text": STORIES[:5]}),
        tmp_path / "TinyStories/data/validation-00000-of-00001-869c898b519ad725.parquet",
    )
    return tmp_path / "TinyStories"


def test_it_streams_from_the_hub_and_names_nothing_else():
    run = load_config(["--config", str(FILE), "--dry-run"])
    (source,) = run.data.train
    assert (source.kind, source.path, source.split, source.streaming) == (
        "hub",
        "roneneldan/TinyStories",
        "train",
        True,
    )
    assert run.tokenizer.path is None and run.training.max_steps * 64 * 512 < 475e6  # tokens of one pass, about


def test_the_variant_for_a_cpu_trains_on_a_local_folder(folder, tmp_path):
    """Three steps, of which the best that is evaluated is what is left."""
    out = tmp_path / "out"
    flags = [*cpu_flags(), "--data.train", f"[{{kind: hub, path: {folder}, streaming: true}}]"]
    flags += ["--data.streaming_validation_rows", "12", "--training.output_dir", str(out), "--training.max_steps", "3"]
    flags += [
        "--training.per_device_train_batch_size",
        "2",
        "--training.logging_steps",
        "1",
        "--training.eval_steps",
        "2",
    ]
    flags += ["--training.save_steps", "2", "--training.warmup_steps", "1", "--callbacks.samples.max_new_tokens", "2"]
    flags += ["--training.use_cpu", "true", "--training.dataloader_num_workers", "0", "--training.disable_tqdm", "true"]
    assert load_config(flags).model.hidden_size == 128
    assert pretrain.main(flags) == 0
    found = losses(out)
    assert len(found) == 3 and found[-1] < found[0]
    state = json.loads((out / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    metrics = json.loads((out / "eval_results.json").read_text())
    assert state["best_metric"] == min(evaluated) == pytest.approx(metrics["eval_TinyStories_loss"], rel=1e-6)
