"""What transformers, accelerate, DeepSpeed, torch.export and ONNX do with saved folders of tiny models."""

import deepspeed
import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, pipeline

from model.chat import encode_conversation, prepare_tokenizer
from tests.tiny import tiny_ids
from tests.tiny import tiny_model as model_of_numbers
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from tests.tiny_processor import picture, tiny_processor
from tests.tiny_reader import save_reader, tiny_reader

pytestmark = pytest.mark.slow

GREEDY = {"max_new_tokens": 5, "do_sample": False}
MESSAGES = [{"role": "user", "content": "the cat"}]


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer, tiny_model().config.vocab_size)
    return tokenizer


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory):
    return str(save_reader(tmp_path_factory.mktemp("media"), scale=1.5))


def written(model, ids: torch.Tensor, num_tokens: int = 5, **depth) -> torch.Tensor:
    """(new tokens,), greedily, all tokens read again for each."""
    length = ids.shape[1]
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False, **depth).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, length:]


# --------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("depth", [{}, {"num_steps": 6}], ids=["mean", "deeper"])
def test_pipeline_of_texts(text_folder, depth):
    """In a batch of different lengths, and a conversation by the template that the folder brings along."""
    pipe, tokenizer, model = pipeline("text-generation", model=text_folder), chat_tokenizer(), tiny_model()
    texts = ["the cat sat", "a"]
    records = pipe(texts, batch_size=2, return_full_text=False, **GREEDY, **depth)
    for text, (record,) in zip(texts, records, strict=True):
        ids = written(model, torch.tensor([tokenizer(text)["input_ids"]]), **depth)
        assert record["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)
    (record,) = pipe(MESSAGES, **GREEDY, **depth)
    ids = torch.tensor([encode_conversation(tokenizer, MESSAGES, add_generation_prompt=True)])
    answer = tokenizer.decode(written(model, ids, **depth), skip_special_tokens=True)
    assert record["generated_text"] == [*MESSAGES, {"role": "assistant", "content": answer}]


def test_pipeline_of_texts_on_a_model_that_reads_images(media_folder):
    (record,) = pipeline("text-generation", model=media_folder)("the cat", return_full_text=False, **GREEDY)
    tokenizer = tiny_processor().tokenizer
    ids = written(tiny_reader(scale=1.5), torch.tensor([tokenizer("the cat")["input_ids"]]))
    assert record["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_pipeline_of_features(text_folder):
    """Of the base model, behind coda and norm."""
    found = pipeline("feature-extraction", model=text_folder)("the cat", return_tensors=True)
    ids = torch.tensor([tiny_tokenizer()("the cat")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_model().model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- accelerate, DeepSpeed, compile

HALF_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.prelude", "model.norm", "lm_head"), "cpu"),
    **dict.fromkeys(("model.core", "model.coda"), "disk"),
}


@pytest.mark.parametrize("device_map", ["auto", HALF_ON_DISK, {"": "disk"}], ids=["auto", "half_on_disk", "disk"])
@pytest.mark.parametrize("kind", ["text", "media"])
def test_weights_on_several_devices(request, tmp_path, kind, device_map):
    folder = request.getfixturevalue(f"{kind}_folder")
    auto_class = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    if kind == "media" and device_map is HALF_ON_DISK:
        device_map = {**HALF_ON_DISK, "model.readers": "disk"}
    spread = auto_class.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    if kind == "text":
        whole, inputs = tiny_model(), {"input_ids": tiny_ids(2, 6)}
    else:
        whole = tiny_reader(scale=1.5)
        inputs = dict(tiny_processor()(images=picture(), text="<|image|>what is it?", return_tensors="pt"))
    with torch.no_grad():
        torch.testing.assert_close(spread(**inputs).logits, whole(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(spread.generate(**inputs, **GREEDY), whole.generate(**inputs, **GREEDY))


def test_deepspeed_inference(text_folder):
    engine = deepspeed.init_inference(AutoModelForCausalLM.from_pretrained(text_folder), dtype=torch.float32)
    ids = tiny_ids(2, 6)
    assert torch.equal(engine.generate(ids, **GREEDY), tiny_model().generate(ids, **GREEDY))


def test_torch_compile_of_the_whole_model():
    """What users do who know no better; `compile_units` is the way that needs no new graph for a new depth."""
    torch.compiler.reset()
    model, ids = model_of_numbers(scale=2.0), tiny_ids(2, 6)
    compiled = torch.compile(model, backend="aot_eager")
    for depth in (2, 5):
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(ids, num_steps=depth, use_cache=False).logits,
                model(ids, num_steps=depth, use_cache=False).logits,
                atol=1e-5,
                rtol=1e-5,
            )
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------------------- export

OPEN = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}


class Logits(nn.Module):
    """The forward pass as a function of token ids alone."""

    def __init__(self, model: nn.Module, num_steps: int):
        super().__init__()
        self.model, self.num_steps = model, num_steps

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, num_steps=self.num_steps, use_cache=False).logits


@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("depth", [1, 4])
def test_torch_export_keeps_batch_and_length_open(position, depth):
    """Of a model that has not run before."""
    model = model_of_numbers(scale=2.0, position_embedding=position)
    program = torch.export.export(Logits(model, depth), (tiny_ids(2, 6),), dynamic_shapes=OPEN, strict=False)
    for shape in ((2, 6), (1, 9), (4, 3), (1, 1)):
        ids = tiny_ids(*shape, seed=1)
        with torch.no_grad():
            expected = model_of_numbers(scale=2.0, position_embedding=position)(ids, num_steps=depth).logits
            torch.testing.assert_close(program.module()(ids), expected, atol=1e-5, rtol=1e-5)


def test_onnx(tmp_path):
    """At one depth, without a cache."""
    import onnxruntime  # here, since the fast tests are collected without it

    model = model_of_numbers(scale=2.0)
    program = torch.onnx.export(Logits(model, 4), (tiny_ids(2, 6),), dynamic_shapes=OPEN, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 6), (1, 9), (4, 3)):
        ids = tiny_ids(*shape, seed=1)
        (ours,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(ours, model(ids, num_steps=4).logits.numpy(), atol=1e-4)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda model: model.generate_batch([[3, 4, 5]], max_new_tokens=2), r"at 3 steps: .* convert.py serve"),
        (
            lambda model: model.generate(tiny_ids(1, 4), assistant_model=model, assistant_early_exit=1),
            "assistant_early_exit",
        ),
    ],
    ids=["continuous_batching", "early_exit_of_an_assistant"],
)
def test_what_cannot_be_says_why(call, reason):
    with pytest.raises(ValueError, match=reason):
        call(tiny_model())
