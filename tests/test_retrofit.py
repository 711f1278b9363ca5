"""`convert.py retrofit`: plain models of transformers as recurrent ones, at first with the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

import convert
from inference.loading import load_model
from tests.tiny_language_model import tiny_tokenizer

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT2 = {
    "vocab_size": 320,
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda tied: LlamaConfig(**SIZES, tie_word_embeddings=tied),
    "llama, biases": lambda tied: LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True),
    "llama, head_dim": lambda tied: LlamaConfig(**SIZES, tie_word_embeddings=tied, head_dim=12),
    "qwen2": lambda tied: Qwen2Config(**SIZES, tie_word_embeddings=tied),
    "qwen3": lambda tied: Qwen3Config(**SIZES, tie_word_embeddings=tied, head_dim=16),
    "gpt2": lambda tied: GPT2Config(**GPT2, tie_word_embeddings=tied),
}
ALL = ("--prelude", "0:2", "--core", "2:4", "--coda", "4:6")


def save(folder, config) -> AutoModelForCausalLM:
    """A fresh model whose biases and norms are not at their beginning any more."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def retrofit(tmp_path, *options):
    assert convert.main(["retrofit", str(tmp_path / "theirs"), str(tmp_path / "ours"), *options]) == 0
    return load_model(tmp_path / "ours")[0]


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_step_with_all_layers_is_the_original(tmp_path, name, is_tied):
    """Also behind padding, and in its greedy texts."""
    theirs = save(tmp_path / "theirs", CONFIGS[name](is_tied))
    ours = retrofit(tmp_path, *ALL)
    ids = torch.randint(3, 320, (2, 13))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, num_steps=1).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours(ids, num_steps=2).logits, theirs(ids).logits, atol=1e-2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, num_steps=1, **options), theirs.generate(ids, **options))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == is_tied


def test_the_middle_may_be_left_out(tmp_path):
    """Then it is the model without these layers."""
    theirs = save(tmp_path / "theirs", CONFIGS["llama"](True))
    ours = retrofit(tmp_path, "--prelude", "0:1", "--core", "3:5", "--coda", "5:6", "--mean-steps", "3")
    assert ours.config.num_hidden_layers == 4 and ours.config.recurrence.mean_steps == 3
    del theirs.model.layers[1:3]
    ids = torch.randint(3, 320, (2, 8))
    with torch.no_grad():
        found = theirs(ids, use_cache=False).logits
        torch.testing.assert_close(ours(ids, num_steps=1).logits, found, atol=1e-4, rtol=1e-4)


def test_weights_in_several_files_and_of_bfloat16(tmp_path):
    theirs = save(tmp_path / "theirs", CONFIGS["llama"](False)).bfloat16()
    (tmp_path / "theirs" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert convert.main(["retrofit", str(tmp_path / "theirs"), str(tmp_path / "ours"), *ALL]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True, dtype="auto")
    assert ours.dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")  # `bfloat16()` has rounded its rotations too
    ids = torch.randint(3, 320, (1, 8))
    with torch.no_grad():
        found, wanted = (
            model.float()(ids, **depth).logits for model, depth in ((ours, {"num_steps": 1}), (theirs, {}))
        )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


REFUSED = {
    "scaled positions": (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ALL,
        "its positions are scaled",
    ),
    "activation": (LlamaConfig(**SIZES, hidden_act="gelu"), ALL, "its hidden_act is 'gelu'"),
    "window": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        ALL,
        "its use_sliding_window is True",
    ),
    "scaled attention": (GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), ALL, "scale_attn_by_inverse"),
    "no core": (LlamaConfig(**SIZES), ("--prelude", "0:3", "--core", "3:3", "--coda", "3:6"), "--core has no layers"),
    "too many": (LlamaConfig(**SIZES), ("--prelude", "0:3", "--core", "3:5", "--coda", "5:7"), "--coda is 5:7"),
    "overlap": (LlamaConfig(**SIZES), ("--prelude", "0:3", "--core", "2:5", "--coda", "5:6"), "may begin at 3"),
    "no range": (LlamaConfig(**SIZES), ("--prelude", "3", "--core", "2:5", "--coda", "5:6"), "'3' has no colon"),
    "no steps": (LlamaConfig(**SIZES), (*ALL, "--mean-steps", "0"), "0 is less than 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line(tmp_path, capsys, case):
    config, options, reason = REFUSED[case]
    save(tmp_path / "theirs", config)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        convert.main(["retrofit", str(tmp_path / "theirs"), str(tmp_path / "ours"), *options])
    assert error.value.code == 2 and not (tmp_path / "ours").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert reason in line


def test_a_damaged_configuration_is_one_line(tmp_path, capsys):
    folder = tmp_path / "theirs"
    save(folder, CONFIGS["llama"](True))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": "wide"'))
    with pytest.raises(SystemExit) as error:
        convert.main(["retrofit", str(folder), str(tmp_path / "ours"), *ALL])
    assert error.value.code == 2 and not (tmp_path / "ours").exists()
    assert "config.json is no configuration of llama (" in capsys.readouterr().err


def test_an_unknown_architecture_is_named(tmp_path, capsys):
    folder = tmp_path / "theirs"
    save(folder, CONFIGS["llama"](True))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "bloom"'))
    with pytest.raises(SystemExit):
        convert.main(["retrofit", str(folder), str(tmp_path / "ours"), *ALL])
    assert "has model_type 'bloom', of which no recurrent model can be made; known are llama, qwen2" in (
        capsys.readouterr().err
    )
