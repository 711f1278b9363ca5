"""Each variant of the blocks with everything that models are used with: caches, exits, padding, packing, adapters, few
bits, activation checkpointing, compiled units and other machines.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from inference.loading import load_model
from model import ExitOptions, MegaTransformerForCausalLM, RecurrentCache
from model.exit_criteria import relative_change
from model.quantization import QuantizationConfig
from tests.rounding import round_model
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_language_model import tiny_tokenizer

PEER = {"mlp": "peer", "peer_num_experts": 36, "peer_num_heads": 2, "peer_top_k": 3, "peer_key_dim": 8}
LAYERS = {"num_prelude_layers": 3, "num_core_layers": 4, "num_coda_layers": 2}
UNIQUE = {"num_unique_prelude_layers": 2, "num_unique_core_layers": 2, "num_unique_coda_layers": 1}
VARIANTS = {
    "sequence": {"layer_sharing": "sequence", **LAYERS, **UNIQUE},
    "cycle": {"layer_sharing": "cycle", **LAYERS, **UNIQUE},
    "cycle_rev": {"layer_sharing": "cycle_rev", **LAYERS, **UNIQUE},
    "none": {"norm_placement": "none"},
    "rezero": {"norm_placement": "none", "residual": "rezero"},
    "rezero-pre": {"norm_placement": "pre", "residual": "rezero"},
    "admin": {"norm_placement": "post", "residual": "admin"},
    "loop_scale": {"recurrence": {"loop_scale_steps": 4}},
    "step_embedding": {"recurrence": {"step_embedding": "sinusoidal"}},
    "peer": PEER,
    "peri": {"norm_placement": "peri"},
    "biases": {"attention_bias": True, "mlp_bias": True, "mlp": "mlp_tanh", "norm": "layernorm"},
    "looped": {
        "num_prelude_layers": 0,
        "num_coda_layers": 0,
        "norm_placement": "peri",
        "recurrence": {"state_init": "embedding", "injection": "none", "state_norm": "in_loop"},
    },
    "retrofitted": {
        "norm_placement": "pre",
        "recurrence": {"state_init": "embedding", "injection": "scalar", "state_norm": "none"},
    },
    "all": {
        **(PEER | LAYERS | UNIQUE | {"layer_sharing": "cycle_rev", "norm_placement": "pre", "residual": "rezero"}),
        "recurrence": {"step_embedding": "sinusoidal", "injection": "gate"},
    },
    "plain": {**(PEER | LAYERS | UNIQUE), "num_core_layers": 0, "num_unique_core_layers": None},
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def model_of(variant: str, scale: float = 1.6) -> MegaTransformerForCausalLM:
    """Of widths that 64 divides, with residuals that are not at their beginning any more."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128}
    model = tiny_model(3, scale=scale, **{**sizes, **VARIANTS[variant]})
    if model.config.residual == "admin":
        model.model.profile_residuals()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("_residual.weight"):
            weight.data.uniform_(0.1, 0.3, generator=generator)
    return model


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def model(variant):
    return model_of(variant)


def depth(model, num_steps: int | tuple) -> dict:
    """The argument of models that have a core."""
    return {} if model.config.get_text_config().num_core_layers == 0 else {"num_steps": num_steps}


def logits_of(model, ids, num_steps: int | tuple = 3, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **depth(model, num_steps), **kwargs).logits


def gradients(model, ids) -> list[torch.Tensor]:
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, **depth(model, (1, 2))).loss.backward()
    return [weight.grad for weight in model.parameters()]


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("policy", "kept", "num_steps"), [("full", None, 3), ("ring", 3, 3), ("last", None, 1)])
def test_with_a_cache_equals_without(model, policy, kept, num_steps):
    ids, cache = tiny_ids(2, 10), RecurrentCache(model.config, policy, kept)
    parts = [logits_of(model, part, num_steps, cache=cache) for part in ids.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, ids, num_steps), **CLOSE)


@pytest.mark.parametrize("policy", ["full", "ring", "last"])
def test_a_cache_of_static_size_equals_one_that_grows(model, policy):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "cache_policy": policy}
    ids = tiny_ids(2, 6)
    grown = model.generate(ids, **options, **depth(model, 5))
    assert torch.equal(model.generate(ids, cache_implementation="static", **options, **depth(model, 5)), grown)


def test_padded_and_packed_rows_equal_rows_alone(model):
    first, second = tiny_ids(1, 8), tiny_ids(1, 5, seed=1)
    alone = [logits_of(model, row)[0] for row in (first, second)]
    padded = torch.cat((first, nn.functional.pad(second, (3, 0))))
    batch = logits_of(model, padded, attention_mask=torch.tensor([[1] * 8, [0] * 3 + [1] * 5]))
    positions = torch.cat((torch.arange(8), torch.arange(5)))[None]
    packed = logits_of(model, torch.cat((first, second), dim=1), position_ids=positions)[0]
    for found in ((batch[0], batch[1, 3:]), packed.split([8, 5])):
        torch.testing.assert_close(found, tuple(alone), **CLOSE)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_a_row_that_exits_equals_the_row_alone_with_its_steps(model):
    """The steps are counted from the first for all, those without gradient among them; behind a cache too."""
    ids, cache = tiny_ids(4, 7), RecurrentCache(model.config)
    logits_of(model, ids[:, :3], 6, cache=cache)
    with torch.no_grad():
        before, after = model(ids, num_steps=3, output_states=True).states[-2:]
        change = relative_change(after, before).mean(-1).median().item()  # of some rows less, of some more
        exits = ExitOptions("latent_difference", change)
        out = model(ids, num_steps=6, exits=exits)
        later = model(ids[:, 3:], num_steps=6, exits=exits, cache=cache)
        pair = model(ids, num_steps=(2, 4)).logits
    assert out.exit_steps.min() < 6
    for row, (count, after) in enumerate(zip(out.exit_steps.tolist(), later.exit_steps.tolist(), strict=True)):
        torch.testing.assert_close(out.logits[row : row + 1], logits_of(model, ids[row : row + 1], count), **CLOSE)
        alone = RecurrentCache(model.config)
        logits_of(model, ids[row : row + 1, :3], 6, cache=alone)
        expected = logits_of(model, ids[row : row + 1, 3:], after, cache=alone)
        torch.testing.assert_close(later.logits[row : row + 1], expected, **CLOSE)
    torch.testing.assert_close(pair, logits_of(model, ids, 6), **CLOSE)


def test_activation_checkpointing_changes_no_bit_and_all_weights_learn(model):
    ids = tiny_ids(2, 7)
    expected = gradients(model, ids)
    assert all(gradient is not None and gradient.any() for gradient in expected)
    model.activation_checkpointing_enable()
    assert all(map(torch.equal, gradients(model, ids), expected))


# ------------------------------------------------------------------------------------------------- libraries around it


@pytest.mark.slow
def test_compiled_units_equal_and_need_no_graph_for_a_further_depth(model):
    ids, graphs = tiny_ids(2, 7), []
    expected = [logits_of(model, ids, steps, use_cache=False) for steps in (2, 4, 6)]
    torch._dynamo.reset()
    model.model.compile_units(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    found = [logits_of(model, ids, 2, use_cache=False)]
    count = len(graphs)
    found += [logits_of(model, ids, steps, use_cache=False) for steps in (4, 6)]
    assert 0 < count == len(graphs)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_adapters_alone_learn_and_can_be_merged(model):
    ids = tiny_ids(2, 7)
    before, config = logits_of(model, ids), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    learned = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert learned and all("lora" in name for name in learned)
    tuned(input_ids=ids, labels=ids, **depth(model, 2)).loss.backward()
    assert all(weight.grad.any() for name, weight in tuned.named_parameters() if name in learned)
    with_adapters = logits_of(tuned, ids)
    assert not torch.allclose(with_adapters, before, atol=1e-2)
    torch.testing.assert_close(logits_of(tuned.merge_and_unload(), ids), with_adapters, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with one of each."""
    folder = tmp_path_factory.mktemp("family")
    for name in VARIANTS:
        model_of(name).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def test_weights_of_4_bits_are_those_of_the_rounded_model(variant, checkpoints):
    """Matrices of linear layers; norms, scales, keys and experts stay as they are."""
    quantization = QuantizationConfig(load_in="4bit", double_quant=False)
    loaded, ids = load_model(checkpoints / variant, quantization=quantization)[0], tiny_ids(2, 7)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(round_model(model_of(variant), "4bit"), ids), **CLOSE)


LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids, found = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), {}
for name in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        found[name] = model(ids).logits
assert "model" not in sys.modules
torch.save(found, "found.pt")
"""


def test_each_is_the_same_elsewhere(checkpoints, tmp_path):
    """In a process that has nothing but the checkpoints, and the code in them."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    ids = tiny_ids(2, 6)
    command = [sys.executable, "-c", LOADER, str(checkpoints), json.dumps(ids.tolist()), *VARIANTS]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == VARIANTS.keys()
    for name, logits in found.items():
        with torch.no_grad():
            torch.testing.assert_close(logits, model_of(name)(ids).logits, atol=1e-5, rtol=1e-5)
