"""The cache: what a read finds under each policy, rows of their own depth, and the operations that `generate` needs."""

import copy

import pytest
import torch

from model import RecurrentCache
from model.cache import BLOCK
from model.outputs import CACHE_NAME
from tests.tiny import tiny_config, tiny_ids, tiny_model

POLICIES = [("full", None), ("ring", 2), ("ring", 3), ("last", None), ("first", 2), ("residual", None)]
SIZES = {"grows": {}, "static": {"max_length": 3 * BLOCK, "max_steps": 5}}
SIZED = [(*policy, size) for policy in POLICIES for size in SIZES if size == "grows" or policy in POLICIES[:4]]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def cache_of(config, policy: str, kept: int | None, **size) -> RecurrentCache:
    """`kept` are tokens of "first", steps of the others."""
    return RecurrentCache(
        config, policy, **{"num_kept_tokens" if policy == "first" else "num_kept_steps": kept}, **size
    )


def logits_of(model, ids, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def visible_entry(entries: list, step: int, policy: str, kept: int | None, distance: int = 1):
    """The read rule: what a reader at `step` finds of a token that has left one entry for each step it took."""
    if policy == "full" or (policy == "first" and distance < kept):
        return entries[min(step, len(entries) - 1)]
    if policy == "first":
        return entries[0]
    if policy == "residual":
        return tuple(map(near, entries[min(step, len(entries) - 1)], entries[-1]))
    kept = kept if policy == "ring" else 1
    in_place = [entry for taken, entry in enumerate(entries) if taken % kept == step % kept]
    return in_place[-1] if in_place else entries[-1]


def near(entry: torch.Tensor, deepest: torch.Tensor) -> torch.Tensor:
    """The deepest entry and the nearest of four levels to the difference, (..., head_dim)."""
    difference = entry - deepest
    scale = difference.square().mean(-1, keepdim=True).sqrt().half().float()
    levels = scale[..., None] * torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])
    nearest = (difference[..., None] - levels).abs().argmin(-1, keepdim=True)
    return deepest + levels.expand(*difference.shape, 4).gather(-1, nearest).squeeze(-1)


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_a_read_finds_what_the_rule_says(policy, kept):
    """Tokens of different depths, against a decoder that keeps every entry and applies the rule."""
    model = tiny_model(scale=2.0, position_embedding="none", num_prelude_layers=0, num_coda_layers=0, num_core_layers=1)
    ids, depths = tiny_ids(1, 7), [3, 1, 5, 2, 6, 4, 6]
    cache, state = cache_of(model.config, policy, kept), torch.full((1, 1, 32), 0.3)
    ours = [
        logits_of(model, ids[:, i : i + 1], cache=cache, num_steps=depth, initial_state=state)
        for i, depth in enumerate(depths)
    ]
    layer, tokens, reference = model.model.core.layers[0], [], []  # tokens[token][step] = (key, value)
    for token, depth in zip(ids[0], depths, strict=True):
        s, e, own = state, model.model.embed_tokens(token)[None, None], []
        for step in range(depth):
            x = model.model.core.injection(s, e)
            q, k, v = layer.attention._project(layer.attention_norm_in(x))
            own.append((k, v))
            far = range(len(tokens), 0, -1)
            visible = [visible_entry(each, step, policy, kept, at) for each, at in zip(tokens, far, strict=True)]
            visible.append(own[step])
            keys, values = (torch.cat(part, 2).repeat_interleave(2, 1) for part in zip(*visible, strict=True))
            mixed = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1) @ values
            x = layer.attention_norm_out(x + layer.attention.o_proj(mixed.transpose(1, 2).flatten(2)))
            s = layer.mlp_norm_out(x + layer.mlp(layer.mlp_norm_in(x)))
        tokens.append(own)
        reference.append(model.lm_head(model.model.norm(model.model.norm(s))))
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(reference, 1), **CLOSE)


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_rows_of_their_own_depth_equal_each_alone_also_later_through_the_cache(position, policy, kept):
    """Invariant 4. The rows are of different length, too."""
    model, ids, depths = tiny_model(scale=2.0, position_embedding=position), tiny_ids(3, 9), torch.tensor([1, 5, 2])
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = 0
    cache = cache_of(model.config, policy, kept)
    first = logits_of(model, ids[:, :6], attention_mask=mask[:, :6], num_steps=depths, cache=cache)
    second = logits_of(model, ids[:, 6:], attention_mask=mask, num_steps=3, cache=cache)
    for row, depth in enumerate(depths.tolist()):
        alone, real = cache_of(model.config, policy, kept), mask[row].bool()
        prompt = ids[row : row + 1, :6][:, real[:6]]
        expected = logits_of(model, prompt, num_steps=depth, cache=alone)
        torch.testing.assert_close(first[row][real[:6]], expected[0], **CLOSE)
        expected = logits_of(model, ids[row : row + 1, 6:], num_steps=3, cache=alone)
        torch.testing.assert_close(second[row], expected[0], **CLOSE)


def test_rows_that_have_stopped_do_no_more_work():
    model, rows = tiny_model(), []
    model.model.core.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    logits_of(model, tiny_ids(3, 4), num_steps=torch.tensor([1, 4, 2]))
    assert rows == [3, 2, 1, 1]


def test_rows_of_their_own_depth_get_the_gradient_of_each_alone():
    model, ids, depths = tiny_model(scale=2.0).train(), tiny_ids(3, 6), torch.tensor([1, 4, 2])
    model(ids, labels=ids, num_steps=depths).loss.backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, depth in enumerate(depths.tolist()):
        one = ids[row : row + 1]
        (model(one, labels=one, num_steps=depth).loss / 3).backward()
    for parameter, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("policy", "kept"), [("full", None), ("ring", 3), ("ring", 8)])
def test_a_ring_of_enough_steps_equals_no_cache(policy, kept):
    """Invariant 1: at 3 steps; across the growth of the buffers."""
    model, ids = tiny_model(scale=2.0, max_position_embeddings=256), tiny_ids(2, BLOCK + 20)
    cache, parts = cache_of(model.config, policy, kept), []
    for part in ids.split([BLOCK - 2, 1, 1, 1, 19], dim=1):
        parts.append(logits_of(model, part, num_steps=3, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, ids, num_steps=3), **CLOSE)


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_memory_is_that_of_its_formula(policy, kept):
    model, tokens = tiny_model(), BLOCK + 1  # 1 + 2 + 1 layers, 2 key/value heads of 8
    cache = cache_of(model.config, policy, kept)
    logits_of(tiny_model(max_position_embeddings=256), tiny_ids(3, tokens), num_steps=5, cache=cache)
    places = 2 * BLOCK
    core = {"full": 5 * places, "ring": (kept or 0) * places, "last": places, "first": places + 4 * (kept or 0)}
    core["residual"] = (
        places * (8 * 4 + 4 * (8 // 4 + 2)) / (8 * 4)
    )  # as many as their bytes would be of full precision
    assert cache.num_bytes == 2 * (2 * places + 2 * core[policy]) * 3 * 2 * 8 * 4


def objects_in(thing, seen: set[int]) -> int:
    """How many Python objects hang on this one."""
    if id(thing) in seen or not (isinstance(thing, list | tuple | dict) or hasattr(thing, "__dict__")):
        return 0
    seen.add(id(thing))
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else []
    held = [] if isinstance(thing, torch.Tensor) else list(getattr(thing, "__dict__", {}).values())
    return 1 + sum(objects_in(part, seen) for part in [*parts, *held])


@pytest.mark.parametrize(("policy", "kept", "size"), SIZED)
def test_there_is_no_python_object_per_token(policy, kept, size):
    model = tiny_model(max_position_embeddings=512)
    cache, counts = cache_of(model.config, policy, kept, **SIZES[size]), []
    for tokens in (3, 1, 2 * BLOCK):
        logits_of(model, tiny_ids(2, tokens), num_steps=torch.tensor([5, 2]), cache=cache)
        counts.append(objects_in(cache, set()))
    slots = 2 + 2 * (kept if policy == "ring" else 1 if policy == "last" else 5)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] < 10 * slots + 60


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_rows_reordered_repeated_selected_and_tokens_cropped(policy, kept):
    """What beams and assisted decoding do to a cache, against prompts that were so from the start."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 8)

    def read(prompt: torch.Tensor) -> RecurrentCache:
        cache = cache_of(model.config, policy, kept)
        logits_of(model, prompt, num_steps=3, cache=cache)
        return cache

    def next_logits(cache: RecurrentCache, rows: int) -> torch.Tensor:
        return logits_of(model, tiny_ids(1, 2, seed=9).expand(rows, -1), num_steps=3, cache=cache)

    for change, expected in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), ids[[1, 1]]),
        (lambda cache: cache.batch_repeat_interleave(2), ids[[0, 0, 1, 1]]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), ids[[1]]),
        (lambda cache: cache.crop(-1 if policy == "first" else -3), ids[:, : 7 if policy == "first" else 5]),
    ):
        cache = read(ids)
        change(cache)
        assert cache.get_seq_length() == expected.shape[1]
        torch.testing.assert_close(
            next_logits(cache, len(expected)), next_logits(read(expected), len(expected)), **CLOSE
        )
    cache = read(ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = logits_of(model, ids, cache=cache_of(model.config, policy, kept))
    torch.testing.assert_close(logits_of(model, ids, cache=cache), expected, **CLOSE)


@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_a_copy_goes_its_own_way(policy, kept):
    """As benchmarks and assisted decoding copy it; then with more steps and exits, which are settled in the copy."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 8)
    cache = cache_of(model.config, policy, kept)
    logits_of(model, ids[:, :4], num_steps=3, cache=cache)
    copied, again = copy.deepcopy(cache), copy.deepcopy(cache) if policy == "first" else cache
    continued = []
    for each in (cache, copied, again):
        for part, steps in zip(ids[:, 4:].split(2, dim=1), (torch.tensor([5, 2]), 4), strict=True):
            continued.append(logits_of(model, part, num_steps=steps, cache=each))
        cache.crop(-4) if each is cache is again else None
    for first, second, third in zip(continued[:2], continued[2:4], continued[4:], strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize(("policy", "kept", "size"), SIZED)
def test_gradients_through_a_chunk_that_is_cached_are_those_without_cache(policy, kept, size):
    """What is written over in place is not what backpropagation reads. Chunks before are constants."""
    option = {"cache_policy": policy, "num_kept_tokens": kept} if policy == "first" else {}
    model, ids = tiny_model(scale=2.0, recurrence=option), tiny_ids(2, 8)
    gradients = []
    for cache in (None, cache_of(model.config, policy, kept, **SIZES[size])):
        model.zero_grad()
        options = {"use_cache": False} if cache is None else {"cache": cache}
        model(ids, labels=ids, num_steps=torch.tensor([4, 2]), **options).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    model(ids[:, :2], labels=ids[:, :2], num_steps=3, cache=cache).loss.backward()


@pytest.mark.parametrize(
    ("policy", "kept", "message"),
    [
        ("rings", None, "'rings' is unknown; choose one of full, ring, last, first, residual"),
        ("ring", 0, r"num_kept_steps \(0\) must be at least 1"),
        ("last", 2, r"num_kept_steps \(2\) is for cache policy 'ring'; 'last' does not read it"),
        ("first", 2, r"num_kept_steps \(2\) is for cache policy 'ring'; 'first' does not read it"),
    ],
)
def test_unknown_policies_are_refused(policy, kept, message):
    with pytest.raises(ValueError, match=message):
        RecurrentCache(tiny_config(), policy, kept)
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(tiny_ids(1, 3), max_new_tokens=1, cache_policy=policy, num_kept_steps=kept)


def test_policy_of_the_keyword_then_of_the_generation_config_then_of_the_config():
    model = tiny_model(recurrence={"cache_policy": "ring", "num_kept_steps": 2})

    def policy_of(**kwargs) -> tuple:
        out = model.generate(tiny_ids(1, 3), max_new_tokens=2, return_dict_in_generate=True, **kwargs)
        return out[CACHE_NAME].policy, out[CACHE_NAME].num_kept_steps

    assert policy_of() == ("ring", 2)
    model.generation_config.cache_policy = "last"
    assert policy_of() == ("last", 1)
    assert policy_of(cache_policy="full") == ("full", None)
    assert policy_of(cache_policy="ring") == ("ring", 2)
    assert policy_of(cache_policy="ring", num_kept_steps=3) == ("ring", 3)
    out = model.generate(tiny_ids(1, 3), max_new_tokens=2, return_dict_in_generate=True, cache_policy="first")
    assert out[CACHE_NAME].num_kept_tokens == model.config.recurrence.num_kept_tokens == 16
