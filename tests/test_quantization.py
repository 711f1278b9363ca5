"""Weights of 8 and 4 bits: what is rounded, what is computed with it, generation, and what is refused."""

import re
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from evaluation.__main__ import main as evaluate
from inference import generate
from inference.loading import load_model
from model import MegaTransformerForCausalLM, RecurrentCache
from model.quantization import PARTS, QuantizationConfig
from tests.rounding import KEPT, round_model, rounded_to_4_bits, rounded_to_8_bits
from tests.tiny import for_forward, tiny_ids, tiny_model
from tests.tiny_artist import save_artist, tiny_artist
from tests.tiny_language_model import save_checkpoint, tiny_tokenizer
from tests.tiny_media import draw

BITS = ["4bit", "8bit"]
POLICIES = [("full", None), ("ring", 2), ("last", None)]
EXITS = [("none", None), ("kl_divergence", 0.2), ("latent_difference", 0.3), ("argmax_stability", 1)]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def tiny_base(**options) -> MegaTransformerForCausalLM:
    """Of widths that 64 divides."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128}
    return tiny_model(scale=1.6, **{**sizes, **options})


def save_run(folder: Path, run: Path) -> Path:
    """A checkpoint of another, untrained model for the data of a run."""
    model, tokenizer = load_model(run)
    tiny_base(vocab_size=model.config.vocab_size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(run / "config.yaml", folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint):
    """By bits; the scales of 4 bits are not rounded, as in the formula."""
    return {bits: load(checkpoint, bits) for bits in BITS}


@pytest.fixture
def propagated():
    """Lets `caplog` see what transformers' loggers say."""
    logging.enable_propagation()
    yield
    logging.disable_propagation()


def load(folder, bits, **options):
    return load_model(folder, quantization=QuantizationConfig(load_in=bits, double_quant=False, **options))[0]


def logits_of(model, input_ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def check_layers(model, base, bits: str, kept: str = KEPT, **inputs) -> None:
    """Each linear layer in a forward pass: against the base's matrix, rounded by the formula unless its name is kept,
    times what went in, rounded too in 8 bits.
    """
    seen = {}
    hooks = [
        module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: (given[0], out)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    logits_of(model, **inputs)
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 10
    for name, (given, out) in seen.items():
        layer = base.get_submodule(name)
        weight = layer.weight.detach()
        if not re.match(rf"(?:{kept})(?:\.|$)", name):
            weight = rounded_to_4_bits(weight) if bits == "4bit" else rounded_to_8_bits(weight)
            given = rounded_to_8_bits(given) if bits == "8bit" else given
        expected = nn.functional.linear(given, weight, layer.bias)
        torch.testing.assert_close(out, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def plain_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


# ------------------------------------------------------------------------------------------------- what is rounded


@pytest.mark.parametrize("bits", BITS)
def test_layers_compute_with_matrices_rounded_by_the_formula(quantized, bits):
    """Each for itself, or one more rounding of an input would be iterated."""
    check_layers(quantized[bits], tiny_base(), bits, input_ids=tiny_ids(3, 7))


@pytest.mark.parametrize("num_steps", [1, 6])
def test_logits_of_4_bits_are_those_of_the_rounded_model(quantized, num_steps):
    ids = tiny_ids(3, 7)
    expected = logits_of(round_model(tiny_base(), "4bit"), ids, num_steps=num_steps)
    torch.testing.assert_close(logits_of(quantized["4bit"], ids, num_steps=num_steps), expected, **CLOSE)
    assert not torch.allclose(expected, logits_of(tiny_base(), ids, num_steps=num_steps), atol=1e-2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", ["injection", "prelude", "core", "coda"])
def test_a_part_that_is_kept_is_as_in_the_checkpoint(checkpoint, bits, part):
    kept = {"injection": "core.injection", "core": "core.layers"}.get(part, part)
    model = load(checkpoint, bits, keep_in_high_precision=["heads", part])
    check_layers(model, tiny_base(), bits, rf"lm_head|model\.{kept}", input_ids=tiny_ids(2, 5))


@pytest.mark.parametrize("bits", BITS)
def test_a_head_of_its_own_can_be_rounded(tmp_path, bits):
    base = tiny_base(tie_word_embeddings=False)
    base.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    check_layers(load(tmp_path, bits, keep_in_high_precision=[]), base, bits, "nothing", input_ids=tiny_ids(2, 5))


def test_of_a_model_with_media_the_layers_of_encoders_are_rounded_and_writers_are_not(tmp_path):
    """Against the formula, with a picture and a sound in the prompt."""
    save_artist(tmp_path)
    ours = load(tmp_path, "8bit")
    config, ids = ours.config, tiny_ids(1, 12, low=20)
    ids[0, 2], ids[0, 6:8] = config.image_token_id, config.audio_token_id
    media = {"pixel_values": draw(1, 3, 8, 8), "input_features": draw(1, 16, 8)}
    check_layers(ours, tiny_artist(), "8bit", input_ids=ids, **media)
    plain = plain_layers(ours)
    assert plain == {name for name in plain_layers(tiny_artist()) if re.match(KEPT, name)}
    assert any("writers" in name for name in plain)
    kept = load(tmp_path, "8bit", keep_in_high_precision=list(PARTS))
    assert plain_layers(kept) == plain_layers(tiny_artist())


def test_layers_whose_width_64_does_not_divide_stay_as_they_are_in_4_bits(tmp_path, caplog, propagated):
    """Their scales would be read at wrong places on some CPUs."""
    shape = {"hidden_size": 64, "intermediate_size": 96}
    tiny_base(**shape).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ours = load(tmp_path, "4bit")
    expected = round_model(tiny_base(**shape), "4bit", kept=rf"{KEPT}|.*\.down_proj")
    torch.testing.assert_close(logits_of(ours, tiny_ids(2, 5)), logits_of(expected, tiny_ids(2, 5)), **CLOSE)
    assert "4 of 16 layers stay as they are, not in 4 bits, since 64 does not divide their width" in caplog.text


def test_scales_of_8_bits_are_nearly_those_of_32(checkpoint, quantized):
    """`double_quant` costs little beside what 4 bits cost."""
    ids = tiny_ids(3, 7)
    whole, once = logits_of(tiny_base(), ids), logits_of(quantized["4bit"], ids)
    twice = logits_of(load_model(checkpoint, quantization=QuantizationConfig(load_in="4bit"))[0], ids)
    assert 0 < (twice - once).norm() < 0.2 * (once - whole).norm()


@pytest.mark.parametrize(("threshold", "is_alone"), [(0, True), (3, False)])
def test_a_row_of_8_bits_depends_on_nothing_but_the_row_unless_outliers_are_left_out(checkpoint, threshold, is_alone):
    model = load(checkpoint, "8bit", outlier_threshold=threshold)
    together, alone = logits_of(model, tiny_ids(8, 9)), logits_of(model, tiny_ids(8, 9)[:1])
    assert torch.allclose(together[:1], alone, atol=1e-5) == is_alone


def test_weights_of_bfloat16_are_computed_with_in_bfloat16(checkpoint):
    model, _ = load_model(checkpoint, dtype=torch.bfloat16, quantization=QuantizationConfig(load_in="4bit"))
    assert model.dtype == model.model.core.injection.proj.weight.dtype == torch.bfloat16
    assert model.model.core.layers[0].mlp.down_proj.compute_dtype == torch.bfloat16
    logits, ids = logits_of(model, tiny_ids(2, 5), num_steps=1), tiny_ids(2, 5)
    expected = logits_of(round_model(tiny_base(), "4bit"), ids, num_steps=1)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.05 * expected.norm()


# ------------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("policy", "kept"), POLICIES)
@pytest.mark.parametrize(("criterion", "threshold"), EXITS)
def test_generation_with_every_cache_and_with_exits(quantized, bits, policy, kept, criterion, threshold):
    """Token by token, each token stopping where the criterion says; of 4 bits with the rounded plain model."""
    exits = {"exit_criterion": criterion, "exit_threshold": threshold}
    ours = quantized[bits].generate(
        tiny_ids(1, 6),
        **exits,
        num_steps=7,
        cache_policy=policy,
        num_kept_steps=kept,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    model = round_model(tiny_base(), bits) if bits == "4bit" else quantized[bits]
    ids = chunk = tiny_ids(1, 6)
    cache, steps = RecurrentCache(model.config, policy, kept), []
    with torch.no_grad():
        for _ in range(8):
            out = model(chunk, cache=cache, num_steps=7, **(for_forward(**exits) if steps else {}))
            steps.append(int(out.exit_steps[0]))
            chunk = out.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, chunk), dim=1)
    assert ours.sequences.tolist() == ids.tolist()
    assert ours.exit_steps.tolist() == [steps]
    assert (min(steps) < 7) == (criterion != "none")


@pytest.mark.parametrize("bits", BITS)
def test_the_command_line_loads_in_fewer_bits(checkpoint, capsys, bits):
    argv = [str(checkpoint), "--prompt", "the cat", "--greedy", "--num-steps", "5", "--max-new-tokens", "6"]
    assert generate.main([*argv, "--load-in", bits]) == 0
    model, tokenizer = load_model(checkpoint, quantization=QuantizationConfig(load_in=bits))
    ids = torch.tensor([[1, *tokenizer("the cat")["input_ids"]]])
    length = ids.shape[1]
    for _ in range(6):
        ids = torch.cat((ids, logits_of(model, ids, num_steps=5)[:, -1:].argmax(-1)), dim=1)
    assert capsys.readouterr().out == tokenizer.decode(ids[0, length:], skip_special_tokens=True) + "\n"


def test_a_run_is_evaluated_in_fewer_bits(tiny_run, tmp_path, capsys):
    folder = save_run(tmp_path / "run", tiny_run)
    argv = [str(folder), "--num-steps", "2", "--limit", "8", "--no-texts", "--output", str(tmp_path)]
    tables = []
    for options in ([], ["--load-in", "8bit"], ["--load-in", "4bit"]):
        assert evaluate([*argv, *options]) == 0
        tables.append(float(re.search(r"^\| +2 \| +([\d.]+)", capsys.readouterr().out, re.MULTILINE)[1]))
    assert tables[0] == pytest.approx(tables[1], rel=0.05) and tables[0] == pytest.approx(tables[2], rel=0.2)


# ------------------------------------------------------------------------------------------------ saved, and refused


@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded_it_stays_in_fewer_bits_and_is_not_quantised_again(quantized, tmp_path, bits):
    quantized[bits].save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    assert plain_layers(loaded) == plain_layers(quantized[bits]) == {"lm_head", "model.core.injection.proj"}
    ids = tiny_ids(2, 6)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(quantized[bits], ids), atol=0, rtol=0)
    for again in BITS:
        with pytest.raises(ValueError, match=rf"are quantised already and cannot be quantised again, to {again}"):
            load(tmp_path, again)


def test_a_model_of_which_nothing_fits_4_bits_is_refused(tmp_path):
    save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no layer that is to be quantised has a width that 64 divides; use 8bit"):
        load(tmp_path, "4bit")


def test_a_head_that_is_the_embedding_is_not_quantised(checkpoint):
    with pytest.raises(ValueError, match=r"keep_in_high_precision has no heads, but .* \(tie_word_embeddings\)"):
        load(checkpoint, "4bit", keep_in_high_precision=["injection"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_in_high_precision": ["injections"]}, "'injections' is unknown; known parts: injection, heads"),
        ({"outlier_threshold": -1.0}, r"\.outlier_threshold: -1.0 is no size"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(load_in="4bit", **options)


# ---------------------------------------------------------------------------------------------- saved after it was used


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_saved_after_a_forward_pass_is_what_is_saved_before(checkpoint, tmp_path, monkeypatch, double_quant):
    """Bit for bit, also where the kernel of CPUs with bfloat16 instructions rearranges the weights in their place: here
    on every CPU, with zeros for its products.
    """
    options = QuantizationConfig(load_in="4bit", double_quant=double_quant)
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
        model, _ = load_model(checkpoint, dtype=torch.bfloat16, quantization=options)
    model.save_pretrained(tmp_path / "before")
    layer = model.model.core.layers[0].mlp.down_proj
    before = layer.weight.detach().clone()

    def zeros(x, weight, quant_state, bias=None):
        return x.new_zeros(*x.shape[:-1], quant_state.shape[0])

    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes, "matmul_4bit", zeros)
        for name in ("after", "once_more"):
            logits_of(model, tiny_ids(2, 5))
            assert layer.weight.shape != before.shape  # it was rearranged
            model.save_pretrained(tmp_path / name)
    expected = load_file(tmp_path / "before" / "model.safetensors")
    assert any(name.endswith("absmax") for name in expected)
    for name in ("after", "once_more"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(saved[key], expected[key])] == []
