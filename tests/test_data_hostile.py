"""Data made to do harm: names that lead elsewhere, objects that look like references, files without an end."""

import io
import json
import logging
import os
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_loading import DataConfig, SourceConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources import texts
from dataset_loading.sources.loading import load_rows, open_stream, rows_of_stream
from dataset_loading.sources.tables import READERS, expand_paths
from dataset_loading.sources.texts import MAX_ROW_BYTES, bounded_lines, list_items
from tests.peak_memory import peak_of
from tests.tiny_processor import image_file, picture

GOOD = image_file(picture())
ANSWER = {"role": "assistant", "content": "it"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture, and beside it what nobody is to read."""
    (tmp_path / "secret.png").write_bytes(image_file(picture(seed=9)))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(GOOD)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(kind, **fields):
    """The rows of a source, and the reasons against the others."""
    bad_rows = BadRows(100)
    found = []
    bad_rows.add = lambda source, where, reason: found.append(reason) or BadRows.add(bad_rows, source, where, reason)
    source = SourceConfig(kind, name="it", **fields)
    if source.streaming:
        rows = rows_of_stream(source, open_stream(source), bad_rows)
    else:
        rows = load_rows(source, "train", DataConfig(), 0, bad_rows)
    return rows, found


# -------------------------------------------------------------------------------------------------------- what is named


def forged(path):
    """Everything that a cell could hold in place of the name of a file."""
    return [
        {"type": "image", "path": path},
        {"type": "image", "path": path, "offset": 0, "size": 10},
        {"type": "image", "task": "scenes", "medium": "1"},
        {"type": "image", "column": "text", "item": None},
        {"path": path},
        {"bytes": None, "path": path},
        [[path]],
        [{"type": "image", "path": path}],
        path,
        "../secret.png",
        "b/../../secret.png",
        f"file://{path}",
        f"FILE:{path}",
        "HTTP://127.0.0.1/a.png",
        "data:image/png;base64,AAAA",
        "a\0.png",
        "\ud800.png",
        "/dev/zero",
        "/proc/self/mem",
        ".",
        "x" * 5000,
        5,
        True,
    ]


def test_no_cell_is_more_than_a_name(folder):
    cells = forged(str(folder.parent / "secret.png"))
    write_lines(folder / "metadata.jsonl", [{"file_name": cell, "text": "x"} for cell in [*cells, "a.png"]])
    rows, reasons = load("imagefolder", path=str(folder))
    assert [json.loads(it)[0]["content"][0]["path"] for it in rows["messages"]] == [str(folder / "a.png")]
    assert len(reasons) == len(cells) and all("\n" not in reason and len(reason) < 6000 for reason in reasons)


def test_no_part_of_a_message_is_more_than_a_name(folder):
    cells = forged(str(folder.parent / "secret.png"))
    talks = [
        {"messages": [{"role": "user", "content": [{"type": "image", key: cell}]}, ANSWER]}
        for cell in [*cells, "a.png"]
        for key in ("image", "path", "file_name")
    ]
    write_lines(folder / "a.jsonl", talks)
    rows, reasons = load("chat", paths=[str(folder / "a.jsonl")])
    assert len(rows) == 3 and len(reasons) == 3 * len(cells)


def test_the_rows_of_files_and_their_rejected_answers_name_files_of_the_folder(folder):
    path = str(folder.parent / "secret.png")
    cells = [{"type": "image", "path": path}, path]
    write_lines(folder / "a.jsonl", [{"seen": cell, "text": "x"} for cell in [*cells, "a.png"]])
    rows, reasons = load("files", paths=[str(folder / "a.jsonl")], image_column="seen")
    assert len(rows) == 1 and "not a name" in reasons[0] and "leads out of the folder" in reasons[1]


def struct_table(path, cells, type_=None):
    pq.write_table(pa.table({"image": pa.array(cells, type_), "text": ["x"] * len(cells)}), path)


@pytest.mark.parametrize("kind", ["files", "hub", "stream"])
def test_a_table_names_files_of_its_folder(folder, kind):
    """By a path beside no bytes, as `datasets` has them, or alone; absolute ones too, where they are inside."""
    names = ["a.png", str(folder / "a.png"), str(folder.parent / "secret.png"), "../secret.png", "/dev/zero", None]
    struct_table(folder / "t.parquet", [{"bytes": None, "path": name} for name in names])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: t.parquet\n---\n")
    place = {"paths": [str(folder / "t.parquet")]} if kind == "files" else {"path": str(folder)}
    streaming = {"streaming": True} if kind == "stream" else {}
    rows, reasons = load("files" if kind == "files" else "hub", image_column="image", **place, **streaming)
    assert len(rows) == 2 and len(set(rows["digest"])) == 1
    assert sum("leads out of the folder" in reason for reason in reasons) == 3


@pytest.mark.parametrize(
    ("type_", "cells"),
    [
        (pa.int64(), [0]),
        (pa.bool_(), [True]),
        (pa.list_(pa.list_(pa.string())), [[["a.png"]]]),
        (pa.struct({"bytes": pa.string(), "path": pa.string()}), [{"bytes": "/etc/hostname", "path": None}]),
        (pa.struct({"bytes": pa.int64(), "path": pa.string()}), [{"bytes": 0, "path": None}]),
        (pa.struct({"other": pa.string()}), [{"other": "a.png"}]),
    ],
    ids=str,
)
def test_a_column_that_holds_no_media_is_named(folder, type_, cells):
    """Numbers would be open files, and texts in place of bytes names of any file."""
    struct_table(folder / "t.parquet", cells, type_)
    with pytest.raises(ValueError, match=r"column 'image' holds .*, neither bytes of media nor names of files"):
        load("files", paths=[str(folder / "t.parquet")], image_column="image")


def test_numbers_and_texts_in_a_stream_are_no_media(folder):
    cells = [{"bytes": str(folder.parent / "secret.png"), "path": None}, {"bytes": "0", "path": None}]
    write_lines(folder / "a.jsonl", [{"image": cell, "text": "x"} for cell in cells])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    rows, reasons = load("hub", path=str(folder), image_column="image", streaming=True)
    assert len(rows) == 0 and [reason.endswith("holds str and no medium") for reason in reasons] == [True, True]


@pytest.mark.parametrize("files", ["../secret.txt", "linked.txt", "/etc/host[n]ame.txt", "pipe.txt"])
def test_a_dataset_that_has_its_files_elsewhere_is_refused(folder, files):
    """Which its README may say, or a link."""
    (folder.parent / "secret.txt").write_text("secret\n" * 100)
    (folder / "linked.txt").symlink_to("../secret.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: ") as error:
        load("hub", path=str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


# ---------------------------------------------------------------------------------------------------------------- links


def test_links_stay_in_the_folder(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "inside.png").symlink_to("../a.png")
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "up").symlink_to("..")
    (folder / "round.png").symlink_to("round.png")
    os.mkfifo(folder / "pipe.png")
    names = ["deep/inside.png", str(folder / "a.png"), "deep/../a.png"]
    out = ["out.png", "zero.png", "up/secret.png", "pipe.png", "round.png", "deep"]
    write_lines(folder / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in names + out])
    rows, reasons = load("imagefolder", path=str(folder))
    assert len(rows) == 3
    kinds = ["leads out of", "leads out of", "leads out of", "no regular file", "no file", "no regular file"]
    assert all(kind in reason for kind, reason in zip(kinds, reasons, strict=True))
    other = folder.parent / "other"
    other.symlink_to(folder)  # the folder itself may be a link
    write_lines(folder / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in names])
    assert len(load("imagefolder", path=str(other))[0]) == 3
    (folder / "metadata.jsonl").unlink()
    rows, reasons = load("imagefolder", path=str(folder), answer_column="label")
    assert len(rows) == 2 and len(reasons) == 4  # a.png, and the link to it


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path):
    """And to those alone."""
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_bytes(GOOD)
    (repository / "secret.png").write_bytes(GOOD)
    (snapshot / "a.png").symlink_to("../../blobs/123")
    (snapshot / "b.png").symlink_to("../../secret.png")
    write_lines(snapshot / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in ("a.png", "b.png")])
    rows, (reason,) = load("imagefolder", path=str(snapshot))
    assert len(rows) == 1 and "leads out of" in reason


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_metadata_are_a_file_of_the_folder(folder, kind):
    path = folder / "metadata.jsonl"
    write_lines(folder.parent / "secret.jsonl", [{"file_name": "a.png", "text": "secret"}])
    {
        "link": lambda: path.symlink_to("../secret.jsonl"),
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(ValueError, match=r"metadata\.jsonl' is no regular file of the folder"):
        load("imagefolder", path=str(folder))


# ----------------------------------------------------------------------------------------------------------------- tars


def write_tar(path, members, **options):
    """Of (name, content), where a content that is a text is that which a link leads to."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def load_tar(path):
    return load("webdataset", paths=[str(path)], image_column="png", text_column="txt")


def test_a_tar_shows_its_own_members(folder):
    secret = str(folder.parent / "secret.png")
    objects = [{"png": {"type": "image", "path": secret}}, {"png": "a.png"}, {"png": secret}, {"png": ["a.png"]}]
    members = [("../../good.png", GOOD), ("../../good.txt", b"good")]
    for number, it in enumerate(objects):
        members += [(f"{number}.json", json.dumps(it).encode()), (f"{number}.txt", b"x")]
    members += [("link.png", "../secret.png"), ("link.txt", b"x")]
    members += [("hard.txt", b"x"), ("hard.png", secret)]
    members += [("twice.png", GOOD), ("twice.txt", b"x"), ("twice.png", GOOD)]
    members += [("key.png", GOOD), ("key.txt", b"x"), ("key.json", b'{"png": "a.png"}')]
    write_tar(folder / "a.tar", members)
    rows, reasons = load_tar(folder / "a.tar")
    assert len(rows) == 1 and json.loads(rows["messages"][0])[1]["content"][0]["text"] == "good"
    wanted = [
        "not a name",
        *["names a file, and the row lies in no folder"] * 3,
        *["is a link"] * 2,
        *["there twice"] * 2,
    ]
    assert all(it in reason for it, reason in zip(wanted, reasons, strict=True))


def with_header(content, start, field):
    """A tar whose first header has other bytes at a place, and the right checksum."""
    header = bytearray(content[:512])
    header[start : start + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize(
    ("start", "field"),
    [
        (124, b"\xff" * 12),  # a size of -1
        (124, b"77777777777\0"),  # 8 GB
        (124, b"\x80" + b"\0" * 3 + b"\xff" * 8),
        (124, b"not a number"),
        (156, b"x"),  # its content is a header, and none
        (156, b"L"),
        (148, b"0000000\0"),
    ],
)
def test_headers_that_lie_are_one_line(folder, start, field):
    write_tar(folder / "a.tar", [("0.png", GOOD), ("0.txt", b"x"), ("1.png", GOOD), ("1.txt", b"x")])
    content = with_header((folder / "a.tar").read_bytes(), start, field)
    if start == 148:
        content = content[:148] + field + content[156:]
    (folder / "a.tar").write_bytes(content)
    if start == 156:  # the header of the next member, which says nothing
        assert len(load_tar(folder / "a.tar")[0]) == 1
        return
    with pytest.raises(ValueError, match=r"a\.tar' is not a whole, uncompressed tar: ") as error:
        load_tar(folder / "a.tar")
    assert "\n" not in str(error.value)


def test_a_member_of_much_text_is_not_read(folder, monkeypatch):
    write_tar(
        folder / "a.tar", [("0.png", GOOD), ("0.txt", b"x" * (MAX_ROW_BYTES + 1)), ("1.png", GOOD), ("1.txt", b"x")]
    )
    rows, (reason,) = load_tar(folder / "a.tar")
    assert len(rows) == 1 and f"has {MAX_ROW_BYTES + 1} bytes, and of text at most {MAX_ROW_BYTES} are read" in reason


# ----------------------------------------------------------------------------------------------------- rows that repeat


def test_two_files_of_metadata_that_name_one_medium_are_refused(folder):
    write_lines(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    (folder / "metadata.csv").write_text("file_name,text\n./a.png,x\n")
    with pytest.raises(ValueError, match=r"metadata\.csv' and '.*metadata\.jsonl' both name '.*a\.png'"):
        load("imagefolder", path=str(folder))


def test_rows_that_repeat_are_counted(folder, caplog):
    """Several texts of one picture are usual, and the same text again is most likely none that was meant."""
    rows = [{"file_name": "a.png", "text": text} for text in ("x", "y", "x")]
    write_lines(folder / "metadata.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert len(load("imagefolder", path=str(folder))[0]) == 3
    where = f"{folder / 'metadata.jsonl'} line"
    assert (
        f"it: 2 rows name a file that a row before them names too, the first of them {where} 2, as {where} 1"
        in caplog.text
    )
    assert (
        f"it: 1 rows have the text and the media of a row before them, the first of them {where} 3, as {where} 1"
        in caplog.text
    )


def test_a_file_is_read_once_by_whatever_names_and_a_copy_is_said(folder, caplog):
    write_tar(folder / "a.tar", [("0.png", GOOD), ("0.txt", b"x")])
    (folder / "b.tar").symlink_to("a.tar")
    paths = [str(folder / "*.tar"), str(folder / "a.tar"), str(folder / ".." / "data" / "a.tar")]
    source = SourceConfig("webdataset", paths=paths, image_column="png", text_column="txt")
    assert expand_paths(source) == [folder / "a.tar"]
    (folder / "c.tar").write_bytes((folder / "a.tar").read_bytes())
    with caplog.at_level(logging.WARNING):
        rows, _ = load("webdataset", paths=paths, image_column="png", text_column="txt")
    assert (
        len(rows) == 2
        and f"the first of them {folder / 'c.tar'} 0, as {folder / 'a.tar'} 0; all are used" in caplog.text
    )


# --------------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.slow
def test_lines_without_an_end_cost_no_more_than_their_beginning(folder):
    """300 MB of zeros, and of objects that become 27 times as large in memory."""
    path = folder / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}' + b" " * 5000 + b"\n")
        file.seek(300 * 2**20)
        file.write(b"\n" + b'{"text": [' + b"{}," * (MAX_ROW_BYTES // 3) + b"{}]}\n" + b'{"text": "behind"}\n')
    rows = list(READERS[".jsonl"](path, ("text",)))
    assert [row.get("text") for _, row, _ in rows] == ["before", None, None, "behind"]
    assert all("longer than 16777216 bytes" in reason for _, _, reason in rows[1:3])
    assert peak_of(lambda: list(READERS[".jsonl"](path, ("text",)))) < 100e6
    path.write_bytes(b'{"text": [' + b"{}," * (MAX_ROW_BYTES // 3 - 10) + b"{}]}\n")
    assert peak_of(lambda: list(READERS[".jsonl"](path, ("text",)))) < 500e6


def test_bounded_lines_are_lines(monkeypatch):
    monkeypatch.setattr(texts, "MAX_ROW_BYTES", 4)
    monkeypatch.setattr(texts, "_PIECE", 3)
    assert list(bounded_lines(io.BytesIO(b"abc\nabcd\nabcdefghi\n\nabcdefghijk"))) == [
        *(b"abc\n", b"abcd\n"[:5], b"abcde", b"\n", b"abcde")
    ]


def test_a_list_of_any_length_is_read_item_by_item(tmp_path, monkeypatch):
    """Whatever stands where a piece of the file ends; what is no list is refused as `json` refuses it."""
    rng = np.random.default_rng(0)
    values = [[1.5e-7, {"a": ['é"\\', None, True]}, "x"], [], [[], {}], [12345, -1], ["\n ]"]]
    path = tmp_path / "a.json"
    for piece in (1, 3, 50):
        monkeypatch.setattr(texts, "_PIECE", piece)
        for value in values:
            for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False) + "\n"):
                path.write_text(text)
                assert list(list_items(path)) == value
                for _ in range(5):
                    place = rng.integers(len(text))
                    broken = text[:place] + str(rng.choice(list(',[]{}"1 e.'))) + text[place + rng.integers(2) :]
                    path.write_text(broken)
                    assert items_or_none(list_items, path) == items_or_none(json.loads, broken)


def items_or_none(read, source):
    try:
        found = read(source)
        return None if isinstance(found, (dict, str, int, float)) else list(found)
    except (ValueError, TypeError):
        return None


@pytest.mark.slow
def test_a_cell_and_a_line_of_csv_are_bounded(folder):
    (folder / "metadata.csv").write_text("file_name,text\n" + "a.png," + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"metadata\.csv' is damaged at line [12]: field larger than field limit"):
        load("imagefolder", path=str(folder))
    with (folder / "metadata.csv").open("r+b") as file:
        file.truncate(300 * 2**20)  # a line without an end
    with pytest.raises(ValueError, match=r"metadata\.csv"):
        load("imagefolder", path=str(folder))
    assert peak_of(lambda: load("imagefolder", path=str(folder))) < 300e6


def test_a_text_of_more_than_a_gigabyte_is_a_bad_row(folder):
    with (folder / "a.txt").open("wb") as file:
        file.truncate(2**30 + 1)
    ((_, _, reason),) = READERS[".txt"](folder / "a.txt", ("text",))
    assert reason.startswith("longer than 1073741824 bytes")


@pytest.mark.slow
def test_a_small_table_does_not_fill_the_memory(folder):
    """Neither by what is well compressed, nor by one long text in many rows."""
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 3_000_000] * 100}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"a\.parquet' has [0-9]+ bytes of column 'text' in [0-9]+; write it anew"):
        load("files", paths=[str(path)])
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200), pa.array(["x" * 3_000_000]))
    pq.write_table(pa.table({"text": text}), path)
    assert peak_of(lambda: sum(1 for _ in READERS[".parquet"](path, ("text",)))) < 150e6


# ------------------------------------------------------------------------------------------------------- damaged tables


@pytest.mark.parametrize("columns", [{"image_column": "image"}, {}], ids=["media", "text"])
def test_damaged_tables_are_one_line(folder, columns):
    """Cut anywhere, or with flipped bits, of which some do no harm."""
    path = folder / "a.parquet"
    struct_table(path, [{"bytes": GOOD, "path": None}] * 5)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:cut] for cut in (0, 3, 100, len(whole) // 2, len(whole) - 1)] + [b"PAR2" + whole[4:-4] + b"PAR2"]
    for _ in range(15):
        content = bytearray(whole)
        for place in rng.integers(len(whole) - 600, len(whole), 3):
            content[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(content))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            load("files", paths=[str(path)], **columns)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and ("a.parquet" in str(error) or "source 'it'" in str(error)), str(error)
    assert refused >= 10


def test_rows_of_tables_that_are_not_as_they_should_be_are_bad_rows(folder):
    """Nothing at any depth, and what is not UTF-8."""
    wrong = pa.array([b"\xff\xfe", b"fine", None, b"fine"]).cast(pa.string(), safe=False)
    wrong = pa.StringArray.from_buffers(4, *[wrong.buffers()[place] for place in (1, 2, 0)])
    cells = [{"bytes": GOOD, "path": None}] * 3 + [None]
    pq.write_table(pa.table({"image": cells, "text": wrong}), folder / "a.parquet")
    rows, reasons = load("files", paths=[str(folder / "a.parquet")], image_column="image")
    assert len(rows) == 1
    wanted = ["a text is not UTF-8", "column 'text' is NoneType", "column 'image' holds nothing"]
    assert all(it in reason for it, reason in zip(wanted, reasons, strict=True))
    part = {"type": "text", "text": "x"}
    talks = [
        None,
        [],
        [None],
        [{"role": "user", "content": None}, ANSWER | {"content": [part]}],
        [{"role": "user", "content": [None, part]}, {"role": "assistant", "content": [part]}],
        [{"role": "user", "content": [{"type": None, "text": "x"}]}, {"role": "assistant", "content": [part]}],
        [{"role": "user", "content": [part]}, {"role": "assistant", "content": [part]}],
    ]
    pq.write_table(pa.table({"messages": talks}), folder / "b.parquet")
    rows, reasons = load("chat", paths=[str(folder / "b.parquet")])
    assert len(rows) == 1 and len(reasons) == len(talks) - 1
