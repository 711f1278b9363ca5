"""Memory comes back when the last name of a thing goes, and not when Python's collector happens to run."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from model import RecurrentCache
from model.step_lora import add_step_lora
from tests.test_trainer import build
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_writing import ASSISTANT, BEGIN, IMAGE, IMAGE_END, IMAGE_START, USER, tiny_writer, writing_batch

POLICIES = [("full", None), ("ring", 2), ("last", None)]
SIZES = {"grows": {}, "static": {"max_length": 12, "max_steps": 4}}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Without the collector; what stands before the test does not concern it."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()


def tensors_in_cycles(run: Callable[[], object]) -> int:
    """How many tensors only the collector finds when everything that `run` has made is dropped."""
    run()
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    count = sum(isinstance(thing, torch.Tensor) for thing in gc.garbage)
    gc.garbage.clear()
    return count


def test_a_cycle_is_counted():
    def run() -> None:
        cycle = [torch.zeros(2)]
        cycle.append(cycle)

    assert tensors_in_cycles(run) == 1


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("policy", "kept"), POLICIES)
def test_the_buffers_of_a_cache_go_with_it(policy, kept, size):
    """Also after all that is done to a cache, and those of its copies."""
    model, ids = tiny_model(), tiny_ids(2, 4)
    cache = RecurrentCache(model.config, policy, kept, **size)
    model(ids, cache=cache, num_steps=torch.tensor([4, 2]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    cache.crop(-1)
    caches = [cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    cache.batch_select_indices(torch.tensor([0, 2]))
    buffers = [weakref.ref(layer.buffer) for each in caches for layer in each.layers]
    assert all(buffer() is not None for buffer in buffers)
    del cache, caches
    assert all(buffer() is None for buffer in buffers)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_cache_that_was_written_and_read_goes_on_as_the_first(write, size):
    """Its slots are views of its buffers, and no copies, which would no longer see what is settled."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 8)
    cache, file = RecurrentCache(model.config, **size), io.BytesIO()
    with torch.no_grad():
        model(ids[:, :4], cache=cache, num_steps=3)
        write(cache, file)
        file.seek(0)
        read = pickle.load(file) if write is pickle.dump else torch.load(file, weights_only=False)
        for part, steps in zip(ids[:, 4:].split(2, dim=1), (torch.tensor([4, 2]), 4), strict=True):
            ours, expected = (model(part, cache=each, num_steps=steps).logits for each in (read, cache))
            assert torch.equal(ours, expected)


GENERATIONS = {
    "full": {},
    "ring": {"cache_policy": "ring", "num_kept_steps": 2},
    "last": {"cache_policy": "last"},
    "first": {"cache_policy": "first", "num_kept_tokens": 2},
    "residual": {"cache_policy": "residual"},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 2},
    "beams": {"num_beams": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "exits": {"exit_criterion": "kl_divergence", "exit_threshold": 0.05},
    "warm start": {"state_warm_start": True},
    "noise": {"noise_level": 0.5},
    "guidance": {"guidance_scale": 1.5},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "outputs": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
        "output_attentions": True,
    },
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
def test_no_text_leaves_a_tensor_to_the_collector(options):
    model = tiny_model(scale=2.0)
    assert tensors_in_cycles(lambda: model.generate(tiny_ids(1, 5), max_new_tokens=3, num_steps=3, **options)) == 0


WRITINGS = {
    "image": {"guidance_scale": 2.0, "on_chunk": lambda chunk: None},
    "audio": {"exit_criterion": "cosine", "exit_in_prefill": True},
    "any": {"max_new_tokens": 4, "exit_criterion": "kl_divergence", "return_dict_in_generate": False},
}


@pytest.mark.parametrize(("mode", "options"), WRITINGS.items())
def test_no_written_medium_leaves_a_tensor_to_the_collector(mode, options):
    model, prompts = tiny_writer(scale=1.5), torch.tensor([[BEGIN, USER, 20, ASSISTANT], [BEGIN, USER, 21, ASSISTANT]])
    assert tensors_in_cycles(lambda: model.generate(prompts, generation_mode=mode, num_steps=2, **options)) == 0


def test_no_medium_that_is_read_leaves_a_tensor_to_the_collector():
    model = tiny_writer()
    prompt = torch.tensor([[BEGIN, USER, IMAGE_START, *[IMAGE] * 4, IMAGE_END, ASSISTANT]])
    image = torch.zeros(1, 3, 8, 8)
    assert tensors_in_cycles(lambda: model.generate(prompt, pixel_values=image, max_new_tokens=3)) == 0


def train_a_text_model() -> None:
    model, ids = tiny_model().train(), tiny_ids(2, 5)
    model.activation_checkpointing_enable()
    add_step_lora(model, ["layers.0.attention.qkv_proj"], num_steps=2, rank=2, alpha=4)
    model(ids, labels=ids, num_steps=(1, 2)).loss.backward()


def train_a_writer() -> None:
    tiny_writer().train()(**writing_batch(), num_steps=(1, 2), skip_logits=True).loss.backward()


@pytest.mark.parametrize("train", [train_a_text_model, train_a_writer])
def test_a_model_that_was_trained_goes_with_its_last_name(train):
    assert tensors_in_cycles(train) == 0


def test_a_trainer_goes_with_its_last_name(tmp_path):
    def train() -> None:
        build(tmp_path, max_steps=2, ema_decay=0.9).train()

    assert tensors_in_cycles(train) == 0
