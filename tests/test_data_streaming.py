"""Streaming sources: the rows of the map-style way, exact resuming, DataLoader workers."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils import concatenate
from torch.utils.data import DataLoader

from dataset_loading import Collator, DataConfig, SourceConfig, StreamingDataset, build_datasets, train_tokenizer
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


def texts_of(rows):
    """The text of each row that holds a whole document: what is learned, without the end token."""
    return [BYTES.decode(row["labels"][row["labels"] != -100][:-1]) for row in rows]


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_gives_the_rows_of_the_loaded_dataset(folder, packing):
    """Documents apart too, which are then filled up with padding, a run of its own."""
    stream = build([hub(folder)], packing=packing).train
    loaded = build([hub(folder, streaming=False)], packing=packing).train
    assert isinstance(stream, StreamingDataset) and len(loaded) > 60
    for index, row in enumerate(stream):
        missing = 16 - len(loaded[index]["input_ids"])
        assert missing == 0 or not packing
        padding = {"input_ids": [0] * missing, "labels": [-100] * missing, "position_ids": list(range(missing))}
        for name, filler in padding.items():
            assert row[name].tolist() == loaded[index][name].tolist() + filler
    assert as_lists(stream) == as_lists(stream)  # a second pass is the first


@pytest.mark.parametrize("packing", [True, False])
def test_batches_of_a_stream_can_be_joined(folder, packing):
    """What accelerate does with those of all ranks, before it deals out their rows: one width, the same names."""
    loader = DataLoader(build([hub(folder)], packing=packing).train, batch_size=4, collate_fn=Collator(BYTES))
    joined = concatenate(list(loader))
    assert joined.keys() == {"input_ids", "labels", "position_ids"}
    learned = joined["labels"][joined["labels"] != -100].tolist()
    assert learned == [token for text in TEXTS for token in (*BYTES(text).input_ids, BYTES.eos_token_id)]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_resumed_stream_goes_on_with_the_next_row(folder, mixed):
    """At any row, in a new object, through JSON; the pass after it starts from the beginning."""
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


@pytest.mark.parametrize("own_validation", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_lose_and_double_nothing(folder, workers, own_validation):
    """Two files, a worker each. Without a validation source five rows are held out in front."""
    validation = [generated()] if own_validation else []
    stream = build([hub(folder)], packing=False, block_size=256, validation=validation).train
    rows = DataLoader(stream, batch_size=None, num_workers=workers)
    assert sorted(texts_of(rows)) == sorted(TEXTS if own_validation else TEXTS[5:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_lose_nothing_of_a_mixture(folder, workers):
    """Of unlike numbers of files: two, and one."""
    stream = build([hub(folder), generated()], packing=False, block_size=256, validation=[]).train
    texts = set(texts_of(DataLoader(stream, batch_size=None, num_workers=workers)))
    in_one_process = set(texts_of(stream))
    assert texts == in_one_process and len(texts) > 70


def test_streams_are_mixed_by_weight_until_each_was_read_once(folder):
    stream = build([hub(folder, weight=3.0), generated()], packing=False, block_size=256).train
    from_hub = [text.startswith("text") for text in texts_of(stream)]
    assert set(TEXTS) <= set(texts_of(stream))
    assert 0.6 < sum(from_hub) / len(from_hub) < 0.9
    assert len(from_hub) - sum(from_hub) >= 40


def test_the_first_rows_of_a_stream_are_its_validation(folder):
    """And train has none of them, nor has the vocabulary."""
    config = DataConfig(train=[hub(folder)], packing=False, block_size=256, streaming_validation_rows=5)
    built = build_datasets(config, BYTES)
    assert (texts_of(built.validation["hub"]), texts_of(built.train)) == (TEXTS[:5], TEXTS[5:])
    assert list(iterate_training_texts(config, 0, 10)) == TEXTS[5:15]


def test_a_stream_that_validation_would_use_up_is_an_error(folder):
    config = DataConfig(train=[hub(folder)], streaming_validation_rows=60)
    with pytest.raises(ValueError, match="its first 60 rows are for validation"):
        build_datasets(config, BYTES)


def test_validation_documents_are_passed_over(folder, tmp_path):
    """Documents that a validation source of its own has are not trained on."""
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": TEXTS[3]}) + "\n")
    validation = [SourceConfig("files", paths=[str(tmp_path / "valid.jsonl")])]
    stream = build([hub(folder)], validation=validation, packing=False, block_size=256).train
    assert texts_of(stream) == TEXTS[:3] + TEXTS[4:]
    config = DataConfig(train=[hub(folder)], validation=validation)
    assert list(iterate_training_texts(config, 0, limit=5)) == [*TEXTS[:3], TEXTS[4]]


def test_bad_rows_of_a_stream_are_skipped_and_counted(folder, caplog):
    """In every pass anew."""
    lines = [json.dumps({"text": text}) + "\n" for text in ("good", "", "fine", " ")]
    (folder / "train-0.jsonl").write_text("".join(lines))
    stream = build([hub(folder)], max_invalid_rows=2, packing=False, block_size=256).train
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert texts_of(stream) == ["good", "fine", *TEXTS[30:]]
    said = [f"skipped a bad row of hub, row {number}: column 'text' is empty" for number in (2, 4)]
    said += ["2 rows cannot be used and are left out: 2 of hub (2 x column 'text' is empty)"]
    assert [record.getMessage() for record in caplog.records] == said * 2
    with pytest.raises(
        ValueError, match=r"2 rows are bad, data\.max_invalid_rows is 1: hub, row 2: column 'text' is empty"
    ):
        list(build([hub(folder)], max_invalid_rows=1).train)
    with pytest.raises(ValueError, match="hub, row 4:"):  # numbered from the front, where one row went to validation
        list(build([hub(folder)], max_invalid_rows=1, validation=[], streaming_validation_rows=1).train)


@pytest.mark.parametrize("is_parquet", [False, True])
def test_a_column_that_a_stream_lacks_is_named(folder, is_parquet):
    """Whether the format says what columns there are, or the first row has to."""
    if is_parquet:
        for path in folder.iterdir():
            path.unlink()
        pq.write_table(pa.table({"body": ["x"], "id": [1]}), folder / "train.parquet")
    else:
        (folder / "train-0.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(ValueError, match="source 'hub' has no column 'text', only body, id; correct it"):
        build([hub(folder)])


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    """Before the stream is read."""
    config = DataConfig(train=[hub(folder)], validation=[generated()])
    with pytest.raises(ValueError, match="token id 258, but the model's vocab_size is 258"):
        build_datasets(config, BYTES, vocab_size=258)


def test_rows_are_tensors_of_block_size(folder):
    for row in build([hub(folder)]).train:
        assert all(values.shape == (16,) and values.dtype == torch.int64 for values in row.values())
