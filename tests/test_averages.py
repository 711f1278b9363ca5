"""`convert.py average`: the mean of the weights of several checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
from inference.averages import mean_of
from inference.loading import load_model
from model.quantization import QuantizationConfig
from tests.tiny import tiny_ids
from tests.tiny_language_model import save_checkpoint


@pytest.fixture
def three(tmp_path):
    return [save_checkpoint(tmp_path / f"checkpoint-{seed}", seed=seed) for seed in range(3)]


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as error:
        convert.main(["average", *map(str, words)])
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_each_weight_is_the_mean(three, tmp_path):
    """By hand, of the files; the result is a checkpoint like any other."""
    out = tmp_path / "mean"
    assert convert.main(["average", *map(str, three), str(out)]) == 0
    whole = [load_file(folder / "model.safetensors") for folder in three]
    found = load_file(out / "model.safetensors")
    assert found.keys() == whole[0].keys() and not torch.equal(*(it["model.embed_tokens.weight"] for it in whole[:2]))
    for name, weight in found.items():
        torch.testing.assert_close(weight, torch.stack([weights[name] for weights in whole]).mean(dim=0))
    model, tokenizer = load_model(out)
    assert model(tiny_ids(1, 4)).logits.isfinite().all() and tokenizer.decode(tokenizer("cat").input_ids)
    assert (out / "modeling_megatransformer_text.py").is_file() and (out / "README.md").is_file()


def test_means_of_half_precision_are_computed_in_float32(tmp_path):
    """1 and 1 + 2^-7, of which the second once, three times: the nearest of bfloat16 to 1 + 2^-9 is 1."""
    folders = []
    for index in range(4):
        folders.append(tmp_path / f"checkpoint-{index}")
        save_checkpoint(folders[-1])
        model, _ = load_model(folders[-1])
        model.to(torch.bfloat16).model.norm.weight.data.fill_(1 + 2**-7 * (index > 0))
        model.save_pretrained(folders[-1])
    assert convert.main(["average", *map(str, folders), str(tmp_path / "mean")]) == 0
    weight = load_file(tmp_path / "mean" / "model.safetensors")["model.norm.weight"]
    assert weight.unique().tolist() == [1 + 2**-7]  # 1 + 3 * 2^-9; sums of bfloat16 end at 1


def test_what_has_no_mean_is_one_line(three, tmp_path, capsys):
    out = tmp_path / "mean"
    assert "needs at least 2 checkpoints" in refusal(capsys, three[0], out)
    other = save_checkpoint(tmp_path / "other", num_core_layers=2)
    assert "num_core_layers is 2 and 1; average checkpoints of one run" in refusal(capsys, three[0], other, out)
    assert f"output: {three[1]} is not empty; name another folder" in refusal(capsys, three[0], three[2], three[1])
    assert not out.exists()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_rounded_weights_have_no_mean(tmp_path, capsys, bits):
    save_checkpoint(tmp_path / "whole", hidden_size=64, intermediate_size=128)
    folders = [tmp_path / "checkpoint-0", tmp_path / "checkpoint-1"]
    for folder in folders:
        model, tokenizer = load_model(tmp_path / "whole", quantization=QuantizationConfig(load_in=bits))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    expected = f"{folders[0]} has weights of 8 or 4 bits, which have no mean; average what they were made of"
    assert expected in refusal(capsys, *folders, tmp_path / "mean")


def test_shapes_and_integers_are_those_of_all(tmp_path):
    """Integers are copied; a shape that would be repeated to fit is refused."""
    weights = [{"a": torch.tensor([1, 2]), "b": torch.ones(2, 1)}, {"a": torch.tensor([1, 3]), "b": torch.ones(2, 2)}]
    places = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for place, content in zip(places, weights, strict=True):
        save_file(content, place)
    assert torch.equal(mean_of("a", [places[0]] * 3), torch.tensor([1, 2]))
    with pytest.raises(
        ValueError, match=r"^a has other integers in .*second\.safetensors than in .*first\.safetensors"
    ):
        mean_of("a", places)
    with pytest.raises(
        ValueError, match=r"^b is \[2, 2\] in .*second\.safetensors and \[2, 1\] in .*first\.safetensors"
    ):
        mean_of("b", places)
