"""The model that reads images and sound, against second ways of computing: each row alone, each medium alone, features
put in by hand, the text model, another backend.
"""

import pytest
import torch
from torch import nn

from model import MODALITIES, MegaTransformerConfig, MegaTransformerForConditionalGeneration, Modality
from model.encoders import image_stem, shuffle_pixels
from model.fusion import check_counts
from model.modeling_megatransformer import take_media
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_media import AUDIO, IMAGE, draw, row_of, tiny_inputs, tiny_media_config, tiny_media_model

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STEMS = {"patch": {"stem": "patch"}, "conv": {"stem": "conv"}, "deep": {"stem": "conv", "stem_depth": 3}}
EVERY_STEM = pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
EVERY_POSITION = pytest.mark.parametrize("positions", ["rope", "alibi"])


@torch.no_grad()
def logits_of(model, **inputs) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


# ------------------------------------------------------------ encoders


@EVERY_STEM
def test_a_padded_image_is_the_image_alone(stem):
    encoder = tiny_media_model(scale=2.0, vision=stem).model.readers["image"].encoder
    inputs = tiny_inputs()
    with torch.no_grad():
        features, is_real = encoder(inputs["pixel_values"], inputs["image_sizes"])
        for number, (height, width) in enumerate(inputs["image_sizes"].tolist()):
            alone, none = encoder(inputs["pixel_values"][number : number + 1, :, :height, :width])
            assert none is None and alone.shape[1] == height * width // 64
            torch.testing.assert_close(features[number][is_real[number]], alone[0], **CLOSE)


def test_a_deep_stem_is_its_convolutions():
    """Two for each halving of 8 pixels to one; activations keep their size on the way, as He et al. want it."""
    stem = image_stem(tiny_media_config(vision={"stem": "conv", "stem_depth": 2, "patch_size": 8}).vision_config)
    assert [conv.stride[0] for conv in stem.convs] == [2, 1, 2, 1, 2, 1]
    encoder = tiny_media_model(vision={"hidden_size": 256, "head_dim": 8, "stem": "conv", "stem_depth": 4})
    hidden = draw(4, 3, 32, 32)
    sizes = []
    for conv in encoder.model.readers["image"].encoder.stem.convs:
        hidden = nn.functional.gelu(conv(hidden))
        sizes.append(hidden.square().mean().sqrt().item())
    assert len(sizes) == 8 and 0.3 < min(sizes) <= max(sizes) < 2, sizes


def test_a_padded_clip_is_the_clip_alone():
    encoder = tiny_media_model(scale=2.0).model.readers["audio"].encoder
    clips, mask = torch.zeros(3, 8, 11), torch.zeros(3, 11)
    for number, length in enumerate((11, 5, 1)):
        clips[number, :, :length], mask[number, :length] = draw(8, length, seed=number), 1
    with torch.no_grad():
        features, is_real = encoder(clips, mask)
        for number, length in enumerate((11, 5, 1)):
            alone, _ = encoder(clips[number : number + 1, :, :length])
            assert alone.shape[1] == -(-length // 4)
            torch.testing.assert_close(features[number][is_real[number]], alone[0], **CLOSE)


def test_an_image_sees_all_of_itself_and_where():
    """Not causal: the first token changes with the last patch. And rows are not columns: transposed, it is another."""
    encoder = tiny_media_model(scale=2.0).model.readers["image"].encoder
    image = draw(1, 3, 16, 16)
    other = image.clone()
    other[:, :, -4:, -4:] = 0
    with torch.no_grad():
        first, changed, transposed = (encoder(each)[0][0] for each in (image, other, image.transpose(2, 3)))
    assert (first[0] - changed[0]).abs().max() > 1e-3
    flipped = transposed.view(2, 2, -1).transpose(0, 1).reshape(4, -1)
    assert (first - flipped).abs().max() > 1e-2


def test_pixel_shuffle_puts_each_square_of_patches_into_one_token():
    hidden = torch.arange(24.0).view(1, 24, 1)  # 4 rows, 6 columns
    tokens = shuffle_pixels(hidden, 4, 6, 2)
    assert tokens[0].tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    [
        ("image", {"pixel_values": torch.zeros(1, 3, 12, 8)}, "multiples of patch_size"),
        ("image", {"pixel_values": torch.zeros(1, 1, 8, 8)}, "expected \\(images, 3"),
        ("image", {"pixel_values": torch.zeros(1, 3, 8, 8), "image_sizes": torch.tensor([[8, 16]])}, "image_sizes"),
        ("image", {"pixel_values": torch.zeros(1, 3, 16, 16), "image_sizes": torch.tensor([[0, 8]])}, "image_sizes"),
        ("audio", {"input_features": torch.zeros(1, 7, 8)}, "8 mel bins"),
        ("audio", {"input_features": torch.zeros(1, 8, 0)}, "at least one frame"),
        ("audio", {"input_features": torch.zeros(1, 8, 4), "input_features_mask": torch.ones(1, 5)}, "mask has shape"),
        ("audio", {"input_features": torch.zeros(1, 8, 4), "input_features_mask": torch.zeros(1, 4)}, "no real frame"),
    ],
)
def test_an_encoder_refuses_what_it_cannot_read(name, inputs, words):
    with pytest.raises(ValueError, match=words):
        tiny_media_model().model.readers[name](**inputs)


# ------------------------------------------------------------ fusion


def test_features_stand_where_their_placeholders_were():
    """By hand: embeddings, with each feature in its place."""
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    with torch.no_grad():
        images = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        (clip,) = model.model.get_audio_features(inputs["input_features"]).pooler_output
        embeds = model.model.embed_tokens(inputs["input_ids"])
        embeds[0, 2:4], embeds[0, 7:10], embeds[1, 1:2], embeds[1, 5:9] = images[0], clip, images[1], images[2]
        expected = model(inputs_embeds=embeds).logits
    assert [len(part) for part in images] == [2, 1, 4] and len(clip) == 3
    torch.testing.assert_close(logits_of(model, **inputs), expected, **CLOSE)


def test_no_modality_drowns_the_others():
    """At initialisation a feature has the mean square of an embedding, whatever the scale of what is read."""
    model, inputs = tiny_media_model(), tiny_inputs()
    tokens = model.model.embed_tokens(tiny_ids(1, 500, high=60)).square().mean()
    for scale in (0.01, 1.0, 100.0):
        images = model.model.get_image_features(scale * inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        (clip,) = model.model.get_audio_features(scale * inputs["input_features"]).pooler_output
        for features in (*images, clip):
            torch.testing.assert_close(features.square().mean(), tokens, atol=0, rtol=0.1)


def test_counts_are_compared_and_the_sample_is_named():
    model, inputs = tiny_media_model(), tiny_inputs()
    ids = inputs["input_ids"].clone()
    ids[1, 8] = 5  # one placeholder too few in the second row
    with pytest.raises(
        ValueError, match=r"sample 1 has 4 placeholders of image.*6 placeholders.*7 features of 3 media"
    ):
        model(**{**inputs, "input_ids": ids})
    ids[1, 8:10], ids[0, 3] = IMAGE, 5  # the sum is right again, the rows are not
    with pytest.raises(ValueError, match="sample 0 has 1 placeholders of image"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match=r"3 placeholders of audio.*0 features of 0 media"):
        model(**{name: value for name, value in inputs.items() if name != "input_features"})
    with pytest.raises(ValueError, match="image_sizes was given without pixel_values"):
        model(inputs["input_ids"], image_sizes=inputs["image_sizes"])
    with pytest.raises(ValueError, match="0 placeholders in 1 samples, 12 features of 3 media"):
        model(inputs_embeds=draw(1, 4, 32), pixel_values=inputs["pixel_values"])


def test_placeholders_are_known_by_their_embeddings():
    """As learned prompts need it, which are embeddings in front of those of the tokens."""
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    ids = inputs.pop("input_ids")
    embeds = model.model.embed_tokens(ids)
    expected = logits_of(model, input_ids=ids, **inputs)
    torch.testing.assert_close(logits_of(model, inputs_embeds=embeds, **inputs), expected)
    prompt = draw(1, 2, 32).expand(len(ids), -1, -1)
    with_prompt = logits_of(model, inputs_embeds=torch.cat((prompt, embeds), dim=1), **inputs)
    whole = model.model.embed(ids, take_media(dict(inputs))).embeds
    torch.testing.assert_close(with_prompt, logits_of(model, inputs_embeds=torch.cat((prompt, whole), dim=1)))


@pytest.mark.parametrize(("name", "places"), [("image", 16), ("audio", 3)])
def test_encoders_show_their_layers(name, places):
    """What hooks see: the input of each block, and the output of the norm; attention sees no padding."""
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    reader, seen = model.model.readers[name], []
    for block in reader.encoder.layers.layers:
        block.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    reader.encoder.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    given = {key: inputs[key] for key in reader.input_names if key in inputs}
    read = getattr(model, f"get_{name}_features")
    with torch.no_grad():
        out = read(**given, output_hidden_states=True, output_attentions=True)
        assert all(torch.equal(*each) for each in zip(out.hidden_states, seen, strict=True))
        assert torch.equal(out.last_hidden_state, seen[-1]) and out.last_hidden_state.shape[1:] == (places, 24)
        assert len(out.attentions) == len(seen) - 1
        for probabilities in out.attentions:
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
        plain = read(**given)
        assert plain.hidden_states is None and plain.attentions is None
        for one, other in zip(plain.pooler_output, out.pooler_output, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        if name == "image":
            small = inputs["image_sizes"].prod(dim=1).argmin()
            tokens = int(inputs["image_sizes"][small].prod()) // 16
            assert out.attentions[0][small].gt(0).any(dim=(0, 1)).sum() == tokens
        whole = model(**inputs, output_hidden_states=True)
        assert torch.equal(whole[f"{name}_outputs"].last_hidden_state, plain.last_hidden_state)
        assert len(whole[f"{name}_outputs"].hidden_states) == len(out.hidden_states)
        assert f"{name}_outputs" in model(**inputs) and f"{name}_outputs" not in model.train()(**inputs)
        assert f"{name}_outputs" not in model.eval()(tiny_ids(1, 4, high=60))


def test_counts_that_fit():
    for places, lengths in (([3, 0, 5], [2, 1, 5]), ([0, 0], []), ([0, 4], [4]), ([2], [1, 0, 1])):
        check_counts("image", places, lengths)
    for places, lengths in (([3, 5], [4, 4]), ([1], []), ([0], [1]), ([4], [2])):
        with pytest.raises(ValueError, match="placeholders"):
            check_counts("image", places, lengths)


# ------------------------------------------------------------ identities


@EVERY_POSITION
def test_a_row_in_a_batch_is_the_row_alone(positions):
    model, inputs = tiny_media_model(scale=2.0, position_embedding=positions), tiny_inputs()
    together = logits_of(model, **inputs)
    for row in range(3):
        torch.testing.assert_close(together[row], logits_of(model, **row_of(inputs, row))[0], **CLOSE)


def test_without_media_it_is_the_text_model():
    model, text = tiny_media_model(scale=2.0), tiny_model(scale=2.0)
    text.load_state_dict({name: value for name, value in model.state_dict().items() if "readers" not in name})
    ids = tiny_ids(2, 9, high=60)
    torch.testing.assert_close(logits_of(model, input_ids=ids), logits_of(text, input_ids=ids), atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_backends_agree(backend):
    """FlexAttention runs as plain tensor operations: its compiled kernel is for GPUs."""
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    expected = logits_of(model, **inputs)
    model.set_attn_implementation(backend)
    assert model.model.readers["image"].encoder.config._attn_implementation == backend
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits_of(model, **inputs), expected, **CLOSE)


def test_steps_without_gradient_and_with_add_up_and_everything_learns():
    model, inputs = tiny_media_model().train(), tiny_inputs()
    whole = model(**inputs, labels=inputs["input_ids"], num_steps=4, use_cache=False).loss
    model.zero_grad()
    split = model(**inputs, labels=inputs["input_ids"], num_steps=(2, 2), use_cache=False).loss
    split.backward()
    torch.testing.assert_close(split, whole)
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_a_batch_without_media_runs_the_same_modules_and_changes_nothing():
    """The ranks of a run have the same graph: every parameter has a gradient, which is 0 for what read nothing."""
    model, ids = tiny_media_model().train(), tiny_ids(2, 9, high=60)
    called = []
    for reader in model.model.readers.values():
        reader.encoder.register_forward_hook(lambda *_: called.append(1))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert len(called) == 2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and ("readers" in name) == (not parameter.grad.any()), name
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids, labels=ids).loss, model.train()(ids, labels=ids).loss)
    assert len(called) == 4, "in evaluation nothing is read that is not there"


def test_the_loss_of_each_label_and_its_weight():
    """Against all logits at once."""
    model, inputs = tiny_media_model(scale=2.0), tiny_inputs()
    labels, weights = inputs["input_ids"].clone(), torch.rand(3, 16)
    labels[labels >= 60] = -100
    logits = logits_of(model, **inputs)
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    is_label = labels[:, 1:] != -100
    out = model(**inputs, labels=labels, loss_weights=weights, skip_logits=True)
    torch.testing.assert_close(out.token_losses[:, 1:], losses, **CLOSE)
    assert not out.token_losses[:, 0].any()
    expected = (losses * weights[:, 1:]).sum() / (weights[:, 1:] * is_label).sum()
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(model(**inputs, labels=labels, skip_logits=True).loss, losses.sum() / is_label.sum())


# ------------------------------------------------------------ a further modality


class Colours(Modality):
    """Triples of numbers, each a token: a modality in one file."""

    name = "colour"
    input_names = ("colours",)

    class config_class(type(tiny_media_config().vision_config)):
        model_type = "colours"

    @classmethod
    def build_encoder(cls, config):
        encoder = nn.Linear(3, 7)
        encoder.config, encoder.output_size = config, 7
        inner = encoder.forward
        encoder.forward = lambda colours: (inner(colours), None)
        return encoder

    @classmethod
    def dummy_inputs(cls, config):
        return {"colours": torch.zeros(1, 1, 3)}


def test_another_modality_is_one_file_and_an_entry_in_the_config(monkeypatch):
    with pytest.raises(ValueError, match="modality_configs has 'colour', which is not registered"):
        tiny_media_model(parts={"modality_configs": {"colour": {}}, "colour_token_id": 60})
    monkeypatch.setitem(MODALITIES, "colour", Colours)
    model = tiny_media_model(parts={"modality_configs": {"colour": {}}, "colour_token_id": 60})
    assert model.input_modalities == ("text", "image", "audio", "colour")
    inputs = tiny_inputs()
    inputs["input_ids"][2, 3:5] = 60
    colours = draw(1, 2, 3)
    reader = model.model.readers["colour"]
    with torch.no_grad():
        out = model(**inputs, colours=colours)
        embeds = model.model.embed(inputs["input_ids"], take_media({**inputs, "colours": colours})).embeds
        torch.testing.assert_close(embeds[2, 3:5], reader.projector(nn.Linear.forward(reader.encoder, colours[0])))
        assert (out.logits[2] - model(**inputs, colours=-colours).logits[2]).abs().max() > 1e-4
    written = model.generate(**inputs, colours=colours, max_new_tokens=3, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(written, model.generate(**inputs, colours=colours, max_new_tokens=3, do_sample=False))
    again = MegaTransformerConfig(**model.config.to_dict())
    assert again.colour_token_id == 60 and again.modality_configs == {"colour": {}}


def test_parts_that_are_not_there():
    config = tiny_media_config(parts={"audio_config": None, "audio_token_id": None})
    model = MegaTransformerForConditionalGeneration(config)
    assert model.input_modalities == ("text", "image")
    with pytest.raises(ValueError, match="input_features was given, but this model reads text, image"):
        model(tiny_ids(1, 4, high=60), input_features=draw(1, 8, 4))
    with pytest.raises(ValueError, match="does not read audio; it reads text, image"):
        model.get_audio_features(draw(1, 8, 4))
    assert model.config.vocab_size == model.config.text_config.vocab_size == 64
    with pytest.raises(ValueError, match=r"audio_token_id \(64\) is outside"):
        tiny_media_config(parts={"audio_token_id": 64})
    with pytest.raises(ValueError, match="also the id of another token"):
        tiny_media_config(parts={"audio_token_id": IMAGE})
    assert AUDIO != IMAGE
