"""The learned probe: what it learns from, that it learns it, that it is saved, exits by it, and costs little."""

import pytest
import torch

import train_exit_probe
from inference.loading import load_model
from model import ExitOptions, MegaTransformerForCausalLM, MegaTransformerTextConfig
from model.exit_criteria import ExitProbe
from tests.tiny import tiny_ids, tiny_model


@pytest.mark.parametrize("distance", [10.0, 0.3])
def test_labels_say_from_where_on_distribution_and_state_are_those_of_full_depth(distance):
    """Against passes of each depth by themselves."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    states, is_final, counts = train_exit_probe.observe(model, batch, 6, 0.05, distance)
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


def test_the_command_trains_a_probe_better_than_a_guess_and_leaves_the_model_alone(tiny_run, tmp_path, capsys):
    out = tmp_path / "with_probe"
    argv = [str(tiny_run), "--output", str(out), "--updates", "60", "--epsilon", "0.001", "--num-steps", "5"]
    assert train_exit_probe.main([*argv, "--device", "cpu"]) == 0
    share = float(capsys.readouterr().out.split("%")[0])
    before, after = (load_model(folder, torch.device("cpu"))[0] for folder in (tiny_run, out))
    kept = after.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())
    assert set(kept) - set(before.state_dict()) == {
        f"model.exit_probe.{name}" for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
    }
    assert share > 80
    steps = after.generate(
        tiny_ids(2, 4, high=60),
        num_steps=5,
        max_new_tokens=4,
        exit_criterion="probe",
        exit_threshold=0.5,
        return_dict_in_generate=True,
    ).exit_steps
    assert steps[:, 0].tolist() == [5, 5] and steps.max() <= 5


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


def test_bad_input_is_one_line(tiny_run, tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(tiny_run), "--updates", "0"], "argument --updates: 0 is less than 1"),
        ([str(tiny_run), "--update", "3"], "unknown argument '--update': did you mean --updates?"),
    ):
        with pytest.raises(SystemExit) as caught:
            train_exit_probe.main(argv)
        captured = capsys.readouterr()
        assert caught.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
