"""Runs of a sequence-to-sequence model: `pretrain.py`, evaluation and generation, and what its batches are."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
import pretrain
from configs import load_config
from dataset_loading import Seq2SeqCollator, load_tokenizer
from evaluation.__main__ import main as evaluate
from evaluation.depth import answers_right
from evaluation.metrics import as_causal, token_nll
from inference.chat import main as chat
from inference.generate import main as generate
from tests.tiny import BEGIN, PAD, tiny_ids
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_seq2seq import PART, tiny_seq2seq

RUN = {
    "model": {
        "model_type": "megatransformer_seq2seq",
        "vocab_size": 259,
        "encoder_config": {**PART, "num_core_layers": 1, "recurrence": {"mean_steps": 2, "backprop_steps": 2}},
        "decoder_config": {**PART, "num_core_layers": 1, "recurrence": {"mean_steps": 3, "backprop_steps": 2}},
    },
    "tokenizer": {"vocab_size": 259},
    "data": {
        "block_size": 48,
        "packing": False,
        "train": [{"kind": "generated", "task": "sorting", "num_rows": 300, "loss_on": "answer"}],
        "validation": [{"kind": "generated", "task": "sorting", "num_rows": 20, "loss_on": "answer"}],
    },
    "callbacks": {"samples": {"prompts": ["312="], "every_steps": 4, "num_steps": [1, 3], "max_new_tokens": 4}},
    "training": {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "recurrence_logging_steps": 4,
        "use_cpu": True,
        "report_to": "none",
    },
}


def write_run(folder, **data) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "data": {**RUN["data"], **data}}))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    argv = ["--config", write_run(folder), "--training.output_dir", str(folder / "out")]
    assert pretrain.main(argv) == 0
    return folder / "out"


def history_of(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_batch_is_sources_and_targets():
    class Tokenizer:
        pad_token_id, bos_token_id = PAD, BEGIN

    rows = [
        {"input_ids": [BEGIN, 7, 8, 9, 2], "labels": [-100, -100, -100, 9, 2]},
        {"input_ids": [BEGIN, 5, 6, 4, 2], "labels": [-100, -100, 6, 4, 2]},
    ]
    batch = Seq2SeqCollator(Tokenizer())(rows)
    expected = {
        "input_ids": [[BEGIN, 7, 8], [BEGIN, 5, PAD]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "decoder_input_ids": [[BEGIN, 9, 2], [BEGIN, 6, 4]],
        "labels": [[9, 2, -100], [6, 4, 2]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    for labels in ([9, 2, 3], [-100, -100, -100], [-100, 9, -100]):
        with pytest.raises(ValueError, match="no source with one target behind it; give sources with prompt"):
            Seq2SeqCollator(Tokenizer())([{"input_ids": [1, 9, 2], "labels": labels}])


@torch.no_grad()
def test_scores_are_those_of_the_model():
    """Position i predicts label i: the sum of the losses is that of the model, and what it would write is right."""
    model = tiny_seq2seq()
    source, labels = tiny_ids(2, 5), tiny_ids(2, 4, seed=1)
    labels[0, 3:] = -100
    out = model(source, labels=labels)
    sums = token_nll(*as_causal(out.logits, labels))
    assert sums[:, 1].tolist() == [3, 4]
    assert (sums[:, 0].sum() / 7).item() == pytest.approx(out.loss.item(), rel=1e-5)
    written = model.generate(source, max_new_tokens=4, do_sample=False)[:, 1:]
    wrong = written.clone()
    wrong[1, -1] = (wrong[1, -1] + 1) % 64
    for answer, right in ((written, [True, True]), (wrong, [True, False])):
        assert answers_right(*as_causal(model(source, labels=answer).logits, answer)).tolist() == right


def test_it_learns_and_logs_its_depth(run):
    history = history_of(run)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 1
    assert all(entry["steps_with_gradient"] <= 2 for entry in history if "loss" in entry)
    assert any("loss_at_1_step" in entry and "state_change_03" in entry for entry in history)
    assert next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry) < losses[0]


def test_a_resumed_run_is_one_that_was_not_interrupted(run, tmp_path):
    argv = ["--config", write_run(tmp_path), "--training.output_dir", str(tmp_path / "out")]
    assert pretrain.main([*argv, "--training.resume_from_checkpoint", str(run / "checkpoint-4")]) == 0
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_its_commands(run, tmp_path, capsys):
    """It is evaluated at several depths of the decoder, and writes; it holds no conversation and is not fine-tuned."""
    argv = [str(run), "--num-steps", "1", "3", "--limit", "8", "--output", str(tmp_path / "evaluation")]
    assert evaluate(argv) == 0
    assert "exact sorting" in capsys.readouterr().out
    assert generate([str(run), "--prompt", "312=", "--greedy", "--max-new-tokens", "3"]) == 0
    written = capsys.readouterr().out.strip()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "312="}\n')
    argv = [str(run), "--prompts", str(tmp_path / "prompts.jsonl"), "--greedy", "--max-new-tokens", "3"]
    assert generate(argv) == 0
    assert json.loads(capsys.readouterr().out)["text"].strip() == written and "312" not in written
    for main, arguments, message in (
        (chat, [str(run)], "writes a target for a source, and holds no conversation"),
        (finetune.main, ["--config", str(write_tuning_config(tmp_path, run))], "which finetune.py does not train"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_packed_rows_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_config(["--config", write_run(tmp_path, packing=True), "--training.output_dir", str(tmp_path / "out")])
    assert "data.packing: true puts several rows into one" in capsys.readouterr().err


def test_weights_of_modalities_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--config", write_run(tmp_path), "--training.modality_weights.audio", "2"])
    assert "training.modality_weights weigh documents of a causal model" in capsys.readouterr().err


def test_sources_without_targets_are_refused(tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n' * 40)
    for source in (
        {"kind": "generated", "task": "sorting", "num_rows": 100},
        {"kind": "files", "paths": [str(tmp_path / "texts.jsonl")]},
    ):
        argv = ["--config", write_run(tmp_path, train=[source]), "--training.output_dir", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as error:
            pretrain.main(argv)
        assert error.value.code == 2 and "has no targets: a model of sequence to sequence" in capsys.readouterr().err


def test_columns_of_sources_and_targets(tmp_path):
    """Rows of a file, by any names of its columns."""
    rows = [{"source": f"say {number}", "target": f"{number}!"} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_column": "source", "answer_column": "target", "loss_on": "answer"}
    source = {"kind": "files", "paths": [str(tmp_path / "rows.jsonl")], **columns}
    run = write_run(tmp_path, train=[source], validation=[], validation_fraction=0.2)
    argv = ["--config", run, "--training.output_dir", str(tmp_path / "out"), "--training.max_steps", "2"]
    assert pretrain.main(argv) == 0
    assert any("eval_loss" in entry for entry in history_of(tmp_path / "out"))


def test_pictures_and_their_figures(tmp_path):
    """All of them, of rows with a source and a target."""
    argv = ["--config", write_run(tmp_path), "--training.output_dir", str(tmp_path / "out")]
    argv += ["--training.report_to", "tensorboard", "--training.max_steps", "4"]
    for name in ("attention", "activations", "gradients", "exits", "trajectories"):
        argv += [f"--callbacks.pictures.{name}_every_steps", "2"]
    assert pretrain.main(argv) == 0
    files = [EventAccumulator(str(path)).Reload().Tags() for path in (tmp_path / "out").rglob("events.out*")]
    images, scalars = ({name for tags in files for name in tags[kind]} for kind in ("images", "scalars"))
    for name in ("attention", "gradient_flow", "exits", "trajectories"):
        assert any(f"pictures/{name}" in image for image in images), (name, images)
    assert any("pictures/exit_step" in name for name in scalars)


def test_objectives_that_read_states_are_refused(tmp_path, capsys):
    argv = ["--config", write_run(tmp_path), "--training.output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        pretrain.main([*argv, "--training.objective.name", "every_step"])
    assert "'every_step', which reads states without the source that a decoder sees; take" in capsys.readouterr().err
    assert pretrain.main([*argv, "--training.objective.name", "full", "--training.max_steps", "2"]) == 0


def test_the_core_is_measured_with_its_source(tmp_path):
    """The spectral radius of a decoder's step, by forward derivatives, is in the log."""
    argv = ["--config", write_run(tmp_path), "--training.output_dir", str(tmp_path / "out")]
    assert pretrain.main([*argv, "--callbacks.stability.core_steps", "2", "--training.max_steps", "4"]) == 0
    measured = [entry["spectral_radius"] for entry in history_of(tmp_path / "out") if "spectral_radius" in entry]
    assert measured and all(0 < value < 100 for value in measured)


def test_the_tokens_of_the_tokenizer_are_those_of_all_parts(run):
    config = json.loads((run / "config.json").read_text())
    tokenizer = load_tokenizer(run)
    for part in (config, config["encoder_config"], config["decoder_config"]):
        assert part["pad_token_id"] == tokenizer.pad_token_id and part["vocab_size"] == 259
    assert config["decoder_start_token_id"] == tokenizer.bos_token_id
