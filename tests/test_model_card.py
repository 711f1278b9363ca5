"""The model card of each saved folder: the hub's library reads it, and the code in it runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import convert
import finetune
import pretrain
from callbacks import model_card
from configs import load_run_config
from model import MegaTransformerImageAutoencoder, MegaTransformerVocoder
from tests.test_pretrain import write_config
from tests.tiny_codecs import tiny_autoencoder, tiny_vocoder
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_reader import save_reader, tiny_reader

REPOSITORY = Path(__file__).parent.parent
FEW = ["--training.max_steps", "2", "--training.save_steps", "2", "--training.save_strategy", "steps"]


def code_in(folder: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, flags=re.DOTALL)
    return block


def run_code(tmp_path: Path, folder: Path, place: str = "") -> None:
    """Run the code of a card in the folder above; `place` is the folder that Python may import from."""
    environment = {**os.environ, "PYTHONPATH": place, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code_in(folder)]
    run = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def section(folder: Path, name: str) -> str:
    return ModelCard.load(folder / "README.md").text.split(f"## {name}\n\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two updates, with a checkpoint."""
    folder = tmp_path_factory.mktemp("card")
    argv = ["--config", str(write_config(folder)), "--training.output_dir", str(folder / "small"), *FEW]
    assert pretrain.main(argv) == 0
    return folder / "small"


def test_card_of_a_run_says_what_its_files_say(run):
    card, resolved = ModelCard.load(run / "README.md"), load_run_config(run / "config.yaml").resolved
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.text.strip().startswith("# small\n")
    written = yaml.safe_load(section(run, "Configuration").strip().removeprefix("```yaml").removesuffix("```"))
    assert written["model"]["recurrence"]["mean_steps"] == resolved["model"]["recurrence"]["mean_steps"] == 3
    assert written["training"]["learning_rate"] == 3e-3 and written["training"]["max_steps"] == 2
    data = section(run, "Data")
    assert "train:\n\n- addition (generated, task addition, 200 rows)\n- stories (generated" in data
    assert "validation:\n\n- addition (generated, task addition, 30 rows)" in data
    results = dict(re.findall(r"\| (\w+) \| ([\d.e+-]+) \|", section(run, "Results")))
    measured = json.loads((run / "eval_results.json").read_text())
    assert float(results["eval_addition_loss"]) == pytest.approx(measured["eval_addition_loss"], rel=1e-5)
    assert results["steps"] == "2" and "loss" in results and not [name for name in results if "runtime" in name]
    import transformers

    assert f"- transformers {transformers.__version__}\n" in card.text


@pytest.mark.slow
def test_code_of_the_cards_runs(run, tmp_path):
    """Of a run, a checkpoint in it, adapters for it, what they are merged to, and a model with media."""
    tuning = write_tuning_config(tmp_path, run)
    assert finetune.main(["--config", str(tuning), "--training.output_dir", str(tmp_path / "lora"), *FEW]) == 0
    assert convert.main(["merge", str(tmp_path / "lora"), "--output", str(tmp_path / "merged")]) == 0
    save_reader(tmp_path / "reader")
    model_card(tmp_path / "reader", tiny_reader()).save(tmp_path / "reader/README.md")
    lora = tmp_path / "lora"
    for folder in (run, run / "checkpoint-2", lora, lora / "checkpoint-2", tmp_path / "merged", tmp_path / "reader"):
        run_code(tmp_path, folder)
    for folder in (lora, lora / "checkpoint-2"):
        assert ModelCard.load(folder / "README.md").data.library_name == "peft"
        assert str(run) in section(folder, "How to load it")
    assert "Low-rank adapters of" in (lora / "README.md").read_text()
    assert "- reversal (generated, task reversal, 60 rows)" in section(tmp_path / "merged", "Data")


@pytest.mark.slow
def test_code_of_the_cards_runs_for_adapters_of_steps(run, tmp_path):
    """Which are no other library's: its code runs where this repository is."""
    tuning = write_tuning_config(tmp_path, run, peft=None, trainer="continued", step_lora={"num_steps": 2})
    assert finetune.main(["--config", str(tuning), "--training.output_dir", str(tmp_path / "steps"), *FEW]) == 0
    run_code(tmp_path, tmp_path / "steps", place=str(REPOSITORY))


@pytest.mark.slow
@pytest.mark.parametrize("model", [tiny_autoencoder(), tiny_vocoder()], ids=["images", "sound"])
def test_code_of_the_cards_of_codecs_runs(model, tmp_path):
    model.save_pretrained(tmp_path / "codec")
    model_card(tmp_path / "codec", model).save(tmp_path / "codec/README.md")
    assert isinstance(model, MegaTransformerImageAutoencoder | MegaTransformerVocoder)
    assert ModelCard.load(tmp_path / "codec/README.md").data.library_name == "transformers"
    run_code(tmp_path, tmp_path / "codec")


def test_a_refreshed_checkpoint_has_a_card_and_keeps_the_one_it_had(tmp_path):
    save_reader(tmp_path / "old")
    assert convert.main(["refresh", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "reads text, images, sound and writes text." in ModelCard.load(tmp_path / "new/README.md").text
    (tmp_path / "old/README.md").write_text("Of somebody else.")
    assert convert.main(["refresh", str(tmp_path / "old")]) == 0
    assert (tmp_path / "old/README.md").read_text() == "Of somebody else."
