"""The command line that answers to images and sound, and the checkpoints it loads."""

import shutil

import pytest
import torch

from inference.generate import main
from inference.loading import load_model
from model import tokenizer_of
from tests.tiny_language_model import save_checkpoint
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor
from tests.tiny_reader import save_reader, tiny_reader


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of two images and a recording."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in (
        ("a.png", image_file(picture(seed=1))),
        ("b.png", image_file(picture(16, 24, seed=2))),
        ("c.wav", audio_file(sound(3000))),
    ):
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in ("a.png", "b.png", "c.wav")}


def run(capsys, *argv):
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def answer(media, prompt, num_steps, max_new_tokens):
    """Greedy decoding without `generate` and without messages: tokens put together by hand, the whole through the model
    for each new token.
    """
    model, processor = tiny_reader(), tiny_processor()
    tokenizer = processor.tokenizer
    text = "<|begin|><|user|>" + "".join(f"<|{kind}|>" for kind, _ in media) + prompt + "<|assistant|>"
    given = {"images": [it for kind, it in media if kind == "image"], "audio": [it for k, it in media if k == "audio"]}
    given = {name: items for name, items in given.items() if items}
    batch = processor(text=text, **given, add_special_tokens=False, return_tensors="pt")
    ids, length = batch.pop("input_ids"), batch.pop("attention_mask").sum()
    not_to_say = [getattr(model.config, f"{kind}_token_id") for kind in ("image", "audio")]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids, **batch, num_steps=num_steps).logits[0, -1]
        logits[not_to_say] = -torch.inf
        ids = torch.cat((ids, logits.argmax().view(1, 1)), dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True) + "\n"


def test_the_answer_to_media_in_their_order_at_a_depth(checkpoint, files, capsys):
    media = [("image", files["b.png"]), ("audio", files["c.wav"]), ("image", files["a.png"])]
    flags = [flag for kind, path in media for flag in (f"--{kind}", path)]
    argv = [checkpoint, "--greedy", "--max-new-tokens", 8, *flags]
    found = [
        run(capsys, *argv, "--prompt", "what?", "--num-steps", steps, *more)
        for steps, more in ((1, []), (5, ["--no-stream"]))
    ]
    assert found == [answer(media, "what?", steps, 8) for steps in (1, 5)] and found[0] != found[1]


def test_a_picture_alone_needs_no_prompt(checkpoint, files, capsys, monkeypatch):
    """Standard input is not asked for one either."""
    monkeypatch.setattr("sys.stdin", None)
    argv = [checkpoint, "--greedy", "--max-new-tokens", 6]
    found = [run(capsys, *argv, "--image", files[name]) for name in ("a.png", "b.png")]
    assert found == [answer([("image", files[name])], "", None, 6) for name in ("a.png", "b.png")]
    assert found[0] != found[1]


def test_a_text_alone_is_continued(checkpoint, capsys):
    """As documents of text are trained: no message."""
    model, tokenizer = tiny_reader(), tiny_processor().tokenizer
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("the cat", add_special_tokens=False)]])
    length = ids.shape[1]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, length:]
    found = run(capsys, checkpoint, "--prompt", "the cat", "--greedy", "--max-new-tokens", 5)
    assert found == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_in_half_precision(checkpoint, files, capsys):
    argv = [checkpoint, "--image", files["a.png"], "--audio", files["c.wav"], "--max-new-tokens", 2, "--greedy"]
    run(capsys, *argv, "--dtype", "bfloat16")


def check_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == "" and found.err.count("\n") == 1
    assert message in found.err


def test_media_that_cannot_be_read_are_one_line(checkpoint, files, tmp_path, capsys):
    check_error(capsys, [checkpoint, "--image", tmp_path / "none.png"], "none.png")
    cut = tmp_path / "cut.png"
    with open(files["a.png"], "rb") as file:
        cut.write_bytes(file.read()[:200])
    check_error(capsys, [checkpoint, "--image", cut], "cut.png")
    check_error(capsys, [checkpoint, "--audio", files["a.png"]], "a.png")
    check_error(capsys, [checkpoint, "--image", "https://example.org/a.png"], "never fetched")


def test_a_model_of_text_reads_no_image(files, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path)
    message = f"--image {files['a.png']} was given, but this model reads text alone: leave it out."
    check_error(capsys, [checkpoint, "--image", files["a.png"]], message)


# Loading


def test_loaded_is_saved(checkpoint, files):
    """Model and processor."""
    model, processor = load_model(checkpoint)
    assert not model.training and len(tokenizer_of(processor)) == len(tiny_processor().tokenizer)
    batches = [
        it(text="<|image|>a", images=files["a.png"], return_tensors="pt") for it in (processor, tiny_processor())
    ]
    with torch.no_grad():
        ours, theirs = model(**batches[0]).logits, tiny_reader()(**batches[1]).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("processor_config.json", None, "has no processor_config.json"),
        ("processor_config.json", "{", "processor_config.json is not valid JSON"),
        ("tokenizer.json", None, "has no tokenizer.json"),
    ],
)
def test_a_checkpoint_without_its_processor_is_incomplete(checkpoint, tmp_path, name, content, message):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=message):
        load_model(copy)


def test_a_processor_of_something_else_names_its_files(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "processor_config.json").write_text('{"image_processor": {"image_processor_type": "Nothing"}}')
    with pytest.raises(ValueError, match=r"processor_config\.json or .*tokenizer\.json in .*copy is damaged"):
        load_model(copy)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    save_reader(tmp_path)
    tokenizer = tiny_processor().tokenizer
    tokenizer.add_tokens([f"<new {index}>" for index in range(9)])
    tiny_processor(tokenizer=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 277 tokens, the model only 272"):
        load_model(tmp_path)
