"""`python -m inference.generate --mode image|audio`: files of what a model has written."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import set_seed

from inference.generate import main
from inference.output import image_sheet
from tests.tiny_artist import CODES, artist_processor, save_artist, tiny_artist, write_codes
from tests.tiny_language_model import save_checkpoint
from tests.tiny_reader import save_reader


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_artist(tmp_path_factory.mktemp("artist")))


def write(checkpoint, *options):
    return main([checkpoint, "--prompt", "a red circle", "--num-steps", "2", *map(str, options)])


def test_a_picture_and_a_sheet_of_several(checkpoint, tmp_path, capsys):
    """The first of a sheet is the one that is written alone; the same seed gives the same picture."""
    assert write(checkpoint, "--mode", "image", "--out", tmp_path / "a.png") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    write(checkpoint, "--mode", "image", "--out", tmp_path / "b.png", "--count", 3)
    alone, sheet = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("a.png", "b.png"))
    assert alone.shape == (32, 32, 3) and sheet.shape == (66, 66, 3)
    assert np.abs(sheet[:8, :8] - alone[:8, :8]).max() <= 2  # the first patch; small weights differ more and more later
    assert (sheet[32:34] == 255).all() and (sheet[34:, 34:] == 255).all()
    assert np.abs(sheet[:8, 34:42] - alone[:8, :8]).max() > 10


def test_latents_may_be_drafts(checkpoint, tmp_path):
    """With no tolerance, the image of plain decoding."""
    options = ("--mode", "image", "--guidance-scale", 1, "--num-steps", 3)
    write(checkpoint, *options, "--out", tmp_path / "a.png")
    write(checkpoint, *options, "--out", tmp_path / "b.png", "--decoding", "wavefront", "--latent-tolerance", 0)
    plain, wave = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("a.png", "b.png"))
    assert np.abs(plain - wave).max() <= 1


def test_pictures_of_codes_are_drawn_as_well(tmp_path, monkeypatch):
    """By a model whose pictures are tokens: those that decoding its own tokens gives."""
    model, out = save_artist(tmp_path / "artist", CODES), tmp_path / "a.png"
    with pytest.raises(SystemExit):  # it has learned nothing, and writes something else
        write(str(model), "--mode", "image", "--out", out)
    assert not out.exists()
    write_codes(monkeypatch)
    write(str(model), "--mode", "image", "--out", out, "--count", 2, "--seed", 3)
    artist, processor = tiny_artist(image=CODES), artist_processor(CODES)
    question = [{"role": "user", "content": "a red circle"}]
    inputs = processor.apply_chat_template([question] * 2, add_generation_prompt=True, tokenize=True, return_dict=True)
    set_seed(3)
    ids = artist.generate(**inputs.convert_to_tensors("pt"), num_steps=2, do_sample=True, top_k=0, max_new_tokens=17)
    expected = np.concatenate([np.asarray(image) for image in artist.decode_image_tokens(ids)], axis=1)
    found = np.asarray(Image.open(out))
    assert np.array_equal(found[:, [*range(32), *range(34, 66)]], expected)


def test_sounds_in_numbered_files(checkpoint, tmp_path, capsys):
    options = ("--guidance-scale", 1, "--num-flow-steps", 2, "--flow-temperature", 0.5, "--count", 2)
    write(checkpoint, "--mode", "audio", "--out", tmp_path / "a.wav", *options)
    paths = [tmp_path / "a-1.wav", tmp_path / "a-2.wav"]
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in paths)
    clips = [soundfile.read(path) for path in paths]
    assert all(rate == 8000 and len(samples) for samples, rate in clips)


def test_pictures_of_a_sheet_stand_row_by_row():
    colours = [(10 * number, 0, 0) for number in range(5)]
    sheet = image_sheet([Image.new("RGB", (4, 3), colour) for colour in colours])
    assert sheet.size == (16, 8)
    assert [sheet.getpixel((6 * (number % 3), 5 * (number // 3))) for number in range(5)] == colours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "image"), "--mode image needs a file"),
        (("--out", "a.png"), "--out has no effect with --mode text"),
        (("--mode", "image", "--out", "a.wav"), "is no name for image: end it in .png"),
        (("--mode", "image", "--out", "/nowhere/a.png"), "the folder /nowhere does not exist"),
        (("--mode", "image", "--out", "a.png", "--guidance-scale", "-1"), "-1 is less than 0"),
        (("--mode", "image", "--out", "a.png", "--num-flow-steps", "0"), "0 is less than 1"),
        (("--mode", "image", "--out", "a.png", "--decoding", "wavefront"), "say by latent_tolerance what is"),
        (("--latent-tolerance", "0.1"), "--latent-tolerance has no effect with --mode text"),
    ],
)
def test_what_cannot_be_written_is_one_line(checkpoint, options, message, capsys):
    with pytest.raises(SystemExit) as failure:
        write(checkpoint, *options)
    assert failure.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("mode", ["image", "audio"])
def test_what_a_model_has_no_head_for_is_one_line(tmp_path, mode, capsys):
    out = {"image": "a.png", "audio": "a.wav"}[mode]
    save_reader(tmp_path / "reader")
    save_checkpoint(tmp_path / "text")
    for name, message in (
        (
            "reader",
            f"generation_mode '{mode}' needs a flow head for {mode}, which this model does not have; it writes text",
        ),
        ("text", f"--mode {mode} was given, but this model writes text alone: leave it out"),
    ):
        with pytest.raises(SystemExit) as failure:
            write(str(tmp_path / name), "--mode", mode, "--out", tmp_path / out)
        error = capsys.readouterr().err
        assert failure.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / out).exists()


def test_a_checkpoint_whose_latents_are_no_numbers_is_one_line(tmp_path, capsys):
    model = tiny_artist()
    model.model.writers["image"].head.out_proj.bias.data[0] = 3e38  # a number, or loading would refuse it
    model.save_pretrained(tmp_path)
    artist_processor().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as failure:
        write(str(tmp_path), "--mode", "image", "--out", tmp_path / "a.png")
    error = capsys.readouterr().err
    assert failure.value.code == 2 and "the image head gave latents that are NaN or infinite" in error
    assert error.count("\n") == 1 and not (tmp_path / "a.png").exists()


def test_a_checkpoint_whose_codes_are_drawn_of_no_numbers_is_one_line(tmp_path, capsys):
    model = tiny_artist(image=CODES)
    model.get_input_embeddings().weight.data[:] = 3e38  # numbers, or loading would refuse them
    model.save_pretrained(tmp_path)
    artist_processor(CODES).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as failure:
        write(str(tmp_path), "--mode", "image", "--out", tmp_path / "a.png")
    error = capsys.readouterr().err
    assert failure.value.code == 2 and "the model's logits are infinite or no numbers" in error
    assert error.count("\n") == 1 and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["image_start", "image_end", "audio_start", "audio_end"])
@pytest.mark.parametrize("value", [None, 3])
def test_a_token_of_written_media_that_is_another_is_one_line(tmp_path, capsys, name, value):
    """Drawn all the same, a picture would begin or end with something else."""
    save_artist(tmp_path / "artist")
    path = tmp_path / "artist" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {f"{name}_token_id": value}))
    with pytest.raises(SystemExit) as failure:
        write(str(tmp_path / "artist"), "--mode", "image", "--out", tmp_path / "a.png")
    error = capsys.readouterr().err
    there = f"has {name}_token_id {config[f'{name}_token_id']}, the model {value}: they do not belong together"
    assert failure.value.code == 2 and there in error and error.count("\n") == 1


def test_media_are_not_written_without_their_tokens():
    """A model that was loaded without its processor."""
    model, processor = tiny_artist(), artist_processor()
    question = [{"role": "user", "content": "a red circle"}]
    inputs = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=True, return_dict=True)
    model.config.image_start_token_id = None
    with pytest.raises(ValueError, match=r"^image_start_token_id is not set in the model's configuration"):
        model.generate(**inputs.convert_to_tensors("pt"), generation_mode="image")
