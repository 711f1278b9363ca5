"""Media and messages that cannot be used: counted bad rows, with the reason, and never a crash later on."""

import io
import json
import logging
import re
import struct
import tarfile
import tracemalloc
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets, build_examples, train_tokenizer
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor

PROCESSOR = tiny_processor()
VALIDATION = [SourceConfig("generated", task="addition", num_rows=3)]
GOOD_PICTURE, GOOD_SOUND = image_file(picture()), audio_file(sound())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def build(source, processor=PROCESSOR, **fields):
    fields = {"validation": VALIDATION, "block_size": 256, "packing": False, **fields}
    return build_datasets(DataConfig(train=[source], **fields), processor)


def folder_with(folder, name, content, text="a text"):
    """An imagefolder or audiofolder of a good file, the file in question, and another good one."""
    kind = "audiofolder" if name.endswith(("wav", "flac", "ogg")) else "imagefolder"
    good = GOOD_SOUND if kind == "audiofolder" else GOOD_PICTURE
    ending = name.rpartition(".")[2] if kind == "audiofolder" else "png"
    for number in (0, 2):
        (folder / f"{number}.{ending}").write_bytes(good)
    if content is not None:
        (folder / name).write_bytes(content)
    names = (f"0.{ending}", name, f"2.{ending}")
    rows = [{"file_name": it, "text": text if it == name else f"text {it}"} for it in names]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(kind, path=str(folder), name="it")


def header_of(width, height):
    """A PNG that says it is so large, of a few bytes."""
    content = bytearray(image_file(Image.new("RGB", (1, 1))))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def with_nan():
    samples = sound()
    samples[7] = np.nan
    return audio_file(samples, subtype="FLOAT")


def long_recording(seconds=36_000):
    """The header of a recording of ten hours, without its samples."""
    content = bytearray(audio_file(np.zeros(8), subtype="PCM_U8"))
    content[40:44] = struct.pack("<I", 8000 * seconds)
    return bytes(content)


BAD = {
    "missing": ("x.png", None, r"no file '.*x\.png'"),
    "truncated picture": ("x.png", GOOD_PICTURE[: len(GOOD_PICTURE) // 2], "x.png"),
    "truncated sound": ("x.wav", GOOD_SOUND[:2000], "truncated"),
    "zero length": ("x.png", b"", "0 bytes|empty|x.png"),
    "zero length sound": ("x.wav", b"", "0 bytes|empty|x.wav"),
    "no samples": ("x.wav", audio_file(np.zeros(0, dtype=np.int16)), "no samples"),
    "no picture": ("x.png", b"GIF, or is it?" * 10, "x.png"),
    "100 megapixels": ("x.png", header_of(10_000, 10_000), "10000 x 10000 pixels"),
    "NaN samples": ("x.wav", with_nan(), "NaN"),
    "a header of ten hours": ("x.wav", long_recording(), "truncated"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("check_media", [True, False])
def test_what_cannot_be_read_is_a_bad_row(tmp_path, caplog, case, check_media):
    """Found before training; what a header does not tell without `check_media`, when the row is asked for: the next row
    stands in for it, and it is counted once.
    """
    name, content, reason = BAD[case]
    source = folder_with(tmp_path, name, content)
    with caplog.at_level(logging.WARNING):
        built = build(source, check_media=check_media)
        rows = [built.train[index] for _ in range(2) for index in range(len(built.train))]
    (record,) = [record for record in caplog.records if "bad row" in record.message]
    assert record.message.startswith(f"skipped a bad row of it, {tmp_path / 'metadata.jsonl'} line 2: ")
    assert len(record.message.splitlines()) == 1 and re.search(reason, record.message)
    if check_media:
        assert len(rows) == 4 and built.report[-1].bad_rows == 1
    texts = [PROCESSOR.tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows]
    ending = "wav" if name.endswith("wav") else "png"
    assert set(texts) == {f"text {number}.{ending}<|end|>" for number in (0, 2)}
    with pytest.raises(
        ValueError, match=r"1 rows are bad, data\.max_invalid_rows is 0: it, .*metadata\.jsonl line 2: "
    ):
        rows = build(source, check_media=check_media, max_invalid_rows=0).train
        [rows[index] for index in range(len(rows))]


def animation():
    buffer = io.BytesIO()
    frames = [picture(16, 16, seed) for seed in range(3)]
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


GOOD = {
    "1x1 pixel": ("x.png", image_file(Image.new("RGB", (1, 1), "red"))),
    "one pixel high": ("x.png", image_file(Image.new("RGB", (5000, 1)))),
    "CMYK": ("x.jpg", image_file(picture().convert("CMYK"), "JPEG")),
    "16-bit": ("x.png", image_file(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64))),
    "palette": ("x.png", image_file(picture().convert("P"))),
    "transparent": ("x.png", image_file(picture().convert("RGBA"))),
    "animated": ("x.gif", animation()),
    "stereo": ("x.wav", audio_file(np.stack([sound(), sound(seed=1)], axis=1))),
    "8-bit": ("x.wav", audio_file(sound(), subtype="PCM_U8")),
    "another rate": ("x.flac", audio_file(sound(), rate=44100, format="FLAC")),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_unusual_is_read(tmp_path, case):
    name, content = GOOD[case]
    rows = build(folder_with(tmp_path, name, content), max_invalid_rows=0).train
    assert len(rows) == 3
    batch = Collator(PROCESSOR)([rows[index] for index in range(3)])
    tensors = batch["pixel_values" if "pixel_values" in batch else "input_features"]
    assert torch.isfinite(tensors).all() and len(tensors) == 3
    kind = "audio" if "input_features" in batch else "image"
    start = PROCESSOR.tokenizer.convert_tokens_to_ids(f"<|{kind}_start|>")
    assert (batch["input_ids"] == start).sum() == 3


def test_a_recording_of_ten_hours_is_refused_by_its_header(tmp_path, caplog):
    """Its text would stay whole. The digest reads 288 MB in pieces; the file is a hole, but for its header."""
    source = folder_with(tmp_path, "x.wav", None)
    with (tmp_path / "x.wav").open("wb") as file:
        file.write(long_recording()[:44])
        file.truncate(44 + 8000 * 36_000)
    tracemalloc.start()
    with caplog.at_level(logging.WARNING):
        rows = build(source).train
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 2 and "36000.0 seconds, of which 2 are read, while its text would stay whole" in caplog.text
    assert peak < 40e6


@pytest.mark.parametrize("check_media", [True, False])
@pytest.mark.parametrize(("samples", "is_read"), [(16000, True), (16700, True), (16900, False), (40000, False)])
def test_a_recording_that_would_be_cut_is_a_bad_row(tmp_path, caplog, samples, is_read, check_media):
    """Two seconds of 8000 samples are read; a tenth of a second more has no word in it."""
    source = folder_with(tmp_path, "x.wav", audio_file(sound(samples)))
    with caplog.at_level(logging.WARNING):
        assert len(build(source, check_media=check_media).train) == 2 + is_read
    reason = f"x.wav: {samples / 8000:.1f} seconds, of which 2 are read, while its text would stay whole; cut both"
    assert (reason in caplog.text) == (not is_read)


@pytest.mark.parametrize("check_media", [True, False])
def test_a_recording_is_cut_with_a_warning_where_that_is_asked_for(tmp_path, caplog, check_media):
    """The row is that of the first two seconds."""
    samples = sound(40000)
    source = folder_with(tmp_path, "x.wav", audio_file(samples))
    with caplog.at_level(logging.WARNING):
        built = build(source, check_media=check_media, cut_long_audio=True, max_invalid_rows=0).train
        rows = [built[index] for index in range(3)]
    assert "x.wav' has 5.0 seconds, of which the first 2 are read; cut it, or raise max_seconds" in caplog.text
    short = audio_file(samples[:16000])
    (tmp_path / "short").mkdir()
    expected = build(folder_with(tmp_path / "short", "x.wav", short), max_invalid_rows=0).train
    for row, other in zip(rows, [expected[index] for index in range(3)], strict=True):
        assert torch.equal(row["input_ids"], other["input_ids"])
        for kind in row["media"]:
            assert all(map(torch.equal, row["media"][kind], other["media"][kind]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "column 'text' is empty"),
        (" \n", "column 'text' is empty"),
        (5, "column 'text' is int, not a string"),
        (None, "column 'text' is NoneType, not a string"),
        (["a"], "column 'text' is list, not a string"),
        ("\ud800", "column 'text' is not UTF-8"),
    ],
)
def test_a_caption_that_is_empty_or_no_text_is_a_bad_row(tmp_path, caplog, text, reason):
    source = folder_with(tmp_path, "x.png", GOOD_PICTURE, text)
    with caplog.at_level(logging.WARNING):
        assert len(build(source).train) == 2
    assert f"line 2: {reason}" in caplog.text


ANSWER = {"role": "assistant", "content": "yes"}
QUESTION = {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]}
BAD_MESSAGES = {
    "no list": ("hello", "a conversation is 'hello'; give a list of messages"),
    "empty": ([], r"a conversation is \[\]; give a list of messages"),
    "no message": (["hello"], "message 0 is 'hello'; give a dict with role and content"),
    "unknown role": (
        [QUESTION, {"role": "bot", "content": "x"}],
        "message 1 has role 'bot'; choose one of user, assistant, system, tool",
    ),
    "no content": ([{"role": "user"}, ANSWER], "message 0 is .*; give a dict with role and content"),
    "no type": ([{"role": "user", "content": [{"text": "x"}]}, ANSWER], "without a type"),
    "unknown type": (
        [{"role": "user", "content": [{"type": "video", "path": "a.png"}]}, ANSWER],
        "message 0 has a part of type 'video'; choose one of text",
    ),
    "unknown type without a file": (
        [{"role": "user", "content": [{"type": "smell"}]}, ANSWER],
        "'smell' names no file",
    ),
    "text of a number": ([{"role": "user", "content": [{"type": "text", "text": 5}]}, ANSWER], "has int as its text"),
    "text that is no unicode": ([{"role": "user", "content": "\ud800"}, ANSWER], "not UTF-8"),
    "missing file": ([{"role": "user", "content": [{"type": "image", "path": "b.png"}]}, ANSWER], "no file"),
    "address": ([{"role": "user", "content": [{"type": "image", "path": "http://a/b.png"}]}, ANSWER], "never fetched"),
    "out of the folder": (
        [{"role": "user", "content": [{"type": "image", "path": "../a.png"}]}, ANSWER],
        "leads out of",
    ),
    "absolute": ([{"role": "user", "content": [{"type": "image", "path": "/etc/hosts"}]}, ANSWER], "leads out of"),
    "no answer": ([QUESTION], "no message of the assistant"),
    "empty answer": ([QUESTION, {"role": "assistant", "content": " "}], r"a message \(assistant\) is empty"),
    "empty question": ([{"role": "user", "content": ""}, ANSWER], r"a message \(user\) is empty"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_messages_that_cannot_be_used_are_a_bad_row(tmp_path, caplog, case):
    messages, reason = BAD_MESSAGES[case]
    (tmp_path / "a.png").write_bytes(GOOD_PICTURE)
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": messages}, {"other": 1}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        assert len(build(SourceConfig("chat", paths=[str(tmp_path / "a.json")])).train) == 1
    first, second = [record.message for record in caplog.records if "bad row" in record.message]
    assert f"{tmp_path / 'a.json'} item 2: " in first + second
    assert re.search(reason, first + second)
    assert "no column 'messages' (has 'other')" in first + second


@pytest.mark.parametrize(("parts", "images"), [(1, 2), (2, 1), (1, 0)])
def test_more_or_fewer_parts_than_media_are_a_bad_row(tmp_path, caplog, parts, images):
    (tmp_path / "a.png").write_bytes(GOOD_PICTURE)
    content = [{"type": "image"}] * parts + [{"type": "text", "text": "x"}]
    bad = {"messages": [{"role": "user", "content": content}, ANSWER], "seen": ["a.png"] * images}
    content = [{"type": "text", "text": "x"}]
    good = {"messages": [{"role": "user", "content": content}, ANSWER], "seen": ["a.png", "a.png"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(bad) + "\n" + json.dumps(good) + "\n")
    paths = [str(tmp_path / "a.jsonl")]
    source = SourceConfig("files", paths=paths, image_column="seen", messages_column="messages", prompt=None)
    with caplog.at_level(logging.WARNING):
        rows = build(source).train
    assert len(rows) == 1 and len(rows[0]["media"]["image"]) == 2  # no part says where: they come first
    assert ("bad row" in caplog.text) and "line 1: " in caplog.text


@pytest.mark.parametrize("is_parquet", [False, True])
def test_a_caption_of_nothing_is_a_bad_row(tmp_path, caplog, is_parquet):
    (tmp_path / "a.png").write_bytes(GOOD_PICTURE)
    if is_parquet:
        features = datasets.Features(seen=datasets.List(datasets.Image()), text=datasets.Value("string"))
        cells = [[], None, [{"bytes": GOOD_PICTURE, "path": None}], [{"bytes": b"", "path": None}]]
        columns = {"seen": cells, "text": ["x"] * 4}
        pq.write_table(pa.table(columns, schema=features.arrow_schema), tmp_path / "a.parquet")
    else:
        rows = [{"seen": cell, "text": "x"} for cell in ([], None, "a.png", 5)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / ("a.parquet" if is_parquet else "a.jsonl")
    source = SourceConfig("files", paths=[str(path)], image_column="seen", name="it")
    with caplog.at_level(logging.WARNING):
        assert len(build(source).train) == 1
    reasons = [record.message.split(": ", 1)[1] for record in caplog.records if "bad row" in record.message]
    assert reasons[:2] == ["column 'seen' holds nothing"] * 2
    assert re.search("0 bytes|is 5, not a name", reasons[2])


def test_too_many_bad_media_stop_the_run_with_the_first_of_them(tmp_path):
    rows = [{"file_name": f"{number}.png", "text": "x"} for number in range(9)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"4 rows are bad, data\.max_invalid_rows is 3: .*line 1: no file .*0\.png.*line 4"
    ):
        build(SourceConfig("imagefolder", path=str(tmp_path)), max_invalid_rows=3)
    with pytest.raises(ValueError, match=r"has no usable rows: 9 x "):
        build(SourceConfig("imagefolder", path=str(tmp_path)))


@pytest.mark.parametrize("packing", [True, False])
def test_a_medium_that_goes_bad_while_training_is_replaced_and_counted(tmp_path, caplog, packing):
    """By the next row that can be read, in whichever row it is; and when none is left, that is an error."""
    for number in range(4):
        picture(16, 16, number).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"text {number}"}) + "\n" for number in range(4)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    source = SourceConfig("imagefolder", path=str(tmp_path), name="it")
    rows = build(source, block_size=24, packing=packing, max_invalid_rows=1).train
    wanted = [rows[index] for index in range(4)]
    (tmp_path / "1.png").unlink()
    at = next(index for index, row in enumerate(wanted) if "1<|end|>" in PROCESSOR.tokenizer.decode(row["input_ids"]))
    with caplog.at_level(logging.WARNING):
        for index in (0, 1, 2, 3, at):
            instead = wanted[(index + 1) % 4 if index == at else index]
            assert rows[index]["input_ids"].tolist() == instead["input_ids"].tolist()
    assert caplog.text.count("bad row") == 1 and "1.png" in caplog.text
    for number in (0, 2, 3):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(ValueError, match=r"2 rows are bad, data\.max_invalid_rows is 1: it, "):
        rows[0]
    rows.bad_rows.limit = 100
    with pytest.raises(ValueError, match="no row of 'it' can be read any more"):
        rows[0]


def test_all_media_of_a_row_that_went_bad_are_counted_at_once(tmp_path, caplog):
    for number in range(4):
        picture(16, 16, number).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"text {number}"}) + "\n" for number in range(4)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    rows = build(SourceConfig("imagefolder", path=str(tmp_path), name="it"), block_size=60, packing=True).train
    seen = [PROCESSOR.tokenizer.decode(row["input_ids"]) for row in rows]
    first = [number for number in range(4) if f"text {number}" in seen[0]]
    assert len(seen) == 2 and len(first) == 3
    for number in first:
        (tmp_path / f"{number}.png").unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert PROCESSOR.tokenizer.decode(rows[0]["input_ids"]) == seen[1]
    assert rows.bad_rows.counts == {"it": 3}
    assert all(f"{number}.png' does not exist" in caplog.text for number in first)


def test_a_medium_that_grows_while_training_does_not_overflow_its_row(tmp_path, caplog):
    source = folder_with(tmp_path, "x.png", image_file(picture(8, 8)))
    rows = build(source, block_size=61, packing=True)
    (tmp_path / "x.png").write_bytes(image_file(picture(64, 64)))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="no row"):
        rows.train[0]  # all three share it
    assert "tokens, where headers promised at most" in caplog.text


def test_documents_longer_than_a_row_are_bad_rows(tmp_path, caplog):
    source = folder_with(tmp_path, "x.png", image_file(picture(64, 64)))
    for packing in (True, False):
        with caplog.at_level(logging.WARNING):
            rows = build(source, block_size=48, packing=packing).train
        assert rows.lengths.max() <= 48
        assert (
            "line 2: 76 tokens, 66 of them of media, more than data.block_size 48; raise it, or make the" in caplog.text
        )
    long = [{"role": "user", "content": "why? " * 50}, ANSWER]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [QUESTION, ANSWER]}, {"messages": long}]))
    (tmp_path / "a.png").write_bytes(GOOD_PICTURE)
    with caplog.at_level(logging.WARNING):
        assert len(build(SourceConfig("chat", paths=[str(tmp_path / "a.json")]), block_size=100).train) == 1
    assert "item 2: 257 tokens, more than data.block_size 100; raise it, or shorten the texts" in caplog.text


# ------------------------------------------------------------------------------------------------- whole sources


def test_sources_that_cannot_be_read_are_named(tmp_path):
    for source, message in {
        ("imagefolder", "path", str(tmp_path / "none")): "is no folder; correct the path",
        ("chat", "paths", (str(tmp_path / "none.json"),)): "no file '.*none.json'",
    }.items():
        kind, name, value = source
        with pytest.raises(ValueError, match=message):
            build(SourceConfig(kind, **{name: list(value) if isinstance(value, tuple) else value}))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json' is not usable JSON"):
        build(SourceConfig("chat", paths=[str(tmp_path / "a.json")]))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="holds dict, not a list"):
        build(SourceConfig("chat", paths=[str(tmp_path / "a.json")]))
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=r"a.tar' is not a whole, uncompressed tar"):
        build(SourceConfig("webdataset", paths=[str(tmp_path / "a.tar")], image_column="png"))


def write_tar(path, documents):
    with tarfile.open(path, "w") as tar:
        for number in range(documents):
            for extension, content in (("png", GOOD_PICTURE), ("txt", b"text")):
                entry = tarfile.TarInfo(f"{number}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_a_stream_keeps_nothing_of_a_tar_that_it_has_read(tmp_path, monkeypatch):
    """A shard may have more members than memory holds headers."""
    write_tar(tmp_path / "a.tar", 50)
    opened, open_tar = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **kwargs: opened.append(open_tar(*args, **kwargs)) or opened[-1])
    columns = {"image_column": "png", "text_column": "txt", "streaming": True}
    stream = build(SourceConfig("webdataset", paths=[str(tmp_path / "a.tar")], **columns)).train
    assert sum(len(opened[-1].members) < 3 for _ in stream) == 50


def test_a_cut_tar_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", 3)
    whole = (tmp_path / "a.tar").read_bytes()
    source = SourceConfig("webdataset", paths=[str(tmp_path / "a.tar")], image_column="png", text_column="txt")
    assert len(build(source).train) == 3
    (tmp_path / "a.tar").write_bytes(whole[: len(GOOD_PICTURE) + 700])
    with pytest.raises(ValueError, match=r"a.tar' is not a whole, uncompressed tar"):
        build(source)


def test_media_need_a_processor_and_a_model_that_reads_them(tmp_path):
    source = folder_with(tmp_path, "x.png", GOOD_PICTURE)
    with pytest.raises(
        ValueError, match=r"source 'it' has media, but the model reads text only; use model_type: megatransformer"
    ):
        build(source, train_tokenizer([], 259))
    with pytest.raises(
        ValueError, match="has no usable rows; the first of 3: message 0 has a part of type 'image'; choose one of"
    ):
        build(source, tiny_processor(image_processor=None))


def test_a_chat_template_that_leaves_out_media_is_refused(tmp_path):
    processor = tiny_processor(chat_template="{% for message in messages %}{{ message.content }}{% endfor %}")
    with pytest.raises(ValueError, match="the chat template leaves out"):
        build(folder_with(tmp_path, "x.png", GOOD_PICTURE), processor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "imagefolder"}, "a source of kind imagefolder needs path"),
        ({"kind": "files", "path": "x", "paths": ["y"]}, "path is 'x', but files of texts name no media"),
        ({"kind": "chat", "format": "llava", "paths": ["y"]}, "format is 'llava', but a source of kind chat does not"),
        ({"kind": "webdataset", "paths": ["a.tar"]}, "needs image_column or audio_column"),
        ({"kind": "imagefolder", "path": "x", "prompt_column": "q"}, r"use prompt: '\{column\}'"),
        ({"kind": "files", "paths": ["a.jsonl"], "prompt": "x"}, "prompt is 'x', which all rows would ask"),
        ({"kind": "chat", "paths": ["a.json"], "prompt": "x"}, "messages_column is 'messages'"),
        ({"kind": "generated", "task": "scenes", "image_column": "x"}, "a source of kind generated does not read it"),
        ({"kind": "imagefolder", "path": "x", "audio_column": "file_name"}, "are both 'file_name'; name two columns"),
        ({"kind": "imagefolder", "path": "x", "loss_on": "prompt"}, "loss_on is 'prompt', unknown"),
    ],
)
def test_fields_that_would_do_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)


def test_a_prompt_that_names_a_column_which_a_row_lacks(tmp_path, caplog):
    source = folder_with(tmp_path, "x.png", GOOD_PICTURE)
    source.prompt = "who is {who}?"
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="has no usable rows"):
        build(source)
    assert "column 'who' of the prompt is NoneType, not text" in caplog.text


def test_an_example_whose_picture_is_gone_says_so(tmp_path):
    source = folder_with(tmp_path, "x.png", GOOD_PICTURE)
    examples = build_examples(source, DataConfig(), PROCESSOR)
    (tmp_path / "x.png").unlink()
    assert examples[0]["answer"] == "text 0.png"
    with pytest.raises(ValueError, match=r"x\.png"):
        examples[1]
