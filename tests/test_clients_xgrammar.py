"""xgrammar's processor of logits for transformers, within `generate`."""

import json

import pytest
import torch
from transformers import LogitsProcessor

from tests.tiny_language_model import tiny_model, tiny_tokenizer
from tests.tiny_processor import picture, tiny_processor
from tests.tiny_reader import tiny_reader

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["cat", "mat"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def processor_of_schema(tokenizer, vocab_size: int) -> LogitsProcessor:
    """Of one call of `generate`."""
    import xgrammar  # here, since the fast tests are collected without it
    from xgrammar.contrib.hf import LogitsProcessor

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info)
    return LogitsProcessor(compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False))


def check_obeys(texts: list[str]) -> None:
    for text in texts:
        found = json.loads(text)
        assert found.keys() == {"name", "count"} and found["name"] in ("cat", "mat") and 0 <= found["count"] <= 99


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "num_steps": 6, "exit_criterion": "kl_divergence", "exit_threshold": 0.5},
    ],
    ids=["greedy", "sampled", "with_exits"],
)
def test_what_is_written_obeys_the_grammar(how):
    """A model that was never trained writes JSON of the schema, in every row."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    batch = tokenizer(["the cat", "sat on the mat"], padding=True, padding_side="left", return_tensors="pt")
    length = batch["input_ids"].shape[1]
    free = model.generate(**batch, max_new_tokens=60, **how)
    with pytest.raises(json.JSONDecodeError):
        check_obeys(tokenizer.batch_decode(free[:, length:], skip_special_tokens=True))
    grammar = processor_of_schema(tokenizer, model.config.vocab_size)
    ids = model.generate(**batch, max_new_tokens=60, logits_processor=[grammar], **how)
    assert (ids[:, length:] == tokenizer.eos_token_id).any(-1).all()
    check_obeys(tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True))


def test_what_is_written_about_an_image_obeys_the_grammar():
    """Where placeholders are forbidden besides."""
    model, processor = tiny_reader(scale=1.0), tiny_processor()
    inputs = processor(images=picture(), text="<|image|>what is it?", return_tensors="pt")
    grammar = processor_of_schema(processor.tokenizer, model.config.get_text_config().vocab_size)
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, logits_processor=[grammar])
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    check_obeys([processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)])
