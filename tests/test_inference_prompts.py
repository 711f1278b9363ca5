"""Many prompts from a file: answered as one by one, refused before the first is."""

import json

import pytest

from inference.generate import main
from inference.prompts import MOST_LISTED, Prompt, batches
from tests.tiny_language_model import save_checkpoint
from tests.tiny_processor import audio_file, image_file, picture, sound
from tests.tiny_reader import save_reader

PROMPTS = ["the cat", "a", "the dog sat on the mat", "b c d", "<|end|> is text"]
GREEDY = ["--greedy", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return str(save_reader(tmp_path_factory.mktemp("reader")))


@pytest.fixture
def prompt_file(tmp_path):
    """Writes lines, JSON or as they are, beside two images and a recording; returns the file's path."""

    def write(*lines):
        for name, content in (
            ("a.png", image_file(picture(seed=1))),
            ("b.png", image_file(picture(16, 24, seed=2))),
            ("c.wav", audio_file(sound(3000))),
            ("broken.png", b"no image"),
        ):
            (tmp_path / name).write_bytes(content)
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(path)

    return write


def run(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
@pytest.mark.parametrize("options", [[], ["--num-steps", "5"], ["--exit-criterion", "kl_divergence"]])
def test_answers_are_those_of_single_runs(checkpoint, prompt_file, capsys, batch_size, options):
    """Padding, neighbours and the end of a shorter answer change nothing; order and lines are those of the file."""
    argv = [checkpoint, *GREEDY, *options]
    alone = [run(capsys, *argv, "--prompt", prompt) for prompt in PROMPTS]
    path = prompt_file(*({"prompt": prompt} for prompt in PROMPTS), "")
    found = answers(run(capsys, *argv, "--prompts", path, "--batch-size", batch_size))
    assert found == [{"prompt": prompt, "text": text[:-1]} for prompt, text in zip(PROMPTS, alone, strict=True)]
    assert len(set(alone)) > 2


def test_draws_in_batches_of_one_are_those_of_single_runs(checkpoint, prompt_file, capsys):
    argv = [checkpoint, "--seed", "3", "--temperature", "2"]
    alone = [run(capsys, *argv, "--prompt", prompt)[:-1] for prompt in PROMPTS]
    path = prompt_file(*({"prompt": prompt} for prompt in PROMPTS))
    assert [row["text"] for row in answers(run(capsys, *argv, "--prompts", path, "--batch-size", "1"))] == alone


def test_answers_about_media_are_those_of_single_runs(reader, prompt_file, capsys, tmp_path, monkeypatch):
    """With one image, several, a recording, none at all, and media of several kinds in one batch; paths are relative to
    the file.
    """
    lines = [
        ({"prompt": "what?", "image": "a.png"}, ["--image", "a.png"]),
        ({"images": ["b.png", "a.png"], "prompt": "which?"}, ["--image", "b.png", "--image", "a.png"]),
        ({"audio": "c.wav"}, ["--audio", "c.wav"]),
        ({"prompt": "the cat"}, []),
        ({"image": "b.png", "audio": ["c.wav"], "prompt": "what?"}, ["--image", "b.png", "--audio", "c.wav"]),
    ]
    path = prompt_file(*(line for line, _ in lines))
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        alone = [
            run(capsys, reader, *GREEDY, *flags, *(["--prompt", line["prompt"]] if "prompt" in line else []))[:-1]
            for line, flags in lines
        ]
    found = answers(run(capsys, reader, *GREEDY, "--prompts", path))
    assert found == [{**line, "text": text} for (line, _), text in zip(lines, alone, strict=True)]
    assert len(set(alone)) > 2


def test_answers_go_to_a_file(checkpoint, prompt_file, capsys, tmp_path):
    argv = [checkpoint, *GREEDY, "--prompts", prompt_file({"prompt": "the cat"}, {"prompt": "é"})]
    expected = run(capsys, *argv)
    out = tmp_path / "out.jsonl"
    assert run(capsys, *argv, "--out", str(out)) == ""
    assert out.read_text(encoding="utf-8") == expected and "é" in expected


def test_prompts_with_and_without_media_are_never_in_one_batch():
    prompts = [Prompt(line, {}, "", (("image", "a"),) * has) for line, has in enumerate([0, 0, 0, 1, 1, 0])]
    assert [[prompt.line for prompt in batch] for batch in batches(prompts, 2)] == [[0, 1], [2], [3, 4], [5]]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == ""
    assert found.err.startswith("inference.generate: error: ") and found.err.count("\n") == 1
    return found.err


BAD_LINES = [
    ("{broken", "Expecting property name"),
    ('["a"]', "'a'"),
    ({}, "prompt is ''; give a text"),
    ({"prompt": " "}, "prompt is ' '; give a text"),
    ({"prompt": 3}, "prompt is 3; give a text"),
    ({"prompt": "a", "imgae": "a.png"}, "unknown key 'imgae'; did you mean image?"),
    ({"prompt": "a", "seed": 1}, "unknown key 'seed'; known: prompt, image, images, audio"),
    ({"image": 3}, "image is 3; give a path, or a list of paths"),
    ({"images": []}, "images is []; give a path, or a list of paths"),
    ({"image": "nowhere.png"}, "nowhere.png is no file; correct the path"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_before_a_model_is_loaded(prompt_file, capsys, line, message):
    path = prompt_file({"prompt": "the cat"}, "", line)
    found = refused(capsys, "nowhere", "--prompts", path)
    assert f"--prompts {path}: 1 of 2 lines cannot be used: line 3: " in found and message in found


def test_bad_lines_are_counted_and_the_first_named(prompt_file, capsys):
    found = refused(capsys, "nowhere", "--prompts", prompt_file({"prompt": "a"}, *["{"] * (MOST_LISTED + 2)))
    assert f"{MOST_LISTED + 2} of {MOST_LISTED + 3} lines cannot be used: line 2: " in found
    assert found.count("; line") == MOST_LISTED - 1 and found.endswith("; ...\n")


def test_a_file_that_is_not_utf8_or_empty_or_missing(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "not UTF-8 (byte 0xe9 in line 1), perhaps Latin-1; save it as UTF-8" in refused(
        capsys, "nowhere", "--prompts", str(path)
    )
    path.write_text("\n\n")
    assert f"--prompts {path} is empty: write lines" in refused(capsys, "nowhere", "--prompts", str(path))
    path.unlink()
    assert "No such file" in refused(capsys, "nowhere", "--prompts", str(path))


def test_media_that_cannot_be_read_stop_all(checkpoint, reader, prompt_file, capsys, tmp_path):
    """Before anything is answered or a file made; also those of a model that reads none."""
    path, out = prompt_file({"prompt": "a"}, {"image": "a.png"}, {"image": "broken.png"}), tmp_path / "out.jsonl"
    found = refused(capsys, reader, "--prompts", path, "--out", str(out))
    assert "1 of 3 lines cannot be used: line 3: " in found and "broken.png" in found and not out.exists()
    found = refused(capsys, checkpoint, "--prompts", path)
    assert "2 of 3 lines cannot be used: line 2: " in found and "this model reads text alone" in found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "a.jsonl", "--prompt", "a"], "--prompt has no effect with --prompts"),
        (["--prompts", "a.jsonl", "--audio", "a"], "--audio has no effect with --prompts"),
        (["--prompts", "a.jsonl", "--mode", "image", "--out", "a.png"], "--mode has no effect with --prompts"),
        (["--prompts", "a.jsonl", "--count", "2"], "--count has no effect with --mode text"),
        (["--prompt", "a", "--batch-size", "2"], "--batch-size has no effect without --prompts"),
        (["--prompt", "a", "--out", "a.jsonl"], "--out has no effect with --mode text"),
        (["--prompts", "a.jsonl", "--batch-size", "0"], "--batch-size: 0 is less than 1"),
    ],
)
def test_options_that_have_no_effect_are_refused(capsys, flags, message):
    assert message in refused(capsys, "nowhere", *flags)
