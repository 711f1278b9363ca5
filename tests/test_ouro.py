"""`convert.py ouro`: a checkpoint of that project, computed by its own formulas, and by ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import convert
from inference.loading import load_model
from tests.tiny_language_model import tiny_tokenizer

CONFIG = {
    "model_type": "ouro",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "use_sliding_window": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NORMS = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")


def random_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (320, 32), "lm_head": (320, 32), "model.early_exit_gate": (1, 32)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.{name}_proj": (width, 32) for name, width in zip("qkvo", (32, 16, 16, 32), strict=True)
        }
        shapes |= {f"{at}.mlp.gate_proj": (48, 32), f"{at}.mlp.up_proj": (48, 32), f"{at}.mlp.down_proj": (32, 48)}
    weights = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    norms = [f"model.layers.{layer}.{norm}.weight" for layer in range(2) for norm in NORMS]
    weights |= {name: 1 + 0.3 * torch.randn(32) for name in (*norms, "model.norm.weight")}
    return weights | {"model.early_exit_gate.bias": torch.tensor([-0.5])}


def reference(weights: dict, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the probabilities with which the gate stops each token after each step, by the formulas."""
    angles = torch.arange(ids.shape[1])[:, None] * 1e6 ** -(torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    def product(x, name):
        return x @ weights[f"{name}.weight"].t()

    def layer(x, at):
        inner = norm(x, f"{at}.input_layernorm")
        q, k, v = (product(inner, f"{at}.self_attn.{name}_proj").unflatten(-1, (-1, 8)) for name in "qkv")
        q, k = (it * cos + torch.cat((-it[..., 4:], it[..., :4]), -1) * sin for it in (q, k))
        parts = (part.transpose(1, 2) for part in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        out = product(out.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        x = x + norm(out, f"{at}.input_layernorm_2")
        inner = norm(x, f"{at}.post_attention_layernorm")
        wide = nn.functional.silu(product(inner, f"{at}.mlp.gate_proj")) * product(inner, f"{at}.mlp.up_proj")
        return x + norm(product(wide, f"{at}.mlp.down_proj"), f"{at}.post_attention_layernorm_2")

    x, gates = weights["model.embed_tokens.weight"][ids], []
    for _ in range(steps):
        for number in range(2):
            x = layer(x, f"model.layers.{number}")
        x = norm(x, "model.norm")
        gates.append(torch.sigmoid(product(x, "model.early_exit_gate") + weights["model.early_exit_gate.bias"]))
    return product(x, "lm_head"), torch.stack(gates)[..., 0]


@pytest.fixture
def converted(tmp_path):
    folder, weights = tmp_path / "theirs", random_weights()
    write(folder, weights)
    assert convert.main(["ouro", str(folder), str(tmp_path / "ours")]) == 0
    return load_model(tmp_path / "ours")[0], weights


def write(folder: Path, weights: dict, **changes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)


def test_the_logits_are_those_of_the_original(converted):
    model, weights = converted
    ids = torch.randint(320, (2, 9))
    for steps in (1, 2, 4):
        with torch.no_grad():
            found = model(ids, num_steps=steps).logits
        torch.testing.assert_close(found, reference(weights, ids, steps)[0], atol=1e-4, rtol=1e-4)
    assert model.config.recurrence.mean_steps == 4


@pytest.mark.parametrize("decoding", ["plain", "wavefront"])
def test_the_gate_ends_the_iteration_where_it_does_there(converted, decoding):
    """A token stops at the first step m with 1 - (1 - g_1) ... (1 - g_m) of at least q; the cache keeps all steps."""
    model, weights = converted
    ids, thresholds, found = torch.randint(3, 320, (1, 9)), (0.3, 0.6, 0.9), []
    for threshold in thresholds:
        out = model.generate(
            *(ids,),
            num_steps=4,
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
            decoding=decoding,
            exit_criterion="q_exit",
            exit_threshold=threshold,
            return_dict_in_generate=True,
        )
        gates = reference(weights, out.sequences[:, :10], 4)[1][:, 0, -1]
        total = 1 - (1 - gates).cumprod(0)
        wanted = int((total >= threshold).nonzero()[0]) + 1 if (total >= threshold).any() else 4
        assert out.exit_steps[0, 1] == wanted
        found.append(wanted)
    assert len(set(found)) > 1  # the test could see a difference


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling in"),
        ({"rope_parameters": ["default"]}, "rope_parameters in"),
        ({"model_type": "llama"}, "model_type in"),
        ({"total_ut_steps": 0}, "mean_steps"),
        ({"hidden_size": 40}, "of another shape"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(tmp_path, capsys, change, reason):
    write(tmp_path / "theirs", random_weights(), **change)
    with pytest.raises(SystemExit) as error:
        convert.main(["ouro", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert error.value.code == 2 and not (tmp_path / "ours").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert reason in line


def test_a_model_without_a_gate_has_no_such_exit(tmp_path):
    weights = {name: weight for name, weight in random_weights().items() if "gate." not in name or "mlp" in name}
    write(tmp_path / "theirs", weights)
    convert.main(["ouro", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    model, _ = load_model(tmp_path / "ours")
    with pytest.raises(ValueError, match="needs a model with a gate"):
        model.generate(torch.tensor([[5, 6]]), exit_criterion="q_exit", max_new_tokens=2)
