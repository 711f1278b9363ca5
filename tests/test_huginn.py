"""`convert.py huginn`: a checkpoint of that project, computed by its own formulas, and by ours."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import convert
from inference.converters.foreign import ForeignCheckpoint
from inference.converters.huginn import convert_huginn
from inference.loading import load_model
from model import ExitOptions, MegaTransformerForCausalLM
from model.exit_criteria import ExitController
from tests.tiny_language_model import tiny_tokenizer

CONFIG = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "n_embd": 32,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 3,
    "n_layers_in_coda": 2,
    "block_size": 64,
    "vocab_size": 300,
    "padded_vocab_size": 320,
    "intermediate_size": 48,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
    "mean_recurrence": 4,
    "mean_backprop_depth": 2,
    "qk_bias": True,
    "tie_embeddings": False,
    "bias": False,
    "state_init": "like-init",
    "injection_type": "linear",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "init_values": {"embed_scale": 5.5},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FIXTURES = [Path(name) for name in os.environ.get("HUGINN_CHECKPOINTS", "").split(os.pathsep) if name]
"""Folders with checkpoints and what the project's own code makes of them, for further tests."""
NAMES = {
    "kl": "kl_divergence",
    "minp_kl": "min_p_kl",
    "entropy_diff": "entropy_difference",
    "latent_diff": "latent_difference",
    "cosine": "cosine",
    "argmax_stability": "argmax_stability",
}


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    """Weights under the names of that project."""
    torch.manual_seed(0)
    width, inner, heads, groups = (config[name] for name in ("n_embd", "intermediate_size", "n_heads",
                                                             "num_key_value_heads"))  # fmt: skip
    head_dim = width // heads
    shapes = {
        "attn.Wqkv.weight": ((heads + 2 * groups) * head_dim, width),
        "attn.proj.weight": (width, width),
        "mlp.fc.weight": (2 * inner, width),
        "mlp.proj.weight": (width, inner),
        **{f"norm_{number}.weight": (width,) for number in range(1, 5)},
    }
    parts = {"prelude": "n_layers_in_prelude", "core_block": "n_layers_in_recurrent_block", "coda": "n_layers_in_coda"}
    weights = {
        f"transformer.{part}.{layer}.{name}": 0.1 * torch.randn(shape) + (len(shape) == 1)
        for part, count in parts.items()
        for layer in range(config[count])
        for name, shape in shapes.items()
    }
    if config["qk_bias"]:  # one tensor for both, so that there are as many heads of keys as of queries
        for name in [name for name in weights if name.endswith("Wqkv.weight")]:
            weights[name.replace("Wqkv.weight", "qk_bias")] = 0.3 * torch.randn(2, 1, heads, head_dim)
    for name, shape in (("wte", (config["padded_vocab_size"], width)), ("adapter", (width, 2 * width))):
        weights[f"transformer.{name}.weight"] = 0.1 * torch.randn(shape)
    weights["transformer.ln_f.weight"] = 1 + 0.2 * torch.randn(width)
    if not config["tie_embeddings"]:
        weights["lm_head.weight"] = 0.2 * torch.randn(config["padded_vocab_size"], width)
    return weights


def reference(config: dict, weights: dict, ids: torch.Tensor, state: torch.Tensor, steps: int) -> torch.Tensor:
    """The logits by the formulas of the paper, with rotations as products of complex numbers."""
    heads, groups = config["n_heads"], config["num_key_value_heads"]
    head_dim, sequence = config["n_embd"] // heads, ids.shape[1]
    frequencies = config["rope_base"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    turn = torch.polar(torch.ones(()), torch.arange(sequence)[:, None] * frequencies)[:, None]

    def norm(x, name):
        mean_square = x.square().mean(-1, keepdim=True)
        return x * (mean_square + config["norm_eps"]).rsqrt() * weights[f"transformer.{name}.weight"]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def layer(x, name):
        qkv = norm(x, f"{name}.norm_1") @ weights[f"transformer.{name}.attn.Wqkv.weight"].t()
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, groups, groups), dim=-2)
        if config["qk_bias"]:
            bias = weights[f"transformer.{name}.attn.qk_bias"]
            q, k = q + bias[0], k + bias[1]
        q, k, v = (part.transpose(1, 2) for part in (rotate(q), rotate(k), v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = norm(out.transpose(1, 2).flatten(2) @ weights[f"transformer.{name}.attn.proj.weight"].t() + x,
                 f"{name}.norm_2")  # fmt: skip
        gate, up = (norm(x, f"{name}.norm_3") @ weights[f"transformer.{name}.mlp.fc.weight"].t()).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        return norm(inner @ weights[f"transformer.{name}.mlp.proj.weight"].t() + x, f"{name}.norm_4")

    def layers(x, part, count):
        for number in range(config[count]):
            x = layer(x, f"{part}.{number}")
        return x

    embeds = config["init_values"]["embed_scale"] * weights["transformer.wte.weight"][ids]
    embeds = layers(embeds, "prelude", "n_layers_in_prelude")
    for _ in range(steps):
        state = torch.cat((state, embeds), dim=-1) @ weights["transformer.adapter.weight"].t()
        state = layers(state, "core_block", "n_layers_in_recurrent_block")
    hidden = norm(layers(norm(state, "ln_f"), "coda", "n_layers_in_coda"), "ln_f")
    return hidden @ weights.get("lm_head.weight", weights["transformer.wte.weight"]).t()


def write_checkpoint(folder: Path, change: dict | None = None, weights: dict | None = None) -> tuple[dict, dict]:
    config = {**CONFIG, **(change or {})}
    weights = random_weights(config) if weights is None else weights
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return config, weights


@pytest.mark.parametrize(
    "change", [{"qk_bias": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "tie_embeddings": True}]
)
def test_the_logits_are_those_of_the_original(tmp_path, change):
    """At several depths, from a given state: tied or not, with biases or grouped queries."""
    config, weights = write_checkpoint(tmp_path / "theirs", change)
    assert convert.main(["huginn", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    model, tokenizer = load_model(tmp_path / "ours")
    assert tokenizer.bos_token_id == model.config.bos_token_id == 1
    ids, state = torch.randint(300, (2, 11)), torch.randn(2, 11, 32)
    for steps in (1, 3, 6):
        with torch.no_grad():
            ours = model(ids, initial_state=state, num_steps=steps).logits
        torch.testing.assert_close(ours, reference(config, weights, ids, state, steps), atol=1e-4, rtol=1e-4)
    assert model.config.recurrence.mean_steps == 4 and model.config.recurrence.backprop_steps == 2


def test_what_is_converted_generates_with_every_cache_and_exits(tmp_path):
    """As it does without a cache, where the policy keeps everything."""
    write_checkpoint(tmp_path / "theirs", {"qk_bias": False})
    convert.main(["huginn", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    model, _ = load_model(tmp_path / "ours")
    prompt = torch.randint(3, 300, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "num_steps": 4, "eos_token_id": None}
    plain = model.generate(prompt, use_cache=False, **options)
    for policy in ("full", "ring", "last", "first", "residual"):
        found = model.generate(prompt, cache_policy=policy, **options)
        assert found.shape == (2, 11)
        assert policy != "full" or torch.equal(found, plain)
    for criterion in NAMES.values():
        assert model.generate(prompt, exit_criterion=criterion, **options).shape == (2, 11)


CASES = {
    "another model": ({"model_type": "llama"}, None, "model_type in .* is 'llama'"),
    "another block": ({"block_class_name": "PostNormBlock"}, None, "block_class_name in .* is 'PostNormBlock'"),
    "no width": ({"n_embd": None}, None, "n_embd in .* is None; a int"),
    "no number": ({"n_embd": "wide"}, None, "n_embd in .* is 'wide'"),
    "missing": ({}, lambda weights: weights.pop("transformer.coda.1.norm_3.weight"), "lacks 1 of the weights"),
    "left over": ({}, lambda weights: weights.update({"transformer.more.weight": torch.ones(2)}), "unexpected 1 of"),
    "shape": (
        {},
        lambda weights: weights.update({"transformer.adapter.weight": torch.ones(32, 32)}),
        "of another shape 1 of",
    ),
    "heads": ({"n_heads": 8}, None, "has 64 rows, and 12 heads need 48"),
    "rotations": (
        {},
        lambda weights: weights.update({"freqs_cis": torch.ones(1, 64, 1, 4, 2)}),
        "not the table of rotations",
    ),
    "integers": (
        {},
        lambda weights: weights.update({"transformer.ln_f.weight": torch.ones(32, dtype=torch.int32)}),
        "no floating-point numbers in 1 of",
    ),
    "infinite": ({}, lambda weights: weights["transformer.wte.weight"].fill_(torch.inf), "infinite or no numbers"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(tmp_path, capsys, case):
    change, spoil, reason = CASES[case]
    weights = random_weights({**CONFIG, "qk_bias": False})
    if spoil is not None:
        spoil(weights)
    write_checkpoint(tmp_path / "theirs", {"qk_bias": False, **change}, weights)
    refuse(capsys, tmp_path, reason)


def test_damaged_files_are_one_line(tmp_path, capsys):
    """Also a pickle that would run code, which is not read."""
    folder = tmp_path / "theirs"
    write_checkpoint(folder, {"qk_bias": False})
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(capsys, tmp_path, "model.safetensors is damaged")
    (folder / "model.safetensors").unlink()
    refuse(capsys, tmp_path, "has no weights")
    torch.save({"x": Run(tmp_path / "ran")}, folder / "pytorch_model.bin")
    refuse(capsys, tmp_path, "pytorch_model.bin is damaged, or holds more than tensors")
    assert not (tmp_path / "ran").exists()
    torch.save(random_weights({**CONFIG, "qk_bias": False}), folder / "pytorch_model.bin")
    assert convert.main(["huginn", str(folder), str(tmp_path / "ours")]) == 0


class Run:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refuse(capsys, tmp_path: Path, reason: str) -> None:
    with pytest.raises(SystemExit) as error:
        convert.main(["huginn", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert error.value.code == 2 and not (tmp_path / "ours").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert re.search(reason, line)


if FIXTURES:

    @pytest.mark.parametrize("folder", FIXTURES)
    def test_given_checkpoints_are_as_their_own_code_has_them(folder):
        """Logits, states and exits."""
        model = convert_huginn(ForeignCheckpoint(folder))
        expected, exits = (load_file(folder / f"{name}.safetensors") for name in ("expected", "exits"))
        given = {"input_ids": expected["input_ids"], "initial_state": expected["initial_state"]}
        close = {"atol": 1e-4, "rtol": 1e-4}
        with torch.no_grad():
            for steps in (1, 3, 6):
                found = model(**given, num_steps=steps)
                torch.testing.assert_close(found.logits, expected[f"logits_r{steps}"], **close)
                torch.testing.assert_close(found.state, expected[f"latents_r{steps}"], **close)
            for theirs, ours in NAMES.items():
                values = values_of(model, ours, given, len(exits[theirs]))
                torch.testing.assert_close(values, exits[theirs].float(), **close)


def values_of(model: MegaTransformerForCausalLM, criterion: str, given: dict, steps: int) -> torch.Tensor:
    """What a criterion makes of each step, (steps, rows)."""
    controller = ExitController(ExitOptions(criterion, threshold=1e-12), model.compute_logits)
    states = model(**given, num_steps=steps, output_states=True).states
    controller.begin(states[0], None)
    found = []
    for step, state in enumerate(states[1:], 1):
        logits = model(**given, num_steps=step)
        controller.check(step, state, logits.last_hidden_state, None)
        found.append(controller.before.value.float())
    return torch.stack(found)
