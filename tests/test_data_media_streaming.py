"""Streams with media: the rows of the same source in memory, exact resuming, bad rows, workers."""

import io
import json
import logging
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from dataset_loading import Collator, DataConfig, SourceConfig, StreamingDataset, build_datasets
from dataset_loading.augmentation import (
    AudioAugmentationConfig,
    AugmentationConfig,
    ImageAugmentationConfig,
    TextAugmentationConfig,
)
from dataset_loading.splits import iterate_training_texts
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor

PROCESSOR = tiny_processor()
VALIDATION = [SourceConfig("generated", task="addition", num_rows=3)]
NUM_ROWS = 10


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # after each pass over a mixture


def media_of(number):
    return image_file(picture(8 + number, 16, number)), audio_file(sound(800 + 300 * number, number))


def hub(folder):
    """Two parquet files with an image and a list of recordings."""
    folder.mkdir()
    features = datasets.Features(
        seen=datasets.Image(), heard=datasets.List(datasets.Audio()), text=datasets.Value("string")
    )
    for shard in range(2):
        rows = [media_of(number) for number in range(shard * 5, shard * 5 + 5)]
        columns = {
            "seen": [{"bytes": seen, "path": None} for seen, _ in rows],
            "heard": [[{"bytes": heard, "path": "a.wav"}] * (1 + shard) for _, heard in rows],
            "text": [f"text {number}" for number in range(shard * 5, shard * 5 + 5)],
        }
        pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / f"train-{shard}.parquet")
    return {"kind": "hub", "path": str(folder), "image_column": "seen", "audio_column": "heard", "prompt": "Well?"}


def webdataset(folder, bad=()):
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * 5, shard * 5 + 5):
                seen, heard = media_of(number)
                members = {"png": seen[:50] if number in bad else seen, "wav": heard, "txt": f"text {number}".encode()}
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"{number}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    columns = {"image_column": "png", "audio_column": "wav", "text_column": "txt"}
    return {"kind": "webdataset", "paths": [str(folder / "*.tar")], **columns}


def build(sources, **fields):
    fields = {"validation": VALIDATION, "block_size": 160, "streaming_validation_rows": 2, **fields}
    return build_datasets(DataConfig(train=sources, **fields), PROCESSOR)


def as_plain(rows):
    plain = []
    for row in rows:
        media = {kind: [tensor.tolist() for tensor in tensors] for kind, tensors in row["media"].items()}
        plain.append({name: values.tolist() for name, values in row.items() if name != "media"} | {"media": media})
    return plain


def texts_of(rows):
    texts = "".join(PROCESSOR.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows)
    return texts.split("<|end|>")[:-1]


TEXTS = [f"text {number}" for number in range(NUM_ROWS)]


def hub_of_classes(folder):
    fields = hub(folder)
    for path in folder.iterdir():
        table = datasets.Dataset.from_parquet(str(path)).with_format("arrow")[:]
        labels = [number % 2 for number in range(table.num_rows)]
        features = datasets.Features.from_arrow_schema(table.schema)
        features["text"] = datasets.ClassLabel(names=["text 0", "text 1"])
        columns = {**table.to_pydict(), "text": labels}
        pq.write_table(pa.table(columns, schema=features.arrow_schema), path)
    return fields


def hub_of_paths(folder):
    """JSON lines, whose columns nobody knows in front, that name files beside them, by their whole paths too."""
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n")
    with (folder / "train.jsonl").open("w") as lines:
        for number in range(NUM_ROWS):
            for ending, content in zip(("png", "wav"), media_of(number), strict=True):
                (folder / f"{number}.{ending}").write_bytes(content)
            row = {"seen": str(folder / f"{number}.png"), "heard": [f"{number}.wav"]}
            lines.write(json.dumps(row | {"text": f"text {number}"}) + "\n")
    return {"kind": "hub", "path": str(folder), "image_column": "seen", "audio_column": "heard"}


@pytest.mark.parametrize("kind", [hub, hub_of_classes, hub_of_paths, webdataset])
def test_a_stream_gives_the_rows_of_the_loaded_dataset(tmp_path, kind):
    """Documents apart, filled up to the block."""
    fields = kind(tmp_path / "data")
    stream = build([SourceConfig(**fields, streaming=True)], packing=False).train
    loaded = build([SourceConfig(**fields)], packing=False).train
    assert isinstance(stream, StreamingDataset)
    rows = list(stream)
    assert len(rows) == len(loaded) == NUM_ROWS
    for row, wanted in zip(as_plain(rows), as_plain(loaded[index] for index in range(NUM_ROWS)), strict=True):
        missing = 160 - len(wanted["input_ids"])
        fillers = {"input_ids": [0] * missing, "labels": [-100] * missing, "modality_ids": [0] * missing}
        fillers["position_ids"] = list(range(missing))
        assert row == {name: wanted[name] + fillers[name] for name in fillers} | {"media": wanted["media"]}
    assert as_plain(stream) == as_plain(rows)  # a second pass is the first


@pytest.mark.parametrize("kind", [hub, webdataset])
def test_packed_rows_of_a_stream_have_whole_documents_in_order(tmp_path, kind):
    """As many as fit; of all rows together, nothing is lost."""
    fields = kind(tmp_path / "data")
    rows = list(build([SourceConfig(**fields, streaming=True)]).train)
    loaded = build([SourceConfig(**fields)], packing=False).train
    assert len(rows) < NUM_ROWS and texts_of(rows) == TEXTS
    number = 0
    for row in rows:
        length, media = 0, {}
        while number < NUM_ROWS and length + len(loaded[number]["input_ids"]) <= 160:
            document = loaded[number]
            part = slice(length, length + len(document["input_ids"]))
            for name in ("input_ids", "labels", "position_ids", "modality_ids"):
                assert torch.equal(row[name][part], document[name])
            for name, tensors in document["media"].items():
                media[name] = media.get(name, []) + [tensor.tolist() for tensor in tensors]
            length, number = part.stop, number + 1
        assert (row["labels"][length:] == -100).all()
        assert {name: [tensor.tolist() for tensor in tensors] for name, tensors in row["media"].items()} == media
    assert number == NUM_ROWS


CHANGES = AugmentationConfig(
    image=ImageAugmentationConfig(crop=0.5),
    audio=AudioAugmentationConfig(speed=[0.9], volume=6),
    text=TextAugmentationConfig(word_drop=0.3),
)


def test_a_stream_is_augmented_anew_in_each_epoch(tmp_path):
    sources = [SourceConfig(**hub(tmp_path / "data"), streaming=True)]
    plain, stream = (build(sources, augmentation=changes).train for changes in (AugmentationConfig(), CHANGES))
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append(as_plain(stream))
    assert epochs[0] == epochs[2] and as_plain(plain) == as_plain(plain)
    for rows in (epochs[1], as_plain(plain)):
        assert all(row["media"] != other["media"] for row, other in zip(epochs[0], rows, strict=False))
    assert texts_of(stream) == texts_of(plain) == TEXTS
    assert any(row["input_ids"] != other["input_ids"] for row, other in zip(epochs[0], epochs[1], strict=False))


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_stream_goes_on_with_the_next_row(tmp_path, packing):
    """At any row, in a new object, through JSON; media, texts that are cut, and a generated task in one mixture,
    augmented.
    """
    sources = [
        SourceConfig(**hub(tmp_path / "hub"), streaming=True),
        SourceConfig(**webdataset(tmp_path / "tars"), streaming=True, name="tars"),
        SourceConfig("generated", task="stories", num_rows=6, weight=0.5),
        SourceConfig("generated", task="scenes", num_rows=6),
    ]
    options = {"packing": packing, "augmentation": CHANGES}
    interrupted, resumed = (build(sources, **options).train for _ in range(2))
    whole = as_plain(interrupted)
    assert len(whole) > 10
    for stop in (1, 2, len(whole) // 2, len(whole) - 1):
        rows = iter(interrupted)
        seen = [next(rows) for _ in range(stop)]
        resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
        assert as_plain(seen) + as_plain(resumed) == whole
    assert as_plain(resumed) == whole


def test_texts_beside_media_are_cut_where_a_row_is_full(tmp_path):
    """Each of their tokens is a label once."""
    sources = [
        SourceConfig(**hub(tmp_path / "hub"), streaming=True),
        SourceConfig("generated", task="stories", num_rows=6),
    ]
    rows = list(build(sources).train)
    learned = torch.cat([row["labels"][(row["labels"] != -100) & (row["modality_ids"] == 0)] for row in rows])
    stories = build(sources[1:], packing=False, block_size=1000).train
    wanted = [stories[index]["labels"] for index in range(len(stories))]
    text = PROCESSOR.tokenizer.decode(learned)
    for labels in wanted:
        assert PROCESSOR.tokenizer.decode(labels[labels != -100]) in text
    assert (torch.cat([row["modality_ids"] for row in rows]) == 2).any()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [hub, webdataset])
def test_workers_lose_and_double_nothing(tmp_path, kind, workers):
    """Two files, a worker each."""
    stream = build([SourceConfig(**kind(tmp_path / "data"), streaming=True)]).train
    rows = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert sorted(texts_of(rows)) == sorted(TEXTS)


def test_batches_have_the_media_of_their_rows(tmp_path):
    stream = build([SourceConfig(**hub(tmp_path / "data"), streaming=True)]).train
    (batch,) = DataLoader(stream, batch_size=100, collate_fn=Collator(PROCESSOR))
    media = {"image": [], "audio": []}
    for row in stream:
        for kind, tensors in row["media"].items():
            media[kind] += tensors
    assert len(media["image"]) == 10 and len(media["audio"]) == 15
    for name, values in PROCESSOR.collate_media(media).items():
        assert torch.equal(batch[name], values)


@pytest.mark.parametrize("kind", [hub, webdataset])
def test_the_first_rows_of_a_stream_are_its_validation(tmp_path, kind):
    """And train has none of them, nor has the vocabulary; nor their equals of another source."""
    config = DataConfig(
        train=[SourceConfig(**kind(tmp_path / "data"), streaming=True, name="it")],
        packing=False,
        block_size=160,
        streaming_validation_rows=3,
    )
    built = build_datasets(config, PROCESSOR)
    held_out = [built.validation["it"][index] for index in range(3)]
    assert (texts_of(held_out), texts_of(built.train)) == (TEXTS[:3], TEXTS[3:])
    assert held_out[0]["media"]["image"][0].shape == (3, 16, 8)
    texts = [text for text in iterate_training_texts(config, 0, 2) if text.startswith("text")]
    assert texts == TEXTS[3:5]
    validation = SourceConfig(**webdataset(tmp_path / "more"), name="more")
    source = SourceConfig(**webdataset(tmp_path / "same"), streaming=True, name="it")
    with pytest.raises(ValueError, match="no row to learn from"):
        next(iter(build([source], validation=[validation]).train))


def test_bad_rows_of_a_stream_are_skipped_and_counted(tmp_path, caplog):
    """What the header tells when the row arrives, the rest when it is made; in every pass anew."""
    source = SourceConfig(**webdataset(tmp_path / "data", bad=(2, 7)), streaming=True, name="it")
    stream = build([source], max_invalid_rows=2).train
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert texts_of(stream) == [text for text in TEXTS if text[-1] not in "27"]
    places = [record.message.split(":")[0] for record in caplog.records if "bad row" in record.message]
    assert places == ["skipped a bad row of it, row 3", "skipped a bad row of it, row 8"] * 2
    with pytest.raises(ValueError, match=r"2 rows are bad, data\.max_invalid_rows is 1: it, row 3: "):
        list(build([source], max_invalid_rows=1).train)


def test_documents_longer_than_a_row_are_bad_rows(tmp_path, caplog):
    stream = build([SourceConfig(**hub(tmp_path / "data"), streaming=True, name="it")], block_size=35).train
    with caplog.at_level(logging.WARNING):
        assert 0 < len(texts_of(stream)) < NUM_ROWS
    assert "of them of media, more than data.block_size 35" in caplog.text


def test_a_column_that_a_stream_lacks_is_named(tmp_path):
    fields = hub(tmp_path / "data") | {"image_column": "picture"}
    with pytest.raises(ValueError, match="has no column 'picture', only seen, heard, text; correct it"):
        build([SourceConfig(**fields, streaming=True)])
