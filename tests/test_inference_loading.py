"""Checkpoints: found, checked, loaded."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.loading import find_checkpoint, load_model
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("original"))


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_loaded_is_saved(checkpoint):
    """The same logits, and the same text from the tokenizer."""
    model, tokenizer = load_model(checkpoint)
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids, num_steps=2).logits, tiny_model()(ids, num_steps=2).logits)
    assert not model.training
    text = "naïve 日本語 😀\n  x"
    encoded = tokenizer(text)["input_ids"]
    assert encoded == tiny_tokenizer()(text)["input_ids"] and tokenizer.decode(encoded) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_dtype_is_that_of_the_checkpoint_or_as_asked(checkpoint):
    assert load_model(checkpoint)[0].dtype == torch.float32
    assert load_model(checkpoint, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    tiny_model().to(torch.bfloat16).save_pretrained(checkpoint)
    assert load_model(checkpoint)[0].dtype == torch.bfloat16


def test_missing_weights_are_an_error(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(
        ValueError, match=r"lacks 1 of the weights \(model.norm.weight\): its weights and its config.json"
    ):
        load_model(checkpoint)


def test_unexpected_weights_are_an_error(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update({f"model.extra_{i}": torch.ones(2) for i in range(5)}))
    with pytest.raises(ValueError, match=r"has unexpected 5 of the weights \(model.extra_0, .*extra_2, \.\.\.\)"):
        load_model(checkpoint)


def test_weights_of_another_shape_are_an_error(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.update({"model.norm.weight": torch.ones(16)}))
    with pytest.raises(ValueError, match=r"has of another shape 1 of the weights \(model.norm.weight\)"):
        load_model(checkpoint)


def test_a_tied_head_is_not_missing(tmp_path):
    """It is not in the file, and shares the embedding's storage after loading."""
    model, _ = load_model(save_checkpoint(tmp_path, tie_word_embeddings=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_another_model_is_an_error_that_names_it(checkpoint):
    edit_config(checkpoint, model_type="llama")
    with pytest.raises(ValueError, match="holds a model of type 'llama', not 'megatransformer_text'"):
        load_model(checkpoint)


def test_a_config_that_is_no_json_is_an_error_that_names_the_file(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"it is damaged: .*config\.json is not valid JSON"):
        load_model(checkpoint)


@pytest.mark.parametrize(("key", "value"), [("dtype", "fp16"), ("auto_map", 3), ("hidden_size", "wide")])
def test_a_config_with_a_wrong_value_is_an_error_that_names_the_file(checkpoint, key, value):
    edit_config(checkpoint, **{key: value})
    with pytest.raises(ValueError, match=r"checkpoint/config\.json is wrong \(.*use another"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", '{"version": "1.0", ', "[]"])
def test_a_tokenizer_that_is_no_json_object_is_an_error_that_names_the_file(checkpoint, name, text):
    (checkpoint / name).write_text(text)
    with pytest.raises(FileNotFoundError, match=rf"it is damaged: .*{name} (is not valid JSON|holds a list)"):
        load_model(checkpoint)


@pytest.mark.parametrize("text", ["{}", '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_tokenizer_without_its_parts_is_an_error_that_names_the_files(checkpoint, text):
    (checkpoint / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json or tokenizer\.json in .*checkpoint is damaged"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", *(f'{{"weight_map": {files}}}' for files in ("3", "{}", '{"a": 5}'))]
)
def test_a_damaged_index_is_an_error_that_names_the_file(checkpoint, text):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"it is damaged: .*model\.safetensors\.index\.json "):
        load_model(checkpoint)


def test_nobody_is_asked_whether_to_run_code(checkpoint, monkeypatch):
    """transformers asks at the terminal where it is not told."""
    told = {}

    def from_pretrained(folder, **options):
        told.update(options)
        return tiny_tokenizer()

    monkeypatch.setattr("inference.loading.AutoTokenizer.from_pretrained", from_pretrained)
    load_model(checkpoint)
    assert told["trust_remote_code"] is False


def test_a_foreign_tokenizer_is_an_error(checkpoint):
    """More tokens than the model has rows for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens, the model only 320"):
        load_model(checkpoint)


def test_pickles_are_not_loaded(checkpoint):
    """A folder with pickled weights only is no checkpoint."""
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load_model(checkpoint)


def test_the_newest_complete_checkpoint_of_a_run(original, tmp_path, caplog):
    """By number, not by name; damaged ones are passed over with a warning that names file and reason."""
    for step in (9, 10, 200, 300, 400):
        shutil.copytree(original, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-400"
    (tmp_path / "checkpoint-400" / "model.safetensors").unlink()
    weights = tmp_path / "checkpoint-300" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "checkpoint-200" / "config.json").unlink()
    with caplog.at_level(logging.WARNING, logger="inference.loading"):
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert [record.getMessage().split("passed over: it ")[1][:30] for record in caplog.records] == [
        "has no model.safetensors",
        "has a damaged model.safetensor",
        "has no config.json",
    ]


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (None, "."),  # not the folder of a run
        ("{", "."),
        ('{"global_step": 12}', "."),
        ('{"global_step": 10}', "."),
        ('{"global_step": 9}', "checkpoint-10"),  # the run went on, and was stopped
    ],
)
def test_of_a_folder_with_weights_the_newest_count(checkpoint, original, caplog, state, found):
    for step in (5, 10):
        shutil.copytree(original, checkpoint / f"checkpoint-{step}")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    with caplog.at_level(logging.WARNING, logger="inference.loading"):
        assert find_checkpoint(checkpoint) == checkpoint / found
    warning = f"{checkpoint / found} is loaded, not the weights in {checkpoint} itself"
    assert [record.getMessage() for record in caplog.records] == ([] if found == "." else [warning])


def test_damaged_weights_of_a_run_folder_are_passed_over(checkpoint, original, caplog):
    shutil.copytree(original, checkpoint / "checkpoint-5")
    (checkpoint / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING, logger="inference.loading"):
        assert find_checkpoint(checkpoint) == checkpoint / "checkpoint-5"
    assert caplog.records[0].getMessage() == f"{checkpoint} is passed over: it has no tokenizer.json"


def test_only_incomplete_checkpoints_are_an_error(original, tmp_path):
    shutil.copytree(original, tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "tokenizer_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no complete model .it has no config.json., nor do its 1 checkpoints"
    ):
        find_checkpoint(tmp_path)


@pytest.fixture
def hub_cache(original, tmp_path, monkeypatch):
    """Without a network: a folder as the hub's client leaves it, of the model someone/small."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(original, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return model / "snapshots" / revision


def test_a_model_of_the_hub_by_its_name(hub_cache, original):
    model, tokenizer = load_model("someone/small")
    expected, _ = load_model(original)
    assert find_checkpoint("someone/small") == hub_cache
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert tokenizer.decode([5, 6]) == load_model(original)[1].decode([5, 6])


def test_a_name_that_the_hub_does_not_have(hub_cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="someone/nothing is no folder, and the hub does not give a model"):
        find_checkpoint("someone/nothing")
    (tmp_path / "someone").mkdir()  # then it is meant to be a folder
    with pytest.raises(FileNotFoundError, match="someone/small does not exist: give the folder"):
        find_checkpoint("someone/small")


def test_a_checkpoint_in_several_files(checkpoint):
    tiny_model().save_pretrained(checkpoint, max_shard_size="20KB")
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(checkpoint)
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the weights file {shards[-1].name}"):
        load_model(checkpoint)
