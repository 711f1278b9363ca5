"""The text model against references written out, and what it does with its options and with bad input."""

import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils.generic import find_labels

from model import MegaTransformerForCausalLM, MegaTransformerForConditionalGeneration, RecurrentCache
from model.blocks import sinusoids
from tests.tiny import tiny_classifier, tiny_config, tiny_ids, tiny_model

POSITIONS = ["rope", "alibi", "learned", "sinusoidal", "none"]
PLACEMENTS = ["sandwich", "pre", "post"]
INJECTIONS = ["concat", "add", "gate"]


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


# ------------------------------------------------------------------------------------------------- reference
# implementation


def reference_logits(model, ids, num_steps, state):
    """The sandwich model with RoPE, written out in plain tensor operations for one row."""
    c, w = model.config, dict(model.named_parameters())
    d, heads, groups = c.head_dim, c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads
    n = len(ids)
    angle = torch.outer(torch.arange(n).float(), c.rope_theta ** (-torch.arange(0, d, 2).float() / d))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name + ".weight"]

    def rotate(x):  # (n, heads, d), as complex numbers
        z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), dim=-1)

    def attention(x, name):
        qkv = (x @ w[name + ".qkv_proj.weight"].T).view(n, -1, d)
        q, k, v = (
            rotate(qkv[:, :heads]),
            rotate(qkv[:, heads : -c.num_key_value_heads]),
            qkv[:, -c.num_key_value_heads :],
        )
        out = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head // groups].T / d**0.5
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v[:, head // groups])
        return torch.cat(out, dim=-1) @ w[name + ".o_proj.weight"].T

    def block(x, name):
        x = norm(attention(norm(x, name + ".attention_norm_in"), name + ".attention") + x, name + ".attention_norm_out")
        gate, up = (norm(x, name + ".mlp_norm_in") @ w[name + ".mlp.gate_up_proj.weight"].T).chunk(2, -1)
        return norm((gate * gate.sigmoid() * up) @ w[name + ".mlp.down_proj.weight"].T + x, name + ".mlp_norm_out")

    e = block(w["model.embed_tokens.weight"][ids] * c.embedding_scale, "model.prelude.layers.0")
    for _ in range(num_steps):
        state = torch.cat((state, e), dim=-1) @ w["model.core.injection.proj.weight"].T
        state = block(block(state, "model.core.layers.0"), "model.core.layers.1")
    h = norm(block(norm(state, "model.norm"), "model.coda.layers.0"), "model.norm")
    return h @ w["model.embed_tokens.weight"].T


def test_forward_equals_the_equations_written_out():
    """The thought state, not the prelude's output, goes through the core."""
    model, ids = tiny_model(scale=2.0), tiny_ids(1, 9)
    state = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    expected = reference_logits(model, ids[0], 3, state[0])
    torch.testing.assert_close(
        logits_of(model, ids, num_steps=3, initial_state=state)[0], expected, atol=1e-5, rtol=1e-4
    )


def test_plain_pre_norm_model_equals_llama():
    """A model without a core, pre-norm and SwiGLU, is Llama: transformers' implementation is the witness."""
    model = tiny_model(
        scale=2.0,
        num_core_layers=0,
        num_prelude_layers=2,
        num_coda_layers=1,
        norm_placement="pre",
        embedding_scale=1.0,
        tie_word_embeddings=False,
    )
    c = model.config
    llama_config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )
    llama = LlamaForCausalLM(llama_config).eval()
    weights = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "model.norm.weight": model.model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for index, block in enumerate([*model.model.prelude.layers, *model.model.coda.layers]):
        q, k, v = block.attention.qkv_proj.weight.split([32, 16, 16])
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "self_attn.o_proj": block.attention.o_proj.weight,
            "mlp.down_proj": block.mlp.down_proj.weight,
            "input_layernorm": block.attention_norm_in.weight,
            "post_attention_layernorm": block.mlp_norm_in.weight,
        }
        weights |= {f"model.layers.{index}.{name}.weight": weight for name, weight in layer.items()}
    llama.load_state_dict(weights)
    ids = tiny_ids(2, 11)
    torch.testing.assert_close(logits_of(model, ids), logits_of(llama, ids), atol=1e-5, rtol=1e-4)


def test_attention_soft_cap_is_applied_and_refused_where_it_would_be_lost():
    """A named option; the closed form c tanh(x / c) bounds logits, so a tiny cap gives uniform attention."""
    ids = tiny_ids(1, 6)
    capped = tiny_model(scale=2.0, attn_logit_softcapping=1e-6)
    assert capped.config._attn_implementation == "eager"
    uniform = tiny_model(scale=2.0)
    uniform.load_state_dict(capped.state_dict())
    for name, parameter in uniform.named_parameters():
        if "qkv_proj" in name:
            parameter.data[:48] = 0  # no queries, no keys: every logit is 0
    torch.testing.assert_close(logits_of(capped, ids), logits_of(uniform, ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="attn_logit_softcapping is not possible with sdpa"):
        tiny_model(attn_logit_softcapping=50.0, attn_implementation="sdpa")


def test_final_soft_cap():
    ids = tiny_ids(1, 6)
    plain, capped = tiny_model(scale=3.0), tiny_model(scale=3.0, final_logit_softcapping=2.0)
    torch.testing.assert_close(logits_of(capped, ids), 2.0 * torch.tanh(logits_of(plain, ids) / 2.0))


def test_dropout_only_in_training_and_recomputed_alike():
    model, ids = tiny_model(attention_dropout=0.2, hidden_dropout=0.2), tiny_ids(2, 7)
    assert torch.equal(logits_of(model, ids), logits_of(model, ids))
    model.train()
    assert not torch.equal(logits_of(model, ids), logits_of(model, ids))
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        model(ids, labels=ids, num_steps=(0, 3)).loss.backward()
        losses.append(model.model.core.injection.proj.weight.grad.clone())
    torch.testing.assert_close(*losses)


def test_labels_are_shifted_and_weighted_by_token():
    """Padding is not in the loss; the loss is -log p of the next token, averaged over labels."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 6)
    labels = ids.clone()
    labels[1, 4:] = -100
    log_p = logits_of(model, ids).log_softmax(-1)
    picked = [-log_p[b, i, ids[b, i + 1]] for b, last in ((0, 5), (1, 3)) for i in range(last)]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=labels).loss, torch.stack(picked).mean())
        summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(4)).loss
    torch.testing.assert_close(summed, torch.stack(picked).sum() / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_is_that_of_capped_logits_in_float32(monkeypatch, dtype):
    """-log p of the next token by the logits that `forward` gives; a sum in bfloat16 would be off by hundredths."""
    model, ids = tiny_model(scale=3.0, final_logit_softcapping=2.0).to(dtype), tiny_ids(2, 7)
    log_p = logits_of(model, ids)[:, :-1].float().log_softmax(-1)
    monkeypatch.setattr("model.cross_entropy.LOGITS_PER_CHUNK", 5 * 64)
    loss = model(ids, labels=ids, skip_logits=True).loss
    torch.testing.assert_close(loss, -log_p.gather(-1, ids[:, 1:, None]).mean(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"skip_logits": True}, {"loss_weights": True}])
def test_a_sequence_in_parts_with_labels_shifted_before_has_the_loss_of_the_whole(options):
    """As trainers do it that spread sequences over ranks: the last place of a part predicts the first token of the
    next. Two documents, so that parts can stand alone; -log p by hand.
    """
    model, ids = tiny_model(scale=3.0), tiny_ids(2, 6)
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) if "loss_weights" in options else None
    options = {**options, "loss_weights": weights} if "loss_weights" in options else options
    shifted = torch.cat((ids[:, 1:], torch.tensor([[-100], [7]])), dim=1)
    log_p = logits_of(model, ids).log_softmax(-1)
    losses = -log_p.gather(-1, shifted.clamp(min=0)[..., None])[..., 0] * (shifted != -100)
    factors = torch.ones(2, 6) if weights is None else weights
    expected = (losses * factors).sum() / (factors * (shifted != -100)).sum()
    with torch.no_grad():
        out = model(ids, labels=torch.zeros_like(ids), shift_labels=shifted, **options)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(model(ids, shift_labels=shifted, **options).loss, expected)
        summed = model(ids, shift_labels=shifted, num_items_in_batch=torch.tensor(4), **options).loss
    torch.testing.assert_close(summed, (losses * factors).sum() / 4)
    if options:
        torch.testing.assert_close(out.token_losses, losses)
    assert find_labels(type(model)) == ["labels"]  # all of which Trainer wants to see before it evaluates a loss


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_attentions_are_given_whatever_the_backend(position):
    """Computed eagerly for this call: the output stays what the backend gives, and the probabilities are what mixes the
    values of the first layer.
    """
    model = tiny_model(scale=3.0, position_embedding=position)
    assert model.config._attn_implementation == "sdpa"
    ids, mixed = tiny_ids(2, 6), []
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    first = model.model.prelude.layers[0].attention
    first.o_proj.register_forward_hook(lambda module, args, output: mixed.append((args[0], first.values)))
    project = first._project

    def remember(hidden):
        query, key, first.values = project(hidden)
        return query, key, first.values

    first._project = remember
    real = mask.bool()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_attentions=True, num_steps=3)
        plain = model(ids, attention_mask=mask, num_steps=3).logits
    torch.testing.assert_close(plain[real], out.logits[real], atol=1e-4, rtol=1e-4)
    assert len(out.attentions) == 1 + 3 * 2 + 1
    for probabilities in out.attentions:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 6))
        assert not probabilities[0].triu(1).any() and not probabilities[1, :, 2:].triu(3).any()
        assert not probabilities[1, :, 2:, :2].any()
    into, values = mixed[0]
    by_hand = torch.einsum("bhqk,bhkd->bqhd", out.attentions[0], values.repeat_interleave(2, dim=1)).flatten(2)
    torch.testing.assert_close(by_hand[real], into[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_mask_for_each_row_equals_the_rows_alone(position):
    """4-D masks of numbers, taken as they are: causal, and without the first two places of the second row; of a whole
    sequence, and of its last tokens behind a cache.
    """
    model, ids = tiny_model(scale=2.0, position_embedding=position), tiny_ids(2, 6)
    seen = torch.ones(6, 6).tril().bool() & (torch.arange(6) >= torch.tensor([0, 2])[:, None, None])
    mask = torch.zeros(2, 1, 6, 6).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    alone = [logits_of(model, ids[:1]), logits_of(model, ids[1:, 2:], position_ids=torch.arange(2, 6)[None])]
    whole = logits_of(model, ids, attention_mask=mask)
    with torch.no_grad():
        cache = model(ids[:, :3], attention_mask=mask[:, :, :3, :3], use_cache=True).cache
    rest = logits_of(model, ids[:, 3:], attention_mask=mask[:, :, 3:], cache=cache)
    for row, expected in enumerate(alone):
        torch.testing.assert_close(whole[row, -expected.shape[1] :], expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rest[row], expected[0, -3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_has_loss_and_gradients_of_zero(skip_logits, num_items_in_batch):
    """Where all is padding or prompt: 0 / 0 would put a NaN into every weight."""
    model, ids = tiny_model(), tiny_ids(2, 6)
    counts = {"skip_logits": skip_logits, "num_items_in_batch": num_items_in_batch}
    loss = model(ids, labels=torch.full_like(ids, -100), **counts).loss
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


# ------------------------------------------------------------------------------------------------ doors, initialisation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "sequence is empty"),
        ({"input_ids": tiny_ids(2, 5), "attention_mask": torch.ones(2, 4)}, r"shape \(2, 4\), expected .* \(2, 5\)"),
        ({"input_ids": tiny_ids(2, 5), "attention_mask": torch.ones(5)}, r"shape \(5,\)"),
        ({"input_ids": tiny_ids(1, 5), "num_steps": 0}, "at least 1; got 0|at least 1, .*got 0"),
        ({"input_ids": tiny_ids(1, 5), "num_steps": -3}, "got -3"),
        ({"input_ids": tiny_ids(1, 5), "num_steps": 2.5}, "got 2.5"),
        ({"input_ids": tiny_ids(1, 5), "num_steps": True}, "got True"),
        ({"input_ids": tiny_ids(1, 5), "num_steps": (0, 0)}, r"\(0, 0\)"),
        ({"input_ids": tiny_ids(2, 5), "num_steps": torch.tensor([1, 2, 3])}, r"each of the 2 rows, got shape \(3,\)"),
        ({"input_ids": tiny_ids(2, 5), "num_steps": torch.tensor([1, 0])}, r"every row, got \[1, 0\]"),
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": tiny_ids(1, 5), "num_stepz": 3}, "does not know the argument 'num_stepz'"),
    ],
)
def test_bad_input_is_refused_at_the_door(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_sequence_over_a_table_is_refused(position):
    model = tiny_model(position_embedding=position, max_position_embeddings=8)
    with pytest.raises(ValueError, match=f"9 positions are more than the 8 of the {position} table"):
        model(tiny_ids(1, 9))
    cache = model(tiny_ids(1, 8), use_cache=True).cache
    with pytest.raises(ValueError, match="9 positions"):
        model(tiny_ids(1, 1), cache=cache)


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_open_positions_extrapolate(position):
    model = tiny_model(position_embedding=position, max_position_embeddings=8)
    assert logits_of(model, tiny_ids(1, 20)).isfinite().all()


def test_plain_model_refuses_steps():
    with pytest.raises(ValueError, match=r"num_steps \(3\) was given, but this model has no core"):
        tiny_model(num_core_layers=0)(tiny_ids(1, 4), num_steps=3)


def test_foreign_cache_is_refused():
    """An empty one too, which is not extended in place as its owner expects."""
    model, foreign = tiny_model(), DynamicCache()
    with pytest.raises(
        ValueError, match=r"DynamicCache with keys of shapes .* in 0 layers; this model needs a Recurrent"
    ):
        model(tiny_ids(1, 4), cache=foreign)
    foreign.update(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8), 0)
    with pytest.raises(ValueError, match=r"DynamicCache with keys of shapes \[\(1, 3, 2, 8\)\] in 1 layers"):
        model(tiny_ids(1, 4), cache=foreign)


def test_initialisation_follows_its_table():
    """Standard deviations against the closed form, on a model wide enough for tight statistics."""
    config = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "position_embedding": "learned"}
    model = tiny_model(**config, tie_word_embeddings=False, recurrence={"mean_steps": 8})
    std = (2 / (5 * 256)) ** 0.5
    cut = 0.9866  # standard deviation of a unit normal that is cut at three
    layers = 1 + 8 * 2 + 1
    block = model.model.core.layers[0]
    expected = {
        model.model.embed_tokens.weight[1:]: std,
        model.lm_head.weight: std,
        model.model.core.injection.proj.weight: std,
        block.attention.qkv_proj.weight: std,
        block.mlp.gate_up_proj.weight: std,
        block.attention.o_proj.weight: std / (2 * layers) ** 0.5,
        block.mlp.down_proj.weight: std / (2 * layers) ** 0.5,
        model.model.embed_positions.weight: std * 16,
    }
    for weight, value in expected.items():
        assert weight.std().item() == pytest.approx(value * cut, rel=0.02)
    assert model.model.embed_tokens.weight[0].abs().max() == 0
    assert (model.model.norm.weight == 1).all()


def test_tied_weights_share_storage_gradient_and_survive_saving(tmp_path):
    model, ids = tiny_model().train(), tiny_ids(2, 7)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(ids, labels=ids).loss.backward()
    untied = tiny_model(tie_word_embeddings=False).train()
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head.weight})
    untied(ids, labels=ids).loss.backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.lm_head.weight.grad, both)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_embedding_scale_multiplies_the_embeddings():
    model, ids = tiny_model(embedding_scale=3.0), tiny_ids(1, 4)
    torch.testing.assert_close(model.model.embed_tokens(ids), 3.0 * model.model.embed_tokens.weight[ids])
    assert tiny_config().embedding_scale == pytest.approx(32**0.5)


def test_rotary_angles_are_float32_in_half_precision():
    """At position 4001 the angles of bfloat16 arithmetic would be off by whole turns."""
    from model.attention import rotary_angles, rotary_tables

    positions = torch.tensor([[4001]])
    cos, _ = rotary_tables(rotary_angles(positions, 8, 10000.0), torch.bfloat16)
    exact = torch.cos(4001 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    torch.testing.assert_close(cos[0, 0, :4].double(), exact, atol=4e-3, rtol=0)


def test_alibi_slopes_of_the_paper():
    from model.attention import alibi_slopes

    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = alibi_slopes(12).tolist()
    assert twelve[:8] == [2.0**-i for i in range(1, 9)]
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_alibi_bias_is_minus_the_slope_times_the_distance():
    from model.attention import alibi_bias

    bias = alibi_bias(torch.tensor([[5, 6]]), torch.tensor([[2, 6]]), num_heads=8)
    assert bias[0, 0].tolist() == [[-1.5, 0.5], [-2.0, 0.0]] and bias[0, 1, 1].tolist() == [-1.0, 0.0]


def test_trainers_find_the_labels_and_nothing_else():
    """`Trainer` evaluates where all that it takes for labels is given."""
    for model in (MegaTransformerForCausalLM, MegaTransformerForConditionalGeneration):
        assert find_labels(model) == ["labels"]


# ------------------------------------------------------------------------------------------- rows of different kinds


@pytest.mark.parametrize("side", ["right", "left", "within"])
@pytest.mark.parametrize(
    ("backend", "static"),
    [
        *[(backend, static) for backend in ("eager", "sdpa") for static in (False, True)],
        pytest.param("flex_attention", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_packed_rows_beside_padded_ones_are_their_documents_alone(position, backend, side, static):
    """Two documents in a row, padding before, behind or between them, and a padded row of one document."""
    model = tiny_model(scale=2.0, position_embedding=position)
    model.set_attn_implementation(backend)
    first, second, pad = tiny_ids(1, 6), tiny_ids(1, 4, seed=1), torch.zeros(1, 3, dtype=torch.long)
    parts = {"right": [first, second, pad], "left": [pad, first, second], "within": [first, pad, second]}[side]
    packed, padded = torch.cat(parts, dim=1), torch.cat((pad, pad, first, pad[:, :1]), dim=1)
    rows = torch.cat((packed, padded))
    counted = torch.cat([torch.arange(part.shape[1]) * (part[0] > 0) for part in parts])
    positions = torch.stack((counted, torch.tensor([*[0] * 6, *range(6), 0])))
    cache = RecurrentCache(model.config, max_length=16) if static else None
    with torch.no_grad():
        together = model(
            rows, attention_mask=(rows != 0).long(), position_ids=positions, cache=cache, num_steps=3
        ).logits
        for document, row in ((first, 0), (second, 0), (first, 1)):
            start = next(at for at in range(13) if torch.equal(rows[row, at : at + document.shape[1]], document[0]))
            alone = model(document, num_steps=3).logits[0]
            torch.testing.assert_close(together[row, start : start + len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_a_static_cache_keeps_packed_documents_apart():
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]] * 2)
    with torch.no_grad():
        cache = RecurrentCache(model.config, max_length=12)
        ours = model(ids, position_ids=positions, cache=cache, num_steps=3).logits[:, 5:]
        torch.testing.assert_close(ours, model(ids[:, 5:], num_steps=3).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_four_dimensional_masks_of_numbers_are_those_of_bools(position, backend):
    model, ids = tiny_model(scale=2.0, position_embedding=position), tiny_ids(2, 6)
    model.set_attn_implementation(backend)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, 3:, 1] = False
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, num_steps=2).logits
        assert torch.equal(model(ids, attention_mask=mask.long(), num_steps=2).logits, expected)
        assert not torch.allclose(expected[1], model(ids, num_steps=2).logits[1], atol=1e-4)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 6, 5\), expected"):
        model(ids, attention_mask=mask[..., :5])


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])], ids=str)
def test_a_loss_is_of_all_positions_whatever_logits_are_kept(keep):
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 6)
    whole, part = model(ids, labels=ids), model(ids, labels=ids, logits_to_keep=keep)
    torch.testing.assert_close(part.loss, whole.loss)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(part.logits, whole.logits[:, kept])


def test_what_inference_mode_leaves_can_be_trained_with():
    model, ids = tiny_model(position_embedding="sinusoidal"), tiny_ids(2, 5)
    with torch.inference_mode():
        model(ids)
    model.train()(ids, labels=ids, num_steps=2).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_positions_below_the_table_and_empty_batches_are_refused(position):
    model, ids = tiny_model(position_embedding=position), tiny_ids(1, 3)
    with pytest.raises(ValueError, match=rf"position_ids has -1, and the {position} table begins at 0; give padding"):
        model(ids, position_ids=torch.tensor([[-1, 0, 1]]))
    with pytest.raises(ValueError, match="the input batch is empty; give at least one row"):
        model(ids[:0])
    with pytest.raises(ValueError, match="batch is empty"):
        model.generate(ids[:0], max_new_tokens=2)


def test_sinusoids_are_those_of_their_definition():
    """Of single positions, whatever the largest is."""
    table = sinusoids(torch.tensor([[0, 7, 63]]), 6)[0].double()
    for row, position in zip(table, (0, 7, 63), strict=True):
        angles = [position / 10000 ** (2 * pair / 6) for pair in range(3)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny_model, tiny_classifier])
def test_embeddings_that_are_put_in_or_resized_keep_the_scale(build):
    model, ids = build(), tiny_ids(2, 5)
    expected = model.get_input_embeddings()(ids)
    other = torch.nn.Embedding(64, 32, padding_idx=0)
    other.weight = model.get_input_embeddings().weight
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert torch.equal(model.get_input_embeddings()(ids), expected)
    model.resize_token_embeddings(70)
    assert torch.equal(model.get_input_embeddings()(ids), expected)
    assert model.get_input_embeddings().embed_scale != 1
