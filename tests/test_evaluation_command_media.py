"""`python -m evaluation` on a model that reads images and sound."""

import json
from dataclasses import asdict

import pytest
import yaml

from dataset_loading import DataConfig, SourceConfig, build_examples, get_task
from evaluation.__main__ import main
from evaluation.answers import text_scores
from tests.test_callbacks_media import answer
from tests.test_evaluation_answers import answers_of
from tests.tiny_processor import tiny_processor
from tests.tiny_reader import save_reader, tiny_reader

SOURCES = [
    {"kind": "generated", "task": "scenes", "num_rows": 40, "difficulty": [1, 2]},
    {"kind": "generated", "task": "melodies", "num_rows": 40, "difficulty": [1, 2]},
    {"kind": "generated", "task": "addition", "num_rows": 40, "difficulty": [1, 1]},
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as pretrain.py leaves it."""
    folder = save_reader(tmp_path_factory.mktemp("run"))
    config = {"data": {"block_size": 256, "train": SOURCES}, "training": {"output_dir": "unused", "seed": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(folder, output, *flags):
    argv = [folder, "--num-steps", 1, 3, "--limit", 5, "--max-new-tokens", 6, "--output", output, *flags]
    assert main([str(argument) for argument in argv]) == 0
    return json.loads((output / "depth.json").read_text())["rows"]


def test_answers_attributes_and_errors_by_source_modality_and_depth(run_folder, tmp_path, capsys):
    """With a model that knows nothing; one source against decoding one by one."""
    rows = run(run_folder, tmp_path)
    out = capsys.readouterr().out
    assert [row["num_steps"] for row in rows] == [1, 3]
    model, processor = tiny_reader(), tiny_processor()
    data = DataConfig(train=[SourceConfig(**source) for source in SOURCES], block_size=256)
    for row in rows:
        assert set(row["sources"]) == set(row["generated"]) == set(row["exact_match"])
        assert set(row["modalities"]) == {"text", "image", "audio"}
        for source, modality in zip(data.train, ("image", "audio", "text"), strict=True):
            scores = row["generated"][source.task]
            assert scores == row["modalities"][modality]["generated"] and scores["num_examples"] == 5
            assert row["modalities"][modality]["losses"] == pytest.approx(row["sources"][source.task])
            assert scores["word_error_rate"] > 0 and 0 <= scores["chrf"] < 0.5
            assert bool(scores["attributes"]) == (modality != "text")
    examples = build_examples(data.train[0], data, processor, 5, seed=5)
    pairs = [(example["answer"], answer(model, example, 3, 6).strip()) for example in examples]
    expected = text_scores(answers_of(*pairs, attributes=get_task("scenes").attributes))
    assert (
        rows[1]["generated"]["scenes"] == json.loads(json.dumps(asdict(expected))) and "colour1" in expected.attributes
    )
    assert "Texts generated for melodies (5):" in out and "By modality:" in out


def test_without_texts_nothing_is_written(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.GenerationMixin.generate", None)
    rows = run(run_folder, tmp_path, "--no-texts")
    assert rows[0]["generated"] == {} and rows[0]["modalities"]["image"]["generated"] is None
    out = capsys.readouterr().out
    assert "Texts written" not in out and "WER" not in out and "exact scenes" in out
