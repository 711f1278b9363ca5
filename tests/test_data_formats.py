"""Data in the shapes in which others publish them, read without conversion: values of the rows that come of them."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

import pretrain
from dataset_loading import DataConfig, SourceConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources.loading import load_rows
from tests.tiny_processor import audio_file, image_file, picture, sound

TALK = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
WAV = audio_file(np.round(sound(3000, 0) * 32767).astype(np.int16))
PNG = image_file(picture(seed=0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def load(max_invalid_rows=0, **fields):
    bad_rows = BadRows(max_invalid_rows)
    return load_rows(SourceConfig(**fields), "train", DataConfig(), 0, bad_rows), bad_rows


def said(max_invalid_rows=0, **fields):
    """Role, text and names of media of each message, and the reasons against bad rows."""
    rows, bad_rows = load(max_invalid_rows, **fields)
    talks = [
        [
            (it["role"], "".join(part.get("text") or f"[{part['path'].rpartition('/')[2]}]" for part in it["content"]))
            for it in json.loads(messages)
        ]
        for messages in rows["messages"]
    ]
    return talks, [reason for _, _, reason in bad_rows.found]


def test_sharegpt(tmp_path):
    rows = [{"conversations": [{"from": "system", "value": "Be brief."}, *TALK]}, {"conversations": TALK[:1]}]
    talks, reasons = said(1, kind="files", paths=[write(tmp_path / "a.json", rows)], format="sharegpt")
    assert talks == [[("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]]
    assert reasons == ["no message of the assistant, so that there is nothing to learn"]


def test_llava(tmp_path):
    """The JSON lies apart from the images, and some rows have none."""
    write(tmp_path / "images/a.png", PNG)
    shown = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    names = ("a.png", "gone.png", "../secret.png")
    write(tmp_path / "secret.png", PNG)
    rows = [{"conversations": TALK}, *({"image": name, "conversations": shown} for name in names)]
    path = write(tmp_path / "llava.json", rows)
    talks, reasons = said(2, kind="files", paths=[path], path=str(tmp_path / "images"), format="llava")
    assert talks[0] == [("user", "2+2?"), ("assistant", "4")]
    assert talks[1:] == [[("user", "[a.png]\nWhat?"), ("assistant", "noise")]]
    assert "no file" in reasons[0] and "leads out of the folder" in reasons[1]
    with pytest.raises(ValueError, match="is no folder; correct the path"):
        said(kind="files", paths=[path], path=str(tmp_path / "nowhere"), format="llava")


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_alpaca(tmp_path, kind):
    rows = [{"instruction": "Add.", "input": "2+2", "output": "4"}, {"instruction": "Go.", "input": "", "output": "no"}]
    path = write(tmp_path / "data/a.json", rows)
    place = {"paths": [path]} if kind == "files" else {"path": str(tmp_path / "data")}
    talks, _ = said(kind=kind, **place, format="alpaca")
    assert talks == [[("user", "Add.\n\n2+2"), ("assistant", "4")], [("user", "Go."), ("assistant", "no")]]


def test_coco_captions(tmp_path):
    write(tmp_path / "train/a.png", PNG)
    captions = [{"image_id": 7, "id": 1, "caption": "noise"}, {"image_id": 8, "id": 2, "caption": "nothing"}]
    content = {"info": {"year": 1}, "images": [{"id": 7, "file_name": "a.png"}], "annotations": captions}
    path = write(tmp_path / "captions.json", content)
    talks, reasons = said(1, kind="files", paths=[path], path=str(tmp_path / "train"), format="coco")
    assert talks == [[("user", "[a.png]"), ("assistant", "noise")]]
    assert reasons[0].startswith("no column 'file_name'")


def test_common_voice(tmp_path):
    write(tmp_path / "clips/a.wav", WAV)
    path = write(tmp_path / "train.tsv", 'client_id\tpath\tsentence\n1\ta.wav\tShe said "yes\n2\tb.wav\tno\n')
    talks, reasons = said(1, kind="files", paths=[path], format="common_voice")
    assert talks == [[("user", "[a.wav]"), ("assistant", 'She said "yes')]] and "no file" in reasons[0]


def test_ljspeech(tmp_path):
    write(tmp_path / "wavs/a.wav", WAV)
    write(tmp_path / "metadata.csv", 'a|Say "1|Say one\na|Just this|\n../a|out|out\nbroken\n')
    talks, reasons = said(2, kind="audiofolder", path=str(tmp_path))
    assert talks == [[("user", "[a.wav]"), ("assistant", text)] for text in ("Say one", "Just this")]
    assert len(reasons) == 2 and all("no file" in reason or "leads out" in reason for reason in reasons)


def test_librispeech(tmp_path):
    write(tmp_path / "1/2/1-2-0.flac", WAV)
    write(tmp_path / "1/2/1-2-2.wav", WAV)
    write(tmp_path / "1/2/1-2.trans.txt", "1-2-0 GOOD MORNING\n1-2-1 GONE\n1-2-2 CONVERTED\n")
    talks, reasons = said(1, kind="audiofolder", path=str(tmp_path))
    assert talks == [
        [("user", f"[1-2-{name}]"), ("assistant", text)]
        for name, text in (("0.flac", "GOOD MORNING"), ("2.wav", "CONVERTED"))
    ]
    assert "1-2-1.flac" in reasons[0] and "no file" in reasons[0]


def test_texts_beside_images_and_names_of_folders(tmp_path):
    for name in ("cats/a.png", "dogs/b.png"):
        write(tmp_path / name, PNG)
    write(tmp_path / "cats/a.txt", "a cat\n")
    talks, reasons = said(1, kind="imagefolder", path=str(tmp_path))
    assert talks == [[("user", "[a.png]"), ("assistant", "a cat")]] and reasons[0].endswith("with its text; write it")
    talks, _ = said(kind="imagefolder", path=str(tmp_path), answer_column="label")
    assert [talk[1][1] for talk in talks] == ["cats", "dogs"]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz", "a.txt.gz", "a.json.gz"])
def test_formats_of_files(tmp_path, name):
    content = {"json": '[{"text": "one"}]', "jsonl": '{"text": "one"}\n', "csv": "text\none\n", "tsv": "text\none\n"}
    raw = content.get(name.split(".")[1], "one").encode()
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith(".gz") else raw)
    assert load(kind="files", paths=[path])[0]["text"][:] == ["one"]
    if name.endswith(".gz"):
        write(tmp_path / name, gzip.compress(raw)[:-9])
        with pytest.raises(ValueError, match=r"is no whole file of gzip: .*; write it again"):
            load(kind="files", paths=[path])


def test_what_save_to_disk_has_written(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["one", "two"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.take(1)}).save_to_disk(tmp_path / "several")
    assert load(kind="hub", path=str(tmp_path / "one"))[0]["text"][:] == ["one", "two"]
    assert load(kind="hub", path=str(tmp_path / "several"), split="test")[0]["text"][:] == ["one"]
    with pytest.raises(ValueError, match="it has no split 'dev', only train, test"):
        load(kind="hub", path=str(tmp_path / "several"), split="dev")
    state = json.loads((tmp_path / "one/state.json").read_text())
    state["_data_files"] = [{"filename": "../several/train/data-00000-of-00001.arrow"}]
    write(tmp_path / "one/state.json", state)
    with pytest.raises(ValueError, match="is no regular file inside of it"):
        load(kind="hub", path=str(tmp_path / "one"))


def test_ranges_of_tars(tmp_path):
    for number in range(9, 11):
        with tarfile.open(tmp_path / f"s-{number:03}.tar", "w") as tar:
            for name, raw in ((f"{number}.png", PNG), (f"{number}.txt", f"text {number}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))
    fields = {"kind": "webdataset", "image_column": "png", "text_column": "txt"}
    for name in ("s-{009..010}.tar", "s-{009,010}.tar", "{s-0,s-0}{09,10}.tar"):
        rows, _ = load(**fields, paths=[str(tmp_path / name)])
        assert [json.loads(it)[1]["content"][0]["text"] for it in rows["messages"]] == ["text 9", "text 10"]
    for name, message in (
        ("s-{009..011}.tar", "no file '.*s-011.tar'"),
        ("s-{009,x}.tar", "no file '.*s-x.tar'"),
        ("s-{3..1}.tar", "smaller number first"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**fields, paths=[str(tmp_path / name)])


def test_the_sources_of_the_page_are_valid():
    page = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    table = page.split("### Published shapes\n")[1].split("\n### ")[0]
    sources = [SourceConfig(**yaml.safe_load(it)) for it in re.findall(r"\| `(\{kind.*\})` \|$", table, re.MULTILINE)]
    assert len(sources) == 11 and {source.format for source in sources} >= {"llava", "alpaca", "coco"}


def test_a_run_reads_them_all(tmp_path, caplog):
    """One mixture has three shapes with images, three with sound and two of texts, and two updates learn from it."""
    shown = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "noise"}]
    llava = [{"image": "a.png", "conversations": shown}, {"conversations": TALK}]
    captions = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": [{"image_id": 7, "id": 1, "caption": "noise"}],
    }
    alpaca = [{"instruction": "Add.", "input": "2+2", "output": "4"}]
    for name, content in {
        "images/a.png": PNG,
        "cats/cat/a.png": PNG,
        "voice/clips/a.wav": WAV,
        "voice/train.tsv": "path\tsentence\na.wav\tyes\n",
        "lj/wavs/a.wav": WAV,
        "lj/metadata.csv": "a|Say 1|Say one\n",
        "libri/1-2-0.flac": WAV,
        "libri/1-2.trans.txt": "1-2-0 GOOD MORNING\n",
        "llava.json": llava,
        "captions.json": captions,
        "talks.json": [{"conversations": TALK}],
        "alpaca.json": alpaca,
    }.items():
        write(tmp_path / name, content)
    images = str(tmp_path / "images")
    files = {
        "llava": {"paths": [str(tmp_path / "llava.json")], "path": images, "format": "llava"},
        "coco": {"paths": [str(tmp_path / "captions.json")], "path": images, "format": "coco"},
        "voice": {"paths": [str(tmp_path / "voice/train.tsv")], "format": "common_voice"},
        "talks": {"paths": [str(tmp_path / "talks.json")], "format": "sharegpt"},
        "alpaca": {"paths": [str(tmp_path / "alpaca.json")], "format": "alpaca"},
    }
    sources = [{"name": name, "kind": "files", **fields} for name, fields in files.items()]
    sources.append({"name": "cats", "kind": "imagefolder", "path": str(tmp_path / "cats"), "answer_column": "label"})
    sources += [{"name": name, "kind": "audiofolder", "path": str(tmp_path / name)} for name in ("lj", "libri")]
    out = tmp_path / "out"
    training = {"output_dir": out, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    training |= {"eval_steps": 2, "save_strategy": "no", "dataloader_num_workers": 0, "warmup_steps": 1}
    training |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "num_train_epochs": 1}
    command = ["--config", "configs/recurrent_mixture.yaml", "--data.train", json.dumps(sources)]
    command += ["--data.validation", "[{kind: generated, task: stories, num_rows: 2}]", "--tokenizer.vocab_size", "270"]
    command += [str(word) for name, value in training.items() for word in (f"--training.{name}", value)]
    with caplog.at_level("INFO"):
        assert pretrain.main(command) == 0
    read = dict(re.findall(r"role='train', name='(\w+)', documents=(\d+)", caplog.text))
    assert read == {source["name"]: "2" if source["name"] == "llava" else "1" for source in sources}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
