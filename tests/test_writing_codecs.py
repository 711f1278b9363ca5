"""Codecs of what is written: there and back, trained ones by folder, and codes as tokens of the vocabulary."""

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from model import (
    MegaTransformerAudioWriterConfig,
    MegaTransformerImageAutoencoder,
    MegaTransformerImageAutoencoderConfig,
    MegaTransformerImageWriterConfig,
    MegaTransformerVocoder,
    MegaTransformerVocoderConfig,
)
from model.codecs import build_codec
from tests.tiny_writing import IMAGE_START, WRITTEN_IMAGE, tiny_writer, writing_batch

SMALL = {"hidden_size": 16, "intermediate_size": 16}
AUTOENCODER = {**SMALL, "image_size": 8, "patch_size": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}
OFFSET = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of trained codecs: sphere, fsq, vocoder."""
    root = tmp_path_factory.mktemp("codecs")
    torch.manual_seed(0)
    for name, options in (("sphere", {"latent_size": 6}), ("fsq", {"bottleneck": "fsq", "fsq_levels": [3, 5]})):
        config = MegaTransformerImageAutoencoderConfig(**AUTOENCODER, **options)
        MegaTransformerImageAutoencoder(config).save_pretrained(root / name)
    sound = {"sampling_rate": 8000, "n_fft": 32, "hop_length": 16, "num_mel_bins": 8, "num_hidden_layers": 1}
    MegaTransformerVocoder(MegaTransformerVocoderConfig(**SMALL, **sound)).save_pretrained(root / "vocoder")
    return root


def test_patches_there_and_back():
    """Each latent is a square of pixels, row by row, times 2."""
    codec = build_codec(MegaTransformerImageWriterConfig(image_size=8, patch_size=4))
    pixels = torch.arange(3 * 8 * 8).view(1, 3, 8, 8) % 255 / 127.5 - 1
    latents, lengths = codec.encode(pixels)
    assert lengths == [4] and torch.equal(latents[1].view(3, 4, 4), 2 * pixels[0, :, :4, 4:])
    image = codec.decode(latents)
    assert image.size == (8, 8)
    assert image.getpixel((5, 2)) == tuple(round((float(value) + 1) * 127.5) for value in pixels[0, :, 2, 5])
    assert codec.project(torch.tensor([[-3.0, 1.0]])).tolist() == [[-2.0, 1.0]]


def test_frames_there_and_back():
    codec = build_codec(MegaTransformerAudioWriterConfig(num_mel_bins=4, frames_per_token=2, n_fft=256))
    frames = torch.arange(2 * 4 * 6).view(2, 4, 6).float()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    latents, lengths = codec.encode(frames, mask)
    assert lengths == [2, 3]
    assert torch.equal(codec.log_mel(latents[:2]), frames[0, :, :4])
    assert torch.equal(codec.log_mel(latents[2:]), frames[1])
    assert latents[2].view(4, 2).tolist() == frames[1, :, :2].tolist()


def test_targets_are_refined_where_the_autoencoder_says_so(folder, tmp_path):
    alone = MegaTransformerImageAutoencoder.from_pretrained(folder / "sphere").eval()
    alone.config.num_refinement_steps = 3
    alone.save_pretrained(tmp_path)
    model = tiny_writer(image={"codec": "autoencoder", "codec_name_or_path": str(tmp_path)})
    model.model.load_backbones()
    pixels = writing_batch()["image_targets"]
    latents, _ = model.model.writers["image"].codec.encode(pixels)
    refined = alone.refine(pixels, alone.encode(pixels))
    assert not torch.allclose(refined, alone.encode(pixels), atol=1e-3)
    torch.testing.assert_close(latents.view(2, 4, 6), refined)
    model.train()
    model(**writing_batch(), num_steps=2).loss.backward()
    assert all(weight.grad is None for weight in model.model.writers["image"].codec.parameters())


def test_an_autoencoder_is_loaded_and_stays_as_it_is(folder, tmp_path):
    model = tiny_writer(image={"codec": "autoencoder", "codec_name_or_path": str(folder / "sphere")})
    model.model.load_backbones()
    alone = MegaTransformerImageAutoencoder.from_pretrained(folder / "sphere").eval()
    codec = model.model.writers["image"].codec
    pixels = writing_batch()["image_targets"]
    latents, _ = codec.encode(pixels)
    torch.testing.assert_close(latents.view(2, 4, 6), alone.encode(pixels))
    torch.testing.assert_close(codec.project(3 * latents), latents)
    model.train()
    model(**writing_batch(), num_steps=2).loss.backward()
    assert not any(weight.requires_grad for weight in codec.parameters()) and not codec.autoencoder.training
    model.save_pretrained(tmp_path)
    (folder / "sphere").rename(folder / "moved")
    try:
        again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again.model.writers["image"].codec.encode(pixels)[0], latents)
    finally:
        (folder / "moved").rename(folder / "sphere")


def test_a_vocoder_makes_the_sound(folder):
    model = tiny_writer(audio={"vocoder_name_or_path": str(folder / "vocoder")})
    model.model.load_backbones()
    codec = model.model.writers["audio"].codec
    log_mel = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    latents, _ = codec.encode(log_mel[None])
    alone = MegaTransformerVocoder.from_pretrained(folder / "vocoder").eval()
    torch.testing.assert_close(codec.decode(latents), alone.decode(log_mel[None])[0].detach())


def test_codes_are_tokens(folder):
    """The loss of an image is the cross-entropy of its codes in its places, as of a model that is given the ids; and
    codes that are generated become the image that the autoencoder makes of them.
    """
    image = {"codec": "autoencoder", "codec_name_or_path": str(folder / "fsq"), "head": "fsq"}
    model = tiny_writer(image=image, code_offset=OFFSET, vocab_size=OFFSET + 15)
    model.model.load_backbones()
    codec = model.model.writers["image"].codec
    batch = writing_batch()
    places = batch["input_ids"] == WRITTEN_IMAGE
    batch["labels"][places] = WRITTEN_IMAGE
    codes = codec.encode_ids(batch["image_targets"]) + OFFSET
    given = {key: it for key, it in batch.items() if key != "image_targets"}
    given["input_ids"] = batch["input_ids"].masked_scatter(places, codes)
    given["labels"] = batch["labels"].masked_scatter(places, codes)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**given).loss)
        with pytest.raises(ValueError, match="shift_labels does not know the codes of images"):
            model(**batch, shift_labels=batch["labels"])
    row = given["input_ids"][1:2]
    (picture,) = model.decode_image_tokens(row)
    expected = codec.decode_ids(codes[1:] - OFFSET)[0]
    assert picture.tobytes() == expected.tobytes()
    start = row[0].tolist().index(IMAGE_START)
    with pytest.raises(ValueError, match="row 0 has 2 codes, but an image has 4"):
        model.decode_image_tokens(row[:, : start + 3])
    with pytest.raises(ValueError, match=r"needs a flow head for image.* its images are tokens: generate text"):
        model.generate(row[:, :start], generation_mode="image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("image_targets"), "there are 8 places for a written image, but no image_targets"),
        (lambda batch: batch["image_targets"].fill_(torch.nan), "image_targets has values that are NaN or infinite"),
        (lambda batch: batch.update(image_targets=torch.zeros(2, 3, 12, 12)), r"expected \(images, 3, 8, 8\)"),
    ],
    ids=["missing", "nan", "size"],
)
def test_images_that_have_no_codes_are_refused(folder, change, message):
    image = {"codec": "autoencoder", "codec_name_or_path": str(folder / "fsq"), "head": "fsq"}
    model, batch = tiny_writer(image=image, code_offset=OFFSET, vocab_size=OFFSET + 15), writing_batch()
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"codec": "autoencoder"}, "needs codec_name_or_path"),
        ({"head": "fsq"}, "'patch' does not have"),
        ({"patch_size": 3}, r"image_size \(8\) must be a multiple of patch_size \(3\)"),
        ({"codec": "autoencoder", "codec_name_or_path": "/nowhere"}, "codec '/nowhere' cannot be loaded"),
        ({"codec": "autoencoder", "codec_name_or_path": "vocoder"}, "is a 'megatransformer_vocoder', and not a"),
        ({"codec": "autoencoder", "codec_name_or_path": "fsq"}, "head 'flow' does not go with"),
    ],
)
def test_codecs_that_do_not_fit_are_refused(folder, image, message):
    if image.get("codec_name_or_path") in ("vocoder", "fsq"):
        image = {**image, "codec_name_or_path": str(folder / image["codec_name_or_path"])}
    with pytest.raises(ValueError, match=message):
        tiny_writer(image=image)


def test_a_vocabulary_without_room_for_codes_is_refused(folder):
    image = {"codec": "autoencoder", "codec_name_or_path": str(folder / "fsq"), "head": "fsq"}
    with pytest.raises(ValueError, match=r"raise model.text_config.vocab_size to 55 or more"):
        tiny_writer(image=image, code_offset=OFFSET)
