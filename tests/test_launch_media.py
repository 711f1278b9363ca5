"""`pretrain.py` on two ranks with a model that reads images and sound, where one of the ranks has media
and the other has none, against one process that has all rows.
"""

import json

import pytest

import pretrain
from configs import load_config
from configs.pretraining import build_pretraining
from tests.test_callbacks import texts
from tests.test_launch import trained
from tests.tiny_media_run import write_media_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS, STEPS = 4, 6
"""Rows of a step, all ranks and micro-batches together; steps."""
KINDS = ("text", "image", "audio")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_media_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The folder of a run of one process, four rows at once, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("one")
    assert pretrain.main(["--config", str(config), "--training.output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(config, tmp_path_factory):
    """The rows of the run in the order in which they are read."""
    flags = ["--config", str(config), "--training.output_dir", str(tmp_path_factory.mktemp("unused"))]
    dataset = build_pretraining(load_config(flags)).train_dataset
    return [dataset[index] for index in range(ROWS * STEPS)]


def kind_of(row: dict) -> str:
    """What a row holds; each is one document."""
    (kind,) = row.get("media") or ("text",)
    return kind


def logs_of(folder) -> list[dict[str, float]]:
    """Losses, tokens and shares of each step."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    known = ["loss", *(f"{what}_{kind}" for what in ("loss", "tokens", "weight_share") for kind in KINDS)]
    return [{name: entry[name] for name in known if name in entry} for entry in entries if "loss" in entry]


def test_the_logs_are_those_of_the_rows(one, rows):
    """So the rows below are those that were drawn."""
    entries = logs_of(one)
    assert len(entries) == STEPS
    for step, entry in enumerate(entries):
        tokens = {}
        for row in rows[ROWS * step : ROWS * (step + 1)]:
            count = (row["labels"][1:] != -100).sum().item()
            tokens[f"tokens_{kind_of(row)}"] = tokens.get(f"tokens_{kind_of(row)}", 0) + count
        assert {name: value for name, value in entry.items() if name.startswith("tokens_")} == tokens
    assert set().union(*entries) >= {"loss_text", "loss_image", "loss_audio"}


@pytest.mark.parametrize(("stage", "per_device", "accumulation"), [("zero2", 1, 2), ("zero3", 1, 2), ("zero3", 2, 1)])
def test_a_rank_without_media_beside_one_with_them(one, rows, config, tmp_path, stage, per_device, accumulation):
    """Invariant 6. Both run all readers, or they would wait for each other: in training, in evaluation, and in the
    samples that are written at the end.
    """
    pairs = set()  # of what the ranks have in a micro-batch
    for first in range(0, len(rows), 2 * per_device):
        kinds = [kind_of(row) for row in rows[first : first + 2 * per_device]]
        pairs.add((frozenset(kinds[:per_device]), frozenset(kinds[per_device:])))
    nothing = frozenset({"text"})
    for kind in KINDS[1:]:
        assert any(kind in a and b == nothing for a, b in pairs) and any(kind in b and a == nothing for a, b in pairs)

    trained(
        tmp_path,
        *("--config", config, "--training.deepspeed", stage),
        *("--training.per_device_train_batch_size", per_device),
        *("--training.gradient_accumulation_steps", accumulation),
    )
    ours, expected = logs_of(tmp_path), logs_of(one)
    assert len(ours) == STEPS
    for step, entry in enumerate(ours):
        assert entry == pytest.approx(expected[step], abs=1e-4), step
    evaluated = [json.loads((folder / "eval_results.json").read_text()) for folder in (tmp_path, one)]
    for name in (name for name in evaluated[1] if name.endswith(("_loss", "_bits_per_byte"))):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], abs=1e-4)
    for tag in ("samples/scenes_0", "samples/melodies_0", "samples/num_steps_2"):
        assert texts(tmp_path, tag) == texts(one, tag)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "processor_config.json").is_file()
