"""What the assistant shows, in chats and batches: tokens, labels and targets, each counted and computed by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_loading import train_tokenizer
from model import (
    MEDIA_TOKENS,
    MegaTransformerConfig,
    MegaTransformerFeatureExtractor,
    MegaTransformerProcessor,
    build_processor,
    media_tokens,
)
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor, writing_processor

PROCESSOR = writing_processor()
TOKENIZER = PROCESSOR.tokenizer


def ids_of(*pieces: str) -> list[int]:
    """Special tokens by name, everything else as bytes."""
    known = TOKENIZER.get_added_vocab()
    return [i for piece in pieces for i in ([known[piece]] if piece in known else TOKENIZER.encode(piece))]


def ask(text: str, *shown: dict) -> list[dict]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": list(shown)}]


def image(width: int = 16, height: int = 16) -> dict:
    return {"type": "image", "image": picture(width, height)}


def recording(samples: int = 2000) -> dict:
    return {"type": "audio", "audio": sound(samples)}


IMAGE = ["<|image_start|>", *["<|written_image|>"] * 4, "<|image_end|>"]


# --------------------------------------------------------------------------------------------------- tokens and labels


def test_an_image_that_the_assistant_shows_is_written():
    """Learned are its start and the end of the message; its length is fixed, and its content is no token."""
    chat = PROCESSOR.encode_chat(ask("a cat", image()))
    assert chat["input_ids"].tolist() == ids_of("<|begin|>", "<|user|>", "a cat", "<|assistant|>", *IMAGE, "<|end|>")
    assert chat["answer_mask"].tolist() == [False] * 8 + [True] + [False] * 5 + [True]
    assert list(chat["media"]) == ["written_image"]


def test_codes_are_learned_where_they_stand():
    sizes = PROCESSOR.image_writer | {"is_learned": True}
    chat = writing_processor(image_writer=sizes).encode_chat(ask("a cat", image()))
    assert chat["answer_mask"].tolist() == [False] * 8 + [True] * 5 + [False, True]


def test_sound_that_the_assistant_plays_is_learned_to_go_on_and_to_end():
    """2000 samples are 26 frames of 80, and so 7 tokens of 4."""
    chat = PROCESSOR.encode_chat(ask("hi", recording(2000)))
    played = ["<|audio_start|>", *["<|written_audio|>"] * 7, "<|audio_end|>"]
    assert chat["input_ids"].tolist() == ids_of("<|begin|>", "<|user|>", "hi", "<|assistant|>", *played, "<|end|>")
    assert chat["answer_mask"].tolist() == [False] * 5 + [True] * 10


def test_what_the_user_shows_is_read_and_what_the_assistant_shows_is_written():
    """The two roles are two kinds, whose tensors differ; text goes before and after."""
    messages = [
        {"role": "user", "content": [image(16, 8), {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, image(16, 8), {"type": "text", "text": "b"}]},
    ]
    chat = PROCESSOR.encode_chat(messages)
    read = ["<|image_start|>", "<|image|>", "<|image|>", "<|image_end|>"]
    wanted = ids_of("<|begin|>", "<|user|>", *read, "?", "<|assistant|>", "a", *IMAGE, "b", "<|end|>")
    assert chat["input_ids"].tolist() == wanted
    assert [i for i, it in enumerate(chat["answer_mask"].tolist()) if it] == [8, 9, 15, 16]
    assert {kind: [tuple(it.shape) for it in tensors] for kind, tensors in chat["media"].items()} == {
        "image": [(3, 8, 16)],
        "written_image": [(3, 16, 16)],
    }


def test_a_model_that_does_not_write_reads_what_the_assistant_shows():
    """As before: context, of which nothing is learned."""
    messages = ask("a cat", image(), {"type": "text", "text": "!"})
    chat = tiny_processor().encode_chat(messages)
    assert list(chat["media"]) == ["image"] and chat["answer_mask"].sum() == 2


def test_texts_say_which_media_are_written():
    """Rendered and read again, with the media beside it, a chat is the same batch."""
    messages = [
        {"role": "user", "content": [image(16, 8), {"type": "text", "text": "and?"}]},
        {"role": "assistant", "content": [image(), recording()]},
    ]
    text = PROCESSOR.apply_chat_template(messages)
    shown = "<|written_image|><|written_audio|>"
    assert text == f"<|begin|><|user|><|image|>and?<|assistant|>{shown}<|end|>"
    options = {"return_dict": True, "return_tensors": "pt"}
    whole = PROCESSOR.apply_chat_template(messages, tokenize=True, **options)
    media = {"written_image": [picture(16, 16)], "written_audio": [sound(2000)]}
    apart = PROCESSOR(images=[picture(16, 8)], text=text, add_special_tokens=False, return_tensors="pt", **media)
    assert set(whole) == set(apart) == {*whole} and {"image_targets", "audio_targets"} < set(whole)
    for name, values in whole.items():
        assert torch.equal(values, apart[name]), name
    assert PROCESSOR.model_input_names[-3:] == ["image_targets", "audio_targets", "audio_targets_mask"]


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(("width", "height"), [(16, 16), (40, 24), (24, 40), (7, 9)])
def test_targets_of_images_are_the_square_in_the_middle(width, height):
    (target,) = PROCESSOR.encode_chat(ask("a", image(width, height)))["media"]["written_image"]
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    wanted = picture(width, height).resize((16, 16), Image.Resampling.BICUBIC, box=box)
    assert target.dtype == torch.float32 and -1 <= target.min() < target.max() <= 1
    assert np.abs(target.numpy() - (np.asarray(wanted).transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-6


@pytest.mark.parametrize("samples", [1, 319, 2000, 9000])
def test_targets_of_sound_are_whole_tokens_filled_with_silence(samples):
    (target,) = PROCESSOR.encode_chat(ask("a", recording(samples)))["media"]["written_audio"]
    extractor = MegaTransformerFeatureExtractor(16, sampling_rate=8000, n_fft=256, hop_length=80, max_seconds=1)
    frames = extractor.preprocess_one(sound(samples))
    assert frames.shape[1] == min(samples, 8000) // 80 + 1 and target.shape[1] == -(-frames.shape[1] // 4) * 4
    assert torch.equal(target[:, : frames.shape[1]], frames)
    silence = extractor.preprocess_one(np.zeros(800, np.float32))
    assert torch.equal(target[:, frames.shape[1] :], silence[:, :1].expand(16, target.shape[1] - frames.shape[1]))


def test_targets_of_a_batch():
    """In the order of their places; sound is padded to the longest, and the mask says where each ends."""
    chats = [ask("a", image(), recording(2000)), ask("b", recording(100), image(16, 8))]
    batch = PROCESSOR.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    assert batch["image_targets"].shape == (2, 3, 16, 16) and batch["audio_targets"].shape == (2, 16, 28)
    assert batch["audio_targets_mask"].sum(dim=1).tolist() == [28, 4]
    assert (batch["audio_targets"][1, :, 4:] == 0).all()
    for number, part in enumerate((image(), image(16, 8))):
        wanted = PROCESSOR.preprocess_item("written_image", part["image"])
        assert torch.equal(batch["image_targets"][number], wanted)


def test_references_are_what_can_be_written_at_best():
    """At the writer's size and rate, from files of others."""
    images, sounds = PROCESSOR.modalities["written_image"], PROCESSOR.modalities["written_audio"]
    reference = images.reference(image_file(picture(40, 24)))
    assert reference.size == (16, 16) and torch.equal(images.preprocess(reference), images.preprocess(picture(40, 24)))
    samples, rate = sounds.reference(audio_file(sound(20000), rate=16000))
    assert rate == 8000 and len(samples) == 8000  # a second of the ten thousand samples that are left


# ------------------------------------------------------------------------------------------ saving, building, bad input


def test_what_is_written_survives_saving(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    loaded = MegaTransformerProcessor.from_pretrained(tmp_path)
    one, other = (it.encode_chat(ask("x", image(20, 16), recording())) for it in (PROCESSOR, loaded))
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert all(torch.equal(one["media"][kind][0], other["media"][kind][0]) for kind in one["media"])
    assert loaded.null_token_id == TOKENIZER.convert_tokens_to_ids("<|null|>")


def test_the_processor_of_a_model_has_the_sizes_of_its_writers():
    config = MegaTransformerConfig(
        text_config={"vocab_size": 300},
        image_writer_config={"image_size": 24, "patch_size": 4},
        audio_writer_config={"sampling_rate": 16000, "n_fft": 400, "hop_length": 160, "frames_per_token": 2},
    )
    tokens = media_tokens(config)
    assert tokens == [*MEDIA_TOKENS, "<|written_image|>", "<|written_audio|>", "<|null|>"]
    processor = build_processor(config, train_tokenizer([], 300, media_tokens=tokens))
    assert list(processor.modalities) == ["written_image", "written_audio"]
    chat = processor.encode_chat(ask("x", image(), recording(1600)))
    assert (chat["input_ids"] == processor.written_image_token_id).sum() == 36
    assert (chat["input_ids"] == processor.written_audio_token_id).sum() == 6  # 11 frames in twos
    assert chat["media"]["written_audio"][0].shape == (64, 12)


def test_numbers_of_modalities_are_those_of_the_model():
    assert PROCESSOR.modality_names[:5] == ("text", "image", "audio", "written_image", "written_audio")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "user", "content": [{"type": "written_image", "image": picture()}]}],
            "type 'written_image'; choose",
        ),
        (
            ask("x", {"type": "written_image", "written_image": picture()}),
            "type 'written_image'; choose one of text, im",
        ),
        (ask("x", {"type": "image"}), "1 parts of type 'written_image'"),
        (ask("x", {"type": "image", "path": "nowhere.png"}), "'nowhere.png' does not exist"),
        (ask("x", {"type": "audio", "audio": np.full(9, np.nan, np.float32)}), "NaN"),
    ],
)
def test_what_cannot_be_written_is_named(messages, reason):
    with pytest.raises(ValueError, match=reason):
        PROCESSOR.encode_chat(messages)


def test_a_user_cannot_show_what_is_only_written():
    processor = writing_processor(image_processor=None)
    with pytest.raises(ValueError, match="part of type 'image'; choose one of text, audio"):
        processor.encode_chat([{"role": "user", "content": [image()]}])
    assert list(processor.encode_chat(ask("x", image()))["media"]) == ["written_image"]


def test_a_vocabulary_without_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"lacks <\|written_image\|>, <\|written_audio\|>, <\|null\|>"):
        writing_processor(tokenizer=train_tokenizer([], 268, media_tokens=MEDIA_TOKENS))
