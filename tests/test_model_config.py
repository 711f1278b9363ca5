"""The configs refuse what they do not know, with the value and the reason, through the API and from nested files."""

import json

import pytest
import torch
from transformers import AutoConfig

from model import (
    MegaTransformerConfig,
    MegaTransformerImageAutoencoderConfig,
    MegaTransformerTextConfig,
    RecurrenceConfig,
)
from tests.tiny import tiny_config
from tests.tiny_codecs import tiny_autoencoder
from tests.tiny_media import tiny_media_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_sise": 32}, "unknown key 'hidden_sise'; did you mean hidden_size\\? known keys: .*mlp"),
        ({"num_label": 3}, "unknown key 'num_label'; did you mean num_labels\\?"),
        ({"recurrence": {"mean_stepz": 3}}, "RecurrenceConfig: unknown key 'mean_stepz'; did you mean mean_steps"),
        ({"hidden_size": "wide"}, "MegaTransformerTextConfig.hidden_size: .*expected int, got str .*wide"),
        ({"recurrence": {"mean_steps": "many"}}, "RecurrenceConfig.mean_steps: .*expected int.*many"),
        ({"recurrence": {"mean_steps": 0}}, "RecurrenceConfig.mean_steps: .*greater or equal to 1.*0"),
        ({"recurrence": {"state_init": "warm"}}, "state_init: .*'like-init'.*warm"),
        ({"recurrence": {"injection": "multiply"}}, "injection: .*'concat', 'add', 'gate'.*multiply"),
        ({"position_embedding": "rotary"}, "position_embedding: .*'rope', 'alibi'.*rotary"),
        ({"norm_placement": "middle"}, "norm_placement: .*'sandwich', 'pre', 'post'.*middle"),
        ({"attention_dropout": 1.0}, "attention_dropout: .*smaller than 1"),
        ({"rope_theta": 0}, "rope_theta: .*greater than 0"),
        ({"num_attention_heads": 5}, r"hidden_size \(32\) is not a multiple of num_attention_heads \(5\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"num_key_value_heads": 8}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(8\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"num_steps": 0}, r"num_steps \(0\) must be at least 1"),
        ({"final_logit_softcapping": -1.0}, r"final_logit_softcapping \(-1.0\) must be greater than 0"),
        ({"num_prelude_layers": 0, "num_core_layers": 0, "num_coda_layers": 0}, "the model needs a layer"),
    ],
)
def test_bad_settings_are_value_errors_that_name_them(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("vision_config", {"patch_sise": 4}, "unknown key 'patch_sise'; did you mean patch_size\\? known keys"),
        ("vision_config", {"stem": "deep"}, "stem: .*'patch', 'conv'.*deep"),
        ("vision_config", {"stem": "conv", "patch_size": 12}, r"patch_size \(12\) must be a power of 2"),
        ("vision_config", {"stem_depth": 2}, "stem_depth is 2, but stem 'patch' has no convolutions; use stem 'conv'"),
        ("vision_config", {"head_dim": 6}, r"head_dim \(6\) must be divisible by 4"),
        (
            "vision_config",
            {"image_size": 36},
            r"image_size \(36\) must be a multiple of patch_size \* pixel_shuffle \(8\)",
        ),
        ("vision_config", {"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of"),
        ("audio_config", {"subsampling": 3}, r"subsampling \(3\) must be a power of 2"),
        ("audio_config", {"hop_length": 600}, r"hop_length \(600\) is more than n_fft \(512\)"),
        ("audio_config", {"head_dim": 5}, r"head_dim \(5\) must be even"),
        ("text_config", {"vocab_size": 4}, r"image_token_id \(5\) is outside the vocabulary of text_config \(4\)"),
        ("audio_token_id", 5, r"image_token_id \(5\) is also the id of another token"),
    ],
)
def test_bad_settings_of_parts_are_value_errors_that_name_them(part, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        MegaTransformerConfig(image_token_id=5, **{part: settings})
    assert "\n" not in str(error.value)


def test_assignment_is_checked_too():
    with pytest.raises(ValueError, match=r"RecurrenceConfig\.mean_steps"):
        RecurrenceConfig().mean_steps = "three"


def test_whole_numbers_serve_as_floats():
    config = tiny_config(rope_theta=10000, norm_eps=1, recurrence={"step_sigma": 1})
    assert (config.rope_theta, config.recurrence.step_sigma) == (10000, 1)


# What others write into a config.json: Unsloth, older versions of transformers, and a version of ours to come.
OF_OTHERS = {"unsloth_version": "2026.1", "use_bfloat16": False, "max_length": 20, "window": 128, "hidden_sise": 7}
STANDARD = {
    "problem_type": "regression",
    "num_labels": 1,
    "output_hidden_states": True,
    "return_dict": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "compressed-tensors", "format": "dense"},
    "_name_or_path": "somewhere/else",
}


def written(folder, config, **parts):
    """The file of a config with further keys, at the top ("") and in its parts, by their dotted names."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for name, keys in parts.items():
        inner = content
        for step in filter(None, name.split(".")):
            inner = inner[step]
        inner |= keys
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def warnings_of_configs(monkeypatch):
    """The messages of the one logger of the configs."""
    messages = []
    monkeypatch.setattr("model.configuration_megatransformer_text.logger.warning_once", messages.append)
    return messages


def test_unknown_keys_of_a_file_are_left_out_with_one_warning(tmp_path, warnings_of_configs):
    plain = tiny_media_config()
    parts = {"": OF_OTHERS, "text_config": {"surprise": 1}, "text_config.recurrence": {"mean_stepz": 3}}
    path = written(tmp_path, plain, **parts)
    loaded = MegaTransformerConfig.from_pretrained(tmp_path)
    (message,) = warnings_of_configs
    names = [*OF_OTHERS, "text_config.surprise", "text_config.recurrence.mean_stepz (did you mean mean_steps?)"]
    assert sorted(message.partition("no effect: ")[2].split(", ")) == sorted(names)
    assert loaded.to_dict() | {"_name_or_path": ""} == plain.to_dict()
    assert MegaTransformerConfig.from_json_file(path).to_dict() == plain.to_dict()
    assert type(MegaTransformerTextConfig.from_pretrained(tmp_path)) is MegaTransformerTextConfig
    loaded.save_pretrained(tmp_path)
    warnings_of_configs.clear()
    MegaTransformerConfig.from_pretrained(tmp_path)
    assert warnings_of_configs == []


@pytest.mark.parametrize("config", [tiny_config(), tiny_media_config()], ids=["text", "media"])
def test_standard_keys_are_known_everywhere(tmp_path, warnings_of_configs, config):
    written(tmp_path, config, **{"": STANDARD})
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert warnings_of_configs == []
    built = type(config)(**STANDARD)
    for standard in (loaded, built):
        assert (standard.problem_type, standard.num_labels, standard.return_dict) == ("regression", 1, False)
        assert standard.dtype is torch.bfloat16 and standard.output_hidden_states is True
        assert standard.quantization_config == STANDARD["quantization_config"]
    loaded.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() == loaded.to_dict() and again.quantization_config == STANDARD["quantization_config"]


def test_keys_of_a_codec_in_a_file(tmp_path, warnings_of_configs):
    tiny_autoencoder().config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"surprise": 1}
    with pytest.raises(ValueError, match="unknown key 'surprise'"):
        MegaTransformerImageAutoencoderConfig(**content)
    assert MegaTransformerImageAutoencoderConfig.from_dict(content).patch_size == tiny_autoencoder().config.patch_size
    assert len(warnings_of_configs) == 1


@pytest.mark.parametrize("config", [tiny_config(), tiny_media_config()], ids=["text", "media"])
def test_depth_at_loading(tmp_path, config):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, num_steps=7)
    assert (loaded.num_steps, loaded.get_text_config().num_steps) == (7, 7)
    assert AutoConfig.from_pretrained(tmp_path).num_steps is None


def test_round_trip_through_a_file(tmp_path):
    config = tiny_config(num_steps=3, qk_norm=True, recurrence={"injection": "gate", "mean_steps": 9})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MegaTransformerTextConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert (loaded.recurrence.injection, loaded.recurrence.mean_steps, loaded.num_steps) == ("gate", 9, 3)
