"""A checkpoint folder is enough: loaded elsewhere, without this repository, through the auto classes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from model import MegaTransformerForCausalLM, MegaTransformerTextModel
from tests.tiny import tiny_ids, tiny_model

LOADER = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.tensor(json.loads(sys.argv[2]))
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert "model.modeling_megatransformer" not in sys.modules
with torch.no_grad():
    logits = causal(ids, num_steps=3).logits
    torch.testing.assert_close(causal.lm_head(base(ids, num_steps=3).last_hidden_state), logits)
    generated = causal.generate(ids, num_steps=3, max_new_tokens=5, do_sample=False)
causal.save_pretrained(sys.argv[3])  # exported again from the exported code
print(json.dumps([type(config).__name__, config.recurrence.mean_steps, logits.tolist(), generated.tolist()]))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_model(scale=2.0)
    model.save_pretrained(folder)
    return folder, model


def load_elsewhere(folder, ids, cwd):
    """Runs LOADER in a process whose current folder and path know nothing of this repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(cwd / "hf")}
    command = [sys.executable, "-c", LOADER, str(folder), json.dumps(ids.tolist()), str(cwd / "again")]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_loads_elsewhere_and_gives_the_same_logits(exported, tmp_path):
    """C7 for the weights: AutoConfig, AutoModel, AutoModelForCausalLM with trust_remote_code=True, from another
    folder.
    """
    folder, model = exported
    ids = tiny_ids(2, 6)
    name, mean_steps, logits, generated = load_elsewhere(folder, ids, tmp_path)
    assert (name, mean_steps) == ("MegaTransformerTextConfig", 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(ids, num_steps=3).logits)
    assert generated == model.generate(ids, num_steps=3, max_new_tokens=5, do_sample=False).tolist()
    assert {p.name for p in (tmp_path / "again").glob("*.py")} == {p.name for p in folder.glob("*.py")}


def test_every_file_of_the_model_is_exported(exported):
    folder, _ = exported
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for target in auto_map.values():
        assert (folder / f"{target.split('.')[0]}.py").is_file()


def test_base_model_saved_alone_loads_as_auto_model(tmp_path):
    base = tiny_model(scale=2.0).model
    base.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MegaTransformerTextModel
    ids = tiny_ids(1, 4)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).state, base(ids).state)


def test_missing_weights_are_reported_by_the_loader(exported):
    """C4: what transformers found is available to callers, who must raise; no key goes missing in a whole
    checkpoint.
    """
    folder, _ = exported
    _, info = MegaTransformerForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
