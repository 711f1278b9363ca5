"""What differs on a GPU: half precision of its kernels, compiled attention, CUDA graphs, weights of 8 and 4 bits.

The expected values are those of the same model in float32, or of the plain way of computing the same on the same GPU.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from inference.loading import load_model
from model import ExitOptions, MegaTransformerForCausalLM, RecurrentCache
from model.quantization import QuantizationConfig
from tests.tiny import PAD, tiny_ids, tiny_model
from tests.tiny_language_model import tiny_tokenizer
from trainers.finetuning import prepare_quantized_training

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
POLICIES = [("full", None), ("ring", 2), ("last", None)]
LENGTH = 24


def wide_model(**options) -> MegaTransformerForCausalLM:
    """Heads of 16, the least that FlexAttention's kernel takes, and widths that 64 divides, as 4 bits want them."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    return tiny_model(scale=2.0, **{**sizes, **options}).to(DEVICE)


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return tiny_ids(*shape, seed=seed, high=320).to(DEVICE)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def check_tokens(logits: torch.Tensor, expected: torch.Tensor, least_agreement: float) -> None:
    """The likeliest tokens are the same, but where two are about as likely; and that is seldom."""
    ours, wanted = logits.argmax(-1), expected.argmax(-1)
    lost = expected.gather(-1, wanted[..., None]) - expected.gather(-1, ours[..., None])
    assert (ours == wanted).float().mean() >= least_agreement
    assert lost.max() <= 0.05 * expected.std()


# ---------------------------------------------------------------------------------------------------- half precision


@torch.no_grad()
def logits_with_cache(model, ids: torch.Tensor, autocast: bool, **options) -> torch.Tensor:
    """Of a prompt, and token by token behind it. (batch, sequence, vocab), float32"""
    cache, parts = RecurrentCache(model.config, **options), []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for chunk in ids.split([8] + [1] * (ids.shape[1] - 8), dim=1):
            parts.append(model(chunk, cache=cache, num_steps=6).logits)
    return torch.cat(parts, dim=1).float()


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_with_cache_and_without_are_both_close_to_float32(autocast):
    ids, model = ids_of(4, LENGTH), wide_model()
    with torch.no_grad():
        expected = model(ids, num_steps=6).logits
    model = model if autocast else model.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        whole = model(ids, num_steps=6, use_cache=False).logits.float()
    cached = logits_with_cache(model, ids, autocast)
    static = logits_with_cache(model, ids, autocast, max_length=LENGTH, max_steps=6)
    for ours in (whole, cached, static):
        assert relative_error(ours, expected) < 0.03
        check_tokens(ours, expected, least_agreement=0.9)


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_rows_of_their_own_depth_equal_each_alone(policy, kept):
    ids, model = ids_of(3, 9), wide_model()
    depths = torch.tensor([2, 5, 3])
    with torch.no_grad():
        cache = RecurrentCache(model.config, policy, kept)
        ours = [model(part, cache=cache, num_steps=depths).logits for part in ids.split([6, 1, 2], dim=1)]
        for row, depth in enumerate(depths.tolist()):
            alone = RecurrentCache(model.config, policy, kept)
            for part, whole in zip(ids[row : row + 1].split([6, 1, 2], dim=1), ours, strict=True):
                expected = model(part, cache=alone, num_steps=torch.tensor([depth])).logits
                torch.testing.assert_close(whole[row : row + 1], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("criterion", [("latent_difference", 0.35), ("kl_divergence", 0.2)])
def test_rows_of_a_ragged_batch_exit_as_each_does_alone(criterion):
    name, threshold = criterion
    model = wide_model()
    model.generation_config.eos_token_id = None
    lengths = (9, 5, 7)
    rows = [ids_of(1, length, seed=length) for length in lengths]
    ids = torch.cat([nn.functional.pad(row, (9 - row.shape[1], 0), value=PAD) for row in rows])
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_steps": 8,
        "exit_criterion": name,
        "exit_threshold": threshold,
        "return_dict_in_generate": True,
    }
    ours = model.generate(ids, attention_mask=(ids != PAD).long(), **options)
    steps = set(ours.exit_steps.flatten().tolist())
    assert len(steps) > 1 and min(steps) < 8
    for row, (alone, length) in enumerate(zip(rows, lengths, strict=True)):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert ours.sequences[row, 9 - length :].tolist() == expected.sequences[0].tolist()
        assert ours.exit_steps[row].tolist() == expected.exit_steps[0].tolist()


# ------------------------------------------------------------------------------------------------- attention, documents


def loss_and_gradients(backend: str, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = wide_model(attn_implementation=backend).train()
    loss = model(num_steps=(1, 2), **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("backend", ["flex_attention", "sdpa"])
def test_backends_have_the_loss_and_gradients_of_eager(backend, kind):
    ids = ids_of(3, 160)
    inputs = {"input_ids": ids, "labels": ids}
    if kind == "padded":
        is_real = torch.arange(160, device=DEVICE) >= torch.tensor([[0], [31], [7]], device=DEVICE)
        inputs |= {"attention_mask": is_real.long(), "labels": ids.masked_fill(~is_real | ~is_real.roll(1, 1), -100)}
    if kind == "packed":
        positions = torch.cat([torch.arange(length) for length in (50, 1, 70, 39)])
        inputs["position_ids"] = positions.expand(3, -1).to(DEVICE)
    (loss, ours), (wanted, expected) = (loss_and_gradients(name, **inputs) for name in (backend, "eager"))
    torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-4)
    for name, gradient in ours.items():
        assert relative_error(gradient, expected[name]) < 5e-3, name


def test_packed_documents_equal_separate_ones():
    model, lengths = wide_model(), [50, 1, 70, 39]
    documents = [ids_of(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
    with torch.no_grad():
        packed = model(torch.cat(documents, dim=1), position_ids=positions, num_steps=3).logits.split(lengths, dim=1)
        for part, document in zip(packed, documents, strict=True):
            torch.testing.assert_close(part, model(document, num_steps=3).logits, atol=2e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------- compilation


def generated(model, ids: torch.Tensor, **options) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, attention_mask=(ids != PAD).long(), max_new_tokens=12, num_steps=5, do_sample=False, **options
    )


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_compiled_static_cache_writes_the_tokens_of_the_one_that_grows(fresh_compiler, policy, kept):
    ids = torch.cat((ids_of(1, 14), nn.functional.pad(ids_of(1, 9, seed=1), (5, 0), value=PAD)))
    options = {"cache_policy": policy, "num_kept_steps": kept}
    expected = generated(wide_model(), ids, **options)
    model = wide_model()
    first = generated(model, ids, cache_implementation="static", **options)
    graphs = counters["stats"]["unique_graphs"]
    again = generated(model, ids, cache_implementation="static", **options)
    assert model.model.units_are_compiled and graphs > 0
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert counters["stats"]["unique_graphs"] == graphs  # nothing is compiled again


def test_cuda_graphs_write_the_same_tokens(fresh_compiler):
    ids = ids_of(2, 14)
    expected = generated(wide_model(), ids)
    model = wide_model()
    options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}
    for _ in range(3):  # warmed up, recorded, replayed
        assert torch.equal(generated(model, ids, **options), expected)


def test_exits_with_compiled_units(fresh_compiler):
    ids = torch.cat((ids_of(1, 14), nn.functional.pad(ids_of(1, 9, seed=1), (5, 0), value=PAD)))
    options = {"exit_criterion": "latent_difference", "exit_threshold": 0.35}
    expected = generated(wide_model(), ids, **options)
    assert torch.equal(generated(wide_model(), ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_compiled_training_has_the_gradients_of_eager(fresh_compiler, checkpointing):
    ids = ids_of(2, 64)

    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = wide_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        if compiled:
            model.model.compile_units(fullgraph=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            model(input_ids=ids, labels=ids, num_steps=(2, 3), skip_logits=True).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    ours, expected = gradients(True), gradients(False)
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    for name, gradient in ours.items():
        assert relative_error(gradient, expected[name]) < 0.05, name


# ------------------------------------------------------------------------------------------------------- 8 and 4 bits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    wide_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "float32"])
def test_fewer_bits_generate_and_are_saved_and_loaded(checkpoint, tmp_path, bits, dtype):
    model, tokenizer = load_model(checkpoint, DEVICE, dtype, QuantizationConfig(load_in=bits))
    ids = ids_of(2, 7)
    with torch.no_grad():
        logits = model(ids, num_steps=4).logits
        whole = wide_model()(ids, num_steps=4).logits
    assert relative_error(logits, whole) < 0.4
    tokens = generated(model, ids)
    assert tokens.shape == (2, 7 + 12)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, DEVICE, dtype)
    with torch.no_grad():
        torch.testing.assert_close(again(ids, num_steps=4).logits, logits, atol=0, rtol=0)
    assert torch.equal(generated(again, ids), tokens)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_adapters_learn_beside_fewer_bits(checkpoint, bits, checkpointing):
    model, _ = load_model(checkpoint, DEVICE, torch.bfloat16, QuantizationConfig(load_in=bits))
    options = SimpleNamespace(
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        deepspeed=None,
        torch_compile=False,
    )
    model = prepare_quantized_training(model, options, has_lora=True)
    model = get_peft_model(model, LoraConfig(target_modules=["qkv_proj", "down_proj", "proj"], r=4)).train()
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.requires_grad], lr=1e-2)
    ids, losses = ids_of(4, 16), []
    for _ in range(20):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, num_steps=(1, 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1


# ------------------------------------------------------------------------------------------------ waiting for the GPU


def synchronisations(run) -> list[str]:
    """Where `run` makes the host wait for the GPU, as torch warns of it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{it.filename}:{it.lineno}" for it in caught if "synchroniz" in str(it.message)]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_a_training_step_never_waits_but_to_look_for_documents(packed):
    model, ids = wide_model().train(), ids_of(2, 32)
    inputs = {"input_ids": ids, "labels": ids, "num_steps": (1, 2), "skip_logits": True}
    if packed:
        inputs |= {"position_ids": torch.arange(16).repeat(2)[None].expand(2, -1).to(DEVICE)}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert len(synchronisations(step)) == packed  # transformers looks whether the positions restart


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
def test_a_token_waits_once_at_most_and_with_exits_once_a_check(static):
    model, ids = wide_model(), ids_of(2, 8)
    room = {"max_length": 32, "max_steps": 4} if static else {}
    cache, token = RecurrentCache(model.config, **room), ids[:, :1]
    mask = torch.ones(2, 32, dtype=torch.long, device=DEVICE)
    exits = ExitOptions(criterion="latent_difference", threshold=1e-6)
    with torch.no_grad():
        model(ids, cache=cache, num_steps=4)
        model(token, cache=cache, num_steps=4, attention_mask=mask[:, :9])
        found = synchronisations(lambda: model(token, cache=cache, num_steps=4, attention_mask=mask[:, :10]))
        checked = synchronisations(lambda: model(token, cache=cache, num_steps=4, exits=exits))
    # transformers looks whether a mask hides something, but not where the room of a static cache has to be hidden.
    assert len(found) == (not static) and len(checked) == 3
