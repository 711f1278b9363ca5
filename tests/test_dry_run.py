"""`pretrain.py --dry-run` and the estimates behind it, against closed forms worked out here, the operations that torch
counts, and the tensors that autograd keeps.
"""

import math
import os
import re
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from callbacks import size_table
from configs import load_config, pretraining
from model import MegaTransformerForCausalLM, RecurrenceConfig
from model.recurrence import INJECTIONS
from tests.hub_encoders import local_encoders
from tests.processes import run_python
from tests.test_pretrain import write_config
from tests.tiny import tiny_config, tiny_ids, tiny_model
from trainers import PlannedTrainingArguments, RecurrentTrainingArguments
from trainers.dry_run import (
    StepCounts,
    activation_bytes,
    expected_steps,
    flops_per_token,
    injection_widths,
    precision_of,
    state_bytes,
)

ROOT = Path(__file__).parent.parent
ROWS, ROW = 2, 16


# ------------------------------------------------------------ depth


def mean_of_smaller(rate: float, most: int) -> float:
    """E[min(most, Poisson(rate) + 1)], as the sum of P(Poisson(rate) + 1 > i) over i < most."""
    terms = [math.exp(-rate + i * math.log(rate) - math.lgamma(i + 1)) for i in range(most)]
    return sum(1 - sum(terms[:i]) for i in range(most))


def test_expected_steps_of_the_lognormal_poisson():
    """Integrated over the normal; the mean of all steps is mean_steps + 1."""
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(80)
    rates = numpy.exp(math.log(8) - 0.5**2 / 2 + 0.5 * nodes)
    with_gradient = sum(w * mean_of_smaller(r, 6) for w, r in zip(weights / weights.sum(), rates, strict=True))
    steps = expected_steps(RecurrenceConfig(mean_steps=8, backprop_steps=6), seed=0)
    assert with_gradient < 5.8  # some draws are shallower than the 6 steps
    assert steps.grad == pytest.approx(with_gradient, rel=0.005)
    assert steps.no_grad + steps.grad == pytest.approx(9, rel=0.01)
    assert steps.most_grad == 6


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [("fixed", (2, 2, 2)), ("uniform", (10 / 7, 18 / 7, 3)), ("poisson", (4 - mean_of_smaller(3, 3), None, 3))],
)
def test_expected_steps_of_the_other_distributions(distribution: str, expected: tuple):
    """Mean 4. Fixed, 2 with gradient: 2 + 2. Uniform on 1 .. 7, 3 with: (0 + 0 + 0 + 1 + 2 + 3 + 4) / 7 and 18 / 7."""
    recurrence = RecurrenceConfig(mean_steps=4, backprop_steps=expected[2], step_distribution=distribution)
    steps = expected_steps(recurrence, seed=0)
    no_grad, grad, most = expected
    assert (steps.no_grad, steps.grad) == pytest.approx((no_grad, 4 - no_grad if grad is None else grad), rel=0.02)
    assert steps.most_grad == most


# ------------------------------------------------------------ operations


def test_operations_by_hand():
    """Width 32, 4 heads of 8, 2 key/value heads, inner width 48, vocabulary 64, layers 1 + 2 + 1, rows of 16."""
    layer = 2 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48) + 4 * 16 * 32
    step, head = 2 * layer + 2 * 64 * 32, 2 * 32 * 64
    flops = flops_per_token(tiny_model(), StepCounts(3.5, 2.5, 4), row=16)
    assert flops.forward == 2 * layer + 6 * step + head
    assert flops.training == 3 * (2 * layer + 2.5 * step + head) + 3.5 * step
    assert flops.recomputed == 2 * layer + 2.5 * step


def counted(model: MegaTransformerForCausalLM, steps: tuple[int, int] | None, backward: bool) -> float:
    """Operations per token of a real pass, by torch: all matrix products, the rest left out on both sides."""
    ids = tiny_ids(ROWS, ROW)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, labels=ids, num_steps=steps).loss
        if backward:
            loss.backward()
    return counter.get_total_flops() / ids.numel()


MODELS = {
    "default": {},
    "grouped heads, wide": {"head_dim": 12, "num_key_value_heads": 1},
    "added injection, plain feed-forward": {"recurrence": {"injection": "add"}, "mlp": "mlp"},
    "gate, untied": {"recurrence": {"injection": "gate"}, "tie_word_embeddings": False},
    "three layers in the core": {"num_core_layers": 3, "num_prelude_layers": 2},
    "neither prelude nor coda": {"num_prelude_layers": 0, "num_coda_layers": 0},
    "plain": {"num_core_layers": 0},
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_operations_are_those_torch_counts(overrides: dict):
    """With eager attention, whose products are all counted as they are."""
    model = tiny_model(**overrides, attn_implementation="eager").train()
    n, k = (3, 2) if model.config.num_core_layers else (0, 0)
    flops = flops_per_token(model, StepCounts(n, k, k), ROW)
    steps = (n, k) if n else None
    assert flops.forward == pytest.approx(counted(model, steps, backward=False), rel=1e-6)
    assert flops.training == pytest.approx(counted(model, steps, backward=True), rel=1e-6)
    model.activation_checkpointing_enable()
    assert flops.training + flops.recomputed == pytest.approx(counted(model, steps, backward=True), rel=1e-6)


# ------------------------------------------------------------ memory


def test_states_of_each_stage():
    """The example of the ZeRO paper's figure 1: 7.5 billion parameters, 64 GPUs, 2 + 2 + 12 bytes."""
    precision = precision_of(is_half=True, by_deepspeed=True)
    count = 7_500_000_000
    whole = [sum(state_bytes(count, count, 8 * count, precision, stage, 64)) / 1e9 for stage in range(4)]
    assert whole == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


@pytest.mark.parametrize(
    ("is_half", "by_deepspeed", "expected"),
    [(True, True, (2, 2, 12)), (True, False, (6, 4, 8)), (False, True, (4, 4, 8)), (False, False, (4, 4, 8))],
)
def test_bytes_of_a_parameter(is_half: bool, by_deepspeed: bool, expected: tuple[int, int, int]):
    assert state_bytes(1, 1, 8, precision_of(is_half, by_deepspeed), stage=0, ranks=8) == expected


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_autocast_states_are_those_that_are_there():
    """The bytes of weights, gradients and moments after a real step under autocast; of the copies none is left."""
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model(tiny_ids(2, 8), labels=tiny_ids(2, 8)).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    there = [sum(tensor.nbytes for tensor in tensors) for tensors in (parameters, gradients, moments)]
    count = sum(parameter.numel() for parameter in parameters)
    weight, gradient, kept = state_bytes(count, count, 8 * count, precision_of(True, False), stage=0, ranks=1)
    assert (weight * 4 / 6, gradient, kept) == pytest.approx(there)


def test_activations_by_hand():
    """Width 32, 4 heads of 8, 2 key/value heads, inner width 48, in bf16 with DeepSpeed, packed rows of 16."""
    block = 2 * (4 * 32) + 2 * (2 * 32 + (32 + 16 + 16) + (32 + 16) + 32 + 4 * 48 + 16)
    step = 2 * block + 2 * (2 * 32)
    norms = 32 * (2 + 2 + 2)
    kept = activation_bytes(tiny_config(), precision_of(True, True), most_grad=3, row=16, packed=True)
    assert (kept.step, kept.checkpointed_step) == (step, 64)
    assert kept.whole == 2 * block + 3 * step + norms
    assert kept.checkpointed == (3 + 3) * 64 + norms + step
    assert kept.logits == 64 * (2 + 2 + 4 + 4)


def kept_bytes(model: MegaTransformerForCausalLM, packed: bool, steps: tuple[int, int]) -> float:
    """Bytes per token that autograd keeps in a real pass, each storage once, weights left out."""
    ids = tiny_ids(ROWS, 64)
    positions = torch.arange(64).remainder(32 if packed else 64).expand(ROWS, -1)
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other one gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.model(ids, position_ids=positions, num_steps=steps).last_hidden_state
    assert hidden.requires_grad
    return (
        sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights) / ids.numel()
    )


KEPT = {
    "default": {},
    "packed": {"packed": True},
    "pre": {"norm_placement": "pre"},
    "post": {"norm_placement": "post"},
    "none": {"norm_placement": "none"},
    "rezero": {"norm_placement": "pre", "residual": "rezero"},
    "admin": {"norm_placement": "post", "residual": "admin"},
    "loop scale": {"recurrence": {"loop_scale_steps": 4}},
    "step embedding": {"recurrence": {"step_embedding": "sinusoidal"}},
    "shared layers": {"num_core_layers": 3, "num_unique_core_layers": 2},
    "experts": {"mlp": "peer", "peer_num_experts": 256},
    "plain feed-forward": {"mlp": "mlp"},
    "grouped heads": {"num_key_value_heads": 2},
    "no positions": {"position_embedding": "none"},
    "add": {"recurrence": {"injection": "add"}},
    "gate": {"recurrence": {"injection": "gate"}},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("overrides", KEPT.values(), ids=KEPT)
def test_activations_are_those_autograd_keeps(overrides: dict):
    """With layer norms, which are fused on CPUs as RMS norms are on GPUs."""
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "norm": "layernorm"}
    settings |= overrides
    packed, dtype = settings.pop("packed", False), settings.pop("dtype", torch.float32)
    model = tiny_model(**settings).to(dtype).train()
    precision = precision_of(dtype == torch.bfloat16, by_deepspeed=True)
    kept = activation_bytes(model.config, precision, most_grad=3, row=64, packed=packed)
    whole = kept_bytes(model, packed, (1, 3))
    assert kept.whole == pytest.approx(whole, rel=0.01)
    assert kept.step == pytest.approx(whole - kept_bytes(model, packed, (1, 2)), rel=0.01)


def test_activations_of_an_injection_that_is_added(monkeypatch: pytest.MonkeyPatch):
    """One that nobody has told the estimate of, s tanh(e) + W s, which keeps s and tanh(e)."""

    class Product(nn.Module):
        def __init__(self, hidden_size: int):
            super().__init__()
            self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

        def forward(self, state: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
            return state * embeds.tanh() + self.proj(state)

    monkeypatch.setitem(INJECTIONS, "product", Product)
    model = tiny_model(hidden_size=128, intermediate_size=256, num_key_value_heads=4, norm="layernorm").train()
    model.model.core.injection = Product(128)
    object.__setattr__(model.config.recurrence, "injection", "product")
    assert injection_widths("product") == 2
    kept = activation_bytes(model.config, precision_of(False, True), most_grad=3, row=64, packed=False)
    assert kept.step == pytest.approx(kept_bytes(model, False, (1, 3)) - kept_bytes(model, False, (1, 2)), rel=0.01)


@pytest.mark.parametrize(("name", "widths"), [("concat", 2), ("add", 0), ("gate", 5)])
def test_what_injections_keep_by_hand(name: str, widths: int):
    """[s; e]; nothing; [s; e], the gate, its complement and s."""
    assert injection_widths(name) == widths


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_activations_under_autocast_are_those_autograd_keeps():
    """RMS norms of bf16 numbers with float32 weights, not fused: the core step, where all of them are such."""
    model = tiny_model(hidden_size=128, intermediate_size=256, num_key_value_heads=4).train()
    kept = activation_bytes(model.config, precision_of(True, False), most_grad=3, row=64, packed=False)
    with torch.autocast("cpu", torch.bfloat16):
        step = kept_bytes(model, False, (1, 3)) - kept_bytes(model, False, (1, 2))
    assert kept.step == pytest.approx(step, rel=0.02)


def test_checkpointing_keeps_a_state_for_each_step():
    model = tiny_model(hidden_size=128).train()
    model.activation_checkpointing_enable()
    kept = activation_bytes(model.config, precision_of(False, False), most_grad=3, row=64, packed=False)
    assert kept_bytes(model, False, (1, 3)) - kept_bytes(model, False, (1, 2)) == kept.checkpointed_step


# ------------------------------------------------------------ the command


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command in an empty folder, where nothing may be read, built or written; returns what it prints."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def fail(*args, **kwargs):
        raise AssertionError("a dry run reads no data, loads no tokenizer and starts no process group")

    for name in (
        "configs.pretraining.build_tokenizer",
        "configs.pretraining.build_datasets",
        "torch.distributed.init_process_group",
    ):
        monkeypatch.setattr(name, fail)

    def start(*argv: str, code: int = 0) -> str:
        if code:
            with pytest.raises(SystemExit) as stopped:
                pretrain.main([*argv, "--dry-run"])
            assert stopped.value.code == code
        else:
            assert pretrain.main([*argv, "--dry-run"]) == 0
        assert list(folder.iterdir()) == []
        out, err = capsys.readouterr()
        return err if code else out

    return start


def cells(text: str, name: str) -> list[str]:
    """The cells of the first row whose name begins like this."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_what_is_frozen_has_no_gradient_and_no_optimizer(dry_run, tmp_path: Path):
    config = ("--config", str(write_config(tmp_path)), "--model.vocab_size", "65536", "--model.hidden_size", "512")
    whole, frozen = dry_run(*config), dry_run(*config, "--training.freeze", "[model.embed_tokens.*]")
    embedding = 65536 * 512
    trained = int(cells(whole, "all |")[0].replace(",", "")) - embedding
    assert cells(frozen, "all |")[1] == f"{trained:,}"
    for text, count in ((whole, trained + embedding), (frozen, trained)):
        sizes = [float(cell) for cell in cells(text, "no DeepSpeed, this run")[:3]]
        assert sizes == pytest.approx([4 * (trained + embedding) / 1e9, 4 * count / 1e9, 8 * count / 1e9], abs=6e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("recurrent_lm", "plain_lm", "recurrent_lm_100m", "recurrent_lm_3b", "tinystories"),
        *("recurrent_vlm", "recurrent_speech", "recurrent_vlm_base", "recurrent_vlm_zero3"),
    ],
)
def test_a_dry_run_prints_and_leaves_nothing(dry_run, tmp_path: Path, name: str):
    config = ROOT / f"configs/{name}.yaml"
    text = dry_run("--config", str(config), *local_encoders(config, tmp_path / "encoders"))
    for expected in ("| embeddings |", "ZeRO 3", "with activation checkpointing", "optimizer step", "B200", "40%"):
        assert expected in text
    assert ("core steps without gradient" in text) == (name != "plain_lm")
    is_large = name in ("recurrent_lm_3b", "recurrent_vlm_base", "recurrent_vlm_zero3")
    assert ("with activation checkpointing, this run" in text) == is_large
    assert ("Encoders of images and sound run once per medium" in text) == ("encoder of" in text)


def test_the_figures_of_recurrent_lm_3b(dry_run, monkeypatch: pytest.MonkeyPatch):
    """On 64 GPUs, from the paper's shape alone: rows of 4096 tokens, 4 of them in a micro-batch, 4 micro-batches."""
    monkeypatch.setenv("WORLD_SIZE", "64")
    text = dry_run("--config", str(ROOT / "configs/recurrent_lm_3b.yaml"))
    layer, adapter, embedding = 4 * 5280**2 + 3 * 5280 * 17920, 2 * 5280**2, 65536 * 5280
    parameters = 8 * (layer + 4 * 5280 + 2 * 5280) + adapter + embedding + 5280
    assert cells(text, "all |")[0] == f"{parameters:,}"
    states = [parameters * size / 64 / 1e9 for size in (2, 2, 12, 16)]
    assert [float(cell) for cell in cells(text, "ZeRO 3, this run")[:4]] == pytest.approx(states, abs=6e-4)
    assert float(cells(text, "ZeRO 2")[0]) == pytest.approx(2 * parameters / 1e9, abs=6e-4)
    block = 2 * (6 * 5280 + 6 * 55 * 96 + 4 * 17920 + 4096) * 4  # bf16: norms, attention, feed-forward, mask; 4 of them
    kept = 4 * 4096 * 2 * (14 * 5280 + block // 2 + 2 * 5280) / 1e9  # the inputs of 8 steps, both ends, e, norms
    assert float(cells(text, "all, at 8 steps")[1]) == pytest.approx(kept, rel=1e-3)
    together = states[-1] + kept
    assert float(re.search(r"Together ([\d.]+) GB", text)[1]) == pytest.approx(together, rel=1e-3)
    flops_layer = 2 * layer + 4 * 4096 * 5280
    once, step = 4 * flops_layer + 2 * embedding, 4 * flops_layer + 2 * adapter
    training = 3 * (once + 7.98 * step) + 25 * step  # means of the paper's distribution; E[min(8, r)] = 7.98
    assert float(cells(text, "token, forward and backward")[0]) == pytest.approx(training, rel=0.01)
    tokens = 4 * 4096 * 4 * 64
    assert f"optimizer step, {tokens:,} tokens" in text
    assert float(cells(text, "optimizer step")[0]) == pytest.approx(tokens * training, rel=0.01)
    assert float(cells(text, "run, 24,000 steps")[0]) == pytest.approx(24000 * tokens * training, rel=0.01)
    again = 4 * flops_layer + 7.98 * step
    speed = 0.4 * 989e12 / (training + again)
    peak, one, all_of_them, hours = (float(cell.replace(",", "")) for cell in cells(text, "H100"))
    assert (peak, one, all_of_them) == pytest.approx((989, speed, 64 * speed), rel=0.01)
    assert hours == pytest.approx(24000 * tokens / (64 * speed) / 3600, rel=0.01)


def test_the_figures_of_recurrent_vlm_base(dry_run, tmp_path: Path):
    """Weights of the encoders are counted, and neither gradients nor optimizer; rows of 2048 tokens, 8 at a time."""
    config = ROOT / "configs/recurrent_vlm_base.yaml"
    text = dry_run("--config", str(config), *local_encoders(config, tmp_path / "encoders"))
    parameters, trained = (int(cell.replace(",", "")) for cell in cells(text, "all |")[:2])
    encoders = [cells(text, f"encoder of {kind}") for kind in ("image", "audio")]
    assert [row[1] for row in encoders] == ["0", "0"]
    assert parameters - trained == sum(int(row[0].replace(",", "")) for row in encoders)
    sizes = [float(cell) for cell in cells(text, "no DeepSpeed, this run")[:3]]
    assert sizes == pytest.approx([6 * parameters / 1e9, 4 * trained / 1e9, 8 * trained / 1e9], abs=6e-4)
    norms, inner = 8 * 4 * 1280, 2 * (2 * 1280 + 6 * 1280 + 4 * 3840 + 2048)  # of a block, under autocast
    stream, step = 8 * 1280, 4 * (norms + inner) + 2 * 2 * 1280
    ends = 1280 * (2 * 8 + 2)
    kept = 8 * 2048 * ((3 + 8) * stream + ends + step) / 1e9
    assert float(cells(text, "all, at 8 steps")[1]) == pytest.approx(kept, rel=1e-3)


def test_the_model_has_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []
    monkeypatch.setattr(pretraining, "describe_needs", lambda model, *rest: seen.append(model) or "")
    run = load_config(["--config", str(write_config(tmp_path)), "--dry-run"])
    text = pretraining.describe_run(run)
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}
    assert text.startswith(size_table(MegaTransformerForCausalLM(run.model)))  # the same table as for real weights


def test_bf16_and_stages(dry_run, tmp_path: Path):
    """Of a run with DeepSpeed its stage is marked; its file decides about bf16 where it does not leave it open."""
    config = str(write_config(tmp_path))
    text = dry_run("--config", config)
    assert "no DeepSpeed, this run" in text and "This run is in float32" in text
    assert [cells(text, name)[-1] for name in ("no DeepSpeed", "ZeRO 1")] == ["4 + 4 + 8", "4 + 4 + 8"]
    text = dry_run("--config", config, "--training.bf16", "true", "--training.deepspeed", "zero1")
    assert "ZeRO 1, this run" in text and "float32, whose" not in text
    assert [cells(text, name)[-1] for name in ("no DeepSpeed", "ZeRO 1")] == ["6 + 4 + 8", "2 + 2 + 12"]
    (tmp_path / "mine.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    text = dry_run("--config", config, "--training.deepspeed", str(tmp_path / "mine.json"))
    assert cells(text, "ZeRO 2, this run")[-1] == "2 + 2 + 12"
    text = dry_run("--config", config, "--training.deepspeed", "zero3_offload")
    assert "less param and optimizer, which DeepSpeed's file moves" in text


def test_an_optimizer_and_an_objective_of_its_own(dry_run, tmp_path: Path):
    """The states are those of the run's optimizer, filter and average; of the objective, the steps with gradient."""
    config = ["--config", str(write_config(tmp_path))]
    text = dry_run(*config, "--training.optim", "sgd", "--training.gradient_filter.name", "ema")
    assert cells(text, "no DeepSpeed, this run")[-1] == "4 + 4 + 4"
    text = dry_run(*config, "--training.optim", "sgd", "--training.ema_decay", "0.9")
    assert cells(text, "no DeepSpeed, this run")[-1] == "4 + 4 + 4"
    flags = ["--model.recurrence.backprop_steps", "1", "--model.recurrence.step_distribution", "fixed"]
    flags += ["--model.recurrence.mean_steps", "6"]
    for name, steps in (("truncated", 1), ("full", 6), ("implicit", 1)):
        text = dry_run(*config, *flags, "--training.objective.name", name)
        assert f"all, at {steps} steps with gradient" in text
        assert ("what the objective implicit computes from the states" in text) is (name == "implicit")


def test_compiled_norms_keep_less_under_autocast(dry_run, tmp_path: Path):
    """Of the core step's 4 norms, the input once in float32 instead of twice."""
    flags = ["--config", str(write_config(tmp_path)), "--training.bf16", "true", "--data.block_size", "4096"]
    texts = [dry_run(*flags, "--training.torch_compile", value) for value in ("false", "true")]
    plain, compiled = (float(cells(text, "a core step")[0]) for text in texts)
    assert plain - compiled == pytest.approx(4 * 4096 * 4 * 32 * 4 / 1e9, abs=1.1e-3)


def test_epochs_have_no_total(dry_run, tmp_path: Path):
    """How long a run in epochs is, only its data know."""
    text = dry_run("--config", str(write_config(tmp_path)), "--training.max_steps", "-1")
    assert "run, " not in text.replace("this run, ", "") and "hours" not in text


def test_only_the_first_rank_prints(dry_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = str(write_config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "tokens/s on 2" in dry_run("--config", config)
    monkeypatch.setenv("RANK", "1")
    assert dry_run("--config", config) == ""


BAD = {
    "key": (("--training.learning_rat", "1"), "training.learning_rat"),
    "range": (("--training.max_steps", "-7"), "max_steps is -7"),
    "range of transformers": (("--training.warmup_steps", "-1"), "warmup_steps"),
    "model": (("--model.num_attention_heads", "5"), "num_attention_heads (5)"),
    "stage": (("--training.deepspeed", "zero9"), "zero9 does not exist"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(dry_run, tmp_path: Path, flags: tuple[str, ...], message: str):
    error = dry_run("--config", str(write_config(tmp_path)), *flags, code=2)
    assert re.fullmatch(r"error: [^\n]+\n", error) and message in error


def test_an_encoder_that_is_not_there_is_one_line(dry_run, tmp_path: Path):
    config, missing = ROOT / "configs/recurrent_vlm_base.yaml", str(tmp_path / "missing")
    error = dry_run("--config", str(config), "--model.vision_config.backbone", missing, code=2)
    assert re.fullmatch(r"error: [^\n]+\n", error) and f"backbone {missing!r} cannot be loaded" in error


def test_what_only_a_dry_run_reads_is_checked_too(dry_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = str(write_config(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    error = dry_run("--config", config, "--training.deepspeed", str(tmp_path / "broken.json"), code=2)
    assert re.fullmatch(r"error: [^\n]+\n", error) and "broken.json is not valid JSON" in error
    for size in ("many", "0"):
        monkeypatch.setenv("WORLD_SIZE", size)
        error = dry_run("--config", config, code=2)
        assert re.fullmatch(r"error: [^\n]+\n", error) and f"WORLD_SIZE is '{size}'" in error


def test_a_real_run_still_asks_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """bf16 on a GPU that does not know it: refused for a run, planned without a question."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    flags = ["--config", str(write_config(tmp_path, training={"use_cpu": False})), "--training.bf16", "true"]
    assert type(load_config([*flags, "--dry-run"]).training) is PlannedTrainingArguments
    with pytest.raises(SystemExit):
        load_config(flags)
    assert "bf16" in capsys.readouterr().err
    run = load_config([*flags, "--training.use_cpu", "true"])
    assert type(run.training) is RecurrentTrainingArguments and run.mode is None
    assert "dry_run" not in run.resolved


@pytest.mark.slow
def test_through_the_command_line(tmp_path: Path):
    """Another process, 64 ranks that do not exist, no network."""
    words = [ROOT / "pretrain.py", "--dry-run", "--config", write_config(tmp_path)]
    environment = {**os.environ, "WORLD_SIZE": "64", "OMP_NUM_THREADS": "1"}
    (tmp_path / "here").mkdir()
    process = run_python(*words, cwd=tmp_path / "here", environment=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("| part |") and "on each of 64 GPU(s)" in process.stdout
    assert list((tmp_path / "here").iterdir()) == []
