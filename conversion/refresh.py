"""A checkpoint that was written by older code, with the code of today beside the same weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from model import (
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerForSequenceClassification,
    MegaTransformerImageAutoencoder,
    MegaTransformerModel,
    MegaTransformerProcessor,
    MegaTransformerTextModel,
    MegaTransformerVocoder,
)

MODELS: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        MegaTransformerForCausalLM,
        MegaTransformerForConditionalGeneration,
        MegaTransformerForSequenceClassification,
        MegaTransformerImageAutoencoder,
        MegaTransformerModel,
        MegaTransformerTextModel,
        MegaTransformerVocoder,
    )
}
PROCESSOR = "processor_config.json"
MANIFEST = "manifest.json"  # of the files as training saved them; a refreshed checkpoint has none


def refresh(folder: Path, output: Path | None = None) -> list[str]:
    """Write the code of today, and the configurations of model and processor as today's code saves them, beside the
    weights and the tokenizer of a checkpoint, which stay as they are, bit for bit.

    Everything is made in a folder beside, and moved when it is complete: if something fails, nothing has changed. In
    place, the code of before goes, and all other files stay.

    Args:
        folder: of the checkpoint; of a run, that of its final weights or one of its checkpoint-N.
        output: where the refreshed checkpoint goes, empty or new; None: in place.

    Returns:
        Names of the files that were written anew.

    Raises:
        ValueError: the folder holds no checkpoint of these models, or one whose weights do not fit its configuration;
            or the output folder holds something.
    """
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; name another folder, or leave it out to refresh {folder} in place")
    model, old_code = skeleton(folder), code_of(folder)
    place = folder if output is None else output.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".refresh-") as name:
        made = Path(name) / "made"
        made.mkdir(mode=folder.stat().st_mode)
        save_without_weights(model, folder, made)
        written = sorted(path.name for path in made.iterdir())
        if output is not None:
            for path in folder.iterdir():
                if path.is_file() and path.name not in {*written, *old_code, MANIFEST}:
                    shutil.copy2(path, made)
            made.replace(output)
            return written
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):  # last, as it names the others
            path.replace(folder / path.name)
        for name in old_code - set(written):
            (folder / name).unlink()
        return written


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint, without weights, and with the `auto_map` of today.

    Raises:
        ValueError: the folder holds no checkpoint of these models, or its weights are not those of its configuration.
    """
    content = read_config(folder)
    names = content.get("architectures") or []
    if not names or names[0] not in MODELS:
        raise ValueError(f"{folder} holds no checkpoint of these models: its config.json has architectures {names}")
    model_class = MODELS[names[0]]
    config = model_class.config_class.from_dict({key: value for key, value in content.items() if key != "auto_map"})
    with torch.device("meta"):
        model = model_class(config)
    check_weights(folder, model)
    return model


def read_config(folder: Path) -> dict:
    """The content of a checkpoint's config.json; ValueError where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no checkpoint: it has no config.json; an adapter has no code to refresh")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def check_weights(folder: Path, model: PreTrainedModel) -> None:
    """Raises ValueError for weights that are missing, left over, or of another shape. Rounded weights (of 8 or 4 bits)
    have shapes and companions of their own, so that of these only the missing ones are found.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        expected.pop(name, None)
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as weights:
                found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): use another checkpoint") from error
    wrong = expected.keys() - found.keys()
    if getattr(model.config, "quantization_config", None) is None:
        wrong |= found.keys() - expected.keys() - model.all_tied_weights_keys.keys()
        wrong |= {name for name in expected.keys() & found.keys() if expected[name] != found[name]}
    if wrong:
        raise ValueError(
            f"{folder}: its weights are not those of its config.json: {len(wrong)} are missing, left over or of "
            f"another shape ({', '.join(sorted(wrong)[:3])}{', ...' if len(wrong) > 3 else ''})"
        )


def code_of(folder: Path) -> set[str]:
    """Names of the files with code that the auto_map of a checkpoint names, and of those that they import."""
    files = set()
    for name in ("config.json", PROCESSOR):
        path = folder / name
        targets = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}) if path.is_file() else {}
        for target in targets.values():
            module = folder / f"{target.rpartition('--')[2].split('.')[0]}.py"
            if module.is_file():
                files |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return files


def save_without_weights(model: PreTrainedModel, folder: Path, output: Path) -> None:
    """Writes what `save_pretrained` does of a model and its processor, but no weights and no tokenizer, which stay."""
    model.config.save_pretrained(output)
    custom_object_save(model, output)
    if (folder / PROCESSOR).is_file():
        processor = MegaTransformerProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        processor.save_pretrained(output)
        for path in output.iterdir():
            if path.suffix != ".py" and path.name not in ("config.json", PROCESSOR):
                path.unlink()
