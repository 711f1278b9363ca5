"""Rules by which the outputs of sub-layers join the stream: ReZero, Admin, and a factor for loops."""

import math

import pytest
import torch
from torch import nn

import pretrain
from model import MegaTransformerForCausalLM, MegaTransformerTextModel
from model.attention import AttentionInputs
from model.blocks import AdminResidual, TransformerBlock
from tests.test_pretrain import write_config
from tests.tiny import tiny_config, tiny_ids, tiny_model
from tests.tiny_media import tiny_media_model

ADMIN = {"norm_placement": "post", "residual": "admin"}
PLAIN = {"num_prelude_layers": 24, "num_core_layers": 0, "num_coda_layers": 0}
DEEP = {**PLAIN, "norm": "layernorm", "hidden_size": 64, "intermediate_size": 192}


def calls_of(model, of_type: type[nn.Module], ids: torch.Tensor, **depth) -> list[tuple]:
    """Modules of a type, what went in and what came out, in the order of a forward pass."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append((module, args, output)))
        for module in model.modules()
        if type(module) is of_type
    ]
    with torch.no_grad():
        model(ids, **depth)
    for hook in hooks:
        hook.remove()
    return seen


# ------------------------------------------------------------------------------------------------------------- ReZero


@pytest.mark.parametrize("placement", ["pre", "none"])
def test_a_block_with_rezero_begins_as_the_identity(placement):
    """To the last bit, after the weights were drawn; and it learns not to be one."""
    model, ids = tiny_model(norm_placement=placement, residual="rezero"), tiny_ids(2, 7)
    calls = calls_of(model, TransformerBlock, ids, num_steps=3)
    assert len(calls) == 1 + 3 * 2 + 1
    assert all(torch.equal(args[0], output) for _, args, output in calls)
    scales = {name: weight for name, weight in model.named_parameters() if name.endswith("_residual.weight")}
    assert len(scales) == 2 * 4 and all(weight.shape == (1,) for weight in scales.values())
    model(ids, labels=ids, num_steps=3).loss.backward()
    assert all(weight.grad.abs() > 0 for weight in scales.values())


def test_rezero_multiplies_each_branch_by_its_own_scale():
    """The attention and the feed-forward layer, of a block by hand."""
    block = tiny_model(norm_placement="pre", residual="rezero", position_embedding="none").model.core.layers[0]
    block.attention_residual.weight.data.fill_(0.5)
    block.mlp_residual.weight.data.fill_(-2.0)
    captured = {}
    block.attention.register_forward_hook(lambda module, args, output: captured.update(attended=output))
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = block(x, AttentionInputs(mask=None))
        middle = x + 0.5 * captured["attended"]
        torch.testing.assert_close(output, middle - 2.0 * block.mlp(block.mlp_norm_in(middle)))


# -------------------------------------------------------------------------------------------------------------- Admin


def test_the_profiling_pass_sums_the_variances_of_what_came_before():
    """By the calls of a plain post-norm model with the same weights, on the same random tokens."""
    model = tiny_model(scale=2.0, **ADMIN)
    ids = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))
    calls = calls_of(model, AdminResidual, ids, num_steps=4)
    before = [1 + sum(args[1].var().item() for _, args, _ in calls[:place]) for place in range(len(calls))]
    assert len(calls) == 2 * (1 + 4 * 2 + 1)
    expected = {}
    for module in dict.fromkeys(module for module, *_ in calls):
        sums = [value for (other, *_), value in zip(calls, before, strict=True) if other is module]
        expected[module] = math.sqrt(sum(sums) / len(sums))
    model.train().model.profile_residuals()
    assert model.training and all(module.is_profiled for module in expected)
    for module, value in expected.items():
        assert module.weight.item() == pytest.approx(value, rel=1e-5)
    assert model.model.prelude.layers[0].attention_residual.weight == 1
    with pytest.raises(ValueError, match="has been profiled already"):
        model.model.profile_residuals()


def test_a_model_that_is_not_profiled_is_one_of_post_norm():
    model, ids = tiny_model(scale=2.0, **ADMIN), tiny_ids(2, 7)
    plain = tiny_model(norm_placement="post")
    left = plain.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all("_residual." in name for name in left.unexpected_keys)
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(before, plain(ids).logits)
        model.model.profile_residuals()
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    with pytest.raises(ValueError, match="has no residual 'admin'"):
        plain.model.profile_residuals()


def contributions(model) -> list[float]:
    """The share of each feed-forward layer in the variance of the last state, by what its output and all later sums
    were divided by.
    """
    calls, factor, found = calls_of(model, AdminResidual, tiny_ids(4, 32)), 1.0, []
    for module, args, output in reversed(calls):
        factor /= output.var().item()
        found.append(args[1].var().item() * factor)
        factor *= module.weight.item() ** 2
    return found[::-1][1::2]


def change_by_perturbation(model, size: float = 1e-3) -> float:
    """The relative change of the last state when all matrices of the layers change by noise, over that of these."""
    ids, generator = tiny_ids(4, 32), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model.model(ids).last_hidden_state
        for weight in model.model.prelude.layers.parameters():
            if weight.ndim > 1:
                weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
        return ((model.model(ids).last_hidden_state - before).norm() / before.norm()).item() / size


def test_all_layers_contribute_alike_at_initialisation():
    """In 24 layers of Admin, where plain post norm has forgotten the first."""
    model = tiny_model(**ADMIN, **DEEP)
    plain = contributions(model)
    model.model.profile_residuals()
    flat = contributions(model)
    assert plain[0] < 0.1 * plain[-1]
    assert max(flat) < 1.6 * min(flat)


def test_what_a_change_of_all_weights_does_grows_with_the_depth_in_plain_post_norm_alone():
    """From 6 to 24 layers about fourfold there, as in theory, and less than twice in Admin."""
    found = {}
    for layers in (6, 24):
        for is_profiled in (False, True):
            model = tiny_model(**ADMIN, **{**DEEP, "num_prelude_layers": layers})
            if is_profiled:
                model.model.profile_residuals()
            found[layers, is_profiled] = change_by_perturbation(model)
    assert found[24, False] > 2.7 * found[6, False]
    assert found[24, True] < 2.2 * found[6, True]
    assert found[24, True] < 0.7 * found[24, False]


def test_a_checkpoint_holds_what_was_profiled(tmp_path):
    """So that a loaded model is not profiled again; and one that is loaded unprofiled has w = 1."""
    model, ids = tiny_model(scale=2.0, **ADMIN), tiny_ids(2, 7)
    model.save_pretrained(tmp_path / "fresh")
    model.model.profile_residuals()
    model.save_pretrained(tmp_path / "profiled")
    fresh, profiled = (
        MegaTransformerForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("fresh", "profiled")
    )
    assert all(buffer == 1 for name, buffer in fresh.named_buffers() if name.endswith("_residual.weight"))
    with torch.no_grad():
        assert torch.equal(profiled(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="profiled already"):
        profiled.model.profile_residuals()
    fresh.model.profile_residuals()


def test_a_model_with_media_is_profiled_on_text():
    """Though random tokens may be placeholders."""
    model = tiny_media_model(**ADMIN)
    model.model.profile_residuals()
    assert model.model.coda.layers[0].mlp_residual.weight > 1


# ----------------------------------------------------------------------------------------------- loops, initialisation


def test_loop_scale_multiplies_the_branches_of_the_core_alone():
    """By 1 / (N sqrt(l)), whatever the steps: as if the output projections, which are linear, were smaller."""
    model, ids = tiny_model(scale=2.0, recurrence={"loop_scale_steps": 6}), tiny_ids(2, 7)
    plain = tiny_model(scale=2.0)
    plain.load_state_dict(model.state_dict())
    for layer in plain.model.core.layers:
        for projection in (layer.attention.o_proj, layer.mlp.down_proj):
            projection.weight.data /= 6 * math.sqrt(2)
    for num_steps in (1, 5):
        with torch.no_grad():
            ours, expected = (each(ids, num_steps=num_steps).logits for each in (model, plain))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "shrunk"),
    [
        ({"norm_placement": "none"}, ("prelude", "core", "coda")),
        ({"norm_placement": "post"}, ("prelude", "core", "coda")),
        ({"recurrence": {"mean_steps": 8, "loop_scale_steps": 8}}, ("prelude", "coda")),
        ({"norm_placement": "none", "residual": "rezero"}, ()),
        (ADMIN, ()),
    ],
    ids=["none", "post", "loop scale", "rezero", "admin"],
)
def test_branches_with_a_factor_of_their_own_are_not_made_small_as_well(options, shrunk):
    """Standard deviations of output projections against the table."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "recurrence": {"mean_steps": 8}}
    model, std = tiny_model(**sizes | options), 0.9866 * (2 / (5 * 256)) ** 0.5  # cut at three
    for part in ("prelude", "core", "coda"):
        expected = std / math.sqrt(2 * (1 + 8 * 2 + 1)) if part in shrunk else std
        block = model.model.get_submodule(part).layers[0]
        for weight in (block.attention.o_proj.weight, block.mlp.down_proj.weight):
            assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert block.attention.qkv_proj.weight.std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "rezero"}, "'rezero' needs norm_placement 'pre' or 'none', not 'sandwich'.* the identity"),
        ({"residual": "rezero", "norm_placement": "post"}, "'rezero' needs norm_placement 'pre' or 'none', not 'post'"),
        ({"residual": "admin", "norm_placement": "pre"}, "'admin' .*needs norm_placement 'post', not 'pre'"),
        ({**ADMIN, "recurrence": {"loop_scale_steps": 4}}, "loop_scale_steps is 4, but residual 'admin' has a factor"),
        ({"recurrence": {"loop_scale_steps": 0}}, r"loop_scale_steps \(0\) must be greater than 0"),
        ({"residual": "highway"}, "residual: .*'add', 'rezero', 'admin'.*highway"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_pretraining_profiles_before_the_first_update_and_a_resumed_run_does_not(tmp_path, monkeypatch):
    """Two steps and one more; the checkpoint is that of weights that were profiled fresh."""
    profiled, original = [], MegaTransformerTextModel.profile_residuals
    monkeypatch.setattr(MegaTransformerTextModel, "profile_residuals", lambda it: profiled.append(it) or original(it))
    model = {"norm_placement": "post", "residual": "admin"}
    options = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 1}
    for steps in (1, 2):
        training = {**options, "max_steps": steps, "resume_from_checkpoint": "true"}
        config = write_config(tmp_path, training=training, model=model)
        assert pretrain.main(["--config", str(config)]) == 0
        assert len(profiled) == 1
    loaded = MegaTransformerForCausalLM.from_pretrained(tmp_path / "out")
    scales = {name: buffer for name, buffer in loaded.model.named_buffers() if name.endswith("_residual.weight")}
    assert scales
    assert all(torch.equal(buffer, profiled[0].get_buffer(name)) for name, buffer in scales.items())
