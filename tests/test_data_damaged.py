"""Tables whose notes about their columns are damaged, and streams that have nothing: one line, no run of no rows."""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from dataset_loading import DataConfig, SourceConfig, build_datasets
from tests.tiny_processor import image_file, picture, tiny_processor

HELD_OUT = [SourceConfig("generated", task="addition", num_rows=2)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def train_of(block_size=128, max_invalid_rows=9, **source):
    config = DataConfig([SourceConfig(**source)], HELD_OUT, block_size=block_size, packing=False)
    config.max_invalid_rows = max_invalid_rows
    return build_datasets(config, tiny_processor()).train


def write_table(path, features):
    columns = {"picture": [{"bytes": image_file(picture(16, 8)), "path": None}], "text": ["one"]}
    schema = datasets.Features(picture=datasets.Image(), text=datasets.Value("string")).arrow_schema
    notes = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pa.table(columns, schema=schema).replace_schema_metadata(notes), path)


WHOLE = {"picture": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
DAMAGED = {
    "no type": WHOLE | {"text": "string"},
    "a number": WHOLE | {"text": 3},
    "an empty list": WHOLE | {"text": []},
    "an unknown type": WHOLE | {"text": {"_type": "Nothing"}},
    "no columns": [WHOLE],
    "nested deeply": WHOLE | {"text": json.loads('{"a":' * 500 + "{}" + "}" * 500)},
}


@pytest.mark.parametrize("kind", ["files", "hub"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_notes_about_columns_are_one_line(tmp_path, kind, damage):
    """Where they are whole, the row is read."""
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    source = {"paths": [str(path)]} if kind == "files" else {"path": str(path.parent)}
    write_table(path, WHOLE)
    assert len(train_of(kind=kind, image_column="picture", **source)) == 1
    write_table(path, DAMAGED[damage])
    with pytest.raises(ValueError, match=r"is damaged: |cannot be loaded: ") as error:
        train_of(kind=kind, image_column="picture", **source)
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_folder_of_the_hub_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^source 'none': '.*data' cannot be loaded: it is empty$"):
        train_of(kind="hub", path=str(tmp_path / "data"), name="none")


def write_tar(path, *texts):
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            for name, content in ((f"{number}.png", image_file(picture(16, 8, number))), (f"{number}.txt", text)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(path)


def stream_of(path, **options):
    columns = {"image_column": "png", "text_column": "txt"}
    return train_of(kind="webdataset", paths=[path], streaming=True, **columns, **options)


def test_a_stream_without_a_row_says_so(tmp_path):
    """`Trainer` would warn, and end the run as if it had trained."""
    with pytest.raises(ValueError, match=r"^the train sources give no row to learn from \(0 bad ones\); check"):
        list(stream_of(write_tar(tmp_path / "none.tar")))
    bad = stream_of(write_tar(tmp_path / "bad.tar", b"", b" "))
    with pytest.raises(ValueError, match=r"no row to learn from \(2 bad ones\)"):
        list(bad)
    with pytest.raises(ValueError, match=r"no row to learn from \(2 bad ones\)"):
        list(bad)  # in each pass


def test_a_stream_may_end_where_a_run_goes_on(tmp_path):
    """Behind its last row there is none, and of several workers one may have no share."""
    path = write_tar(tmp_path / "whole.tar", b"one", b"two")
    stream = stream_of(path)
    assert len(list(stream)) == 2
    behind = stream.state_dict()
    again = stream_of(path)
    again.load_state_dict(behind)
    assert list(again) == [] and len(list(again)) == 2
    rows = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(map(torch.Tensor.tolist, (row["input_ids"] for row in rows))) == sorted(
        row["input_ids"].tolist() for row in stream
    )
