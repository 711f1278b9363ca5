"""The learned probe: what it learns from, that it learns it, that it is saved, exits by it, and costs little."""

import json

import pytest
import torch
import yaml

import finetune
import pretrain
from configs import load_run_config
from configs.finetuning import add_exit_probe
from dataset_loading import Collator, build_validation
from inference.loading import load_model
from model import ExitOptions, MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.exit_criteria import ExitProbe
from model.step_lora import add_step_lora
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_media_run import TINY_MEDIA_RUN, write_media_config
from trainers import exit_probe
from trainers.exit_probe import observe


@pytest.mark.parametrize(
    ("distance", "steps"), [(10.0, "alike"), (0.3, "alike"), (0.3, "adapters"), (0.3, "embeddings")]
)
def test_labels_say_from_where_on_distribution_and_state_are_those_of_full_depth(distance, steps, monkeypatch):
    """Against passes of each depth by themselves."""
    monkeypatch.setattr(exit_probe, "DIVERGENCE", 0.05)
    monkeypatch.setattr(exit_probe, "DISTANCE", distance)
    recurrence = {"step_embedding": "sinusoidal"} if steps == "embeddings" else {}
    model, ids = tiny_model(scale=2.0, recurrence=recurrence), tiny_ids(2, 5)
    if steps == "adapters":
        adapter = add_step_lora(model, ["layers.0.attention.qkv_proj"], num_steps=4, rank=2, alpha=4)
        for name, weight in adapter.named_parameters():
            torch.nn.init.normal_(weight, std=0.3) if name.endswith("up") else None
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    states, is_final, counts = observe(model, batch, 6)
    assert len(states) == 7 and is_final.shape == (6, 2, 5)
    assert counts.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]
    with torch.no_grad():
        full = model(ids, attention_mask=mask, num_steps=6, output_states=True)
        p_full, s_full, still = full.logits.double().softmax(-1), full.states[-1], torch.ones(2, 5, dtype=torch.bool)
        for step in range(6, 0, -1):
            one = model(ids, attention_mask=mask, num_steps=step, output_states=True)
            p, s = one.logits.double().softmax(-1), one.states[-1]
            still &= (p_full * (p_full / p).log()).sum(-1) < 0.05
            still &= (s_full - s).norm(dim=-1) < distance * s_full.norm(dim=-1)
            assert torch.equal(is_final[step - 1], still)
    assert 0 < is_final[:, counts].float().mean() < 1
    assert is_final[-1].all()


def test_a_row_exits_when_the_probe_is_sure():
    """Against the probe by hand on the states of a pass that takes all steps."""
    model = tiny_model(scale=2.0)
    probe, ids = model.model.add_exit_probe(), tiny_ids(6, 4)
    with torch.no_grad():
        probe.out.weight.mul_(40)
        states = model(ids, num_steps=6, output_states=True, use_cache=False).states
        ours = model(ids, num_steps=6, exits=ExitOptions("probe", 0.4), use_cache=False)
        doubts = [1 - torch.sigmoid(probe(states[i][:, -1], states[i - 1][:, -1])) for i in range(1, 7)]
    for row in range(6):
        passed = [step for step, doubt in enumerate(doubts, 1) if doubt[row] < 0.4]
        assert ours.exit_steps[row] == (passed[0] if passed else 6)
    assert len(ours.exit_steps.unique()) > 1


def train_probe(folder, base, *flags, **sections):
    """The folder of a run that trains a probe for a base, and what it measured at the end."""
    sections = {"peft": None, "trainer": "exit_probe", **sections}
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    config = write_tuning_config(folder, base, training={**training, "learning_rate": 1e-2}, **sections)
    tree = yaml.safe_load(config.read_text())
    del tree["training"]["recurrence_logging_steps"]
    config.write_text(yaml.safe_dump(tree))
    out = folder / "with_probe"
    assert finetune.main(["--config", str(config), "--training.output_dir", str(out), *flags]) == 0
    return out, json.loads((out / "eval_results.json").read_text())


def test_a_run_trains_a_probe_better_than_a_guess_and_leaves_the_model_alone(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(exit_probe, "DIVERGENCE", 1e-3)
    out, measured = train_probe(tmp_path, tiny_run, "--training.max_steps", "60", "--model.num_steps", "5")
    before, after = (load_model(folder, torch.device("cpu"))[0] for folder in (tiny_run, out))
    kept = after.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())
    assert set(kept) - set(before.state_dict()) == {
        f"model.exit_probe.{name}" for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    }
    assert measured["eval_addition_accuracy"] > 0.8
    steps = after.generate(
        tiny_ids(2, 4, high=60),
        num_steps=5,
        max_new_tokens=4,
        exit_criterion="probe",
        exit_threshold=0.5,
        return_dict_in_generate=True,
    ).exit_steps
    assert steps[:, 0].tolist() == [5, 5] and steps.max() <= 5


def test_the_share_of_right_decisions_is_that_of_the_tokens_that_count(tiny_run, tmp_path, monkeypatch):
    """Against the probe by hand on one batch of the validation rows."""
    monkeypatch.setattr(exit_probe, "DIVERGENCE", 0.01)
    out, measured = train_probe(tmp_path, tiny_run, "--training.max_steps", "2")
    model, tokenizer = load_model(out)
    run = load_run_config(out / "config.yaml")
    rows = build_validation(run.data, tokenizer, seed=run.seed)["addition"]
    shares = []
    for row in rows:
        batch = Collator(tokenizer)([row])
        states, is_final, counts = observe(model, batch, model.config.recurrence.mean_steps)
        with torch.no_grad():
            logits = [model.model.exit_probe(states[i], states[i - 1]) for i in range(1, len(states))]
        right = [(logit > 0) == final for logit, final in zip(logits, is_final, strict=True)]
        shares.append(torch.stack(right)[:, counts].float().mean())
    assert measured["eval_addition_accuracy"] == pytest.approx(float(torch.stack(shares).mean()), abs=1e-6)


def test_a_model_with_media_and_a_fine_tuned_one_get_a_probe_too(tmp_path):
    media = write_media_config(tmp_path, training={"max_steps": 1}, callbacks={"media_samples": {"num_examples": 0}})
    assert pretrain.main(["--config", str(media), "--training.output_dir", str(tmp_path / "media")]) == 0
    data = {name: TINY_MEDIA_RUN["data"][name] for name in ("block_size", "packing", "train", "validation")}
    base = tmp_path / "media"
    config = write_tuning_config(tmp_path, base, trainer="continued", peft=None, data=data, training={"max_steps": 1})
    assert finetune.main(["--config", str(config), "--training.output_dir", str(tmp_path / "tuned")]) == 0
    out, measured = train_probe(tmp_path, tmp_path / "tuned", "--training.max_steps", "1", data=data)
    before, after = (load_model(folder)[0].state_dict() for folder in (tmp_path / "tuned", out))
    assert {name.rpartition(".exit_probe.")[0] for name in after.keys() - before.keys()} == {"model"}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {"eval_scenes_accuracy", "eval_melodies_loss"} <= set(measured)


def test_a_probe_costs_at_most_a_hundredth_of_a_step():
    """Multiplications per token, at the width of recurrent_lm.yaml and above; a core of one layer."""
    for hidden in (128, 512, 5280):
        config = MegaTransformerTextConfig(
            vocab_size=8, hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=hidden // 32,
            num_prelude_layers=0, num_core_layers=1, num_coda_layers=0,
        )  # fmt: skip
        with torch.device("meta"):
            core, probe = MegaTransformerForCausalLM(config).model.core, ExitProbe(hidden)
        step, extra = (
            sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
            for module in (core, probe)
        )
        assert extra <= 0.01 * step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--training.exit_distance", "0"],
            "training.exit_distance is '0', but this option is gone, and is always 0.05",
        ),
        (["--model.path", "nowhere"], "nowhere"),
        (["--peft.rank", "2", "--peft.target_modules.core", "all-linear"], "peft: an exit probe learns alone"),
        (["--data.train", "[{kind: files, paths: [nowhere/*.txt]}]"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(tiny_run, tmp_path, capsys, flags, message):
    argv = ["--trainer", "exit_probe", "--training.use_cpu", "true", "--training.output_dir", str(tmp_path / "out")]
    argv += ["--model.path", str(tiny_run), "--data.train", "[{kind: generated, task: addition, num_rows: 50}]"]
    with pytest.raises(SystemExit) as caught:
        finetune.main([*argv, "--training.max_steps", "1", *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_core_has_nothing_to_exit_from():
    with pytest.raises(ValueError, match=r"has no core \(num_core_layers is 0\), so there is nothing to exit from"):
        add_exit_probe(tiny_model(num_core_layers=0))
