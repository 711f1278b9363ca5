"""A sequence-to-sequence model in 4 bits: what is rounded, and that its cache and what it writes go with that."""

import pytest
import torch

from inference.loading import load_model
from model import RecurrentCache
from model.quantization import QuantizationConfig
from tests.rounding import round_model
from tests.test_seq2seq import masked, step_by_step
from tests.tiny import tiny_ids
from tests.tiny_language_model import tiny_tokenizer
from tests.tiny_seq2seq import tiny_seq2seq

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
# Widths that 64 divides, so that blocks of scales are those of the formula.
SIZES = {part: {"hidden_size": 64, "intermediate_size": 128} for part in ("encoder", "decoder")}


def model_of_64():
    return tiny_seq2seq(scale=1.6, vocab_size=320, **SIZES)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq") / "saved"
    model_of_64().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_model(folder, quantization=QuantizationConfig(load_in="4bit", double_quant=False))[0]


@torch.no_grad()
def test_weights_are_those_of_the_rounded_model(quantized):
    """In encoder, decoder and cross-attention; embeddings, head, injections and norms stay as they are."""
    rounded = round_model(model_of_64(), "4bit")
    given = (tiny_ids(2, 7), masked([7, 4], 7), tiny_ids(2, 5, seed=1))
    torch.testing.assert_close(quantized(*given).logits, rounded(*given).logits, **CLOSE)
    assert not torch.allclose(quantized(*given).logits, model_of_64()(*given).logits, atol=1e-2)


@torch.no_grad()
def test_cached_is_uncached(quantized):
    source, target = tiny_ids(3, 7), tiny_ids(3, 6, seed=1)
    mask, target_mask = masked([7, 4, 6], 7), masked([6, 5, 3], 6, is_left=True)
    depth = {"num_steps": torch.tensor([4, 2, 3])}
    cache = RecurrentCache(quantized.text_config)
    found = step_by_step(quantized, source, mask, target, target_mask, cache, **depth)
    whole, real = quantized(source, mask, target, target_mask, **depth).logits, target_mask.bool()
    torch.testing.assert_close(found[real], whole[real], **CLOSE)


@torch.no_grad()
def test_it_writes_what_the_rounded_model_writes(quantized):
    rounded = round_model(model_of_64(), "4bit")
    options = {"attention_mask": masked([7, 4], 7), "max_new_tokens": 6, "do_sample": False}
    found = quantized.generate(tiny_ids(2, 7), **options)
    assert torch.equal(found, quantized.generate(tiny_ids(2, 7), **options, use_cache=False))
    assert torch.equal(found, rounded.generate(tiny_ids(2, 7), **options))
