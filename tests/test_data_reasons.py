"""What is left out is said in one line at the end, and for what all rows share its cause is named once."""

import json
import logging
import unicodedata

import pytest

from dataset_loading import DataConfig, SourceConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources.loading import load_rows
from dataset_loading.sources.references import UnusableRow, reference_to
from tests.test_data_media_bad import PROCESSOR, build, folder_with
from tests.tiny_processor import image_file, picture


def load(source: SourceConfig):
    return load_rows(source, "train", DataConfig(), 0, BadRows(0))


def test_reasons_are_counted_by_source_whatever_names_and_numbers_are_in_them(caplog):
    bad_rows = BadRows(99)
    for number in range(3):
        bad_rows.add("photos", f"line {number}", f"no file '{number}.png'; correct it")
        bad_rows.add("sounds", f"line {number}", f"a/{number}.wav: {number}.5 seconds")
    bad_rows.add("photos", "line 9", "column 'text' is empty")
    bad_rows.add("notes", "line 1", "column 'text' is empty")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        bad_rows.report()
        BadRows(99).report()
    assert [record.message for record in caplog.records] == [
        "8 rows cannot be used and are left out: 4 of photos (3 x such as no file '0.png'; correct it; 1 x column "
        "'text' is empty), 3 of sounds (3 x such as a/0.wav: 0.5 seconds), 1 of notes (1 x column 'text' is empty)"
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_says_it_alone(tmp_path, caplog, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO):
        assert len(build(folder_with(tmp_path, "x.png", b"")).train) == 2
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == (rank == "0") and all("1 of it (1 x " in line and "0 bytes" in line for line in said)
    assert ("skipped a bad row" in caplog.text) == (rank == "0")


def test_a_folder_without_metadata_is_one_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(image_file(picture()))
    with pytest.raises(ValueError, match=r"no metadata.jsonl, .*metadata.parquet, so that .*, and no column 'text'"):
        load(SourceConfig("imagefolder", path=str(tmp_path)))
    (tmp_path / "Metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata.parquet, though 'Metadata.jsonl', which is not read, so that"):
        load(SourceConfig("imagefolder", path=str(tmp_path)))
    assert len(load(SourceConfig("imagefolder", path=str(tmp_path), answer_column="label"))) == 1
    with pytest.raises(ValueError, match=r"and no file that is one of .*\.wav.*; correct the path"):
        load(SourceConfig("audiofolder", path=str(tmp_path), answer_column="label"))


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_are_found_in_either_unicode_form(tmp_path, written, stored):
    folder = tmp_path / unicodedata.normalize(stored, "Fotos für später")
    folder.mkdir()
    (folder / unicodedata.normalize(stored, "größe é.png")).write_bytes(image_file(picture()))
    name = unicodedata.normalize(written, "Fotos für später/größe é.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}) + "\n")
    (row,) = load(SourceConfig("imagefolder", path=str(tmp_path)))
    (part,) = json.loads(row["messages"])[0]["content"]
    assert PROCESSOR.load_item("image", part["path"]).size == picture().size


def test_of_two_names_in_other_forms_none_is_guessed(tmp_path):
    for name in ("\u212b.png", "A\u030a.png"):  # both are \u00c5 when composed
        (tmp_path / name).write_bytes(image_file(picture()))
    with pytest.raises(UnusableRow, match="no file"):
        reference_to("image", "\u00c5.png", tmp_path)


def test_paths_of_sources_are_found_in_either_unicode_form(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "größe.txt")).write_text("one")
    path = tmp_path / unicodedata.normalize("NFC", "größe.txt")
    assert load(SourceConfig("files", paths=[str(path)]))["text"][:] == ["one"]
