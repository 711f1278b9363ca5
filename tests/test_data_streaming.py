"""Streaming sources: the rows of the map-style way, exact resuming, DataLoader workers."""

import json
import logging

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from dataset_loading import DataConfig, SourceConfig, StreamingDataset, build_datasets, train_tokenizer
from dataset_loading.splits import iterate_training_texts

BYTES = train_tokenizer([], 259)
TEXTS = [f"text {number} " * (number % 7 + 1) for number in range(60)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    for shard in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[shard * 30 : shard * 30 + 30]]
        (tmp_path / "hub" / f"train-{shard}.jsonl").write_text("".join(lines))
    return tmp_path / "hub"


def hub(folder, **fields):
    return SourceConfig("hub", path=str(folder), **{"streaming": True, **fields})


def generated(**fields):
    return SourceConfig("generated", task="addition", **{"num_rows": 40, **fields})


def build(train, **fields):
    return build_datasets(
        DataConfig(
            train=train, **{"validation": [generated()], "block_size": 16, "streaming_validation_rows": 5, **fields}
        ),
        BYTES,
    )


def as_lists(rows):
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_gives_the_rows_of_the_loaded_dataset(folder, packing):
    stream = build([hub(folder)], packing=packing).train
    loaded = build([hub(folder, streaming=False)], packing=packing).train
    assert isinstance(stream, StreamingDataset) and len(loaded) > 60
    assert as_lists(stream) == as_lists(loaded[index] for index in range(len(loaded)))
    assert as_lists(stream) == as_lists(stream)  # a second pass is the first


@pytest.mark.parametrize("mixed", [False, True])
def test_a_resumed_stream_goes_on_with_the_next_row(folder, mixed):
    """D2: at any row, in a new object, through JSON; the pass after it starts from the beginning."""
    sources = [hub(folder, weight=2.0), generated()] if mixed else [hub(folder)]
    whole = as_lists(build(sources, validation=[]).train)
    for stop in (1, 2, 17, len(whole) - 1):
        interrupted = build(sources, validation=[]).train
        rows = iter(interrupted)
        seen = [next(rows) for _ in range(stop)]
        state = json.loads(json.dumps(interrupted.state_dict()))
        resumed = build(sources, validation=[]).train
        resumed.load_state_dict(state)
        assert as_lists(seen) + as_lists(resumed) == whole
        assert as_lists(resumed) == whole


def test_an_abandoned_pass_leaves_nothing_to_the_next(folder):
    stream = build([hub(folder)]).train
    whole = as_lists(stream)
    next(iter(stream))
    assert as_lists(stream) == whole


def test_workers_divide_the_shards(folder):
    """Two workers read two files: together every document once."""
    stream = build([hub(folder)], packing=False, block_size=256).train
    rows = list(DataLoader(stream, batch_size=None, num_workers=2))
    texts = [BYTES.decode(row["input_ids"][1:-1]) for row in rows]
    assert sorted(texts) == sorted(TEXTS)


def test_streams_are_mixed_by_weight_until_each_was_read_once(folder):
    stream = build([hub(folder, weight=3.0), generated()], packing=False, block_size=256).train
    from_hub = [BYTES.decode(row["input_ids"][1:-1]).startswith("text") for row in stream]
    assert set(TEXTS) <= {BYTES.decode(row["input_ids"][1:-1]) for row in stream}
    assert 0.6 < sum(from_hub) / len(from_hub) < 0.9
    assert len(from_hub) - sum(from_hub) >= 40


def test_the_first_rows_of_a_stream_are_its_validation(folder):
    """D3: and train has none of them, nor has the vocabulary."""
    config = DataConfig(train=[hub(folder)], packing=False, block_size=256, streaming_validation_rows=5)
    built = build_datasets(config, BYTES)
    validation = [BYTES.decode(row["input_ids"][1:-1]) for row in built.validation["hub"]]
    train = [BYTES.decode(row["input_ids"][1:-1]) for row in built.train]
    assert (validation, train) == (TEXTS[:5], TEXTS[5:])
    assert list(iterate_training_texts(config, 0, 10)) == TEXTS[5:15]


def test_a_stream_that_validation_would_use_up_is_an_error(folder):
    """D4."""
    config = DataConfig(train=[hub(folder)], streaming_validation_rows=60)
    with pytest.raises(ValueError, match="its first 60 rows are for validation"):
        build_datasets(config, BYTES)


def test_validation_documents_are_passed_over(folder, tmp_path):
    """D3: documents that a validation source of its own has are not trained on."""
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": TEXTS[3]}) + "\n")
    validation = [SourceConfig("files", paths=[str(tmp_path / "valid.jsonl")])]
    stream = build([hub(folder)], validation=validation, packing=False, block_size=256).train
    assert [BYTES.decode(row["input_ids"][1:-1]) for row in stream] == TEXTS[:3] + TEXTS[4:]


def test_bad_rows_of_a_stream_are_skipped_and_counted(folder, caplog):
    """D1: in every pass anew."""
    lines = [json.dumps({"text": text}) + "\n" for text in ("good", "", "fine", " ")]
    (folder / "train-0.jsonl").write_text("".join(lines))
    stream = build([hub(folder)], max_bad_rows=2, packing=False, block_size=256).train
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            texts = [BYTES.decode(row["input_ids"][1:-1]) for row in stream]
            assert texts == ["good", "fine", *TEXTS[30:]]
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped a bad row of hub, row {number}: column 'text' is empty" for number in (2, 4, 2, 4)
    ]
    with pytest.raises(
        ValueError, match=r"2 rows are bad, data\.max_bad_rows is 1: hub, row 2: column 'text' is empty"
    ):
        list(build([hub(folder)], max_bad_rows=1).train)
    with pytest.raises(ValueError, match="hub, row 4:"):  # numbered from the front, where one row went to validation
        list(build([hub(folder)], max_bad_rows=1, validation=[], streaming_validation_rows=1).train)


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    """D9: before the stream is read."""
    config = DataConfig(train=[hub(folder)], validation=[generated()])
    with pytest.raises(ValueError, match="token id 258, but the model's vocab_size is 258"):
        build_datasets(config, BYTES, vocab_size=258)


def test_rows_are_tensors_of_block_size(folder):
    for row in build([hub(folder)]).train:
        assert all(values.shape == (16,) and values.dtype == torch.int64 for values in row.values())
