"""`pretrain.py` from YAML to a run folder, in this process; tests/test_launch.py goes through the launcher."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

import pretrain
from configs import load_config
from configs.pretraining import build_media_examples, whole_weights
from dataset_loading import get_task
from dataset_loading.tasks.registry import generate_row
from evaluation.__main__ import main as evaluate
from inference.loading import load_model
from model.chat import CHAT_TEMPLATE, ROLE_TOKENS, encode_conversation
from tests.processes import run_python
from tests.tiny import tiny_ids
from tests.tiny_language_model import tiny_model
from tests.tiny_processor import tiny_processor
from trainers.resuming import forget_tied_weights

TINY_RUN = {
    "model": {
        "model_type": "megatransformer_text",
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_core_layers": 1,
        "recurrence": {"mean_steps": 3, "backprop_steps": 2},
    },
    "tokenizer": {"vocab_size": 259},
    "data": {
        "block_size": 48,
        "train": [
            {"kind": "generated", "task": "addition", "num_rows": 200, "difficulty": [1, 2], "weight": 2},
            {"kind": "generated", "task": "stories", "num_rows": 50},
        ],
        "validation": [{"kind": "generated", "task": "addition", "num_rows": 30, "difficulty": [1, 2]}],
    },
    "callbacks": {"samples": {"prompts": ["1+1="], "every_steps": 4, "num_steps": [1, 3], "max_new_tokens": 4}},
    "training": {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "recurrence_logging_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    },
}


REPOSITORY = Path(__file__).parent.parent


def write_config(folder, **sections):
    """TINY_RUN with parts of its sections replaced, as a YAML file in `folder`."""
    merged = {name: {**section, **sections.get(name, {})} for name, section in TINY_RUN.items()}
    path = Path(folder) / "run.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run: (its folder, the YAML it came from)."""
    base = tmp_path_factory.mktemp("run")
    config = write_config(base)
    assert pretrain.main(["--config", str(config), "--training.output_dir", str(base / "out")]) == 0
    return base / "out", config


def test_run_folder_holds_all_that_is_needed(run):
    """Weights, tokenizer and code in the run folder and in each checkpoint."""
    folder, _ = run
    for place in (folder, folder / "checkpoint-3", folder / "checkpoint-6"):
        for name in ("model.safetensors", "config.json", "tokenizer.json", "modeling_megatransformer_text.py"):
            assert (place / name).is_file()
    assert (folder / "config.yaml").is_file() and (folder / "eval_results.json").is_file()
    assert not list(folder.glob("**/pytorch_model*.bin"))


def test_tensorboard_shows_samples_and_scalars(run):
    """Samples at each depth, steps with and without gradient, state change per step, tokens per second."""
    folder, _ = run
    events = EventAccumulator(str(next(folder.glob("runs/*"))))
    events.Reload()
    tags = events.Tags()
    scalars = {tag.removeprefix("train/") for tag in tags["scalars"]}
    assert {"loss", "steps_without_gradient", "steps_with_gradient", "tokens_per_second", "grad_norm"} <= scalars
    assert {"loss_at_1_step", "loss_at_mean_steps", "depth_gap", "token_correlation", "state_change_03"} <= scalars
    assert {"eval/addition_bits_per_byte", "eval/addition_perplexity"} <= set(tags["scalars"])
    texts = [tag for tag in tags["tensors"] if "samples" in tag]
    assert {"num_steps_1", "num_steps_3"} == {tag.split("/")[2] for tag in texts}
    assert "1+1=" in events.Tensors(texts[0])[0].tensor_proto.string_val[0].decode()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(losses(folder), rel=1e-6) and len(logged) == 6


def test_resolved_yaml_alone_repeats_the_run(run, tmp_path):
    """The same losses, from any current folder."""
    folder, _ = run
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        pretrain.main(["--config", str(folder / "config.yaml"), "--training.output_dir", str(tmp_path / "again")])
    finally:
        os.chdir(here)
    assert losses(tmp_path / "again") == losses(folder)
    before, after = (yaml.safe_load((f / "config.yaml").read_text()) for f in (folder, tmp_path / "again"))
    assert before["training"].pop("output_dir") != after["training"].pop("output_dir")
    assert before == after


def test_resume_from_checkpoint_continues_exactly(run, tmp_path, caplog):
    """Half a run, then `--training.resume_from_checkpoint true`, equals the whole run bitwise; a newer checkpoint that
    was cut off is passed over. Of tied weights, which are saved once, none is said to be missing.
    """
    folder, config = run
    out = tmp_path / "out"
    flags = ["--config", str(config), "--training.output_dir", str(out)]
    # The schedule must be that of the whole run, so the half is made by damaging what came after its checkpoint.
    shutil.copytree(folder, out)
    (out / "model.safetensors").unlink()
    optimizer = out / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    pretrain.main([*flags, "--training.resume_from_checkpoint", "true"])
    assert losses(out) == losses(folder)
    assert "checkpoint-6 is passed over" in caplog.text and "missing keys" not in caplog.text
    ours, whole = (load_model(place)[0].state_dict() for place in (out, folder))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_tied_weights_are_missing_where_both_are():
    """Against torch's own report, without the hook."""
    model = tiny_model()
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    whole = {name: weight for name, weight in model.state_dict().items() if name != "model.norm.weight"}
    without_head = {name: weight for name, weight in whole.items() if name != "lm_head.weight"}
    without_both = {name: weight for name, weight in without_head.items() if name != "model.embed_tokens.weight"}
    states = (whole, without_head, without_both)
    before = [set(model.load_state_dict(state, strict=False).missing_keys) for state in states]
    model.register_load_state_dict_post_hook(forget_tied_weights)
    after = [set(model.load_state_dict(state, strict=False).missing_keys) for state in states]
    assert before[1] == {"model.norm.weight", "lm_head.weight"} and len(before[2]) == 3
    assert after == [before[0], before[0], before[2]]


LOADER = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
text = "Zürich: 12+34=, 日本 \\U0001f600\\n\\ttab  two spaces"
assert tokenizer.decode(tokenizer(text).input_ids) == text
assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == [
    tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
with torch.no_grad():
    logits = model(ids, num_steps=2).logits
    assert torch.allclose(model.lm_head(base(ids, num_steps=2).last_hidden_state), logits, atol=1e-5)
print(json.dumps([tokenizer(text).input_ids, logits.tolist()]))
"""


def test_checkpoint_loads_elsewhere_with_its_tokenizer(run, tmp_path):
    """In another folder and process, without this repository: the same text, ids and logits; pad is not end."""
    folder, _ = run
    ids = tiny_ids(1, 6)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    arguments = (folder / "checkpoint-6", json.dumps(ids.tolist()))
    process = run_python("-c", LOADER, *arguments, cwd=tmp_path, environment=environment)
    assert process.returncode == 0, process.stderr
    token_ids, logits = json.loads(process.stdout.splitlines()[-1])
    model, tokenizer = load_model(folder / "checkpoint-6")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(ids, num_steps=2).logits)
    assert token_ids == tokenizer("Zürich: 12+34=, 日本 \U0001f600\n\ttab  two spaces").input_ids
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_depth_table_of_the_run(run, tmp_path, capsys):
    """`python -m evaluation RUN --num-steps ...`: the table at the mean depth repeats the run's own evaluation."""
    folder, _ = run
    assert evaluate([str(folder), "--num-steps", "1", "3", "--output", str(tmp_path / "depth")]) == 0
    rows = json.loads((tmp_path / "depth" / "depth.json").read_text())
    assert {path.suffix for path in (tmp_path / "depth").iterdir()} == {".json", ".jsonl", ".md", ".png"}
    assert (tmp_path / "depth" / "depth.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    reported = json.loads((folder / "eval_results.json").read_text())["eval_addition_loss"]
    assert f"{reported:.4f}" in capsys.readouterr().out or any(abs(value - reported) < 1e-4 for value in _numbers(rows))


def _numbers(tree):
    """All numbers in nested lists and dicts."""
    if isinstance(tree, (dict, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _numbers(item)
    elif isinstance(tree, float):
        yield tree


def test_media_are_shown_of_train_sources_where_there_is_no_validation(tmp_path):
    """New ones; a stream, which is not even opened, and texts have none to show. Validation sources go first."""
    train = [
        {"kind": "generated", "task": "scenes", "num_rows": 50},
        {"kind": "generated", "task": "stories", "num_rows": 50},
        {"kind": "webdataset", "paths": ["nowhere.tar"], "image_column": "jpg", "streaming": True},
    ]
    data = {"train": train, "validation": [], "block_size": 128}
    config = ["--config", str(write_config(tmp_path, data=data))]
    run, processor = load_config(config), tiny_processor()
    examples = build_media_examples(run, processor)
    counts = run.callbacks.media_samples.num_examples, run.callbacks.generated_samples.num_examples
    assert list(examples) == ["scenes"] and len(examples["scenes"]) == max(counts) == 4
    scenes = get_task("scenes")
    rows = [
        generate_row(scenes, scenes.default_difficulty, "test", (run.training.seed, 0), index) for index in range(4)
    ]
    assert [example["answer"] for example in examples["scenes"]] == [row["answer"] for row in rows]
    named = "[{kind: generated, task: melodies, num_rows: 9}, {kind: generated, task: addition, num_rows: 9}]"
    run = load_config([*config, "--data.validation", named])
    assert list(build_media_examples(run, processor)) == ["melodies"]


def test_models_are_built_whole_under_zero_3():
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # as TrainingArguments make one
    args = SimpleNamespace(deepspeed="zero3", hf_deepspeed_config=config)
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(KeyError), whole_weights(args):
        assert not is_deepspeed_zero3_enabled()
        raise KeyError
    assert is_deepspeed_zero3_enabled()
    with whole_weights(SimpleNamespace(deepspeed=None)):
        assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": [{"kind": "files", "paths": ["nothing/*.txt"]}]}}, r"nothing/\*\.txt"),
        ({"data": {"train": [{"kind": "generated", "task": "adition"}]}}, "'adition'.*chained_lookup"),
        ({"data": {"train": []}}, "train"),
        ({"model": {"vocab_size": 100}}, "token id.*vocab_size is 100"),
        ({"training": {"per_device_train_batch_size": 5000}}, r"less than one batch of 5000"),
        ({"training": {"max_steps": -1, "num_train_epochs": 0}}, "num_train_epochs is 0: there is nothing to train"),
        ({"training": {"resume_from_checkpoint": str(REPOSITORY / "docs")}}, "docs has no trainer_state.json"),
        (
            {"training": {"metric_for_best_model": "accuracy"}},
            "'accuracy' is unknown; .* are eval_loss, eval_addition_loss, eval",
        ),
        ({"training": {"lr_scheduler_kwargs": {"bogus": 1}}}, "training.lr_scheduler_type or .*'bogus'"),
        ({"model": {"num_attention_heads": 5}}, r"hidden_size \(32\).*num_attention_heads \(5\)"),
        ({"model": {"position_embedding": "learned", "max_position_embeddings": 8}}, "block_size: 48.*8 positions"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tmp_path, capsys, sections, message):
    config = write_config(tmp_path, **sections)
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_empty_file_and_corrupt_rows(tmp_path, capsys):
    """An empty dataset stops the run; so do more corrupt rows than allowed, and the error says which."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + "{broken\n" * 3)
    for name, message in (("empty.txt", "'empty' has no usable rows"), ("rows.jsonl", "line 2")):
        data = {"train": [{"kind": "files", "paths": [name]}], "max_invalid_rows": 2}
        config = write_config(tmp_path, data=data)
        with pytest.raises(SystemExit) as stopped:
            pretrain.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_output_folder_of_another_model_is_refused(run, capsys):
    folder, config = run
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--config", str(config), "--training.output_dir", str(folder), "--model.hidden_size", "64"])
    assert stopped.value.code == 2
    assert "model.hidden_size is 32 there and 64 here; choose another output_dir" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def refused(capsys, *argv):
    """The one line with which a start is refused."""
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([str(word) for word in argv])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("option", "size", "reason"),
    [
        ("vocab_size", 10**11, "parameters, which take .* GiB in float32, and this machine has"),
        ("hidden_size", 2**31, "no model of these sizes can be made"),
        ("intermediate_size", 2**62, "no model of these sizes can be made"),
        ("num_core_layers", 10**7, "model.num_core_layers: Value must be .* smaller or equal to 10000"),
    ],
)
def test_a_model_beyond_the_memory_is_refused(run, tmp_path, capsys, option, size, reason):
    """Before any of it is made, and before a tokenizer is trained for it."""
    _, config = run
    out = tmp_path / "out"
    assert re.search(
        reason, refused(capsys, "--config", config, "--training.output_dir", out, f"--model.{option}", size)
    )
    assert not out.exists()


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_resume_writes_nothing(run, tmp_path, capsys):
    folder, config = run
    before = content(folder)
    flags = ["--config", config, "--training.resume_from_checkpoint", folder / "checkpoint-3"]
    elsewhere = ["--training.output_dir", tmp_path / "out"]
    line = refused(capsys, *flags, *elsewhere, "--model.hidden_size", "64")
    assert "checkpoint-3 has other options: model.hidden_size is 32 there and 64 here; give the same, or begin" in line
    line = refused(capsys, *flags, "--training.output_dir", folder, "--training.optim", "sgd")
    assert "training.optim is 'adamw_torch_fused' there and 'sgd' here; give the same, or begin anew" in line
    line = refused(capsys, *flags, *elsewhere, "--training.max_steps", "3")
    assert "checkpoint-3 is of step 3, and training.max_steps is 3: nothing is left to train" in line
    line = refused(capsys, *flags[:3], folder, *elsewhere)
    assert "has no state of an optimizer (optimizer*); give a checkpoint-N folder" in line
    assert content(folder) == before and not (tmp_path / "out").exists()


def test_a_start_that_fails_leaves_the_file_of_the_earlier_run(run, tmp_path, monkeypatch):
    """Whatever goes wrong before training begins, such as states that cannot be loaded."""
    folder, config = run
    out = shutil.copytree(folder, tmp_path / "out")
    before = content(out)

    def fail(*args):
        raise RuntimeError("the states cannot be loaded")

    monkeypatch.setattr("transformers.Trainer._load_optimizer_and_scheduler", fail)
    flags = ["--config", str(config), "--training.output_dir", str(out), "--training.max_steps", "9"]
    with pytest.raises(RuntimeError, match="the states cannot be loaded"):
        pretrain.main([*flags, "--training.resume_from_checkpoint", "true"])
    assert content(out) == before


def test_damaged_data_files_are_one_line(tmp_path, capsys):
    """A parquet file that is damaged inside, which no look at its ends shows."""
    table = pyarrow.table({"text": [f"row {index} " * 50 for index in range(200)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    raw = bytearray((tmp_path / "rows.parquet").read_bytes())
    raw[100:400] = b"\xff" * 300
    (tmp_path / "rows.parquet").write_bytes(raw)
    config = write_config(tmp_path, data={"train": [{"kind": "files", "paths": ["rows.parquet"]}]})
    assert "orrupt" in refused(capsys, "--config", config, "--training.output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """Without a metric, by the loss of the first validation source; a learning rate that makes it worse again."""
    flags = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    config = write_config(tmp_path, training={**flags, "learning_rate": 0.5, "lr_scheduler_type": "constant"})
    assert pretrain.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    name = "eval_addition_loss"
    evaluated = {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}
    best = min((2, 4, 6), key=evaluated.get)
    assert best != 6 and Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    places = (tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")
    kept, saved = (load_file(place / "model.safetensors") for place in places)
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_every_tokenizer_of_text_has_a_chat_template(run):
    """Of a run without conversations, loaded without our code; as many roles as there are rows are tokens."""
    messages = [{"role": "user", "content": "1+1 <|end|>"}, {"role": "assistant", "content": "2"}]
    for folder in (run[0], run[0] / "checkpoint-6"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        assert tokenizer.decode(ids) == "<|begin|><|user|>1+1 <|end|><|assistant|>2<|end|>"
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert ids == encode_conversation(tokenizer, messages)


def test_a_model_of_text_learns_from_conversations(tmp_path, caplog):
    """The roles are tokens, the template is saved, and questions are answered while it learns."""
    source = {"kind": "generated", "task": "calculator", "num_rows": 100}
    config = write_config(
        tmp_path,
        model={"vocab_size": 263},
        tokenizer={"vocab_size": 263},
        data={"block_size": 96, "train": [source], "validation": [source | {"num_rows": 4}]},
        callbacks={"media_samples": {"num_examples": 1, "num_steps": [2], "max_new_tokens": 3}, "samples": {}},
        training={"max_steps": 2, "save_strategy": "no", "output_dir": str(tmp_path / "run")},
    )
    with caplog.at_level("INFO"):
        assert pretrain.main(["--config", str(config)]) == 0
    assert "step 2, samples/calculator_0, 2 steps" in caplog.text
    _, tokenizer = load_model(tmp_path / "run")
    assert tokenizer.chat_template.endswith(CHAT_TEMPLATE)
    assert tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS.values())) == [3, 4, 5, 6]
