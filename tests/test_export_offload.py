"""Exported models whose weights stay on the disk, all of them or every second part, do what they do in memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from tests.tiny import tiny_ids, tiny_model
from tests.tiny_artist import artist_processor, tiny_artist
from tests.tiny_media import tiny_inputs, tiny_media_model


def every_second_part(model: PreTrainedModel) -> dict[str, str]:
    parts = [name for name, _ in model.model.named_children()]
    places = {f"model.{name}": "disk" if index % 2 else "cpu" for index, name in enumerate(parts)}
    return {**places, "lm_head": places["model.embed_tokens"]}


def offloaded(model: PreTrainedModel, auto_class: type, folder: Path, whole: bool) -> PreTrainedModel:
    model.save_pretrained(folder)
    places = {"": "disk"} if whole else every_second_part(model)
    return auto_class.from_pretrained(folder, device_map=places, offload_folder=folder / "weights").eval()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["text", "media"])
def test_reading_from_the_disk(kind, whole, tmp_path):
    model = tiny_model(scale=2.0) if kind == "text" else tiny_media_model(scale=2.0)
    inputs = {"input_ids": tiny_ids(2, 6)} if kind == "text" else tiny_inputs()
    auto_class = AutoModelForCausalLM if kind == "text" else AutoModelForMultimodalLM
    other = offloaded(model, auto_class, tmp_path, whole)
    assert any(parameter.is_meta for parameter in other.parameters())
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs, num_steps=3).logits, model(**inputs, num_steps=3).logits)
    options = {"num_steps": 3, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(other.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("whole", [True, False])
def test_writing_from_the_disk(whole, tmp_path):
    """In float64: modules on the disk are called, and others' weights are looked up; each latent is made from others,
    by which the rounding of that grows.
    """
    model = tiny_artist().double()
    other = offloaded(model, AutoModelForMultimodalLM, tmp_path, whole)
    messages = [{"role": "user", "content": "a red circle"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = artist_processor().apply_chat_template(messages, **options)
    for mode in ("image", "audio"):
        options = {"generation_mode": mode, "flow_seeds": [1], "max_new_tokens": 20, "num_steps": 2}
        made, expected = (each.generate(**inputs, **options).latents[mode][0] for each in (other, model))
        torch.testing.assert_close(made, expected)
