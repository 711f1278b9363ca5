"""What libraries around the model expect of it: PEFT, bitsandbytes, accelerate, torch.compile, autocast, resizing."""

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from model import MegaTransformerForCausalLM, RecurrentCache
from model.attention import AttentionInputs
from model.cross_entropy import causal_loss
from tests.tiny import tiny_ids, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_the_embedding_keep_its_scale(tied):
    """LoRA beside the embedding = merged into it; tokens that are to be trained change nothing before training."""
    ids, model = tiny_ids(2, 6), tiny_model(scale=2.0, tie_word_embeddings=tied)
    expected = logits_of(model, ids)
    trained = get_peft_model(model, LoraConfig(target_modules=["qkv_proj"], trainable_token_indices=[5, 6])).eval()
    torch.testing.assert_close(logits_of(trained, ids), expected, **CLOSE)

    model = tiny_model(scale=2.0, tie_word_embeddings=False)
    beside = get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)).eval()
    ours = logits_of(beside, ids)
    torch.testing.assert_close(ours, logits_of(beside.merge_and_unload(), ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_reaches_every_matrix_of_a_block(tmp_path, bits):
    """The head and the embedding stay as they are."""
    tiny_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = MegaTransformerForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    quantized = [
        name
        for name, module in model.named_modules()
        if "bnb" in type(module).__module__ or "bitsandbytes" in type(module).__module__
    ]
    assert plain == ["lm_head"]
    assert len([name for name in quantized if name.endswith(("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))]) == 16


def test_inputs_of_attention_move_to_the_device_of_a_layer():
    """As accelerate does it where the layers of a model stand on several devices."""
    tensor = torch.zeros(1, 2)
    inputs = AttentionInputs(tensor, rotary=(tensor, tensor), position_bias=tensor, where=tensor, rows=tensor)
    moved = send_to_device({"inputs": inputs}, "meta")["inputs"]
    parts = [moved.mask, *moved.rotary, moved.position_bias, moved.where, moved.rows]
    assert [part.device.type for part in parts] == ["meta"] * 6
    assert AttentionInputs(None, where=slice(2, 3)).to("meta").where == slice(2, 3)


def test_new_tokens_are_initialised_like_the_old_ones():
    model = tiny_model(hidden_size=256, vocab_size=2000)
    model.resize_token_embeddings(4000, mean_resizing=False)
    old, new = model.get_input_embeddings().weight.split(2000)
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.02)


@pytest.mark.parametrize("injection", ["concat", "add", "gate"])
def test_the_state_keeps_its_precision_under_autocast(injection):
    """What is iterated is rounded in no injection, or they would not be compared at one precision."""
    model = tiny_model(recurrence={"injection": injection})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model(tiny_ids(1, 4), output_states=True).states
    assert {state.dtype for state in states} == {torch.float32}


def test_a_head_with_dropout_has_the_gradient_of_its_own_forward_pass(monkeypatch):
    """Chunks are computed again for the gradient, and must draw what they drew: what was dropped has no gradient."""
    torch.manual_seed(0)
    monkeypatch.setattr("model.cross_entropy.LOGITS_PER_CHUNK", 64 * 3)
    drop, linear = nn.Dropout(0.5), nn.Linear(32, 64, bias=False)
    hidden, dropped = torch.randn(1, 9, 32, requires_grad=True), []

    def head(x):
        x = drop(x)
        dropped.append(x.detach() == 0)
        return linear(x)

    loss, _ = causal_loss(head, hidden, tiny_ids(1, 9), 64, 8)
    in_forward = torch.cat(dropped)
    loss.backward()
    assert not hidden.grad[0][in_forward].any()


@pytest.mark.slow
def test_compiled_units_stay_compiled_under_autocast_and_for_rows_of_many_lengths():
    """dynamo counts the graphs of all three units together, and falls back in silence when there are too many."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    with torch._dynamo.config.patch(recompile_limit=8):  # torch's, whatever ran before; put back afterwards
        model = tiny_model().train()
        model.model.compile_units(backend=backend)
        for length in (4, 6, 7, 9):
            for autocast in (False, True):
                for depth in ((0, 2), (3, 1), (1, 2)):
                    runs.clear()
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        model(tiny_ids(2, length), labels=tiny_ids(2, length), num_steps=depth)
                    assert len(runs) == 2 + sum(depth)
    torch._dynamo.reset()


def test_guidance_takes_both_passes_at_one_depth():
    model, depths = tiny_model(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: depths.append(kwargs["num_steps"]), with_kwargs=True)
    model.generate(tiny_ids(1, 4), num_steps=2, guidance_scale=1.5, max_new_tokens=3, do_sample=False)
    assert depths == [2] * 6


def test_outputs_are_tuples_where_asked_for():
    model, ids = tiny_model(), tiny_ids(1, 4)
    out = model(ids, return_dict=False, use_cache=False)
    assert isinstance(out, tuple)
    torch.testing.assert_close(out[0], logits_of(model, ids))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_four_dimensional_mask_of_bools_says_who_is_seen(backend):
    """Each token sees itself and the fourth: against the same as numbers, and a sequence without the others."""
    model, ids = tiny_model(scale=2.0, attn_implementation=backend), tiny_ids(1, 5)
    seen = (torch.eye(5, dtype=torch.bool) | (torch.arange(5) == 3))[None, None]
    ours = logits_of(model, ids, attention_mask=seen)
    numbers = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(ours, logits_of(model, ids, attention_mask=numbers), **CLOSE)
    short = logits_of(model, ids[:, 3:], position_ids=torch.tensor([[3, 4]]))
    torch.testing.assert_close(ours[:, 4], short[:, 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_documents_stay_apart_beside_a_mask_that_hides_nothing(position):
    model, ids = tiny_model(scale=2.0, position_embedding=position), tiny_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    ours = logits_of(model, ids, position_ids=positions, attention_mask=torch.ones(1, 6))
    torch.testing.assert_close(ours[:, 4:], logits_of(model, ids[:, 4:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_table_is_long_enough_for_rows_whose_positions_it_has(position):
    """Padding and documents before do not count; a position past the end is one clear error."""
    model = tiny_model(scale=2.0, position_embedding=position, max_position_embeddings=8)
    ids = tiny_ids(1, 12)
    packed = logits_of(model, ids, position_ids=torch.arange(6).repeat(1, 2))
    torch.testing.assert_close(packed[:, 6:], logits_of(model, ids[:, 6:]), atol=1e-4, rtol=1e-4)
    padded = logits_of(model, ids, attention_mask=(torch.arange(12) >= 6).long()[None])
    torch.testing.assert_close(padded[:, 6:], logits_of(model, ids[:, 6:]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"14 positions are more than the 8 of the {position} table"):
        model(ids[:, :4], position_ids=torch.arange(10, 14)[None])


def test_a_cache_beside_gradient_checkpointing_is_refused():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"a cache is not possible with gradient checkpointing .* call model.eval"):
        model(tiny_ids(1, 4), cache=RecurrentCache(model.config))
    assert model(tiny_ids(1, 4), labels=tiny_ids(1, 4)).loss.isfinite()
    assert logits_of(model.eval(), tiny_ids(1, 4)).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 32), (1, 5, 32), (2, 4, 16), (32,)])
def test_a_state_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"initial_state has shape .* \(batch, new tokens, hidden\) = \(2, 4, 32\)"):
        tiny_model()(tiny_ids(2, 4), initial_state=torch.zeros(shape))


def test_depth_may_be_any_integer_but_a_list_says_too_little():
    """A list of two could be rows or (without gradient, with gradient)."""
    numpy = pytest.importorskip("numpy")
    model, ids = tiny_model(), tiny_ids(2, 4)
    torch.testing.assert_close(logits_of(model, ids, num_steps=numpy.int64(3)), logits_of(model, ids, num_steps=3))
    with pytest.raises(ValueError, match=r"a tuple of two counts, or a tensor \(batch,\); got \[1, 4\]"):
        model(ids, num_steps=[1, 4])
    with pytest.raises(ValueError, match="got True"):
        model(ids, num_steps=True)
