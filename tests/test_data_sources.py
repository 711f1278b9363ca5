"""Sources of every kind, bad rows, and the errors of what cannot be read."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_loading import DataConfig, SourceConfig, TokenizerConfig, build_datasets, build_tokenizer
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources.loading import load_rows


def load(source, max_invalid_rows=0, limit=None):
    bad_rows = BadRows(max_invalid_rows)
    return load_rows(source, "train", DataConfig(), 0, bad_rows, limit), bad_rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_txt_file_is_one_document_with_its_bytes_as_they_are(tmp_path):
    raw = "one\r\n\r\n  two\ttabs\n\ufeffé".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    rows, _ = load(SourceConfig("files", paths=[str(tmp_path / "a.txt")]))
    assert [row["text"].encode() for row in rows] == [raw]


def test_globs_are_expanded_in_order_and_no_file_is_read_twice(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "[odd].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = [str(tmp_path / name) for name in ("[odd].txt", "**/*.txt", "a.txt")]
    rows, _ = load(SourceConfig("files", paths=paths))
    assert rows["text"][:] == ["[odd].txt", "a.txt", "b.txt", "deep/c.txt"]


def test_a_folder_that_exists_is_no_pattern(tmp_path, monkeypatch):
    """Brackets in its name are its name, below it they are a pattern; also of a path relative to the current folder."""
    folder = tmp_path / "notes [2024]" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.txt", "b.txt", "[c].txt"):
        (folder / name).write_text(name)
    for path, found in (
        (folder / "*.txt", {"a.txt", "b.txt", "[c].txt"}),
        (folder / "[ax].txt", {"a.txt"}),
        (folder / "[c].txt", {"[c].txt"}),  # a file of this name is there
        (folder.parent / "**" / "[ax].txt", {"a.txt"}),
    ):
        assert set(load(SourceConfig("files", paths=[str(path)]))[0]["text"]) == found
    monkeypatch.chdir(tmp_path)
    assert len(load(SourceConfig("files", paths=["notes [2024]/**/*.txt"]))[0]) == 3
    monkeypatch.chdir(folder)
    assert len(load(SourceConfig("files", paths=["*.txt", "../deep/[ab].txt"]))[0]) == 3  # each once


def test_text_columns_of_jsonl_and_parquet(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one", "id": 1}, {"body": "two", "id": 2}])
    pq.write_table(pa.table({"id": [3], "body": ["three é"]}), tmp_path / "b.parquet")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    rows, _ = load(SourceConfig("files", paths=paths, text_column="body"))
    assert rows.to_list() == [{"text": "one"}, {"text": "two"}, {"text": "three é"}]


def test_prompt_and_answer_columns(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1", "a": "2", "more": None}])
    rows, _ = load(SourceConfig("files", paths=[path], prompt_column="q", answer_column="a"))
    assert rows.to_list() == [{"prompt": "1+1", "answer": "2"}]


BAD_LINES = [
    (b'{"text": "cut o', "not JSON (Unterminated string starting at at column 10)"),
    (b'{"text": "\xff\xfe"}', "not UTF-8 (byte 0xff at position 10)"),
    (b'{"text": 5}', "column 'text' is int, not a string"),
    (b'{"text": null}', "column 'text' is NoneType, not a string"),
    (b'{"text": " \\n"}', "column 'text' is empty"),
    (b'{"txt": "typo", "n": 1}', "no column 'text' (has 'txt', 'n')"),
    (b'{"text": "\\ud800"}', "column 'text' is not UTF-8 (surrogates not allowed at character 0)"),
    (b'["text"]', "not a JSON object but list"),
    (b"[" * 100_000, "not usable JSON (nested too deeply)"),
    (b'{"text": "fine", "n": ' + b"1" * 5000 + b"}", "not usable JSON (a number with too many digits)"),
]


def test_a_bad_line_costs_itself_and_is_reported(tmp_path, caplog):
    """Skipped, counted, and logged with source, line and reason; the rows around it are kept."""
    good = [f'{{"text": "good {number}"}}'.encode() for number in range(len(BAD_LINES))]
    lines = [line for pair in zip(good, (bad for bad, _ in BAD_LINES), strict=True) for line in pair]
    (tmp_path / "mixed.jsonl").write_bytes(b"\n\n".join(lines))  # blank lines are no rows
    source = SourceConfig("files", name="notes", paths=[str(tmp_path / "mixed.jsonl")])
    with caplog.at_level(logging.WARNING):
        rows, bad_rows = load(source, max_invalid_rows=len(BAD_LINES))
    assert rows["text"][:] == [f"good {number}" for number in range(len(BAD_LINES))]
    assert bad_rows.counts == {"notes": len(BAD_LINES)}
    for number, (record, (_, reason)) in enumerate(zip(caplog.records, BAD_LINES, strict=True)):
        where = f"notes, {tmp_path / 'mixed.jsonl'} line {4 * number + 3}"
        assert record.getMessage() == f"skipped a bad row of {where}: {reason}"


def test_too_many_bad_rows_stop_the_run_and_are_named(tmp_path):
    """One more than the limit."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, {"text": 1}, {"text": "good"}, {"text": ""}])
    source = SourceConfig("files", paths=[path])
    assert len(load(source, max_invalid_rows=2)[0]) == 2
    with pytest.raises(ValueError) as error:
        load(source, max_invalid_rows=1)
    assert str(error.value) == (
        f"2 rows are bad, data.max_invalid_rows is 1: a, {path} line 2: column 'text' is int, not a string; "
        f"a, {path} line 4: column 'text' is empty; repair them or raise data.max_invalid_rows"
    )


def test_bad_parquet_rows(tmp_path):
    """A null, and a string that is not UTF-8."""
    binary = pa.array([b"fine", None, b"\xff", b"also fine"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, binary.buffers(), null_count=1)  # pyarrow does not check
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    rows, bad_rows = load(SourceConfig("files", paths=[str(tmp_path / "a.parquet")]), max_invalid_rows=2)
    assert rows["text"][:] == ["fine", "also fine"]
    assert bad_rows.counts == {"a": 2}


def test_a_parquet_file_that_is_damaged_inside_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"row {i}" for i in range(5000)]}), path, compression="snappy", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet' is damaged: .*; write it again"):
        load(SourceConfig("files", paths=[str(path)]))


def test_a_txt_file_that_is_not_utf8_is_a_bad_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt row 1: not UTF-8 \(byte 0xe9 at position 3\)"):
        load(SourceConfig("files", paths=[str(tmp_path / "a.txt")]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "no file '{path}' (from "),
        ("missing/*.jsonl", "no file '{path}' (from "),
        ("folder", "'{path}' is a folder; name its files"),
        ("table.xml", "format of '{path}' is unknown; use one of .txt, .jsonl, .parquet"),
        ("broken.parquet", "'{path}' is not a parquet file"),
        ("other.parquet", "'{path}' has no column 'text', only body; correct it"),
        ("empty.jsonl", "source 'empty' has no usable rows: it has none"),
        ("blank.txt", "source 'blank' has no usable rows: 1 x column 'text' is empty"),
    ],
)
def test_errors_name_the_path(tmp_path, name, message):
    """A missing, unreadable or empty file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.xml").write_text("text\n")
    (tmp_path / "broken.parquet").write_text("PAR1 and no more")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    path = str(tmp_path / name)
    with pytest.raises(ValueError) as error:
        load(SourceConfig("files", paths=[path]), max_invalid_rows=1)
    assert message.format(path=path) in str(error.value)
    assert "\n" not in str(error.value)


def test_answers_cannot_come_from_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = SourceConfig("files", paths=[str(tmp_path / "a.txt")], prompt_column="q", answer_column="a")
    with pytest.raises(ValueError, match="plain text and has no columns q, a"):
        load(source)


def test_hub_reads_a_local_folder_by_split_and_column(tmp_path, own_cache):
    """The same call reads a dataset of the hub by its name."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"body": f"train {number}", "n": number} for number in range(5)])
    write_jsonl(folder / "test.jsonl", [{"body": "test 0", "n": 0}, {"body": "", "n": 1}])
    source = {"kind": "hub", "path": str(folder), "text_column": "body"}
    assert load(SourceConfig(**source))[0]["text"][:] == [f"train {number}" for number in range(5)]
    assert load(SourceConfig(**source), limit=2)[0]["text"][:] == ["train 0", "train 1"]
    rows, bad_rows = load(SourceConfig(**source, split="test"), max_invalid_rows=1)
    assert rows.to_list() == [{"text": "test 0"}]
    assert bad_rows.counts == {"dataset": 1}
    with pytest.raises(ValueError, match="row 2: column 'body' is empty"):
        load(SourceConfig(**source, split="test"))
    with pytest.raises(ValueError, match="source 'dataset' has no column 'text', only body, n"):
        load(SourceConfig("hub", path=str(folder)))
    with pytest.raises(ValueError, match="cannot be loaded: Unknown split"):
        load(SourceConfig(**source, split="validation"))


def test_a_hub_folder_that_is_missing_is_named(tmp_path, own_cache):
    path = f"{tmp_path}/nowhere"
    with pytest.raises(ValueError, match=f"source 'nowhere': '{path}' cannot be loaded: ") as error:
        load(SourceConfig("hub", path=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "web"}, "source kind is 'web', unknown; choose one of hub, files, generated"),
        ({"kind": "files"}, "a source of kind files needs paths, which is []"),
        ({"kind": "hub", "path": "x", "weight": 0.0}, "weight is 0.0"),
        ({"kind": "hub", "path": "x", "weight": float("nan")}, "weight is nan"),
        (
            {"kind": "hub", "path": "x", "task": "addition"},
            "task is 'addition', but a source of kind hub does not read",
        ),
        ({"kind": "files", "paths": ["a"], "streaming": True}, "streaming is True, but a source of kind files"),
        ({"kind": "hub", "path": "x", "prompt_column": "q"}, "prompt_column is 'q' and answer_column is None"),
        (
            {"kind": "hub", "path": "x", "prompt_column": "q", "answer_column": "q"},
            "prompt_column and answer_column are both 'q'; name two columns",
        ),
        ({"kind": "hub", "path": "x", "loss_on": "answer"}, "loss_on is 'answer', but the source has no answers"),
        ({"kind": "hub", "path": "x", "loss_on": "some"}, "loss_on is 'some', unknown"),
        ({"kind": "generated", "task": "addition", "num_rows": 0}, "num_rows is 0"),
        ({"kind": "generated", "task": "addition", "difficulty": [3, 2]}, "difficulty is [3, 2]"),
        ({"kind": "generated", "task": "addition", "difficulty": [0, 2]}, "difficulty is [0, 2]"),
        ({"kind": "generated", "task": "addition", "difficulty": [2]}, "difficulty is [2]"),
        ({"kind": "generated", "task": "scenes", "difficulty": [1, 3]}, "[1, 3], but 'scenes' has 1 to 2"),
        ({"kind": "generated", "task": "addition", "role": "dev"}, "role is 'dev', unknown"),
        ({"kind": "generated", "task": "addition", "seed": -1}, "seed is -1"),
    ],
)
def test_source_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        SourceConfig(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SOURCE = {"kind": "generated", "task": "addition"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 1}, "block_size is 1; give at least 2"),
        ({"max_invalid_rows": -1}, "max_invalid_rows is -1; give at least 0"),
        ({"preprocessing_workers": 0}, "preprocessing_workers is 0; give at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"train": [SourceConfig(**SOURCE), SourceConfig(**SOURCE)]}, "2 train sources are called 'addition'"),
        ({"train": [SourceConfig(**SOURCE, role="test")]}, "train source 'addition' has role 'test'"),
        ({"validation": [SourceConfig(**SOURCE, role="train")]}, "validation source 'addition' has role 'train'"),
        ({"validation": [SourceConfig("hub", path="x", streaming=True)]}, "validation source 'x' is streaming"),
    ],
)
def test_data_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("paths", "label"),
    [
        (["texts/novel.txt"], "novel"),
        (["/data/letters/*.txt"], "letters"),
        (["/data/**/part-?.jsonl"], "data"),
        (["*.txt"], "files"),
    ],
)
def test_sources_of_files_are_called_after_a_file_or_its_folder(paths, label):
    """A name without pattern characters: it becomes part of metric names."""
    assert SourceConfig("files", paths=paths).label == label


def test_a_pattern_and_a_strange_name_build(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} " * 1000)
    config = DataConfig(
        train=[SourceConfig("files", paths=[str(tmp_path / "*.txt")], name="what? a/name:*")], block_size=16
    )
    built = build_datasets(config, build_tokenizer(TokenizerConfig(vocab_size=259), config))
    assert list(built.validation) == ["what? a/name:*"] and len(built.train) > 10
