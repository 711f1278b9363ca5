"""`convert.py onnx`: a program of ONNX Runtime with the logits of the model."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import convert
from inference.loading import load_model
from tests.tiny_language_model import save_checkpoint


def convert_to(folder, out, *options) -> int:
    return convert.main(["onnx", str(folder), str(out), *map(str, options)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"position_embedding": "alibi"}, {"num_core_layers": 0, "num_coda_layers": 2}], ids=str
)
def test_logits_of_any_batch_and_length(tmp_path, options):
    """At the depth that was asked for, behind padding too; a model without a core has none."""
    import onnxruntime  # here, since the fast tests are collected without it

    folder, has_core = save_checkpoint(tmp_path / "run", **options), "num_core_layers" not in options
    assert convert_to(folder, tmp_path / "out", *(("--num-steps", 4) if has_core else ())) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    model, tokenizer = load_model(folder)
    for rows, tokens in ((1, 1), (2, 6), (4, 15)):
        ids = torch.randint(3, 300, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[0, : tokens // 2] = 0
        (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            depth = {"num_steps": 4} if has_core else {}
            wanted = model(ids, attention_mask=mask, **depth).logits.numpy()
            other = model(ids, attention_mask=mask, **({"num_steps": 1} if has_core else {})).logits.numpy()
        seen = mask.numpy().astype(bool)
        np.testing.assert_allclose(found[seen], wanted[seen], atol=1e-4)
        assert not has_core or np.abs(found - other)[seen].max() > 1e-3
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the cat").input_ids == tokenizer("the cat").input_ids


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    """Nothing is written."""
    folder = save_checkpoint(tmp_path / "run", num_core_layers=0)
    for options, reason in (
        ((folder, tmp_path / "out", "--num-steps", 4), "without a core, which takes no steps"),
        ((folder, tmp_path / "out", "--num-steps", 0), "0 is less than 1"),
        ((tmp_path / "none", tmp_path / "out"), "does not exist"),
        ((folder, folder), "is not empty"),
    ):
        with pytest.raises(SystemExit) as error:
            convert_to(*options)
        assert error.value.code == 2 and not (tmp_path / "out").exists()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert reason in line
