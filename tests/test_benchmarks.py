"""The speed benchmarks: that both sides do the same work, and that what they report is what was measured."""

import json
from collections.abc import Iterator

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks import decode, pictures, timing, train_step
from model import RecurrentCache
from model.blocks import TransformerBlock
from model.cache import BLOCK
from tests.tiny import tiny_ids

CPU = torch.device("cpu")
SIZES = {
    "hidden-size": 32,
    "intermediate-size": 48,
    "heads": 4,
    "key-value-heads": 2,
    "vocab-size": 64,
    "prelude-layers": 1,
    "core-layers": 2,
    "coda-layers": 1,
    "core-steps": 3,
}
TINY = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
ONE_ROUND = ["--rounds", "1", "--warmup", "1", "--device", "cpu"]


def pair(**changes: int):
    """Our pre-norm model and the Llama made of it, tiny, in evaluation mode."""
    sizes = {name.replace("-", "_"): value for name, value in SIZES.items()} | changes
    args = timing.build_parser("test", "").parse_args([])
    vars(args).update(sizes)
    ours = timing.build_ours(args, "pre").eval()
    return ours, timing.shared_llama(ours, sizes["core_steps"]).eval()


# -------------------------------------------------------------------------------------------------------- same work


def test_llama_has_the_parameters_of_six_layers_and_executes_eighteen():
    """The default layers: 1 + 4 + 1 unique, 1 + 4 x 4 + 1 executed; by the closed form of a Llama layer."""
    ours, llama = pair(core_layers=4, core_steps=4)
    hidden, inner, keys, vocab = 32, 48, 16, 64
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    expected = 6 * layer + 2 * vocab * hidden + hidden
    assert len(llama.model.layers) == 18
    assert sum(parameter.numel() for parameter in llama.parameters()) == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == expected + 2 * hidden * hidden
    timing.check_parameters(llama, ours)


def test_layers_of_a_repetition_share_storage_and_each_has_its_place_in_the_cache():
    _, llama = pair()
    layers = llama.to(torch.bfloat16).model.layers  # as the benchmarks move models; the layers stay shared
    storages = [[parameter.data_ptr() for parameter in layer.parameters()] for layer in layers]
    of_block = [0, 1, 2, 1, 2, 1, 2, 3]  # 1 + 3 x 2 + 1
    for i, first in enumerate(of_block):
        for j, second in enumerate(of_block):
            assert (storages[i] == storages[j]) == (first == second), (i, j)
            assert first == second or not set(storages[i]) & set(storages[j])
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(8))


def test_a_difference_in_parameters_is_noticed():
    ours, llama = pair()
    llama.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(llama.model.layers[3].mlp.up_proj.weight.clone())
    with pytest.raises(AssertionError, match="parameters against"):
        timing.check_parameters(llama, ours)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_both_execute_the_same_number_of_layers(num_steps: int):
    ours, llama = pair(core_steps=num_steps)
    passes = []
    for module in [*ours.modules(), *llama.modules()]:
        if isinstance(module, (TransformerBlock, LlamaDecoderLayer)):
            module.register_forward_hook(lambda module, *_: passes.append(type(module)))
    with torch.no_grad():
        ours(tiny_ids(1, 5), num_steps=num_steps)
        llama(tiny_ids(1, 5))
    assert passes == [TransformerBlock] * (2 + 2 * num_steps) + [LlamaDecoderLayer] * (2 + 2 * num_steps)


def test_llama_computes_what_ours_does_when_the_injection_passes_the_state_through():
    """[1 0] as injection, the prelude's output as initial state; Llama gets the norm before the coda as a hook."""
    ours, llama = pair()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.3)  # off the gentle start; no norm is the identity
        ours.model.core.injection.proj.weight.copy_(torch.eye(32, 64))
    llama = timing.shared_llama(ours, 3).eval()
    llama.model.layers[-1].register_forward_pre_hook(lambda _, args: (llama.model.norm(args[0]), *args[1:]))
    ids, prelude = tiny_ids(2, 9), []
    ours.model.prelude.register_forward_hook(lambda *args: prelude.append(args[-1]))
    with torch.no_grad():
        ours(ids, num_steps=1)
        logits = ours(ids, num_steps=3, initial_state=prelude[0]).logits
        torch.testing.assert_close(logits, llama(ids).logits, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ clock, memory, table


def test_candidates_take_turns_and_the_warm_up_does_not_count():
    turns = []
    seconds = timing.interleave({name: lambda name=name: turns.append(name) for name in "ABC"}, 3, 2, CPU)
    assert "".join(turns) == "ABC" * 5
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_candidates_are_timed_by_the_clock_that_is_given():
    ticks = iter(range(100))
    seconds = timing.interleave({"A": lambda: next(ticks)}, 2, 1, CPU, clock=lambda: float(next(ticks)))
    assert seconds == {"A": [2.0, 2.0]}


def test_ratios_are_taken_within_a_round():
    """The machine is half as fast in the second round: the ratio is the same in both, that of the medians is not."""
    seconds = {"base": [1.0, 2.0, 1.0], "other": [2.0, 4.0, 4.0]}
    assert timing.speed_ratios(seconds, "base") == {"base": [1.0, 1.0, 1.0], "other": [0.5, 0.5, 0.25]}
    assert timing.describe_ratio([0.5, 0.5, 0.25]) == "0.500 (0.375 to 0.500)"


def test_quartiles():
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([2.0, 1.0]) == (1.25, 1.5, 1.75)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_memory_meter_measures_a_known_allocation():
    """1 MiB is freed before 4 MiB come: with the 2 MiB that stay, 6 MiB at most; what was there before is not in it."""

    def mebibytes(number: int) -> torch.Tensor:
        return torch.zeros(number * 2**18)

    def run() -> None:
        stays, goes = mebibytes(2), mebibytes(1)
        del goes
        before[0] = None
        last = mebibytes(4)
        del stays, last

    before = [mebibytes(16)]
    assert timing.peak_bytes(run, CPU) == 6 * timing.MIB


def test_memory_meter_sees_the_backward_pass():
    """x @ w squared and summed: at its peak the backward pass holds the gradients of the product and of w."""
    x, w = torch.ones(256, 1024), torch.ones(1024, 512, requires_grad=True)

    def run() -> None:
        (x @ w).square().sum().backward()
        w.grad = None

    scalars = 8  # the loss and the gradient that it starts with
    assert timing.peak_bytes(run, CPU) == 4 * 256 * 512 + 4 * 1024 * 512 + scalars


def test_bytes_held_count_each_tensor_once():
    one, other = torch.zeros(10), torch.zeros(3, dtype=torch.bfloat16)
    assert timing.held_bytes(one, other, one) == 46


def test_weights_and_moments_are_three_numbers_for_each_parameter():
    args = train_step.build_parser().parse_args([*TINY, "--batch-size", "1", "--sequence-length", "4"])
    trainees = train_step.build_trainees(args, CPU)
    for trainee in trainees.values():
        trainee()
        parameters = list(trainee.model.parameters())
        steps = 4 * len(parameters)  # AdamW counts its steps in a float32 per parameter
        assert trainee.held_bytes() == 12 * sum(parameter.numel() for parameter in parameters) + steps
        assert all(parameter.grad is None for parameter in parameters)


def test_no_side_fills_a_cache_in_training():
    args = train_step.build_parser().parse_args([*TINY, "--batch-size", "1", "--sequence-length", "4"])
    for trainee in train_step.build_trainees(args, CPU).values():
        assert trainee.model(**trainee.draw_inputs()).cache is None


def test_ours_starts_each_step_from_a_new_state_as_in_training():
    args = train_step.build_parser().parse_args([*TINY, "--batch-size", "2", "--sequence-length", "4"])
    trainee = train_step.build_trainees(args, CPU)["pre norm"]
    first, second = (trainee.draw_inputs()["initial_state"] for _ in range(2))
    rows = [*first, *second]
    assert first.shape == (2, 4, 32)
    assert not any(torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))


def test_cache_bytes_of_both_are_those_of_the_closed_form():
    ours, llama = pair()
    ids = tiny_ids(2, 5)
    cache = RecurrentCache(ours.config)
    with torch.no_grad():
        ours(ids, num_steps=3, cache=cache)
        theirs = llama(ids, use_cache=True).cache
    token = 8 * 2 * 2 * 2 * 8 * 4  # passes, keys and values, rows, heads, width of a head, bytes
    assert decode.cache_bytes(theirs) == 5 * token
    assert decode.cache_bytes(cache) == BLOCK * token  # whole blocks


# ------------------------------------------------------------------------------------------------------------- scripts


def table_of(text: str) -> list[list[str]]:
    """Cells of the lines of the only table in the text, its header first and without the line below it."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert set(lines.pop(1)) == {"---", "---:"}
    assert len({len(line) for line in lines}) == 1
    return lines


@pytest.mark.parametrize(
    "extra", [[], ["--dtype", "bf16", "--gradient-checkpointing", "--processor-time"]], ids=["plain", "options"]
)
def test_train_step_prints_a_table(extra, capsys, tmp_path):
    output = tmp_path / "out.json"
    sizes = ["--batch-size", "2", "--sequence-length", "8"]
    assert train_step.main([*TINY, *ONE_ROUND, *sizes, *extra, "--output", str(output)]) == 0
    header, *rows = table_of(capsys.readouterr().out)
    names = [timing.REFERENCE, "pre norm", "pre norm, 1 of 3 steps without gradient", "sandwich norm"]
    assert header[0] == "training step"
    assert [row[0] for row in rows] == names
    assert rows[0][2] == "1.000 (1.000 to 1.000)"
    record = json.loads(output.read_text())
    assert {name: len(values) for name, values in record["seconds"].items()} == dict.fromkeys(names, 1)
    assert all(record["peak_bytes"][name] > 0 for name in names)
    assert record["peak_bytes"][names[2]] < record["peak_bytes"][names[1]]  # truncation keeps fewer activations
    assert record["options"]["core_steps"] == 3


@pytest.fixture
def limit_put_back() -> Iterator[None]:
    """What compiling sets for the whole process is as before afterwards."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def test_llama_is_compiled_as_a_whole_and_ours_by_units(monkeypatch, limit_put_back):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    ours, llama = pair()
    train_step.compile_model(llama)
    train_step.compile_model(ours)
    units = [llama, ours.model.prelude, ours.model.core, ours.model.coda]
    assert [module for module, _ in compiled] == units
    assert all(options == {"fullgraph": True} for _, options in compiled)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_step_compiled(capsys, limit_put_back):
    """With activation checkpointing, since that compiles what a step without it does too."""
    sizes = ["--core-layers", "1", "--batch-size", "2", "--sequence-length", "8"]
    assert train_step.main([*TINY, *ONE_ROUND, *sizes, "--compile", "--gradient-checkpointing"]) == 0
    out = capsys.readouterr().out
    assert "compiled" in out
    assert len(table_of(out)) == 5


def test_decode_prints_a_table(capsys, tmp_path):
    output = tmp_path / "out.json"
    sizes = ["--batch-sizes", "1", "2", "--contexts", "4", "6", "--new-tokens", "3"]
    assert decode.main([*TINY, *ONE_ROUND, *sizes, "--output", str(output)]) == 0
    header, *rows = table_of(capsys.readouterr().out)
    assert header[0] == "decoding"
    names = [timing.REFERENCE, "pre norm", "pre norm, ring", "pre norm, last", "sandwich norm"]
    cells = ["1 x 4", "2 x 4", "1 x 6", "2 x 6"]
    assert [row[:2] for row in rows] == [[name, cell] for cell in cells for name in names]
    found = json.loads(output.read_text())["cells"]["2 x 6"]
    slot = 2 * 2 * 2 * 8 * 4  # keys and values, rows, heads, width of a head, bytes; of one token in one layer
    slots = [8, 8, 2 + 2 * 2, 2 + 2, 8]  # full: 1 + 3 x 2 + 1
    tokens = [7, *[BLOCK] * 4]  # ours: whole blocks
    expected = [slot * layers * length for layers, length in zip(slots, tokens, strict=True)]
    assert found["cache_bytes"] == dict(zip(names, expected, strict=True))
    assert all(value > 0 for value in found["peak_bytes"].values())


def test_decoding_behind_a_cache_gives_the_tokens_of_the_whole_prompt():
    """What is timed is the continuation that `generate` gives without any of it."""
    ours, llama = pair()
    prompt = tiny_ids(2, 7)
    for model, options in ((ours, {"num_steps": 3}), (llama, {})):
        cache = decode.fill_cache(model, prompt[:, :-1], options, None)
        behind = decode.continue_prompt(model, prompt, 4, cache=cache, **options)
        assert torch.equal(behind, decode.continue_prompt(model, prompt, 4, use_cache=False, **options))


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (train_step.main, ["--rounds", "0"], "argument --rounds: 0 is less than 1: give 1 or more."),
        (train_step.main, ["--sequence-length", "1"], "a row needs a token and the one after it."),
        (train_step.main, ["--hidden-size", "30"], "hidden_size (30) is not a multiple of num_attention_heads (8)"),
        (train_step.main, ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (decode.main, ["--key-value-heads", "3"], "must be a multiple of num_key_value_heads (3)"),
        (decode.main, ["--output", "/nowhere/out.json"], "make /nowhere first."),
        (decode.main, ["--device", "cuda:99"], "Device 'cuda:99' does not work here"),
        (decode.main, ["--new-token", "3"], "unknown argument '--new-token': did you mean --new-tokens?"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_too_few_tokens_are_noticed():
    """An end-of-text token would make one side faster than the other."""
    ours, llama = pair()
    assert ours.generation_config.eos_token_id is None
    assert llama.generation_config.eos_token_id is None
    prompt = tiny_ids(1, 4)
    token = decode.continue_prompt(ours, prompt, 1, num_steps=3)[0, -1].item()
    with pytest.raises(AssertionError, match=r"returned \(1, 5\), expected \(1, 7\)"):
        decode.continue_prompt(ours, prompt, 3, num_steps=3, eos_token_id=token)


class FakeTrainer:
    """Makes four steps, or fails in the third."""

    def __init__(self, order: list[str], name: str, fails: bool = False):
        self.order, self.name, self.fails = order, name, fails

    def add_callback(self, callback: pictures.TurnCallback) -> None:
        self.callback = callback

    def train(self) -> None:
        for step in range(4):
            self.callback.on_step_begin()
            if self.fails and step == 2:
                raise ValueError("it fails")
            self.order.append(self.name)


def test_trainers_take_turns_step_by_step():
    order = []
    seconds = pictures.take_turns({name: FakeTrainer(order, name) for name in pictures.NAMES})
    assert order == ["without", "with"] * 4
    assert list(seconds) == ["without", "with"] and [len(each) for each in seconds.values()] == [3, 3]


def test_a_trainer_that_fails_does_not_let_the_other_wait():
    order = []
    trainers = {"without": FakeTrainer(order, "without"), "with": FakeTrainer(order, "with", fails=True)}
    with pytest.raises(ValueError, match="it fails"):
        pictures.take_turns(trainers)
    assert order.count("without") == 4


def test_the_share_is_of_all_steps_together():
    report = pictures.report({"without": [0.1, 0.1, 0.2], "with": [0.1, 0.1, 0.21]})
    assert "| without | 133.3 | 100.0 | 200.0 |" in report and "+2.50% over 3 steps" in report
