"""`finetune.py` from YAML to adapters and back, in this process: supervised, continued, resumed, merged, refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import convert
import finetune
from configs import load_config, load_run_config
from configs.finetuning import FinetuningConfig
from evaluation.__main__ import main as evaluate
from inference import generate
from inference.loading import load_model
from model import MegaTransformerForCausalLM
from tests.test_pretrain import losses
from tests.tiny import tiny_ids
from tests.tiny_finetuning import write_tuning_config

SCALE = 6 / 2  # alpha / rank
DELTA = ".lora_{}.weight"


def tune(folder: Path, base: Path, *flags: object, **sections) -> Path:
    """The folder of a run that must succeed."""
    config = write_tuning_config(folder, base, **sections)
    argv = ["--config", config, "--training.output_dir", folder / "out", *flags]
    assert finetune.main([str(item) for item in argv]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def tuned(tiny_run, tmp_path_factory) -> Path:
    """A finished run of supervised fine-tuning with LoRA. Read only."""
    return tune(tmp_path_factory.mktemp("tuned"), tiny_run)


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def added_by_hand(base: Path, adapter: Path) -> MegaTransformerForCausalLM:
    """The base with W + alpha / rank B A in place of W."""
    model, weights = load_model(base)[0], adapter_weights(adapter)
    state = model.state_dict()
    for name in [name for name in weights if "lora_A" in name]:
        layer = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        down, up = weights[name], weights[name.replace("lora_A", "lora_B")]
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + SCALE * up @ down
    model.load_state_dict(state)
    return model


def logits_of(model: torch.nn.Module, steps: int = 5) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids(2, 9, high=250), num_steps=steps).logits


# ------------------------------------------------------------ what is learned


def test_only_adapters_are_saved_and_all_of_them_have_learned(tuned, tiny_run):
    """Those of the layers that are named, and nothing else: the base is not in the folder and has not changed."""
    for place in (tuned, tuned / "checkpoint-2", tuned / "checkpoint-4"):
        assert not list(place.glob("model*")) and (place / "tokenizer.json").is_file()
    weights = adapter_weights(tuned)
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in weights}
    linear = [f"{part}.layers.0" for part in ("model.prelude", "model.coda")]
    count = load_model(tiny_run)[0].config.num_prelude_layers
    expected = {f"model.prelude.layers.{number}.attention.qkv_proj" for number in range(count)}
    expected |= {f"model.coda.layers.{number}.mlp.down_proj" for number in range(count)}
    expected |= {"model.core.injection.proj"} | {
        f"model.core.layers.0.{name}"
        for name in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert linear and layers == expected
    assert all(weight.abs().max() > 0 for weight in weights.values())  # B begins at 0


def test_the_loss_of_trl_is_that_of_the_model(tuned, tiny_run, tmp_path):
    """The same depths, states, rows and labels: `continued`, with the model's own loss, goes the same way."""
    continued = tune(tmp_path, tiny_run, trainer="continued")
    assert len(losses(tuned)) == 4
    assert losses(continued) == pytest.approx(losses(tuned), abs=2e-4)  # logged with 4 digits
    ours, theirs = adapter_weights(continued), adapter_weights(tuned)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-3)


def test_depths_are_those_of_the_keys(tuned, tiny_run):
    """The mean over the two micro-batches of each step of what (seed, step, micro-batch) gives."""
    from model.depth import sample_depth

    config = load_model(tiny_run)[0].config.recurrence
    history = json.loads((tuned / "trainer_state.json").read_text())["log_history"]
    logged = [entry["steps_without_gradient"] for entry in history if "loss" in entry]
    drawn = [[sample_depth(config, 42, step, batch)[0] for batch in range(2)] for step in range(4)]
    assert logged == [sum(pair) / 2 for pair in drawn]


def test_all_weights_learn_without_adapters(tiny_run, tmp_path):
    folder = tune(tmp_path, tiny_run, "--training.max_steps", 1, "--training.save_strategy", "no", peft=None)
    ours, before = load_file(folder / "model.safetensors"), load_file(tiny_run / "model.safetensors")
    assert ours.keys() == before.keys()
    assert all(not torch.equal(ours[name], before[name]) for name in before)


def test_the_depth_of_a_run_is_that_of_its_evaluation(tiny_run, tmp_path):
    """Whatever config.json names where nothing else does."""
    base = shutil.copytree(tiny_run, tmp_path / "base", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_steps": 1}))
    flags = ("--model.num_steps", 3, "--training.max_steps", 1, "--training.save_strategy", "no")
    folder = tune(tmp_path, base, *flags, peft=None)
    model, ids = load_model(folder)[0], tiny_ids(2, 9, high=250)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits_of(model, 3))
        assert not torch.equal(model(input_ids=ids).logits, logits_of(model, 1))


# ------------------------------------------------------------ from the folder back to a model


def test_the_ways_to_load_an_adapter_agree(tuned, tiny_run, tmp_path):
    """Ours, PEFT's own beside an Auto class, and what is merged: W + alpha / rank B A each."""
    expected = logits_of(added_by_hand(tiny_run, tuned))
    assert (expected - logits_of(load_model(tiny_run)[0])).abs().max() > 1e-2
    base = AutoModelForCausalLM.from_pretrained(tiny_run, trust_remote_code=True)
    by_peft = PeftModel.from_pretrained(base, tuned).eval()
    assert convert.main(["merge", str(tuned), "--output", str(tmp_path / "merged")]) == 0
    merged, tokenizer = load_model(tmp_path / "merged")
    for model in (load_model(tuned)[0], by_peft, merged):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
    assert tokenizer.chat_template == load_model(tuned)[1].chat_template
    assert (tmp_path / "merged/modeling_megatransformer_text.py").is_file()


def test_an_adapter_is_used_where_a_model_is(tuned, tmp_path, capsys):
    """By `inference.generate` and `python -m evaluation`, on the data of its run."""
    assert generate.main([str(tuned), "--prompt", "12+34=", "--greedy", "--max-new-tokens", "3"]) == 0
    assert evaluate([str(tuned), "--num-steps", "2", "--limit", "2", "--output", str(tmp_path), "--no-texts"]) == 0
    assert "addition" in capsys.readouterr().out
    assert isinstance(load_run_config(tuned / "config.yaml"), FinetuningConfig)


def test_the_base_may_have_moved(tuned, tiny_run, tmp_path, capsys):
    adapter, moved = shutil.copytree(tuned, tmp_path / "adapter"), shutil.copytree(tiny_run, tmp_path / "moved")
    record = json.loads((adapter / "base_model.json").read_text())
    (adapter / "base_model.json").write_text(json.dumps(record | {"path": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match=r"its base cannot be loaded: .*gone does not exist.* --base"):
        load_model(adapter)
    assert convert.main(["merge", str(adapter), "--base", str(moved), "--output", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged")[0]), logits_of(load_model(tuned)[0]))


def test_resuming_continues_exactly(tuned, tiny_run, tmp_path):
    """Invariant 6, with dropout in the adapters: half a run and the rest equal the whole, bitwise."""
    out = shutil.copytree(tuned, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-4")
    (out / "trainer_state.json").unlink()  # by which the run is finished
    tune(tmp_path, tiny_run, "--training.resume_from_checkpoint", "true")
    assert losses(out) == losses(tuned)
    ours, whole = adapter_weights(out), adapter_weights(tuned)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_the_resolved_yaml_alone_repeats_the_run(tuned, tmp_path):
    flags = ["--config", str(tuned / "config.yaml"), "--training.output_dir", str(tmp_path / "again")]
    assert finetune.main(flags) == 0
    assert losses(tmp_path / "again") == losses(tuned)


# ------------------------------------------------------------ bad input


def refusal(capsys, main, *argv: object) -> str:
    """The one line of an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(item) for item in argv])
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trainer", "sftt"], "trainer: 'sftt' is unknown; did you mean sft?"),
        (["--model.path", "/nowhere"], "/nowhere does not exist"),
        (["--peft.rank", "0"], "peft.rank: 0 is too small; give at least 1"),
        (["--peft.rnk", "1"], "did you mean rank?"),
        (["--peft.dropout", "1"], "peft.dropout: 1"),
        (["--step_lora.num_steps", "0"], "step_lora.num_steps: 0 steps have no delta"),
        (["--peft.target_modules.core", "q_proj"], "'q_proj' matches nothing; the linear layers of core are proj, qkv"),
        (["--peft.target_modules.vision", "all-linear"], "vision has no linear layers; this model has prelude (qkv"),
        (["--step_lora.target_modules", "head"], "step_lora.target_modules: 'head' matches nothing"),
        (["--training.packing", "true"], "unknown key training.packing"),
        (["--training.loss_type", "dtf"], "loss_type is 'dtf'; give one of nll, dft"),
    ],
)
def test_bad_options_are_one_line(flags, words, tiny_run, tmp_path, capsys):
    config = write_tuning_config(tmp_path, tiny_run)
    line = refusal(capsys, finetune.main, "--config", config, "--training.output_dir", tmp_path / "out", *flags)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_other_adapters_is_not_gone_on_with(tuned, tiny_run, tmp_path, capsys):
    flags = ["--training.output_dir", tmp_path / "out", "--training.resume_from_checkpoint", tuned / "checkpoint-2"]
    config = write_tuning_config(tmp_path, tiny_run, peft=None)
    words = "checkpoint-2 has other options: peft is {'rank': 2, 'alpha': 6,"
    assert words in refusal(capsys, finetune.main, "--config", config, *flags)
    flags[-1] = shutil.copytree(tuned / "checkpoint-2", tmp_path / "old")  # of code that kept no options there
    for name in ("config.yaml", "manifest.json"):
        (flags[-1] / name).unlink()
    words = "old has peft, but this run has no adapters; give the same sections"
    assert words in refusal(capsys, finetune.main, "--config", config, *flags)
    line = refusal(capsys, finetune.main, "--config", config, "--step_lora.rank", 2, *flags)
    assert "old has peft, but this run has step_lora" in line
    assert not (tmp_path / "out").exists()


def test_adapters_need_a_part(tiny_run, tmp_path, capsys):
    config = write_tuning_config(tmp_path, tiny_run, peft={"target_modules": {}})
    line = refusal(capsys, finetune.main, "--config", config, "--training.output_dir", tmp_path / "out")
    assert "peft.target_modules: no part is named; this model has prelude (qkv_proj, o_proj" in line


def test_a_checkpoint_has_to_be_named(tmp_path, capsys):
    config, load = write_tuning_config(tmp_path, ""), partial(load_config, kind=FinetuningConfig)
    assert "model.path: it is missing" in refusal(capsys, load, "--config", config)


def other_base(tiny_run: Path, folder: Path) -> Path:
    """A copy of the base whose weights differ."""
    other = shutil.copytree(tiny_run, folder)
    weights = {name: weight + 1e-3 for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_an_adapter_of_another_base_is_refused(tuned, tiny_run, tmp_path, capsys):
    """Where it is merged, loaded, and gone on with."""
    other, adapter = other_base(tiny_run, tmp_path / "other"), shutil.copytree(tuned, tmp_path / "adapter")
    words = "is an adapter of another base: of the weights that were in"
    assert words in refusal(capsys, convert.main, "merge", tuned, "--base", other, "--output", tmp_path / "merged")
    record = json.loads((adapter / "base_model.json").read_text())
    (adapter / "base_model.json").write_text(json.dumps(record | {"path": str(other)}))
    assert words in refusal(capsys, generate.main, adapter, "--prompt", "1")
    config = write_tuning_config(tmp_path, other)
    flags = ["--config", config, "--training.output_dir", tmp_path / "out", "--training.max_steps", 5]
    flags += ["--training.resume_from_checkpoint", tuned / "checkpoint-4"]
    assert words in refusal(capsys, finetune.main, *flags)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_fit_is_refused(tuned, tmp_path):
    """One of PEFT, without our record: by its layers and shapes."""
    adapter = shutil.copytree(tuned, tmp_path / "adapter")
    (adapter / "base_model.json").unlink()
    weights = adapter_weights(adapter)
    name = next(name for name in weights if "lora_B" in name)
    for changed in ({**weights, name: weights[name][1:].contiguous()}, {**weights, "more": weights[name].clone()}):
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="is an adapter of another base, or damaged; it does not fit"):
            load_model(adapter)


def test_merging_what_cannot_be_merged(tuned, tiny_run, tmp_path, capsys):
    into = ("--output", tmp_path / "merged")
    assert "holds a whole model, and no adapter" in refusal(capsys, convert.main, "merge", tiny_run, *into)
    assert "is not empty" in refusal(capsys, convert.main, "merge", tuned, "--output", tuned)
    line = refusal(capsys, finetune.main, "--config", write_tuning_config(tmp_path, tuned))
    assert "holds an adapter, and not the model below it: merge them first with `python convert.py merge" in line


def test_another_run_in_the_same_folder_is_refused(tuned, tiny_run, tmp_path, capsys):
    config = write_tuning_config(tmp_path, tiny_run, peft={"rank": 3})
    line = refusal(capsys, finetune.main, "--config", config, "--training.output_dir", tuned)
    assert "holds another model: peft.rank is 2 there and 3 here" in line
