"""What is always true of the text model, for every position embedding, norm placement and head, tied or not.

Each identity computes the same thing in two ways. The weights are scaled up, so that attention is far from uniform.
"""

from itertools import product

import pytest
import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from inference.shutdown import end_process
from model import RecurrentCache
from model.recurrence import draw_training_states
from tests.tiny import tiny_ids, tiny_model

POSITIONS = ("rope", "alibi", "learned", "sinusoidal", "none")
PLACEMENTS = ("sandwich", "pre", "post")
VARIANTS = [
    {"position_embedding": position, "norm_placement": placement, "tie_word_embeddings": tied}
    for position, placement, tied in product(POSITIONS, PLACEMENTS, (True, False))
]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def name_of(variant: dict) -> str:
    head = "tied" if variant["tie_word_embeddings"] else "untied"
    return f"{variant['position_embedding']}-{variant['norm_placement']}-{head}"


@pytest.fixture(params=VARIANTS, ids=name_of)
def variant(request) -> dict:
    return request.param


@pytest.fixture
def model(variant):
    return tiny_model(scale=2.0, **variant)


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def loss_and_gradients(model, *calls: dict) -> list[torch.Tensor]:
    """The sum of the losses of some calls, and its gradient with respect to each parameter."""
    model.zero_grad()
    loss = sum(model(**call).loss for call in calls)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def training_call(model, rows: int = 4, first: int = 0, num_steps=(1, 2)) -> dict:
    """Arguments of a training pass over `rows` rows, each with its own like-init state; the loss is divided by 28."""
    ids = tiny_ids(4, 8)[first : first + rows]
    state = draw_training_states(model.config, 8, [(0, 0, first + row) for row in range(rows)])
    return {"input_ids": ids, "labels": ids, "num_steps": num_steps, "initial_state": state, "num_items_in_batch": 28}


# ------------------------------------------------------------------------------------- 1: the cache, padding, packing


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 4, 3]], ids=["token by token", "chunks"])
def test_with_a_cache_equals_without(model, chunks):
    ids, cache = tiny_ids(2, 12), RecurrentCache(model.config)
    parts = [logits_of(model, part, num_steps=3, cache=cache) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, ids, num_steps=3), **CLOSE)
    assert cache.get_seq_length() == 12 and cache.num_steps == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_in_a_batch_equals_the_row_alone(model, side):
    """A row does not see its padding, and stands at the positions where it would stand alone."""
    long, short, pad = tiny_ids(1, 10), tiny_ids(1, 6, seed=1), torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((pad, short) if side == "left" else (short, pad), dim=1)
    real = slice(4, 10) if side == "left" else slice(0, 6)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1] = 0
    mask[1, real] = 1
    batch = logits_of(model, torch.cat((long, padded)), attention_mask=mask, num_steps=3)
    torch.testing.assert_close(batch[0], logits_of(model, long, num_steps=3)[0], **CLOSE)
    torch.testing.assert_close(batch[1, real], logits_of(model, short, num_steps=3)[0], **CLOSE)


def test_a_row_with_padding_inside_equals_the_row_without(model):
    """Positions are counted over the real tokens, also those of keys."""
    ids, mask = tiny_ids(1, 9), torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]])
    real = mask[0].bool()
    with_padding = logits_of(model, ids, attention_mask=mask, num_steps=3)[:, real]
    torch.testing.assert_close(with_padding, logits_of(model, ids[:, real], num_steps=3), **CLOSE)


def test_left_padding_with_a_cache_equals_the_row_alone(model):
    """A prompt, then one token at a time."""
    ids = tiny_ids(1, 8)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(11) >= 3).long()[None]
    cache, parts = RecurrentCache(model.config), []
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 11))]:
        parts.append(logits_of(model, padded[:, start:stop], attention_mask=mask[:, :stop], cache=cache, num_steps=2))
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 3:], logits_of(model, ids, num_steps=2), **CLOSE)


def test_packed_documents_equal_separate_ones(model):
    """Attention does not cross a restart of the positions."""
    lengths = [5, 1, 7]
    documents = [tiny_ids(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = logits_of(model, torch.cat(documents, dim=1), position_ids=positions, num_steps=3).split(lengths, dim=1)
    for part, document in zip(packed, documents, strict=True):
        torch.testing.assert_close(part, logits_of(model, document, num_steps=3), **CLOSE)


def test_saved_equals_loaded(model, tmp_path):
    """Bitwise, and a tied head stays tied."""
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert torch.equal(logits_of(loaded, tiny_ids(2, 7)), logits_of(model, tiny_ids(2, 7)))


# ------------------------------------------------------------------------------------------------- 2: backends


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_backends_agree_with_eager(variant, backend):
    """Backends agree with padding. FlexAttention runs as plain tensor operations: its compiled kernel is for GPUs."""
    ids, mask = tiny_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with torch.compiler.set_stance("force_eager"):
        eager, other = (
            logits_of(tiny_model(scale=2.0, attn_implementation=name, **variant), ids, attention_mask=mask)[mask.bool()]
            for name in ("eager", backend)
        )
    torch.testing.assert_close(other, eager, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_compiled_flex_attention_agrees_with_eager_on_a_gpu(position):
    """The kernel wants heads of at least 16."""
    ids = tiny_ids(2, 200).cuda()
    eager, flex = (
        logits_of(
            tiny_model(
                scale=2.0,
                position_embedding=position,
                attn_implementation=name,
                head_dim=16,
                max_position_embeddings=256,
            ).cuda(),
            ids,
        )
        for name in ("eager", "flex_attention")
    )
    torch.testing.assert_close(flex, eager, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------- 3: steps and gradients


def test_steps_without_and_with_gradient_add_up(model):
    """N steps without gradient and k with equal n + k steps in value."""
    ids = tiny_ids(2, 7)
    for split in ((0, 5), (3, 2), (5, 0)):
        assert torch.equal(model(ids, num_steps=split).logits, model(ids, num_steps=5).logits)


def test_more_steps_change_the_output(model):
    outputs = [logits_of(model, tiny_ids(2, 7), num_steps=steps) for steps in (1, 2, 3)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 and (outputs[1] - outputs[2]).abs().max() > 1e-2


@pytest.mark.parametrize("injection", ["concat", "add", "gate"])
def test_every_parameter_gets_a_gradient(variant, injection):
    """Those of the injection too, and with steps without gradient before."""
    options = {"qk_norm": True, "qk_bias": True, "norm": "layernorm", "mlp": "mlp"}
    model = tiny_model(recurrence={"injection": injection}, **options, **variant).train()
    ids = tiny_ids(2, 7)
    model(ids, labels=ids, num_steps=(2, 2)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_the_steps_with_gradient_are_the_last_ones(model):
    core, recorded = model.model.core, []
    core.register_forward_hook(lambda module, arguments, output: recorded.append(output.requires_grad))
    model(tiny_ids(1, 4), num_steps=(3, 2))
    assert recorded == [False, False, False, True, True]


def test_the_gradient_of_truncated_steps_is_that_of_the_last_steps_alone(model):
    """n steps without gradient are a constant initial state of the k steps after them."""
    call = training_call(model, num_steps=(3, 2))
    with torch.no_grad():
        after_three = model(call["input_ids"], num_steps=3, initial_state=call["initial_state"], output_states=True)
    truncated = loss_and_gradients(model, call)
    alone = loss_and_gradients(model, {**call, "num_steps": 2, "initial_state": after_three.states[-1]})
    for ours, reference in zip(truncated, alone, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- 5: no leak


def test_what_is_predicted_is_not_seen(model, variant):
    """The loss at i has no gradient with respect to the inputs after i, the first of which it predicts."""
    ids = tiny_ids(1, 8)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    losses = cross_entropy(model(inputs_embeds=embeds, num_steps=3).logits[0, :-1], ids[0, 1:], reduction="none")
    for i, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, embeds, retain_graph=True)
        assert gradient[0, i + 1 :].abs().max() == 0
        assert gradient[0, : i + 1].abs().amax(-1).min() > 0


# ------------------------------------------------------------------------------------------------- 6: equivalent runs


def test_activation_checkpointing_changes_nothing(model):
    """Recomputed in backward, to the last bit."""
    model.train()
    call = training_call(model)
    without = loss_and_gradients(model, call)
    model.activation_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model, call), without, strict=True))


def test_four_micro_batches_of_one_row_equal_one_of_four(model):
    """At a fixed depth, with a like-init state of its own for each row."""
    model.train()
    whole = loss_and_gradients(model, training_call(model))
    parts = loss_and_gradients(model, *(training_call(model, rows=1, first=row) for row in range(4)))
    for one, four in zip(whole, parts, strict=True):
        torch.testing.assert_close(four, one, atol=1e-5, rtol=1e-4)


def test_the_loss_in_chunks_equals_that_of_all_logits(model, monkeypatch):
    """Seven chunks of five tokens or fewer."""
    model.train()
    call = training_call(model)
    reference = loss_and_gradients(model, call)
    monkeypatch.setattr("model.cross_entropy.LOGITS_PER_CHUNK", 5 * model.config.vocab_size)
    for ours, expected in zip(loss_and_gradients(model, {**call, "skip_logits": True}), reference, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_ranks_of_two_rows_equal_one_of_four(tmp_path):
    """For all variants; `DistributedDataParallel` averages the gradients over the ranks."""
    torch.multiprocessing.spawn(compare_two_ranks_with_one, args=(str(tmp_path / "store"),), nprocs=2)


def compare_two_ranks_with_one(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for variant in VARIANTS:
        model = tiny_model(scale=2.0, **variant).train()
        whole = loss_and_gradients(model, training_call(model))
        shared = DistributedDataParallel(model)
        own = loss_and_gradients(shared, training_call(model, rows=2, first=2 * rank))
        distributed.all_reduce(own[0])
        for ours, expected in zip([own[0], *(2 * gradient for gradient in own[1:])], whole, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    distributed.destroy_process_group()
    end_process(0)
