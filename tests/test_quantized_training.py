"""Training beside weights of 8 and 4 bits: gradients, what is trained, whole runs, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import convert
import finetune
from inference.loading import load_model
from model.quantization import QuantizationConfig
from tests.rounding import round_model
from tests.test_quantization import BITS, save_run, tiny_base
from tests.tiny import tiny_ids
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_language_model import tiny_tokenizer
from trainers.base import is_quantized, make_trained_weights_float32
from trainers.finetuning import prepare_quantized_training

ADAPTERS = {"target_modules": ["qkv_proj", "down_proj", "proj"], "r": 2, "init_lora_weights": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def options(**changes):
    """The training arguments that are looked at."""
    plain = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None, "deepspeed": None}
    return SimpleNamespace(**{**plain, "torch_compile": False, **changes})


def load(checkpoint, bits, dtype=None, **changes):
    quantization = QuantizationConfig(load_in=bits, double_quant=False)
    model, _ = load_model(checkpoint, dtype=dtype, quantization=quantization)
    return prepare_quantized_training(model, options(**changes), has_lora=True)


def with_adapters(model) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**ADAPTERS)).train()


def gradients(model) -> dict[str, torch.Tensor]:
    ids = tiny_ids(3, 8)
    model(input_ids=ids, labels=ids, num_steps=(2, 3)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_have_the_gradient_of_the_rounded_model_also_after_an_evaluation(checkpoint, bits, checkpointing):
    """Against plain matrices rounded by the formula. In training, 8 bits round no inputs on a CPU."""
    kwargs = {"use_reentrant": False} if checkpointing else None
    ours = load(checkpoint, bits, gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs)
    with torch.no_grad():
        ours.eval()(tiny_ids(1, 4))
    ours = with_adapters(ours)
    expected = with_adapters(round_model(tiny_base().requires_grad_(False), bits))
    found, wanted = gradients(ours), gradients(expected)
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    assert len(found) == 2 * (4 * 2 + 1)  # two matrices for each of two layers in four blocks, and for the injection
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_rounded_is_float32_and_nothing_but_adapters_learns(checkpoint, bits):
    """Of a checkpoint that is loaded in bfloat16, also after an evaluation: the first layer's adapter gets its
    gradient through all other layers.
    """
    model = with_adapters(load(checkpoint, bits, torch.bfloat16))
    assert is_quantized(model) and not is_quantized(with_adapters(tiny_base()))
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.float32}
    assert sum(parameter.dtype in (torch.int8, torch.uint8) for parameter in model.parameters()) == 16
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    with torch.no_grad():
        model.eval()(input_ids=tiny_ids(1, 4))
    found = gradients(model.train())
    assert len(found) == 2 * (4 * 2 + 1) and all(gradient.any() for gradient in found.values())


def test_only_adapters_beside_rounded_weights_become_float32(checkpoint):
    for model, expected in (
        (with_adapters(load(checkpoint, "4bit")), torch.float32),
        (with_adapters(tiny_base()), torch.bfloat16),
    ):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
        make_trained_weights_float32(model)
        assert {parameter.dtype for parameter in trained} == {expected}


@pytest.mark.parametrize("bits", BITS)
def test_a_run_beside_rounded_weights(tiny_run, tmp_path, bits):
    """Adapters alone are saved, and all have learned; beside 4 bits they are W' x + alpha / rank B A x."""
    base = save_run(tmp_path / "base", tiny_run)
    quantization = {"load_in": bits, "double_quant": False}
    config = write_tuning_config(tmp_path, base, quantization=quantization, training={"save_strategy": "no"})
    assert finetune.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")]) == 0
    adapters = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(adapters) == 2 * (1 + 9 + 1)  # in the prelude, the core's two layers and its injection, and the coda
    assert all(weight.dtype == torch.float32 and weight.any() for weight in adapters.values())

    if bits == "8bit":  # whose inputs are rounded too
        return
    ours, _ = load_model(tmp_path / "out", quantization=QuantizationConfig(**quantization))
    expected = round_model(load_model(base)[0], bits)
    for name in [name for name in adapters if "lora_A" in name]:
        layer = expected.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight.data += 6 / 2 * adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
    with torch.no_grad():
        logits, wanted = (model(tiny_ids(2, 6), num_steps=3).logits for model in (ours, expected))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_base_that_is_saved_in_fewer_bits(tiny_run, tmp_path, capsys):
    """It is prepared like one that is rounded when it is loaded; adapters cannot be merged into it."""
    base, out = save_run(tmp_path / "base", tiny_run), tmp_path / "out"
    load_model(base, quantization=QuantizationConfig(load_in="8bit"))[0].save_pretrained(base)
    config = write_tuning_config(tmp_path, base, training={"save_strategy": "no", "max_steps": 1})
    assert finetune.main(["--config", str(config), "--training.output_dir", str(out)]) == 0
    assert is_quantized(load_model(out)[0])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        convert.main(["merge", str(out), "--output", str(tmp_path / "merged")])
    assert "is saved in 8 or 4 bits, in which most of what was learned would be lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "has_lora", "message"),
    [
        ({}, False, "peft: weights of 8 and 4 bits do not learn"),
        (
            {"deepspeed": "zero3.json", "hf_deepspeed_config": SimpleNamespace(is_zero3=lambda: True)},
            True,
            "training.deepspeed: ZeRO-3 does not divide weights of 8 and 4 bits among ranks; use zero2",
        ),
        ({"torch_compile": True}, True, "training.torch_compile: it is not possible with weights of 8 and 4 bits"),
    ],
)
def test_what_cannot_be_trained_is_refused(checkpoint, changes, has_lora, message):
    model, _ = load_model(checkpoint, quantization=QuantizationConfig(load_in="8bit"))
    with pytest.raises(ValueError, match=message):
        prepare_quantized_training(model, options(**changes), has_lora)
