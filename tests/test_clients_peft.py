"""PEFT's methods on a tiny model: what they learn and what is written with them, against the same without a cache."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional
from transformers import DynamicCache

from model import RecurrentCache
from tests.tiny import tiny_ids, tiny_model

pytestmark = pytest.mark.slow

VIRTUAL = 4
METHODS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "projected_prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=16
    ),
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
}
METHOD = pytest.mark.parametrize("method", METHODS)


def peft_model(method: str, **options) -> PeftModel:
    """With virtual tokens large enough to change what is written."""
    model = get_peft_model(tiny_model(scale=2.0, **options), METHODS[method])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("prompt_encoder"):
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def written_without_cache(model, ids: torch.Tensor, num_tokens: int, **depth) -> torch.Tensor:
    """Greedily, all tokens read again for each."""
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **depth).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


@METHOD
@pytest.mark.parametrize("depth", [{}, {"num_steps": 6}], ids=["mean", "deeper"])
def test_what_is_written_is_what_is_written_without_a_cache(method, depth):
    model, ids = peft_model(method), tiny_ids(2, 6)
    ours = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        **depth,
    )
    assert torch.equal(ours, written_without_cache(model, ids, 8, **depth))
    plain = tiny_model(scale=2.0).generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **depth)
    assert not torch.equal(ours, plain)


@METHOD
def test_exits_are_possible_with_what_is_learnt(method):
    model, ids = peft_model(method), tiny_ids(2, 6)
    outputs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        num_steps=8,
        exit_criterion="latent_difference",
        exit_threshold=0.5,
        return_dict_in_generate=True,
    )
    assert outputs.exit_steps.shape == (2, 6)
    assert (outputs.exit_steps[:, 0] == 8).all() and 1 <= outputs.exit_steps[:, 1:].min() < 8


@METHOD
def test_gradients_are_those_of_finite_differences(method):
    """Through the steps that carry gradient, here all, of the loss by what is learnt, and by nothing else."""
    model, ids = peft_model(method).double(), tiny_ids(2, 6)

    def loss():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), num_steps=3).logits[:, -5:]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(("lora" if method == "lora" else "prompt_encoder") in name for name in learnt)
    for name, weight in learnt.items():
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        with torch.no_grad():
            weight.add_(direction, alpha=1e-6)
            above = loss()
            weight.sub_(direction, alpha=2e-6)
            below = loss()
            weight.add_(direction, alpha=1e-6)
        slope = ((above - below) / 2e-6).item()
        assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("policy", ["full", "ring", "last"])
def test_a_prefix_is_read_as_tokens_that_took_one_step(policy):
    """Keys and values that a shallow pass has left, in a cache of transformers, against that cache itself."""
    model = tiny_model(scale=2.0, recurrence={"cache_policy": policy, "num_kept_steps": 2})
    before, after = tiny_ids(2, 5), tiny_ids(2, 4, seed=1)
    with torch.no_grad():
        cache = model(before, num_steps=1, use_cache=True).past_key_values
        slots = [*cache.prelude_slots, *cache.core_slots(0), *cache.coda_slots]
        prefix = DynamicCache([(slot.keys[:, :, :5].clone(), slot.values[:, :, :5].clone()) for slot in slots])
        ours = model(after, past_key_values=prefix, num_steps=4, use_cache=True)
        expected = model(after, past_key_values=cache, num_steps=4)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert isinstance(ours.past_key_values, RecurrentCache) and ours.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("layers", [3, 5])
def test_a_cache_of_other_layers_is_refused(layers):
    model = tiny_model()
    keys = torch.zeros(2, model.config.num_key_value_heads, 3, model.config.head_dim)
    with pytest.raises(ValueError, match=rf"cache is a DynamicCache .* in {layers} layers; .* in each of 4 layers"):
        model(tiny_ids(2, 4), past_key_values=DynamicCache([(keys, keys)] * layers))
