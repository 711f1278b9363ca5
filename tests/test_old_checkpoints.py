"""Checkpoints in `tests/fixtures`, which code of before has written, give what that code computed: here, and elsewhere
with `trust_remote_code` and the code of today in the place of theirs.

`python -m tests.test_old_checkpoints FOLDER` has written them, with what they compute in `expected.safetensors`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

import finetune
import model
from inference.loading import load_model
from tests.processes import run_python
from tests.tiny_artist import save_artist
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_language_model import save_checkpoint

TARGET_MODALITIES = Path(__file__).parent / "fixtures"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of sums in another order, as on another processor
LEVEL = 1 / 255  # of a pixel that lies between two, either may come out there


def question() -> torch.Tensor:
    """(2, 12) token ids."""
    return torch.arange(24).reshape(2, 12) * 7 % 250 + 3


def text_of(model) -> dict[str, torch.Tensor]:
    """What a text model computes: logits at two depths, and tokens with and without exits."""
    ids = question()
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        found = {f"logits_{steps}": model(ids, num_steps=steps).logits for steps in (2, 5)}
    exits = {"num_steps": 8, "exit_criterion": "kl_divergence", "exit_threshold": 0.05, "return_dict_in_generate": True}
    found["tokens"] = model.generate(ids, num_steps=3, **options)
    exited = model.generate(ids, **options, **exits)
    return found | {"tokens_of_exits": exited.sequences, "exit_steps": exited.exit_steps}


def media_of(model, processor) -> dict[str, torch.Tensor]:
    """What a model of all media computes: logits of a text about media, and an image and a sound that it writes."""
    pixels = (torch.arange(32 * 32 * 3).reshape(32, 32, 3) * 11 % 256).to(torch.uint8)
    sound = (torch.arange(2400) / 9).sin().numpy()
    inputs = processor(
        text=["<|image|> what <|audio|> then?"],
        images=[Image.fromarray(pixels.numpy())],
        audio=[sound],
        return_tensors="pt",
    )
    with torch.no_grad():
        found = {"logits": model(**inputs, num_steps=4).logits}
    prompt = processor(text=["a red circle"], return_tensors="pt")
    options = {"num_steps": 3, "return_dict_in_generate": True, "flow_temperature": 0.0}
    torch.manual_seed(0)
    drawn = model.generate(**prompt, generation_mode="image", **options)
    played = model.generate(**prompt, generation_mode="audio", **options)
    found["image"] = torch.from_numpy(np.array(drawn.images[0])) / 255
    return found | {"audio": torch.as_tensor(played.audio[0])}


def outputs(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What each of the three computes in this process."""
    text, _ = load_model(folder / "text")
    media, processor = load_model(folder / "media")
    adapted, _ = load_model(folder / "adapter")
    return {"text": text_of(text), "media": media_of(media, processor), "adapter": text_of(adapted)}


def outputs_elsewhere(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The same by the auto classes and the code in the folders."""
    options = {"trust_remote_code": True, "dtype": torch.float32}
    text = AutoModelForCausalLM.from_pretrained(folder / "text", **options).eval()
    media = AutoModelForMultimodalLM.from_pretrained(folder / "media", **options).eval()
    processor = AutoProcessor.from_pretrained(folder / "media", trust_remote_code=True)
    return {"text": text_of(text), "media": media_of(media, processor)}


def compare(found: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    """Tokens are equal; numbers are, to rounding."""
    for name, tensors in found.items():
        expected = load_file(folder / name / "expected.safetensors")
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            where = f"{name} {key}: "
            close = CLOSE | {"atol": LEVEL + CLOSE["atol"]} if key == "image" else CLOSE
            torch.testing.assert_close(tensor, expected[key], **close, msg=lambda text, where=where: where + text)


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy, whose adapter finds its base there."""
    folder = shutil.copytree(TARGET_MODALITIES, tmp_path / "old")
    name_base(folder, str(folder / "text"))
    return folder


def name_base(folder: Path, base: str) -> None:
    path = folder / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["base_model_name_or_path"] = base
    path.write_text(json.dumps(content, indent=2) + "\n")


def test_they_compute_what_they_did(old):
    compare(outputs(old), old)


def test_what_is_compared_depends_on_the_weights(old):
    """One weight of each, changed, is noticed."""
    for name, file in (("text", "model"), ("media", "model"), ("adapter", "adapter_model")):
        path = old / name / f"{file}.safetensors"
        weights = load_file(path)
        key = next(key for key in weights if "core" in key)
        save_file(weights | {key: weights[key] + 0.1}, path, metadata={"format": "pt"})
    for name, tensors in outputs(old).items():
        with pytest.raises(AssertionError):
            compare({name: tensors}, TARGET_MODALITIES)


def test_they_compute_it_elsewhere_with_the_code_of_today(old):
    """The names in their auto_map are still those of files and classes."""
    for name in ("text", "media"):
        for target in json.loads((old / name / "config.json").read_text())["auto_map"].values():
            file = Path(model.__file__).with_name(f"{target.split('.')[0]}.py")
            for part in (file, *get_relative_import_files(file)):
                shutil.copy(part, old / name)
    elsewhere = old.parent / "elsewhere"
    elsewhere.mkdir()
    # The functions above, without the imports of this project.
    lines = Path(__file__).read_text().splitlines()
    own = ("import finetune", "import model", "from inference", "from tests")
    (elsewhere / "compared.py").write_text("\n".join(line for line in lines if not line.startswith(own)))
    code = (
        "import sys; from pathlib import Path; import compared; folder = Path(sys.argv[1])\n"
        "compared.compare(compared.outputs_elsewhere(folder), folder)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('model', 'tests', 'inference')]"
    )
    done = run_python("-c", code, old, cwd=elsewhere)
    assert done.returncode == 0, done.stderr


def write(folder: Path) -> None:
    """Write the three, without their code, and what they compute."""
    save_checkpoint(folder / "text")
    save_artist(folder / "media")
    config = write_tuning_config(
        folder, folder / "text", training={"output_dir": str(folder / "adapter"), "save_strategy": "no"}
    )
    finetune.main(["--config", str(config)])
    for name, tensors in outputs(folder).items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name / "expected.safetensors")
    name_base(folder, "../text")
    wanted = ("model.safetensors", "adapter_model.safetensors", "expected.safetensors", "chat_template.jinja")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in wanted and not path.name.endswith(("config.json", "tokenizer.json")):
            path.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute())
