"""Pipelines of transformers on a checkpoint that writes media, against `generate` by hand."""

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from tests.tiny_artist import artist_processor, save_artist, tiny_artist
from tests.tiny_processor import picture

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
OPTIONS = {"flow_seeds": [3], "num_steps": 2, "max_new_tokens": 30, "do_sample": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_artist(tmp_path_factory.mktemp("artist")))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("any-to-any", model=checkpoint)


def by_hand(model, mode, messages=MESSAGES):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = artist_processor().apply_chat_template(messages, **options)
    return model.generate(**inputs, generation_mode=mode, **OPTIONS)


@pytest.mark.parametrize("messages", [MESSAGES, [{"role": "user", "content": [{"type": "image", "image": picture()}]}]])
def test_any_to_any_draws(pipe, messages):
    """From a text, and from a picture."""
    (record,) = pipe(text=messages, generation_mode="image", generate_kwargs=dict(OPTIONS))
    pixels = [
        np.asarray(image, dtype=int)
        for image in (record["generated_image"], *by_hand(pipe.model, "image", messages).images)
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1 and pixels[0].std() > 10


def test_any_to_any_plays(pipe):
    (record,) = pipe(text=MESSAGES, generation_mode="audio", generate_kwargs=dict(OPTIONS))
    torch.testing.assert_close(record["generated_audio"], by_hand(pipe.model, "audio").audio[0], atol=1e-3, rtol=0)


def test_any_to_any_still_writes_text(pipe):
    options = {"num_steps": 2, "max_new_tokens": 5, "do_sample": False}
    (record,) = pipe(text=MESSAGES, return_full_text=False, generate_kwargs=options)
    assert isinstance(record["generated_text"], str)


def test_text_to_audio(checkpoint):
    pipe = pipeline("text-to-audio", model=checkpoint, processor=artist_processor())
    options = {"return_tensors": "pt", "padding": True}
    output = pipe(MESSAGES, preprocess_params=options, generate_kwargs={**OPTIONS, "generation_mode": "audio"})
    assert output["sampling_rate"] == 8000
    np.testing.assert_allclose(output["audio"], by_hand(pipe.model, "audio").audio[0].numpy(), atol=1e-3)


def test_parts_of_an_answer(tmp_path):
    """`post_process_multimodal_output` in mode "any", and `save_audio`."""
    processor, output = artist_processor(), by_hand(tiny_artist(), "audio")
    ((part,),) = processor.post_process_multimodal_output(output, generation_mode="any")
    assert part["type"] == "audio" and part["sampling_rate"] == 8000
    processor.save_audio(part["audio"], tmp_path / "a.wav")
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(samples, part["audio"].clamp(-1, 1).numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="1 waveforms and 2 paths"):
        processor.save_audio(part["audio"], [tmp_path / "a.wav", tmp_path / "b.wav"])
    with pytest.raises(ValueError, match="nothing of mode 'image'"):
        processor.post_process_multimodal_output(output, generation_mode="image")
