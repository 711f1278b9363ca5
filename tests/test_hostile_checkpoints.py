"""Checkpoints that cannot be: each is refused in one line, before anything of its size is allocated or run."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load, save_file

import convert
import finetune
from inference import chat, generate
from inference.loading import load_model
from model import MegaTransformerForCausalLM, MegaTransformerForConditionalGeneration
from model.weight_files import check_finite
from tests.tiny_artist import save_artist
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return {"text": save_checkpoint(folder / "text"), "artist": save_artist(folder / "artist")}


@pytest.fixture
def checkpoint(originals, tmp_path):
    return shutil.copytree(originals["text"], tmp_path / "text")


@pytest.fixture
def artist(originals, tmp_path):
    return shutil.copytree(originals["artist"], tmp_path / "artist")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Fails where transformers would begin to make room for weights."""

    def fail(*args, **kwargs):
        pytest.fail("weights are loaded")

    for model_class in (MegaTransformerForCausalLM, MegaTransformerForConditionalGeneration):
        monkeypatch.setattr(model_class, "from_pretrained", fail)


def edit(path, *names, value):
    """Puts a value into a JSON file, under names of which each leads into the next."""
    content = json.loads(path.read_text())
    part = content
    for name in names[:-1]:
        part = part[name]
    part[names[-1]] = value
    path.write_text(json.dumps(content))


def read_weights(path):
    """Not mapped into memory, since the file is written anew."""
    return load(path.read_bytes())


def edit_weights(path, change):
    weights = read_weights(path)
    save_file({name: change(name, tensor) for name, tensor in weights.items()}, path, metadata={"format": "pt"})


def edit_header(path, change):
    """Changes the header of a file of weights, and leaves the rest."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def refusal(folder, kind=(ValueError, FileNotFoundError), **options) -> str:
    with pytest.raises(kind) as caught:
        load_model(folder, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    return message


def command_refusal(capfd, main, *argv) -> str:
    """The one line of a command that ends with code 2; nothing else is written to either stream."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(item) for item in argv])
    captured = capfd.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# ------------------------------------------------------------------------------------------------- sizes of a config


@pytest.mark.parametrize(
    ("names", "value", "reason"),
    [
        (("hidden_size",), 2**31, "head_dim|larger|Storage size"),
        (("hidden_size",), 64, "has of another shape"),
        (("intermediate_size",), 2**31, "larger weight .4294967296, 32"),
        (("vocab_size",), 2**40, "larger weight .1099511627776, 32"),
        (("num_core_layers",), 10**4, "a model with more (weights|parts) than its 27 weights in files"),
        (("num_core_layers",), 10**7, "num_core_layers"),
        (("num_prelude_layers",), 2**62, "num_prelude_layers"),
        (("num_key_value_heads",), 4, "has of another shape"),
        (("num_labels",), 2**31, "num_labels is 2147483648"),
        (("id2label",), 7, "is wrong"),
        (("hidden_size",), -32, "hidden_size"),
        (("hidden_size",), 32.0, "hidden_size"),
        (("hidden_size",), float("nan"), "hidden_size"),
        (("num_core_layers",), [1], "num_core_layers"),
        (("recurrence",), [], "recurrence"),
        (("recurrence", "mean_steps"), "many", "mean_steps"),
        (("recurrence", "mean_steps"), 2**31, "mean_steps"),
        (("model_type",), ["megatransformer_text"], "holds a model of type"),
        (("eos_token_id",), 320, r"eos_token_id \(320\) is outside the vocabulary \(vocab_size 320\)"),
        (("eos_token_id",), [2, -1], "outside the vocabulary"),
        (("pad_token_id",), 10**9, "pad_token_id .* is outside the vocabulary"),
    ],
)
def test_a_config_of_other_sizes_than_the_weights(checkpoint, nothing_is_loaded, names, value, reason):
    edit(checkpoint / "config.json", *names, value=value)
    with pytest.raises(ValueError, match=reason):
        load_model(checkpoint)
    assert refusal(checkpoint)


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (("text_config", "hidden_size"), 2**31),
        (("vision_config", "hidden_size"), 2**30),
        (("vision_config", "num_hidden_layers"), 10**7),
        (("audio_config", "num_mel_bins"), 2**40),
        (("audio_config", "intermediate_size"), 2**40),
        (("image_writer_config", "patch_size"), 32),
        (("image_writer_config", "flow_num_layers"), 10**7),
        (("audio_writer_config", "flow_hidden_size"), 2**35),
        (("audio_writer_config", "frames_per_token"), 2**31),
        (("structure_token_ids",), [5, 10**6]),
        (("image_token_id",), 10**6),
        (("vision_config",), []),
        (("modality_configs",), {"smell": {}}),
    ],
)
def test_a_config_of_media_of_other_sizes_than_the_weights(artist, nothing_is_loaded, names, value):
    edit(artist / "config.json", *names, value=value)
    assert refusal(artist)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("vision_config", "backbone"),
        ("audio_config", "backbone"),
        ("image_writer_config", "codec_name_or_path"),
        ("audio_writer_config", "vocoder_name_or_path"),
    ],
)
def test_a_config_that_names_a_model_elsewhere(artist, nothing_is_loaded, monkeypatch, part, name):
    """It is not looked for, on the hub least of all."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("it asks the hub"))
    edit(artist / "config.json", part, name, value="someone/model")
    if part == "image_writer_config":
        edit(artist / "config.json", part, "codec", value="autoencoder")
    assert f"{part} has {name} 'someone/model', but no " in refusal(artist)


def test_a_config_that_is_nested_too_deeply(checkpoint):
    text = (checkpoint / "config.json").read_text().rstrip()
    for depth in (900, 100_000):
        (checkpoint / "config.json").write_text(f'{text[:-1]}, "deep": {"[" * depth}{"]" * depth}}}')
        assert "config.json" in refusal(checkpoint)


def test_a_config_that_is_larger_than_any_is(checkpoint):
    with (checkpoint / "config.json").open("a") as file:
        file.truncate(65 * 2**20)  # a hole, which takes no room
    assert "more than any such file needs" in refusal(checkpoint)


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(checkpoint, value):
    def change(name, tensor):
        return tensor.index_fill(0, torch.tensor([3]), value) if name == "model.norm.weight" else tensor

    edit_weights(checkpoint / WEIGHTS, change)
    message = refusal(checkpoint)
    assert "1 of 32 numbers in model.norm.weight are infinite or no numbers in float32" in message
    assert "infinite or no numbers" in refusal(checkpoint, dtype=torch.bfloat16)


def test_weights_that_are_infinite_in_the_dtype_that_was_asked_for(checkpoint):
    edit_weights(checkpoint / WEIGHTS, lambda name, tensor: tensor + 1e5 if name == "model.norm.weight" else tensor)
    assert "32 of 32 numbers in model.norm.weight are infinite or no numbers in float16" in refusal(
        checkpoint, dtype=torch.float16
    )
    load_model(checkpoint)


def test_logits_that_overflow(checkpoint, capfd):
    """Greedy, their first token would be taken, and nothing written."""
    factors = {"model.norm.weight": 3e4, "model.embed_tokens.weight": 1e3}  # float16 ends at 65504
    edit_weights(checkpoint / WEIGHTS, lambda name, tensor: tensor * factors.get(name, 1))
    for how in ("--greedy", "--sample"):
        line = command_refusal(capfd, generate.main, checkpoint, "--prompt", "the cat", "--dtype", "float16", how)
        assert "the model's logits are infinite or no numbers after" in line


@pytest.mark.parametrize("how", ["--greedy", "--sample"])
def test_norms_that_overflow(checkpoint, capfd, how):
    """What they give is 0, and so are all logits."""
    edit_weights(checkpoint / WEIGHTS, lambda name, tensor: tensor * 1e20)
    line = command_refusal(capfd, generate.main, checkpoint, "--prompt", "the cat", how)
    assert "the model's logits are all equal after" in line


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_weights_of_another_type(checkpoint, nothing_is_loaded, dtype):
    edit_weights(checkpoint / WEIGHTS, lambda name, tensor: tensor.to(dtype))
    assert "has no floating-point numbers in 27 of the weights" in refusal(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["model.norm.weight"].update(shape=[2**40]),
        lambda header: header["model.norm.weight"].update(shape=[-1]),
        lambda header: header["model.norm.weight"].update(data_offsets=[0, 2**40]),
        lambda header: header["model.norm.weight"].update(dtype="F33"),
        lambda header: header.update({"model.norm.weight": 5}),
    ],
)
def test_a_header_that_lies(checkpoint, nothing_is_loaded, change):
    edit_header(checkpoint / WEIGHTS, change)
    assert "has a damaged model.safetensors" in refusal(checkpoint)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63 - 1])
def test_a_header_whose_length_lies(checkpoint, nothing_is_loaded, length):
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    assert "has a damaged model.safetensors" in refusal(checkpoint)


def test_a_pickle_by_the_name_of_weights(checkpoint, nothing_is_loaded):
    torch.save(read_weights(checkpoint / WEIGHTS), checkpoint / WEIGHTS)
    assert "has a damaged model.safetensors" in refusal(checkpoint)


@pytest.mark.parametrize("change", ["lacks", "has unexpected", "has of another shape"])
def test_wrong_weights_are_one_line_of_every_command(checkpoint, tmp_path, capfd, change):
    weights = read_weights(checkpoint / WEIGHTS)
    if change == "lacks":
        del weights["model.norm.weight"]
    elif change == "has unexpected":
        weights["x" * 5000] = torch.ones(1)
    else:
        weights["model.norm.weight"] = torch.ones(1)
    save_file(weights, checkpoint / WEIGHTS, metadata={"format": "pt"})
    for main, argv in (
        (generate.main, [checkpoint, "--prompt", "the"]),
        (chat.main, [checkpoint]),
        (convert.main, ["refresh", checkpoint, tmp_path / "refreshed"]),
    ):
        line = command_refusal(capfd, main, *argv)
        assert f"{change} 1 of the weights (" in line and len(line) < 500
    assert not (tmp_path / "refreshed").exists()


def test_a_sum_of_weights_may_overflow(tmp_path):
    """In float16 it ends at 65504; each of them is far below."""
    model = tiny_model(tie_word_embeddings=False).half()
    model.lm_head.weight.data.fill_(1000.0)
    assert model.lm_head.weight.sum().isinf()
    check_finite(tmp_path, model)


def test_finetuning_refuses_it_too(checkpoint, tmp_path, capfd):
    edit(checkpoint / "config.json", "num_core_layers", value=10**4)
    config = write_tuning_config(tmp_path, checkpoint, training={"output_dir": str(tmp_path / "run")})
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        finetune.main(["--config", str(config)])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and "describes a model with more" in line
    assert not list(tmp_path.glob("run/*.safetensors"))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a.bin"]
)
def test_an_index_that_leads_out_of_the_folder(checkpoint, nothing_is_loaded, name):
    (checkpoint / WEIGHTS).rename(checkpoint.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert f"names {name!r}, which is no safetensors file beside it" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "added_tokens.json"])
def test_a_pipe_is_not_read(checkpoint, nothing_is_loaded, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert f"{name} is no regular file" in refusal(checkpoint)


def test_a_device_is_not_read(checkpoint, nothing_is_loaded):
    (checkpoint / "chat_template.jinja").symlink_to("/dev/zero")
    assert "chat_template.jinja is no regular file" in refusal(checkpoint)


def test_links_to_files_are_files(checkpoint, tmp_path):
    """As in the cache of the hub's client."""
    (checkpoint / WEIGHTS).rename(tmp_path / "blob")
    (checkpoint / WEIGHTS).symlink_to(tmp_path / "blob")
    load_model(checkpoint)


def test_an_adapter_config_beside_a_model_leads_nowhere(checkpoint, originals):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(originals["artist"])}))
    assert "checkpoint" not in refusal(checkpoint).split(" ")[0]


# -------------------------------------------------------------------------------------------------- generation configs


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("temperature", [1], r"temperature is \[1\]; give a number of at least 0"),
        ("temperature", float("nan"), "temperature is nan"),
        ("eos_token_id", [[]], r"eos_token_id is \[\[\]\]; give a token below 320"),
        ("eos_token_id", 320, "eos_token_id is 320; give a token below 320"),
        ("pad_token_id", [0], "pad_token_id"),
        ("max_length", "ten", "max_length is 'ten'; give a whole number of 1 to"),
        ("num_beams", 10**6, "num_beams is 1000000; give a whole number of 1 to 1024"),
        ("num_steps", 10**9, "num_steps"),
        ("do_sample", "yes", "do_sample is 'yes'; give true or false"),
        ("suppress_tokens", [1, 10**6], "suppress_tokens"),
        ("bad_words_ids", [[10**9]], "bad_words_ids"),
        ("draft_steps", 0, "draft_steps is 0; give a whole number, or auto"),
        ("decoding", 1, "decoding is 1; give a text"),
        ("custom_generate", "someone/code", "'custom_generate' is no setting that is read here; take it out"),
        ("trust_remote_code", True, "'trust_remote_code' is no setting"),
        ("temperatur", 1.0, "did you mean temperature?"),
    ],
)
def test_a_generation_config_with_what_cannot_be(checkpoint, nothing_is_loaded, name, value, reason):
    edit(checkpoint / "generation_config.json", name, value=value)
    with pytest.raises(ValueError, match=rf"generation_config\.json is wrong: .*{reason}"):
        load_model(checkpoint)


def test_a_generation_config_with_all_that_can_be(checkpoint):
    values = {"temperature": 0.5, "top_k": 5, "do_sample": True, "eos_token_id": [2, 1], "top_p": None}
    values |= {"decoding": "wavefront", "draft_steps": "auto", "sampling_seed": 3, "contrast_strength": -0.5}
    for name, value in values.items():
        edit(checkpoint / "generation_config.json", name, value=value)
    found = load_model(checkpoint)[0].generation_config
    assert {name: getattr(found, name) for name in values} == values


# ------------------------------------------------------------------------------------------- tokenizers and processors


def test_a_tokenizer_whose_ids_lie_beyond_the_model(checkpoint):
    """It has no more tokens than the model has rows, but not the same."""
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 5000
    path.write_text(json.dumps(content))
    assert "has 5001 tokens, the model only 320" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_input_names", []), ("model_input_names", ["x"]), ("model_max_length", "long"), ("model_max_length", -1)],
)
def test_a_tokenizer_config_with_what_cannot_be(checkpoint, name, value):
    edit(checkpoint / "tokenizer_config.json", name, value=value)
    assert f"tokenizer_config.json is wrong: {name} is {value!r}" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("names", "value", "reason"),
    [
        (("image_processor", "patch_size"), 0, "patch_size is 0"),
        (("image_processor", "patch_size"), "x", "patch_size is 'x'"),
        (("image_processor", "patch_size"), 2**31, "patch_size is 2147483648"),
        (("image_processor", "patch_size"), 8, "has patch_size 8, the model 4: they do not belong together"),
        (("image_processor", "image_mean"), [0.5], "image_mean"),
        (("feature_extractor", "sampling_rate"), 0, "sampling_rate is 0"),
        (("feature_extractor", "sampling_rate"), 16000, "has sampling_rate 16000, the model 8000"),
        (("feature_extractor", "feature_size"), 2**31, "feature_size"),
        (("feature_extractor", "max_seconds"), "long", "max_seconds is 'long'"),
        (("image_processor",), 5, "is damaged"),
        (("image_writer",), [], "is damaged"),
        (("audio_writer",), {"x": 1}, "is damaged"),
    ],
)
def test_a_processor_with_what_cannot_be(artist, names, value, reason):
    edit(artist / "processor_config.json", *names, value=value)
    with pytest.raises(ValueError, match=reason):
        load_model(artist)
    assert refusal(artist)


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter_original(originals, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter") / "lora"
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, lora_alpha=4, target_modules=["qkv_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    edit(folder / "adapter_config.json", "base_model_name_or_path", value=str(originals["text"]))
    return folder, model.merge_and_unload()


@pytest.fixture
def adapter(adapter_original, tmp_path):
    return shutil.copytree(adapter_original[0], tmp_path / "lora")


def test_an_adapter_is_for_the_layers_that_it_has_weights_for(adapter, adapter_original):
    """Whatever pattern of names its config has; this one would take for ever to match."""
    edit(adapter / "adapter_config.json", "target_modules", value=r"(([a-z_.0-9]+)*)*!")
    model, ids = load_model(adapter)[0], torch.arange(3, 12)[None]
    torch.testing.assert_close(model(ids).logits, adapter_original[1].eval()(ids).logits)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("r", 0, "r is 0; give a whole number of at least 1"),
        ("r", 2**31, "its rank is 2147483648, but that of its weights 2"),
        ("r", "2", "r is '2'"),
        ("rank_pattern", {"down_proj": 2**31}, "its rank is 2147483648"),
        ("rank_pattern", {"(a+)+$": 2}, "rank_pattern"),
        ("lora_alpha", float("nan"), "lora_alpha is nan"),
        ("lora_alpha", {}, "lora_alpha"),
        ("peft_type", "IA3", "peft_type is 'IA3'; only LORA is read"),
        ("peft_type", ["LORA"], "peft_type"),
        ("layer_replication", [[0, 10**9]], "layer_replication"),
        ("megatron_config", {"x": 1}, "megatron_config"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("modules_to_save", [5], "modules_to_save"),
        ("base_model_name_or_path", None, "of no base that could be found: None"),
        ("base_model_name_or_path", ["x"], "of no base that could be found"),
        ("base_model_name_or_path", "/dev/zero", "its base cannot be loaded: /dev/zero is a file"),
        ("base_model_name_or_path", "someone/../x", "its base cannot be loaded"),
    ],
)
def test_an_adapter_config_with_what_cannot_be(adapter, name, value, reason):
    edit(adapter / "adapter_config.json", name, value=value)
    assert reason in refusal(adapter)


def test_an_adapter_whose_base_is_itself(adapter):
    edit(adapter / "adapter_config.json", "base_model_name_or_path", value=str(adapter))
    assert "config.json" in refusal(adapter, kind=(ValueError, OSError))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_no_numbers(adapter, tmp_path, capfd, value):
    edit_weights(adapter / "adapter_model.safetensors", lambda name, tensor: torch.full_like(tensor, value))
    line = command_refusal(capfd, convert.main, "merge", adapter, "--output", tmp_path / "merged")
    assert str(adapter) in line and not (tmp_path / "merged").exists()


def test_an_adapter_that_lacks_weights(adapter, capfd):
    weights = read_weights(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    line = command_refusal(capfd, generate.main, adapter, "--prompt", "the")
    assert "is on one side only" in line


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_steps", 2**40, "num_steps is 1099511627776"),
        ("num_steps", 10**6, "has num_steps and rank (1000000, 2), but the weights beside it are of [(2, 2)]"),
        ("rank", 0, "rank is 0"),
        ("alpha", "x", "alpha is 'x'"),
        ("targets", "injection", "targets is 'injection'; give names of layers"),
        ("targets", [[]], "targets"),
        ("more", 1, "it has not just num_steps, rank, alpha and targets"),
    ],
)
def test_deltas_of_steps_with_what_cannot_be(checkpoint, tmp_path, name, value, reason):
    from inference.adapters import base_model
    from model.step_lora import add_step_lora

    model, folder = tiny_model(), tmp_path / "steps"
    folder.mkdir()
    add_step_lora(model, ["layers.0.mlp.down_proj"], num_steps=2, rank=2, alpha=4).save(folder)
    base_model(checkpoint).save(folder)
    load_model(folder)
    edit(folder / "step_lora.json", name, value=value)
    assert reason in refusal(folder)


def test_tokens_of_a_tiny_tokenizer_are_below_its_size():
    """What `test_a_tokenizer_whose_ids_lie_beyond_the_model` takes for granted."""
    assert max(tiny_tokenizer().get_vocab().values()) < 320
