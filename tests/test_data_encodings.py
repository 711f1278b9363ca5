"""Texts with a byte-order mark are those without, wherever texts are read; other encodings are named in one line."""

import io
import json
import tarfile

import pytest

from configs import read_yaml
from dataset_loading import DataConfig, SourceConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources.loading import load_rows
from dataset_loading.sources.texts import decode_text
from inference.prompts import read_prompts
from tests.tiny_processor import image_file, picture

MARK = b"\xef\xbb\xbf"
CHAT = [{"role": "user", "content": "wie spät?"}, {"role": "assistant", "content": "zwölf"}]
ROWS = [{"file_name": "0.png", "text": "größer"}, {"file_name": "1.png", "text": "süß"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CONTENTS = {
    "jsonl": LINES,
    "metadata.jsonl": LINES,
    "metadata.csv": "file_name,text\n0.png,größer\n1.png,süß\n",
    "chat.json": json.dumps([{"messages": CHAT}] * 2, ensure_ascii=False),
    "chat.jsonl": 2 * (json.dumps({"messages": CHAT}, ensure_ascii=False) + "\n"),
}


def source_of(folder, name: str, raw: bytes) -> SourceConfig:
    for number in range(2):
        (folder / f"{number}.png").write_bytes(image_file(picture(seed=number)))
    path = folder / (name if "." in name else f"rows.{name}")
    path.write_bytes(raw)
    if name.startswith("metadata"):
        return SourceConfig("imagefolder", path=str(folder))
    return SourceConfig("chat" if name.startswith("chat") else "files", paths=[str(path)])


def load(source: SourceConfig) -> list[dict]:
    rows = load_rows(source, "train", DataConfig(), 0, BadRows(0))
    return [{name: value for name, value in row.items() if name != "where"} for row in rows]


@pytest.mark.parametrize("name", CONTENTS)
def test_a_mark_in_front_is_no_part_of_the_rows(tmp_path, name):
    raw = CONTENTS[name].encode()
    rows = load(source_of(tmp_path, name, raw))
    assert len(rows) == 2 and load(source_of(tmp_path, name, MARK + raw)) == rows


def test_marks_of_files_that_were_joined_are_no_part_of_their_lines(tmp_path):
    raw = LINES.encode()
    rows = load(source_of(tmp_path, "jsonl", MARK + raw + MARK + raw + MARK + b"\n"))
    assert rows == 2 * load(source_of(tmp_path, "jsonl", raw))


def test_a_mark_in_front_of_a_text_is_no_part_of_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "größer\ufeff\r\n".encode())
    assert load(SourceConfig("files", paths=[str(path)])) == [{"text": "größer\ufeff\r\n"}]


def test_a_mark_in_front_of_a_member_of_a_tar_is_no_part_of_it(tmp_path):
    members = {"a.png": image_file(picture()), "a.txt": MARK + b"one", "b.png": image_file(picture(seed=1))}
    members["b.json"] = MARK + b'{"txt": "two"}'
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = SourceConfig("webdataset", paths=[str(tmp_path / "a.tar")], image_column="png", text_column="txt")
    answers = [json.loads(row["messages"])[1]["content"][0]["text"] for row in load(source)]
    assert answers == ["one", "two"]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1"])
def test_another_encoding_is_one_line_with_the_file_and_the_fix(tmp_path, name, encoding):
    content = "".join(char if char != "\n" else "\r\n" for char in CONTENTS[name])
    with pytest.raises(ValueError) as error:
        load(source_of(tmp_path, name, content.encode(encoding)))
    said = str(error.value)
    assert "\n" not in said and (name if "." in name else "rows.jsonl") in said
    if name == "chat.json" and encoding == "latin-1":  # a single line, which might be damaged
        assert "is not usable JSON" in said
    else:
        assert encoding.rpartition("-")[0].upper()[:6] in said.upper() and "save it as UTF-8, e.g. iconv -f" in said


def test_one_line_that_is_damaged_costs_itself_only(tmp_path):
    path, bad_rows = tmp_path / "a.jsonl", BadRows(2)
    path.write_bytes(LINES.encode() + b'{"text": "\xe9"}\n{"text": "\xe8"}\n')
    rows = load_rows(SourceConfig("files", paths=[str(path)]), "train", DataConfig(), 0, bad_rows)
    assert rows["text"][:] == ["größer", "süß"] and bad_rows.counts == {"a": 2}


def test_a_folder_of_the_hub_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(LINES.encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows/a\.jsonl' is UTF-16, not UTF-8; save it as UTF-8"):
        load(SourceConfig("hub", path=str(tmp_path / "rows")))


def test_zeros_in_a_text_are_no_encoding():
    assert decode_text(b"a\0b and more") == "a\0b and more"


def test_a_configuration_with_a_mark(tmp_path):
    text = "model:\n  name: größer\n"
    path = tmp_path / "a.yaml"
    for raw in (text.encode(), MARK + text.encode()):
        path.write_bytes(raw)
        assert read_yaml(path) == {"model": {"name": "größer"}}
    for encoding, named in (("utf-16", "is UTF-16"), ("latin-1", "not UTF-8")):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=rf"a\.yaml .*{named}.*; save it as UTF-8$") as error:
            read_yaml(path)
        assert "\n" not in str(error.value)


def test_prompts_with_a_mark(tmp_path):
    text, path = '{"prompt": "größer"}\n{"prompt": "b"}\n', tmp_path / "prompts.jsonl"
    path.write_bytes(MARK + text.encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["größer", "b"]
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=r"prompts\.jsonl is UTF-16 or UTF-32; save it as UTF-8\.$"):
            read_prompts(path)
