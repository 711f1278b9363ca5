"""Files and folders that are there whole or not at all, also where a disk is full."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import convert
from inference import generate
from inference.conversation import Conversation
from inference.output import append, save_audio, save_images, whole_file, whole_folder
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


@contextmanager
def full_disk(size: int):
    """No file grows beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def by_pillow(path):
    Image.effect_noise((200, 200), 90).save(path)


def by_safetensors(path):
    save_file({"a": torch.zeros(10_000)}, path)


def by_tokenizers(path):
    tiny_tokenizer().backend_tokenizer.save(str(path))


WRITERS = {
    "text.json": lambda path: path.write_text("x" * 10_000),
    "image.png": by_pillow,
    "weights.safetensors": by_safetensors,
    "tokenizer.json": by_tokenizers,
    "weights.pt": lambda path: torch.save(torch.zeros(10_000), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, name):
    (tmp_path / name).write_text("before")
    refusal = pytest.raises(ValueError, match=rf"{tmp_path / name} cannot be written: .*\w")
    with full_disk(1000), refusal, whole_file(tmp_path / name) as path:
        WRITERS[name](path)
    assert names_in(tmp_path) == [name] and (tmp_path / name).read_text() == "before"
    with whole_file(tmp_path / name) as path:
        WRITERS[name](path)
    assert names_in(tmp_path) == [name] and (tmp_path / name).stat().st_size > 1000


def test_a_file_that_was_half_written_when_something_else_failed_is_gone(tmp_path):
    for error, shown in ((ValueError("mine"), "mine"), (RuntimeError("theirs"), "RuntimeError: theirs")):
        with pytest.raises(ValueError, match=shown), whole_file(tmp_path / "a.txt") as path:
            path.write_text("half")
            raise error
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []


def test_what_is_no_ordinary_file_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "real.txt").write_text("before")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    for name in ("pipe", "link.txt"):
        with whole_file(tmp_path / name) as path:
            path.write_text("all")
    assert os.read(reading, 10) == b"all" and (tmp_path / "real.txt").read_text() == "all"
    os.close(reading)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link.txt").is_symlink()
    refusal = pytest.raises(ValueError, match="/dev/full cannot be written: No space left on device")
    with refusal, whole_file(Path("/dev/full")) as path:
        path.write_text("all")


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    wrong = {
        "folder": "is a folder",
        "none/a.txt": "No such file",
        "file/a.txt": "Not a directory",
        "a" * 300: "too long",
    }
    for name, reason in wrong.items():
        with pytest.raises(ValueError, match=f"cannot be written: .*{reason}"), whole_file(tmp_path / name) as path:
            path.write_text("all")
    assert names_in(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("others", [None, [], ["other.txt"]])
def test_a_folder_is_there_whole_or_not_at_all(tmp_path, others):
    folder = tmp_path / "out"
    for name in [] if others is None else [".", *others]:
        folder.mkdir(exist_ok=True)
        if name != ".":
            (folder / name).write_text("kept")
    before = names_in(tmp_path)
    refusal = pytest.raises(ValueError, match=f"{folder} cannot be written: File too large")
    with full_disk(1000), refusal, whole_folder(folder) as made:
        (made / "a.txt").write_text("a")
        (made / "b.txt").write_text("b" * 2000)
    assert names_in(tmp_path) == before
    with whole_folder(folder) as made:
        (made / "a.txt").write_text("a")
    assert names_in(folder) == sorted(["a.txt", *(others or [])]) and folder.stat().st_mode & 0o77 != 0


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    append(tmp_path / "talk.jsonl", "first")
    with full_disk(100), pytest.raises(ValueError, match="cannot be written: "):
        append(tmp_path / "talk.jsonl", "x" * 1000)
    assert (tmp_path / "talk.jsonl").read_text() == "first\n"


def test_images_and_sounds_are_written_all_or_none(tmp_path):
    with full_disk(1000), pytest.raises(ValueError, match=r"a\.png cannot be written"):
        save_images([Image.effect_noise((64, 64), 90)], tmp_path / "a.png")
    with full_disk(3000), pytest.raises(ValueError, match=r"a-\d\.wav cannot be written"):
        save_audio([torch.zeros(1000), torch.zeros(9000)], 8000, tmp_path / "a.wav")
    assert names_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_merge_onto_a_full_disk_leaves_nothing_and_may_be_repeated(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    monkeypatch.setattr(convert, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(convert, "is_adapter", lambda path: True)
    monkeypatch.setattr(convert, "load_model", lambda folder, base: (model, tokenizer))
    argv = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    with full_disk(5000), pytest.raises(SystemExit) as caught:
        convert.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and f"{tmp_path / 'merged'} cannot be written" in line
    assert names_in(tmp_path) == []
    assert convert.main(argv) == 0
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(names_in(tmp_path / "merged"))


def test_answers_to_many_prompts_are_there_when_all_are(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the mat"}\n')
    argv = [str(checkpoint), "--prompts", str(tmp_path / "prompts.jsonl"), "--batch-size", "1", "--max-new-tokens", "2"]
    with full_disk(40), pytest.raises(SystemExit):
        generate.main([*argv, "--out", str(tmp_path / "out.jsonl")])
    assert "out.jsonl cannot be written: File too large" in capsys.readouterr().err
    assert names_in(tmp_path) == ["prompts.jsonl"]
    assert generate.main([*argv, "--out", str(tmp_path / "out.jsonl")]) == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["the cat", "the mat"]


def test_saving_a_conversation_where_nothing_can_be_written(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    conversation = Conversation(tiny_model(), tokenizer, {"max_new_tokens": 4})
    conversation.messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        conversation.save(tmp_path / "none" / "talk.jsonl")


@pytest.mark.slow
def test_standard_output_that_is_full_is_one_line(checkpoint):
    argv = [sys.executable, "-m", "inference.generate", str(checkpoint), "--prompt", "a", "--max-new-tokens", "2"]
    for more in ([], ["--no-stream"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*argv, *more], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        lines = [line for line in done.stderr.splitlines() if "kernel" not in line]
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert "standard output cannot be written: No space left on device" in lines[0]
