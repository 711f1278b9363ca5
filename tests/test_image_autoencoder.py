"""The autoencoder of pictures, its bottlenecks and its losses, against closed forms and enumeration."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from model import MegaTransformerImageAutoencoder, MegaTransformerImageAutoencoderConfig
from model.image_autoencoder import FiniteScalars
from model.reconstruction import Discriminator, adversarial_losses
from tests.tiny_codecs import AUTOENCODER, pictures, tiny_autoencoder

LEVELS = [4, 3, 2]


def test_latents_lie_on_the_sphere():
    model = tiny_autoencoder()
    latents = model.encode(pictures(3))
    assert latents.shape == (3, model.num_tokens, model.latent_size) == (3, 16, 6)
    torch.testing.assert_close(latents.square().mean(dim=-1), torch.ones(3, 16), atol=1e-4, rtol=0)


def test_tokens_are_patches_row_by_row():
    """Without blocks a token knows its patch alone, on both sides."""
    model = tiny_autoencoder(num_encoder_layers=0, num_decoder_layers=0)
    first = pictures(1)
    second = first.clone()
    second[:, :, 4:8, 12:16] = 0.3  # the second row's last patch
    latents = [model.encode(images) for images in (first, second)]
    assert (latents[0] != latents[1]).any(dim=-1)[0].nonzero().flatten().tolist() == [7]
    changed = (model.decode(latents[0]) != model.decode(latents[1]))[0].any(dim=0)
    assert changed[4:8, 12:16].all() and changed.sum() == 16


def test_blocks_look_at_neighbours():
    """3 x 3 patches each: two blocks reach two patches far."""
    model = tiny_autoencoder(num_encoder_layers=2)
    for block in model.encoder.blocks:
        nn.init.normal_(block.depthwise.weight)
    first = pictures(1, side=32)
    second = first.clone()
    second[:, :, :4, :4] = 0.3
    changed = (model.encode(first) - model.encode(second)).abs().amax(dim=-1).view(8, 8) > 1e-6
    assert changed[:3, :3].all() and changed.sum() == 9


def test_past_the_branches_of_the_blocks_there_is_a_linear_map():
    """The branches have norms, and say the same about an image ten times as strong; what is left is the product of the
    first and the last layer, with the sums over neighbours in between.
    """
    encoder, images = tiny_autoencoder().encoder, pictures(1)
    assert not encoder.blocks[0].depthwise.weight.any()
    nn.init.constant_(encoder.blocks[0].depthwise.weight[:, :, 1, 2:], 0.5)  # half of the patch to the right
    patches = nn.functional.unfold(images, 4, stride=4).transpose(1, 2).view(1, 4, 4, -1)
    mixed = patches + 0.5 * nn.functional.pad(patches[:, :, 1:], (0, 0, 0, 1))
    expected = 900 * (mixed @ encoder.embed.weight.T @ encoder.head.weight.T)
    found = encoder(1000 * patches) - encoder(100 * patches)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=1e-3)


def test_other_sizes_go_as_well():
    model = tiny_autoencoder()
    assert model.decode(model.encode(pictures(2, side=32))).shape == (2, 3, 32, 32)


def test_components_make_a_linear_map_of_it_bent_by_the_sphere():
    """By numpy's decomposition: the components of a patch, scaled by how far it is from the middle of the sphere."""
    model, images = tiny_autoencoder(latent_size=6), pictures(20)
    model.begin_with_components(images)
    patches = nn.functional.unfold(images, 4, stride=4).transpose(1, 2).reshape(-1, 48).numpy()
    centred = patches - patches.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    variances, directions = sizes[:5] ** 2 / len(patches), directions[:5]
    components = centred @ directions.T
    amplified = components * variances**-0.25
    squares = np.square(amplified).sum(axis=1, keepdims=True)
    expected = components * np.sqrt(1.25 / (1 + 0.25 * squares / squares.mean())) @ directions + patches.mean(axis=0)
    with torch.no_grad():
        made = model.decode(model.encode(images))
    found = nn.functional.unfold(made, 4, stride=4).transpose(1, 2).reshape(-1, 48).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(ValueError, match="1 patches do not have 5 principal components"):
        model.begin_with_components(images[:1, :, :4, :4])


def test_the_loss_is_the_error_of_pixels_and_of_their_differences():
    model = tiny_autoencoder(pixel_loss_weight=2.0, gradient_loss_weight=0.5)
    images = pictures(2)
    with torch.no_grad():
        out = model(images)
    error = (out.reconstruction - images).numpy()
    down, across = abs(error[:, :, 1:] - error[:, :, :-1]).mean(), abs(error[..., 1:] - error[..., :-1]).mean()
    assert float(out.losses["pixels"]) == pytest.approx(abs(error).mean(), rel=1e-5)
    assert float(out.losses["gradients"]) == pytest.approx((down + across) / 2, rel=1e-5)
    assert float(out.loss) == pytest.approx(2 * abs(error).mean() + (down + across) / 4, rel=1e-5)


def test_the_logarithm_of_the_error_is_what_a_ratio_of_signal_to_noise_measures():
    model = tiny_autoencoder(pixel_loss="logarithmic", gradient_loss_weight=0.0)
    images = pictures(3)
    with torch.no_grad():
        out = model(images)
    decibels = [10 * np.log10(4 / float(np.square(error).mean())) for error in (out.reconstruction - images).numpy()]
    assert float(out.loss) == pytest.approx(np.log10(4) - np.mean(decibels) / 10, rel=1e-5)


def test_noise_is_added_in_training_alone():
    """Of a deviation that is drawn for each image, up to the largest; what is perturbed stays on the sphere."""
    model = tiny_autoencoder(latent_noise=0.3, latent_size=64)
    images = pictures(2)
    assert torch.equal(model(images).reconstruction, model(images).reconstruction)
    model.train()
    assert not torch.equal(model(images).reconstruction, model(images).reconstruction)
    latents = model.bottleneck(torch.randn(2000, 4, 64))
    perturbed = model.bottleneck.perturb(latents)
    torch.testing.assert_close(perturbed.square().mean(dim=-1), torch.ones(2000, 4), atol=1e-4, rtol=0)
    # With z of mean square 1 and noise of deviation s the cosine of the angle is 1 / sqrt(1 + s^2), nearly.
    cosine = (latents * perturbed).mean(dim=(1, 2))
    deviation = (1 / cosine.square() - 1).clamp(min=0).sqrt()
    assert float(deviation.mean()) == pytest.approx(0.15, abs=0.01)
    assert float(deviation.max()) == pytest.approx(0.3, abs=0.05) and float(deviation.min()) < 0.02
    quiet = tiny_autoencoder(latent_noise=0.0).train()
    assert torch.equal(quiet(images).reconstruction, quiet(images).reconstruction)


def test_refined_latents_are_those_of_a_descent_by_hand():
    """Of one image, by its own error: Adam's first two steps are known numbers of the gradients."""
    model, images = tiny_autoencoder(num_refinement_steps=2), pictures(1)
    latents = model.encode(images).detach()
    position, first, second = latents.clone(), 0.0, 0.0
    for step, rate in enumerate((0.03, 0.015), start=1):
        position.requires_grad_()
        error = (model.decode(model.project(position)) - images).square().mean().log10()
        (gradient,) = torch.autograd.grad(error, position)
        first, second = 0.8 * first + 0.2 * gradient, 0.99 * second + 0.01 * gradient.square()
        slope = first / (1 - 0.8**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        position = position.detach() - rate * slope
    torch.testing.assert_close(model.refine(images, latents), model.project(position), atol=1e-5, rtol=1e-4)


def test_refined_latents_make_better_images_and_nothing_else():
    model, images = tiny_autoencoder(num_refinement_steps=10), pictures(3)
    with torch.inference_mode():
        latents = model.encode(images)
        refined = model.refine(images, latents)
        errors = [(model.decode(found) - images).square().mean(dim=(1, 2, 3)) for found in (latents, refined)]
    assert (errors[1] < 0.98 * errors[0]).all() and not refined.requires_grad
    torch.testing.assert_close(refined.square().mean(dim=-1), torch.ones(3, 16), atol=1e-4, rtol=0)
    alone = torch.cat([model.refine(image, model.encode(image)) for image in images.split(1)])
    torch.testing.assert_close(alone, refined, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())
    for options in ({}, {"num_refinement_steps": 10, "bottleneck": "fsq"}):  # codes have no gradient to follow
        plain = tiny_autoencoder(**options)
        assert plain.num_refinement_steps == 0
        assert torch.equal(plain.refine(images, plain.encode(images)), plain.encode(images))


def test_every_weight_gets_a_gradient_and_learns_pictures():
    model = tiny_autoencoder(latent_noise=0.0).train()
    images = pictures(4).round(decimals=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("bottleneck", ["sphere", "fsq"])
def test_the_nearest_latents(bottleneck):
    """Those of an image are their own; others go where a search among many finds none nearer."""
    model = tiny_autoencoder(bottleneck=bottleneck, fsq_levels=LEVELS, latent_size=3)
    latents = model.encode(pictures(1))
    torch.testing.assert_close(model.project(latents), latents)
    given = 2 * torch.randn(50, 3)
    found = model.project(given)
    codes = bottleneck == "fsq"
    others = model.bottleneck.latents(torch.arange(24)) if codes else model.project(torch.randn(5000, 3))
    distances = torch.cdist(given, others).amin(dim=1)
    assert ((given - found).norm(dim=1) <= distances + 1e-5).all()


# ---------------------------------------------------------------------------------------------------------------- codes


def test_codes_are_all_the_values_of_all_numbers():
    model = tiny_autoencoder(bottleneck="fsq", fsq_levels=LEVELS)
    assert model.latent_size == 3 and model.config.num_codes == 24
    latents = model.bottleneck.latents(torch.arange(24))
    values = [[-1, -0.5, 0, 0.5], [-1, 0, 1], [-1, 0]]
    # The first number changes fastest.
    assert latents.tolist() == [list(reversed(code)) for code in itertools.product(*reversed(values))]
    assert model.bottleneck.ids(latents).tolist() == list(range(24))
    assert model.bottleneck.ids(latents.bfloat16()).tolist() == list(range(24))


def test_numbers_are_rounded_to_the_nearest_value():
    """Every value is reached, in order, and half of the line is below 0 for an odd number of levels."""
    for levels, count in ((5, 5), (8, 8), (2, 2)):
        bottleneck = FiniteScalars(MegaTransformerImageAutoencoderConfig(bottleneck="fsq", fsq_levels=[levels]))
        line = torch.linspace(-6, 6, 5001).view(1, -1, 1)
        rounded = bottleneck(line).flatten()
        assert (rounded.diff() >= 0).all() and len(rounded.unique()) == count
        assert rounded.min() == -1 and rounded.max() == (1 if levels % 2 else (levels // 2 - 1) / (levels // 2))
        assert bottleneck(torch.zeros(1, 1, 1)).item() == 0


def test_the_gradient_passes_the_rounding():
    """As that of the bounded number would: tanh' times half the levels, by what a level is worth."""
    bottleneck = FiniteScalars(MegaTransformerImageAutoencoderConfig(bottleneck="fsq", fsq_levels=[5]))
    hidden = torch.tensor([[[0.7]]], requires_grad=True)
    bottleneck(hidden).sum().backward()
    expected = (1 - torch.tanh(torch.tensor(0.7)) ** 2) * 2 * (1 + 1e-3) / 2
    assert hidden.grad.item() == pytest.approx(expected.item(), rel=1e-5)


def test_ids_are_the_latents():
    model = tiny_autoencoder(bottleneck="fsq", fsq_levels=LEVELS)
    images = pictures(3)
    ids = model.encode_ids(images)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < 24
    assert len(ids.unique()) > 3
    torch.testing.assert_close(model.bottleneck.latents(ids), model.encode(images))
    torch.testing.assert_close(model.decode_ids(ids), model(images).reconstruction)
    assert torch.equal(model.train()(images).reconstruction, model(images).reconstruction)


# ------------------------------------------------------------------------------------------------------- discriminators


class Mean(nn.Module):
    """Judges by the mean and a weight; its one feature is the medium."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, media):
        return self.weight * media.mean(dim=(1, 2, 3)), [self.weight * media]


def test_adversarial_losses_by_hand():
    discriminators = nn.ModuleList([Mean()])
    made, media = torch.full((2, 1, 2, 2), 0.25), torch.full((2, 1, 2, 2), 0.125)
    losses = adversarial_losses(discriminators, made, media)
    assert float(losses["generator"]) == -0.5
    assert float(losses["features"]) == pytest.approx(1.0)  # |0.5 - 0.25| / 0.25
    assert float(losses["discriminator"]) == pytest.approx((1 - 0.25) + (1 + 0.5))


def test_codec_and_discriminator_learn_apart():
    discriminators = nn.ModuleList([Discriminator(nn.Identity(), 3, 4)])
    made, media = pictures(2, seed=1).requires_grad_(), pictures(2)
    losses = adversarial_losses(discriminators, made, media)
    weights = list(discriminators.parameters())
    of_codec = losses["generator"] + losses["features"]
    assert all(it is None for it in torch.autograd.grad(of_codec, weights, retain_graph=True, allow_unused=True))
    assert torch.autograd.grad(of_codec, made, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(losses["discriminator"], made, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(losses["discriminator"], weights)[0].abs().sum() > 0
    assert all(weight.requires_grad for weight in weights)


def test_a_discriminator_joins_when_it_is_told_to():
    model = tiny_autoencoder(adversarial_weight=0.5, adversarial_start=3).train()
    assert set(model(pictures(2), step=2).losses) == {"pixels", "gradients"}
    out = model(pictures(2), step=3)
    assert set(out.losses) == {"pixels", "gradients", "generator", "features", "discriminator"}
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert tiny_autoencoder().discriminators is None


# ------------------------------------------------------------------------------------------------------ files and input


@pytest.mark.parametrize("bottleneck", ["sphere", "fsq"])
def test_saved_with_its_code_it_loads_anywhere(tmp_path, bottleneck):
    model, images = tiny_autoencoder(bottleneck=bottleneck), pictures(2)
    model.save_pretrained(tmp_path / "autoencoder")
    name = json.loads((tmp_path / "autoencoder/config.json").read_text())["auto_map"]["AutoModel"]
    exported = get_class_from_dynamic_module(name, str(tmp_path / "autoencoder"))
    assert exported is not MegaTransformerImageAutoencoder
    for source in (AutoModel, exported):
        loaded = source.from_pretrained(tmp_path / "autoencoder").eval()
        torch.testing.assert_close(loaded(images).reconstruction, model(images).reconstruction)
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, r"image_size \(30\) must be a multiple of patch_size \(4\)"),
        ({"fsq_levels": [8, 1]}, r"fsq_levels is \[8, 1\]"),
        ({"fsq_levels": []}, r"fsq_levels is \[\]"),
        ({"latent_size": 1}, "a sphere of one number is a sign"),
        ({"bottleneck": "vq"}, "bottleneck"),
        ({"latent_noise": -1}, "latent_noise"),
    ],
)
def test_bad_settings_are_value_errors_that_name_them(options, message):
    with pytest.raises(ValueError, match=message):
        MegaTransformerImageAutoencoderConfig(**{**AUTOENCODER, **options})


def test_bad_input_is_named():
    model = tiny_autoencoder()
    for shape in ((3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 12), (1, 3, 18, 18), (1, 3, 0, 0)):
        with pytest.raises(ValueError, match=r"expected \(images, 3, side, side\), a multiple of patch_size"):
            model.encode(torch.zeros(shape))
    for shape in ((1, 16, 5), (1, 15, 6), (16, 6), (1, 0, 6)):
        with pytest.raises(ValueError, match=r"expected \(images, tokens, 6\), the tokens a square"):
            model.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="bottleneck 'sphere' has no codes"):
        model.encode_ids(pictures(1))
    coded = tiny_autoencoder(bottleneck="fsq", fsq_levels=LEVELS)
    with pytest.raises(ValueError, match="ids are from 0 to 24, but there are codes 0 to 23"):
        coded.decode_ids(torch.arange(25)[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_levels_are_finite_in_every_precision(dtype):
    """The values of the formula in float64, with gradients."""
    bottleneck = tiny_autoencoder(bottleneck="fsq", fsq_levels=[2, 2, 5]).bottleneck
    hidden = torch.tensor([[[-6.0, 0.75, 0.0], [0.25, -5.0, 2.0]]], dtype=dtype, requires_grad=True)
    half = torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64) * 1.001
    offset = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    expected = (torch.tanh(hidden.double() + torch.atanh(offset / half)) * half - offset).round()
    expected = expected / torch.tensor([1, 1, 2])
    found = bottleneck(hidden)
    assert found.dtype == dtype and torch.equal(found.double(), expected)
    assert found[0].tolist() == [[-1.0, 0.0, 0.0], [0.0, -1.0, 1.0]]
    found.float().sum().backward()
    assert torch.isfinite(hidden.grad).all()
