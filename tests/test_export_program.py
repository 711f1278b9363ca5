"""`torch.export` of models that have never run: programs for any batch and length, at one depth."""

import copy

import pytest
import torch
from torch.export import Dim

from tests.tiny import PAD, tiny_ids, tiny_model
from tests.tiny_media import AUDIO, IMAGE, draw, tiny_media_model


def program_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The exported model; the first dimension of all inputs, and the second of ids and masks, are left open."""
    shapes = {
        name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if tensor.ndim == 2 else {0: Dim.DYNAMIC}
        for name, tensor in inputs.items()
    }
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()


def padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of which the first has padding at its beginning."""
    ids, mask = tiny_ids(batch, length, seed=length), torch.ones(batch, length, dtype=torch.long)
    ids[0, : length // 3], mask[0, : length // 3] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_implementation": "eager", "qk_norm": True},
        {"position_embedding": "alibi"},
        {"position_embedding": "learned"},
        {"num_core_layers": 0},
        {"num_core_layers": 3, "num_unique_core_layers": 2, "recurrence": {"step_embedding": "sinusoidal"}},
        {"mlp": "peer", "norm_placement": "post", "residual": "admin"},
    ],
    ids=["rope", "eager", "alibi", "learned", "plain", "shared layers", "experts"],
)
@torch.no_grad()
def test_a_program_serves_other_batches_and_lengths(options):
    """Of one layer in the core, unless its layers are what it is about: each step of them is exported anew."""
    model = tiny_model(scale=2.0, num_steps=2, use_cache=False, **{"num_core_layers": 1, **options})
    reference = copy.deepcopy(model)
    program = program_of(model, padded(2, 7))
    for batch, length in ((1, 5), (3, 11), (2, 7), (5, 2)):
        inputs = padded(batch, length)
        real = inputs["attention_mask"].bool()
        expected = reference(**inputs)
        torch.testing.assert_close(program(**inputs).logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**inputs).logits, expected.logits)  # export has left nothing in it


@torch.no_grad()
def test_another_initial_state_than_was_drawn_is_refused_until_it_is():
    options = {"num_steps": 1, "use_cache": False, "num_core_layers": 1}
    before = tiny_model(**options)(**padded(2, 7)).logits
    model = tiny_model(**options)
    model.config.recurrence.state_seed = 7
    with pytest.raises(ValueError, match=r"now \('like-init', 1.0, 7\): run it once before torch.export"):
        program_of(model, padded(2, 7))
    drawn = model(**padded(2, 7)).logits
    assert not torch.allclose(drawn, before)
    torch.testing.assert_close(program_of(model, padded(2, 7))(**padded(2, 7)).logits, drawn)


@torch.no_grad()
def test_a_program_reads_images_and_sound():
    """In each row an image of 4 tokens and a clip of 3."""

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = tiny_ids(batch, length, high=60)
        ids[:, 1:5], ids[:, 6:9] = IMAGE, AUDIO
        return {
            "input_ids": ids,
            "pixel_values": draw(batch, 3, 16, 16, seed=length),
            "input_features": draw(batch, 8, 10, seed=length),
        }

    model = tiny_media_model(scale=2.0, num_steps=2, use_cache=False)
    reference = copy.deepcopy(model)
    program = program_of(model, inputs(2, 12))
    for batch, length in ((1, 9), (3, 14), (2, 12)):
        given = inputs(batch, length)
        torch.testing.assert_close(program(**given).logits, reference(**given).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_saved_program_is_loaded_without_the_model(tmp_path):
    model = tiny_model(scale=2.0)
    ids, options = tiny_ids(2, 7), {"num_steps": 2, "use_cache": False}
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, **dict.fromkeys(options)}
    torch.export.save(
        torch.export.export(model, (), {"input_ids": ids, **options}, dynamic_shapes=shapes), tmp_path / "a.pt2"
    )
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    ids = tiny_ids(3, 9)
    torch.testing.assert_close(
        loaded(input_ids=ids, **options).logits, model(ids, **options).logits, atol=1e-5, rtol=1e-5
    )
