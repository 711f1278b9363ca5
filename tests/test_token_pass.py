"""One new token of each row: few operations, and the numbers of the modules."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from model import RecurrentCache, attention
from model.blocks import TransformerBlock
from tests.tiny import tiny_ids, tiny_model

VARIANTS = {
    "sandwich": {},
    "pre, alibi": {"norm_placement": "pre", "position_embedding": "alibi"},
    "post, learned": {"norm_placement": "post", "position_embedding": "learned", "norm": "layernorm"},
    "biases and norms of heads": {"qk_bias": True, "qk_norm": True},
    "one key for all heads": {"num_key_value_heads": 1, "mlp": "geglu"},
    "mlp": {"mlp": "mlp", "recurrence": {"injection": "gate"}},
    "experts": {"mlp": "peer", "peer_num_experts": 64, "peer_top_k": 4, "recurrence": {"injection": "add"}},
    "rezero": {
        "residual": "rezero",
        "norm_placement": "pre",
        "num_core_layers": 3,
        "num_unique_core_layers": 2,
        "layer_sharing": "cycle",
    },
    "scaled": {"recurrence": {"loop_scale_steps": 4, "step_embedding": "sinusoidal"}},
    "wide": {"hidden_size": 256, "intermediate_size": 1024},
    "no core": {"num_core_layers": 0},
}
POLICIES = [{}, *({"cache_policy": policy} for policy in ("last", "residual"))]
POLICIES += [{"cache_policy": "ring", "num_kept_steps": 2}, {"cache_policy": "first", "num_kept_tokens": 2}]
ROUNDING = 1e-6
"""Of the largest logit."""


def decode(model: nn.Module, rows: int = 3, **options) -> torch.Tensor:
    """Logits of tokens that are read one by one behind a prompt, in rows with padding."""
    ids, cache = tiny_ids(rows, 10), RecurrentCache(model.config.get_text_config())
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[-1, :2] = 0
    with torch.no_grad():
        parts = [model(ids[:, :5], attention_mask=mask[:, :5], cache=cache, **options).logits]
        for end in range(6, 11):
            part = ids[:, end - 1 : end]
            parts.append(model(part, attention_mask=mask[:, :end], cache=cache, **options).logits)
    return torch.cat(parts, dim=1)


@pytest.fixture
def by_modules(monkeypatch):
    """Runs a function by the modules alone."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "is_token_alone", lambda *args: False)
            return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_numbers_are_those_of_the_modules(name, rows, by_modules, monkeypatch):
    model = tiny_model(scale=1.2 if name == "wide" else 2.0, **VARIANTS[name])
    made, make = [], TransformerBlock.token_function
    monkeypatch.setattr(TransformerBlock, "token_function", lambda block: made.append(block) or make(block))
    depth = {} if name == "no core" else {"num_steps": torch.tensor([4, 2, 3][:rows])}
    found, expected = decode(model, rows, **depth), by_modules(decode, model, rows, **depth)
    assert set(made) == {module for module in model.modules() if isinstance(module, TransformerBlock)}
    torch.testing.assert_close(found, expected, atol=ROUNDING * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_texts_with_exits_are_the_same(policy, by_modules):
    model, ids = tiny_model(scale=2.0), tiny_ids(3, 6)
    options = {
        "max_new_tokens": 12,
        "exit_criterion": "kl_divergence",
        "exit_threshold": 0.05,
        "num_steps": 6,
        **policy,
    }
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "eos_token_id": None}
    found, expected = model.generate(ids, **options), by_modules(model.generate, ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.exit_steps, expected.exit_steps)
    assert len(found.exit_steps.unique()) > 2


def test_modules_with_hooks_and_adapters_are_called(by_modules):
    model, seen = tiny_model(scale=2.0), []
    for module in (model.model.core.layers[0].mlp.down_proj, model.model.coda.layers[0].attention):
        module.register_forward_hook(lambda module, args, output: seen.append(module) or 2 * output)
    found = decode(model, num_steps=3)
    assert len(seen) == 6 * (3 + 1)
    torch.testing.assert_close(found, by_modules(decode, model, num_steps=3), atol=1e-5, rtol=0)
    tuned = get_peft_model(tiny_model(scale=2.0), LoraConfig(target_modules=["qkv_proj", "o_proj"], r=2))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    found = decode(tuned, num_steps=3)
    torch.testing.assert_close(found, by_modules(decode, tuned, num_steps=3), atol=1e-5, rtol=0)
    assert (found - decode(tuned.unload(), num_steps=3)).abs().max() > 0.01


def test_changed_weights_are_seen(by_modules):
    model, ids, cache = tiny_model(scale=2.0), tiny_ids(1, 3), None
    layer = model.model.core.layers[0]
    logits = []
    with torch.no_grad():
        cache = RecurrentCache(model.config)
        for index in range(3):
            logits.append(model(ids[:, index : index + 1], cache=cache, num_steps=2).logits)
            layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight * 2)
            layer.attention_norm_in.weight.mul_(1.5)
    model = tiny_model(scale=2.0)
    layer, cache = model.model.core.layers[0], RecurrentCache(model.config)

    def expected(index):
        with torch.no_grad():
            found = model(ids[:, index : index + 1], cache=cache, num_steps=2).logits
            layer.mlp.down_proj.weight.mul_(2)
            layer.attention_norm_in.weight.mul_(1.5)
        return found

    for index in range(3):
        torch.testing.assert_close(logits[index], by_modules(expected, index), atol=1e-5, rtol=0)


def test_dropout_attentions_and_half_precision_go_by_the_modules(monkeypatch):
    """None of them is what the functions give."""
    made, make = [], TransformerBlock.token_function
    monkeypatch.setattr(TransformerBlock, "token_function", lambda block: made.append(block) or make(block))
    model = tiny_model(hidden_dropout=0.5)
    different = decode(model.train(), num_steps=2)[:, 5:] - decode(model, num_steps=2)[:, 5:]
    assert different.abs().max() > 0.01
    decode(model.eval(), num_steps=2, output_attentions=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode(model, num_steps=2)
    ids, cache = tiny_ids(1, 2), RecurrentCache(model.config)
    for token in ids.split(1, dim=1):  # with gradients
        model(token, cache=cache, num_steps=2)
    assert made == []
    decode(model, num_steps=2)
    assert made != []


def test_bf16_weights_give_what_the_modules_give(by_modules):
    model = tiny_model(scale=2.0).to(torch.bfloat16)
    found, expected = decode(model, num_steps=3), by_modules(decode, model, num_steps=3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_generate_makes_functions_once_and_forgets_them(monkeypatch):
    model, made, make = tiny_model(num_core_layers=1), [], TransformerBlock.token_function
    monkeypatch.setattr(TransformerBlock, "token_function", lambda block: made.append(block) or make(block))
    block, ids = model.model.core.layers[0], tiny_ids(1, 4)
    given = {"num_steps": 3, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, **given)
    assert made.count(block) == 1
    seen = []
    handle = block.register_forward_hook(lambda *call: seen.append(1))
    second = model.generate(first.sequences, past_key_values=first.past_key_values, **given)
    assert len(seen) == 5 * 3
    assert made.count(block) == 1
    handle.remove()
    assert second.past_key_values.token_functions is None
    with pytest.raises(RuntimeError, match="by the streamer"):
        model.generate(ids, streamer=Broken(), past_key_values=(cache := RecurrentCache(model.config)), **given)
    assert cache.token_functions is None


class Broken:
    """A streamer that fails behind the prompt."""

    def __init__(self):
        self.count = 0

    def put(self, tokens):
        self.count += 1
        if self.count == 3:
            raise RuntimeError("by the streamer")

    def end(self):
        pass
