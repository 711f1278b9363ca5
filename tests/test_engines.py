"""Engines that keep keys and values in pages: a stand-in for vLLM, and transformers' continuous batching, on folders
of `convert.py serve`.

The stand-in is written from what vLLM gives to a model and wants of it, and shares no code with ours: all texts one
behind the other in one row, positions, and for each of `range(num_hidden_layers)` a store, which the attention function
finds by `module.layer_idx`.
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import convert
from model import MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.paged_attention import check_places
from tests.processes import run_python
from tests.tiny import END, PAD, tiny_config, tiny_ids, tiny_model
from tests.tiny_language_model import save_checkpoint, tiny_tokenizer
from tests.tiny_processor import picture, tiny_processor
from tests.tiny_reader import save_reader
from tests.tiny_seq2seq import tiny_seq2seq

NEW_TOKENS = 5
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=END, pad_token_id=PAD)
# Else transformers takes 60 % of the memory.
SMALL = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=96)
PROMPTS = [tiny_ids(1 + (7 * number) % 23, seed=number).tolist() for number in range(20)]


# --------------------------------------------------------------------------------------------------------- a stand-in


class Pages:
    """Keys and values of one executed layer: pages of 4 tokens, in the order in which texts ask for them."""

    def __init__(self, heads: int, head_dim: int, num_pages: int = 400):
        self.pages = torch.full((num_pages, 2, 4, heads, head_dim), torch.nan)


class StandIn:
    """An engine that runs a base model, for several texts at once.

    Args:
        model: A base model whose attention is "vllm".
        head: Hidden states to logits.
    """

    def __init__(self, model, head):
        self.model, self.head = model, head
        config = model.config.get_text_config()
        self.layers = {i: Pages(config.num_key_value_heads, config.head_dim) for i in range(config.num_hidden_layers)}
        self.tables: list[list[int]] = []  # the pages of each text
        self.batch: list[tuple[int, int, int]] = []  # text, tokens before, new tokens
        self.num_used, self.calls = 0, 0

    def run(self, new: dict[int, list[int]], before: dict[int, int]) -> dict[int, torch.Tensor]:
        """The logits behind the new tokens of some texts, (vocabulary,) each."""
        self.batch = [(text, before[text], len(tokens)) for text, tokens in new.items()]
        for text, past, count in self.batch:
            while 4 * len(self.tables[text]) < past + count:
                self.tables[text].append(self.num_used)
                self.num_used += 1
        ids = torch.tensor([[token for tokens in new.values() for token in tokens]])
        positions = torch.tensor([[past + i for _, past, count in self.batch for i in range(count)]])
        with torch.no_grad():
            outputs = self.model(
                input_ids=ids,
                inputs_embeds=None,
                use_cache=False,
                position_ids=positions,
                attention_instances={place: (self, pages) for place, pages in self.layers.items()},
                return_dict=False,
            )
            hidden = outputs[0][0, ...]
            ends = torch.tensor([count for *_, count in self.batch]).cumsum(0) - 1
            return dict(zip(new, self.head(hidden[ends]), strict=True))

    def attend(self, layer: Pages, query, key, value, scale: float, cap: float | None) -> torch.Tensor:
        """(tokens, heads x head_dim) each, as vLLM has them -> the same."""
        self.calls += 1
        heads, head_dim = layer.pages.shape[3:]
        query = query.view(len(query), -1, head_dim)
        key, value = (part.view(len(part), heads, head_dim) for part in (key, value))
        outputs, start = [], 0
        for text, past, count in self.batch:
            table = torch.tensor(self.tables[text])
            place = torch.arange(past, past + count)
            for half, part in enumerate((key, value)):
                layer.pages[table[place // 4], half, place % 4] = part[start : start + count]
            both = layer.pages[table].transpose(0, 1).flatten(1, 2)[:, : past + count]  # (2, tokens, heads, head_dim)
            keys, values = both.repeat_interleave(query.shape[1] // heads, dim=2)
            logits = torch.einsum("qhd,khd->hqk", query[start : start + count], keys) * scale
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            seen = torch.arange(past + count) <= place[:, None]
            weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
            start += count
        return torch.cat(outputs).flatten(1)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Greedily, all prompts at once, the longer ones read in two parts: new tokens, and all logits in float32."""
        self.tables = [[] for _ in prompts]
        written, found, lengths = [[] for _ in prompts], [[] for _ in prompts], dict.fromkeys(range(len(prompts)), 0)
        new = {text: prompt[: len(prompt) // 2] for text, prompt in enumerate(prompts) if len(prompt) > 8}
        if new:
            self.run(new, lengths)
            lengths |= {text: len(tokens) for text, tokens in new.items()}
        new = {text: prompt[lengths[text] :] for text, prompt in enumerate(prompts)}
        for _ in range(num_tokens):
            for text, logits in self.run(new, lengths).items():
                found[text].append(logits)
                written[text].append(int(logits.argmax()))
                lengths[text] += len(new[text])
            new = {text: [tokens[-1]] for text, tokens in enumerate(written) if tokens[-1] != END}
            if not new:
                break
        return written, [torch.stack(logits) for logits in found]


def stand_in_attention(
    module, query, key, value, attention_mask, scaling=None, attention_instances=None, dropout=0.0, **kwargs
):
    """What vLLM registers takes and gives, by public code of it; what it would leave out must not be there."""
    assert attention_mask is None and not dropout and kwargs.keys() <= {"softcap"}
    engine, layer = attention_instances[module.layer_idx]
    tokens = query.shape[-2]
    query, key, value = (part.transpose(1, 2).reshape(tokens, -1) for part in (query, key, value))
    return engine.attend(layer, query, key, value, scaling, module.config.attn_logit_softcapping), None


@pytest.fixture
def vllm_attention(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", stand_in_attention)


def served_model(num_steps: int, **options) -> MegaTransformerForCausalLM:
    """A model as it is loaded from a folder for engines."""
    layers = {name: options.get(name, usual) for name, usual in LAYERS.items()}
    executed = layers["num_prelude_layers"] + num_steps * layers["num_core_layers"] + layers["num_coda_layers"]
    return tiny_model(scale=2.0, num_steps=num_steps, num_executed_layers=executed, **{**layers, **options})


LAYERS = {"num_prelude_layers": 2, "num_core_layers": 2, "num_coda_layers": 1}


def in_vllm(model: MegaTransformerForCausalLM) -> StandIn:
    model.config._attn_implementation = "vllm"
    return StandIn(model.model, model.compute_logits)


def reference(model: MegaTransformerForCausalLM, prompts: list[list[int]]) -> tuple[list, list]:
    """New tokens of `generate`, up to the end, and their logits; all prompts in a batch, padded on the left."""
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    options = {"output_logits": True, "return_dict_in_generate": True}
    outputs = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    rows = outputs.sequences[:, longest:].tolist()
    tokens = [row[: row.index(END) + 1] if END in row else row for row in rows]
    logits = torch.stack(outputs.logits, dim=1)
    return tokens, [row[: len(written)] for row, written in zip(logits, tokens, strict=True)]


KINDS = {
    "grouped": {},
    "all heads": {"num_key_value_heads": 4, "qk_norm": True, "qk_bias": True},
    "soft caps": {"attn_implementation": "eager", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0},
    "shared layers": {
        "num_core_layers": 3,
        "num_unique_core_layers": 2,
        "recurrence": {"step_embedding": "sinusoidal"},
    },
    "learned positions": {"position_embedding": "learned"},
}


@pytest.mark.parametrize(
    ("num_steps", "kind"),
    [
        *((steps, "grouped") for steps in (1, 4, 8)),
        *(pytest.param(2, kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:]),
    ],
)
def test_a_paged_engine_equals_generate(vllm_attention, num_steps, kind):
    model = served_model(num_steps, **KINDS[kind])
    expected, logits = reference(model, PROMPTS)
    engine = in_vllm(model)
    tokens, found = engine.generate(PROMPTS, NEW_TOKENS)
    assert tokens == expected
    for ours, theirs in zip(logits, found, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    config = model.config
    assert len(engine.layers) == config.num_hidden_layers == config.count_executed_layers(num_steps)
    assert engine.calls % len(engine.layers) == 0
    assert not any(layer.pages[:3].isnan().all() for layer in engine.layers.values())  # each has been written


def test_a_model_without_core_needs_no_folder(vllm_attention):
    model = tiny_model(scale=2.0, num_core_layers=0)
    expected, _ = reference(model, PROMPTS[:5])
    assert in_vllm(model).generate(PROMPTS[:5], NEW_TOKENS)[0] == expected


@pytest.mark.slow
def test_one_graph_without_breaks(monkeypatch):
    """vLLM compiles the base model whole, with an attention that is one operation of its own."""

    @torch.library.custom_op("tests::attend", mutates_args=())
    def attend(query: torch.Tensor, place: int) -> torch.Tensor:
        return query * (1 + place)

    @attend.register_fake
    def _(query, place):
        return torch.empty_like(query)

    def attention(module, query, key, value, mask, attention_instances=None, **kwargs):
        query = query.transpose(1, 2)
        return attend(query.reshape(query.shape[1], -1), module.layer_idx), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", attention)
    torch.compiler.reset()
    model = served_model(3)
    model.config._attn_implementation = "vllm"
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        given = {"input_ids": tiny_ids(1, length), "position_ids": torch.arange(length)[None], "use_cache": False}
        given |= {"attention_instances": {}, "return_dict": False}
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given)[0], model.model(**given)[0], atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------ continuous batching


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [
        (1, {}),
        (4, {}),
        (8, {}),
        pytest.param(4, {"attn_implementation": "eager", "attn_logit_softcapping": 5.0}, marks=pytest.mark.slow),
        pytest.param(2, {"num_core_layers": 3, "num_unique_core_layers": 2}, marks=pytest.mark.slow),
    ],
    ids=["1", "4", "8", "eager", "shared layers"],
)
def test_continuous_batching_equals_generate(num_steps, options):
    model = served_model(num_steps, **options)
    expected, _ = reference(model, PROMPTS)
    before = model.config._attn_implementation
    outputs = model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=SMALL)
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert model.config._attn_implementation == before
    assert reference(model, PROMPTS[:2])[0] == expected[:2]  # no place is left behind in the model


@pytest.mark.parametrize(
    ("options", "asked", "reason"),
    [
        ({}, {}, "place for each of 4 layers .* and 10 are executed at 4 steps: .* convert.py serve"),
        ({"position_embedding": "alibi"}, {}, "engines cannot run position_embedding 'alibi'"),
        ({"recurrence": {"cache_policy": "first"}}, {}, "engines cannot run cache_policy 'first'"),
        ({"recurrence": {"exit_criterion": "cosine"}}, {}, "takes all steps of every token"),
        ({}, {"num_steps": 3}, "num_steps has no effect in generate_batch"),
        ({}, {"generation_config": GenerationConfig(num_steps=3)}, "num_steps is 3 .* the 4 steps"),
        ({}, {"generation_config": GenerationConfig(exit_criterion="cosine")}, "takes all steps of every token"),
    ],
)
def test_continuous_batching_says_what_it_cannot(options, asked, reason):
    with pytest.raises(ValueError, match=reason):
        tiny_model(**options).generate_batch([[3, 4]], **{"max_new_tokens": 2, **asked})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_steps": 3}, "place for each of 11 layers .* and 9 are executed at 3 steps"),
        ({"num_steps": torch.tensor([4])}, "num_steps with a number per row is not possible"),
        ({"output_attentions": True}, "output_attentions is not possible"),
        ({"no_such_name": 1}, "does not know the argument 'no_such_name'"),
    ],
)
def test_an_engine_call_says_what_it_cannot(vllm_attention, given, reason):
    model = served_model(4)
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=reason):
        model.model(tiny_ids(1, 3), attention_instances={}, **given)


def test_an_engine_alibi_is_refused(vllm_attention):
    with pytest.raises(ValueError, match="engines cannot run position_embedding 'alibi'"):
        in_vllm(served_model(2, position_embedding="alibi")).generate([[3, 4]], 1)


def test_names_of_engines_are_refused_where_none_calls():
    with pytest.raises(ValueError, match="does not know the argument 'block_table'"):
        tiny_model()(tiny_ids(1, 3), block_table=torch.zeros(1))


def test_a_processor_counts_placeholders_of_images():
    processor, sizes = tiny_processor(), [(16, 24), (8, 8)]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    texts = [processor(images=picture(*reversed(size)), text="<|image|>", return_tensors="pt") for size in sizes]
    placeholder = processor.image_token_id
    assert counted["num_image_tokens"] == [int((batch["input_ids"] == placeholder).sum()) for batch in texts]
    assert counted["num_image_patches"] == [1, 1] and "num_image_tokens" not in processor._get_num_multimodal_tokens()


# ----------------------------------------------------------------------------------------------------------- the folder


def test_a_config_for_engines():
    """Other numbers than the steps give are refused, and a cache still has one layer for all steps."""
    config = tiny_config(num_steps=3, num_executed_layers=8)
    assert (config.num_hidden_layers, config.num_layers_of_one_step) == (8, 4)
    assert json.loads(config.to_json_string())["num_hidden_layers"] == 8
    assert MegaTransformerTextConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert "num_hidden_layers" not in tiny_config().to_dict() and tiny_config().num_hidden_layers == 4
    for wrong in ({"num_executed_layers": 9}, {"num_executed_layers": 8, "num_hidden_layers": 9}):
        with pytest.raises(ValueError, match=r"num_executed_layers is 9|unknown key 'num_hidden_layers'"):
            tiny_config(num_steps=3, **wrong)
    with pytest.raises(ValueError, match="unknown key 'num_hidden_layers'"):
        tiny_config(num_hidden_layers=4)
    check_places(config, 3)
    config.num_steps = 4  # what is saved then is a checkpoint like any other
    assert not {"num_executed_layers", "num_hidden_layers"} & json.loads(config.to_json_string()).keys()


def serve(*arguments) -> int:
    return convert.main(["serve", *map(str, arguments)])


LOADER = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
places = []
def attention(module, query, key, value, mask, scaling=None, attention_instances=None, **kwargs):
    places.append(module.layer_idx)
    return query.transpose(1, 2).flatten(2)[0], None
ALL_ATTENTION_FUNCTIONS.register("vllm", attention)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
config.get_text_config()._attn_implementation = "vllm"
with torch.device("meta"):  # before anything else has imported the code
    base = AutoModel.from_config(config, trust_remote_code=True)
assert {parameter.device.type for parameter in base.parameters()} == {"meta"} and base.is_backend_compatible()
base = base.to_empty(device="cpu")
hidden = base(input_ids=ids, use_cache=False, position_ids=torch.arange(ids.shape[1])[None], attention_instances={},
              return_dict=False)[0][0, ...]
assert hidden.shape == (ids.shape[1], config.get_text_config().hidden_size)
assert places == list(range(config.get_text_config().num_hidden_layers)), places
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
print(model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist())
if len(sys.argv) > 3:
    from transformers.generation import ContinuousBatchingConfig
    from transformers import GenerationConfig
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)
    (output,) = model.generate_batch(ids.tolist(), generation_config=greedy, continuous_batching_config=small).values()
    print(ids[0].tolist() + output.generated_tokens)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("the cat")
assert not [name for name in sys.modules if name.split(".")[0] in ("model", "tests", "inference")]
"""


@pytest.mark.parametrize("kind", ["text", pytest.param("media", marks=pytest.mark.slow)])
def test_the_folder_loads_elsewhere(tmp_path, capsys, kind):
    source, output = tmp_path / "source", tmp_path / "deep" / "served"
    save_checkpoint(source) if kind == "text" else save_reader(source, scale=1.5)
    (source / "training_args.bin").write_bytes(b"a trainer's")
    (source / "optimizer.pt").write_bytes(b"a trainer's")
    config = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**config, "num_steps": 2, "exit_criterion": "cosine"}))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert serve(source, output, "--num-steps", 5) == 0
    assert f"written to {output}: " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert os.path.samefile(source / "model.safetensors", output / "model.safetensors")
    assert not {"training_args.bin", "optimizer.pt"} & {path.name for path in output.iterdir()}
    assert {path.name for path in output.parent.iterdir()} == {"served"}
    written = json.loads((output / "config.json").read_text())
    written = written.get("text_config", written)
    layers = [written[f"num_{part}_layers"] for part in ("prelude", "core", "coda")]
    assert written["num_hidden_layers"] == written["num_executed_layers"] == layers[0] + 5 * layers[1] + layers[2]
    again = AutoModelForCausalLM.from_pretrained(source)
    ids = (tiny_tokenizer() if kind == "text" else tiny_processor().tokenizer)("the cat", return_tensors="pt").input_ids
    expected = again.generate(ids, max_new_tokens=6, do_sample=False, num_steps=5, exit_criterion="none")[0].tolist()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    extra = ["batch"] * (kind == "text")
    run = run_python("-c", LOADER, output, json.dumps(ids.tolist()), *extra, cwd=elsewhere, environment=environment)
    assert run.returncode == 0, run.stderr
    assert [json.loads(line) for line in run.stdout.splitlines()] == [expected] * (1 + len(extra))


def test_a_served_folder_is_served_again_at_another_depth(tmp_path):
    save_checkpoint(tmp_path / "source")
    assert serve(tmp_path / "source", tmp_path / "once", "--num-steps", 5) == 0
    (tmp_path / "twice").mkdir()  # an empty folder
    assert serve(tmp_path / "once", tmp_path / "twice", "--num-steps", 2) == 0
    config = json.loads((tmp_path / "twice/config.json").read_text())
    assert (config["num_steps"], config["num_hidden_layers"]) == (2, 4)


def test_weights_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    save_checkpoint(tmp_path / "source")
    monkeypatch.setattr(os, "link", refuse)
    assert serve(tmp_path / "source", tmp_path / "served", "--num-steps", 2) == 0
    assert (
        load_file(tmp_path / "served/model.safetensors").keys()
        == load_file(tmp_path / "source/model.safetensors").keys()
    )


def spoiled(folder: Path, change: str) -> Path:
    """A checkpoint with which something is wrong, and its folder."""
    options = {"no core": {"num_core_layers": 0}, "alibi": {"position_embedding": "alibi"}}
    options["first"] = {"recurrence": {"cache_policy": "first"}}
    if change == "missing":
        return folder / "missing"
    if change == "seq2seq":
        tiny_seq2seq().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder
    save_checkpoint(folder, **options.get(change, {}))
    weights = folder / "model.safetensors"
    if change == "not ours":
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    elif change in ("a weight less", "another shape"):
        found = load_file(weights)
        norm = found.pop("model.norm.weight")
        found |= {"model.norm.weight": norm[:3].clone()} if change == "another shape" else {}
        save_file(found, weights, metadata={"format": "pt"})
    elif change == "adapter":
        weights.unlink()
        (folder / "adapter_config.json").write_text("{}")
        save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "steps", "reason"),
    [
        ("missing", 4, "does not exist: give the folder"),
        ("no weights", 4, "has no model.safetensors"),
        ("not ours", 4, "has architectures ['LlamaForCausalLM']"),
        ("cut", 4, "model.safetensors"),
        ("a weight less", 4, "model.norm.weight"),
        ("another shape", 4, "model.norm.weight"),
        ("adapter", 4, "holds an adapter; merge it first"),
        ("seq2seq", 4, "engines"),
        ("no core", 4, "without a core (num_core_layers is 0), which has no --num-steps: engines run the folder as it"),
        ("alibi", 4, "engines cannot run position_embedding 'alibi'"),
        ("first", 4, "engines cannot run cache_policy 'first'"),
        ("", 0, "--num-steps: 0 is less than 1"),
        ("", -3, "--num-steps: -3 is less than 1"),
        ("", "many", "--num-steps: 'many' is not a whole number"),
        ("", 10_001, "--num-steps is 10001, and a token takes at least 1 and at most 10000 steps"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path, capsys, change, steps, reason):
    source, output = spoiled(tmp_path / "source", change), tmp_path / "served"
    with pytest.raises(SystemExit) as error:
        serve(source, output, f"--num-steps={steps}")
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and reason in line, line
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_what_is_there_is_not_written_over(tmp_path, capsys):
    save_checkpoint(tmp_path / "source")
    for output in (tmp_path / "source", tmp_path / "source/config.json"):
        with pytest.raises(SystemExit) as error:
            serve(tmp_path / "source", output, "--num-steps", 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and f"{output} is there and not empty" in line


def test_nothing_is_written_if_something_fails_on_the_way(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    save_checkpoint(tmp_path / "source")
    monkeypatch.setattr(shutil, "copy2", fail)
    with pytest.raises(SystemExit):
        serve(tmp_path / "source", tmp_path / "served", "--num-steps", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
