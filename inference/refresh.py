"""A checkpoint that was written by older code, with the code of today beside the same weights."""

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

import model as ours
from model import MegaTransformerProcessor
from model.backbones import reason_of
from model.weight_files import build_skeleton, check_fit, declared_weights

from .checkpoints import PROCESSOR, read_json

MODELS: dict[str, type[PreTrainedModel]] = {
    name: it for name, it in vars(ours).items() if isinstance(it, type) and issubclass(it, PreTrainedModel)
}
MANIFEST = "manifest.json"  # of the files as training saved them; a refreshed checkpoint has none


def refresh(folder: Path, output: Path | None = None) -> list[str]:
    """Write the code of today, and the configurations of model and processor as today's code saves them, beside the
    weights and the tokenizer of a checkpoint, which stay as they are, bit for bit.

    Everything is made in a folder beside, and moved when it is complete: if something fails, nothing has changed. In
    place, the code of before goes, and all other files stay.

    Args:
        folder: Folder of the checkpoint; of a run, that of its final weights or one of its checkpoint-N.
        output: Folder of the refreshed checkpoint, empty or new; None: in place.

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
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no checkpoint: it has no config.json; an adapter has no code to refresh")
    content = read_json(folder / "config.json")
    names = content.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str) or names[0] not in MODELS:
        raise ValueError(
            f"{folder} holds no checkpoint of these models: its config.json has architectures {repr(names)[:60]}"
        )
    declared = declared_weights(sorted(folder.glob("model*.safetensors")))
    try:
        given = {key: value for key, value in content.items() if key != "auto_map"}
        model = build_skeleton(MODELS[names[0]], MODELS[names[0]].config_class.from_dict(given), declared)
    except Exception as error:  # of all kinds: values of wrong types reach code of libraries
        raise ValueError(f"{folder / 'config.json'} is wrong ({reason_of(error)}): use another checkpoint") from error
    check_fit(folder, model, declared)
    return model


def code_of(folder: Path) -> set[str]:
    """Names of the files with code that the auto_map of a checkpoint names, and of those that they import."""
    files = set()
    for name in ("config.json", PROCESSOR):
        path = folder / name
        targets = read_json(path).get("auto_map") if path.is_file() else None
        for target in targets.values() if isinstance(targets, dict) else ():
            if not isinstance(target, str):
                raise ValueError(f"{path} has an auto_map to {repr(target)[:60]}; correct it to FILE.CLASS")
            module = folder / f"{target.rpartition('--')[2].split('.')[0]}.py"
            if module.is_file():
                files |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return files


def save_without_weights(model: PreTrainedModel, folder: Path, output: Path) -> None:
    """Writes what `save_pretrained` does of a model and its processor, but no weights and no tokenizer, which stay."""
    model.config.save_pretrained(output)
    custom_object_save(model, output)
    if (folder / PROCESSOR).is_file():
        try:
            processor = MegaTransformerProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries of its parts raise nothing narrower
            raise ValueError(f"the processor in {folder} is damaged ({reason_of(error)}): use another") from error
        processor.save_pretrained(output)
        for path in output.iterdir():
            if path.suffix != ".py" and path.name not in ("config.json", PROCESSOR):
                path.unlink()
