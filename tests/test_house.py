"""How much a newcomer has to hold in mind, counted: files, lines, names, ways through the code.

Each count has a bound, which is what has been reached. A change that goes beyond it has to be worth it: then the bound
is raised, and the commit says why. One that comes below it lowers the bound.
"""

import ast
import inspect
import itertools
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
from torch import nn

import pretrain
from configs import load_config, read_yaml
from dataset_loading import build_datasets, build_tokenizer
from model import MegaTransformerForCausalLM
from tests.test_config_reference import LINES
from tests.test_pretrain import write_config
from tests.tiny import tiny_model
from tests.tiny_media import tiny_inputs, tiny_media_model
from tests.tiny_media_run import write_media_config

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "dataset_loading", "trainers", "callbacks", "configs", "evaluation", "inference")
SCRIPTS = sorted(ROOT.glob("*.py"))
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")) + SCRIPTS
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
# What reaches the reader of any command, and so may be defined once in each.
OF_COMMANDS = {"main", "build_parser"}

BOUNDS = {
    "scripts": 3,
    "files": 244,
    "lines": 48_408,
    "names defined twice": 0,
    "names of the text model's forward": 20,
    "lines that a text checkpoint exports": 5_557,
    "frames to the loss": 8,
    "frames to the loss, with media": 9,
    "stays in files while data are built": 38,
    "texts without a subject": 0,
    "forms of pixel_values in the model file": 2,
    "classes of the image modality": 11,
    "files of a further modality": 2,
    "options of a run": 381,
    "options that no YAML sets": 146,
}


def check(name: str, count: int) -> None:
    """Compare a count with its bound."""
    assert count <= BOUNDS[name], f"{name}: {count}, and {BOUNDS[name]} had been reached"


def test_scripts():
    check("scripts", len(SCRIPTS))


def test_files_and_lines():
    check("files", len(FILES))
    check("lines", sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES))


def test_names_that_are_defined_twice():
    """Public functions and classes of the same name in several files: a reader cannot know which is meant."""
    places = defaultdict(set)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places[node.name].add(path)
    twice = {name for name, files in places.items() if len(files) > 1} - OF_COMMANDS
    check("names defined twice", len(twice))


def accepted(function) -> set[str]:
    """The names of a function's arguments, those of a typed **kwargs included."""
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            typed = getattr(parameter.annotation, "__args__", ())  # Unpack[TypedDict]
            names |= {key for part in typed for key in inspect.get_annotations(part)}
        else:
            names.add(name)
    return names - {"self"}


def test_names_that_forward_accepts():
    names = accepted(MegaTransformerForCausalLM.forward)
    assert {"input_ids", "attention_mask", "labels", "num_steps", "initial_state"} <= names
    check("names of the text model's forward", len(names))


def test_lines_that_a_text_checkpoint_exports(tmp_path):
    """Lines that are not empty."""
    tiny_model().save_pretrained(tmp_path)
    exported = sorted(tmp_path.glob("*.py"))
    assert any(path.name.startswith("modeling_megatransformer") for path in exported)
    lines = (line for path in exported for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    check("lines that a text checkpoint exports", sum(1 for _ in lines))


def own_frames(stack: list[str], begin: str) -> list[str]:
    """The functions of this project on the way from a function, which is included."""
    own = [name for name in stack if name]
    return own[own.index(begin) :]


def frames_to_the_loss(config: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Own frames from `pretrain.py main` to the line that calls torch's cross entropy, at the first step."""
    ways: list[list[str]] = []
    original = nn.functional.cross_entropy

    def noted(*args, **kwargs):
        ways.append([frame.name if is_own(frame.filename) else "" for frame in traceback.extract_stack()])
        return original(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "cross_entropy", noted)
    assert pretrain.main(["--config", str(config)]) == 0
    return len(own_frames(ways[0], "main"))


def is_own(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in (*ROOMS, *(path.name for path in SCRIPTS))


def test_frames_from_main_to_the_loss(tmp_path, monkeypatch):
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 1}
    config = write_config(tmp_path, training=training)
    check("frames to the loss", frames_to_the_loss(config, monkeypatch))


@pytest.mark.slow
def test_frames_from_main_to_the_loss_with_media(tmp_path, monkeypatch):
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 1}
    check(
        "frames to the loss, with media",
        frames_to_the_loss(write_media_config(tmp_path, training=training), monkeypatch),
    )


def test_stays_in_files_while_data_are_built(tmp_path):
    """How often the reader who follows `build_datasets`, each function once, has to turn to another file."""
    run = load_config(["--config", str(write_config(tmp_path))])
    tokenizer = build_tokenizer(run.tokenizer, run.data, seed=0)
    functions: dict[CodeType, str] = {}  # in the order in which they are reached

    def follow(frame, event, argument):
        if event == "call" and is_own(frame.f_code.co_filename):
            functions.setdefault(frame.f_code, frame.f_code.co_filename)

    sys.setprofile(follow)
    try:
        build_datasets(run.data, tokenizer, seed=0, vocab_size=run.model.vocab_size, batch_size=2)
    finally:
        sys.setprofile(None)
    files = list(functions.values())
    check("stays in files while data are built", sum(1 for _ in itertools.groupby(files)))


def test_forms_of_pixel_values():
    """The expressions, such as `kwargs[...]`, by which the file of the models with media reaches the pixels that are
    given to `forward`, until an encoder has them.
    """
    model, inputs, found = tiny_media_model(), tiny_inputs(), set()
    file = inspect.getsourcefile(type(model))

    def forms_in(frame) -> Iterator[str]:
        for name, value in frame.f_locals.items():
            parts = getattr(value, "__dict__", {})
            for place, holder in {name: value, **{f"{name}.{part}": parts[part] for part in parts}}.items():
                if holder is inputs["pixel_values"]:
                    yield place
                elif isinstance(holder, dict) and any(it is inputs["pixel_values"] for it in holder.values()):
                    yield f"{place}[...]"

    def follow(frame, event, argument):
        if frame.f_code.co_filename != file:
            return None
        found.update(forms_in(frame))
        return follow

    before = sys.gettrace()
    sys.settrace(follow)
    try:
        model(**inputs, num_steps=2)
    finally:
        sys.settrace(before)
    assert found
    check("forms of pixel_values in the model file", len(found))


def test_classes_of_the_image_modality():
    """Classes in `model` whose names say image or vision, and those in files named after images: what is read of them
    (modality, processor, encoder), what is generated (codec, autoencoder and its parts), and their configurations.
    """
    names = {
        node.name
        for path, tree in TREES.items()
        for node in tree.body
        if path.parent == ROOT / "model" and isinstance(node, ast.ClassDef)
        if re.search("Image|Vision", node.name) or path.name.startswith("image_")
    }
    assert {"ImageModality", "MegaTransformerVisionModel", "MegaTransformerImageAutoencoder"} <= names
    check("classes of the image modality", len(names))


def test_files_of_a_further_modality():
    """Those that the recipe in `docs/change.md` edits or adds, which `tests/test_change_page.py` carries out: with them
    a modality is read from sources of data, trained on, saved with its code, and asked about, as images are.
    """
    page = (ROOT / "docs/change.md").read_text(encoding="utf-8")
    recipe = page.split("\n## Modality\n")[1].split("\n## ")[0]
    files = set(re.findall(r"^`([\w/]+\.py)`:$", recipe, re.MULTILINE))
    assert "model/modalities.py" in files and f"| [Modality](#modality) | {len(files)} |" in page
    check("files of a further modality", len(files))


def names_in(tree: object) -> set[str]:
    """The names of all groups and options in a YAML."""
    if isinstance(tree, list):
        return {name for item in tree for name in names_in(item)}
    return {str(key) for key in tree} | names_in(list(tree.values())) if isinstance(tree, dict) else set()


def test_options():
    """The rows of docs/config.md, and those whose names are in no file of configs/."""
    names = names_in([read_yaml(path) for path in sorted((ROOT / "configs").glob("*.yaml"))])
    options = {(line.group, line.key) for line in LINES}
    unset = {(group, key) for group, key in options if key not in names}
    assert ("peft", "rank") in options - unset and ("model, model.text_config", "qk_norm") in unset
    check("options of a run", len(options))
    check("options that no YAML sets", len(unset))


# A text that begins with one of these says of nothing what it is.
PREPOSITIONS = {"of", "in", "as", "by", "with", "from", "for", "to", "at", "on", "under", "beside", "among", "behind"}


def said() -> Iterator[str]:
    """Docstrings of modules, classes and functions, the entries below "Args:" in them, and help texts of options."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                yield text
                yield from (found[1] for found in re.finditer(r"^ {4}\w+: (\S.*)$", text, re.MULTILINE))
            if (
                isinstance(node, ast.keyword)
                and node.arg == "help"
                and isinstance(node.value, (ast.Constant, ast.JoinedStr))
            ):
                yield ast.unparse(node.value).lstrip("f").strip("'\"")


def test_texts_without_a_subject():
    """Such as "Of the deltas, at least 1." instead of "Rank of the low-rank update, at least 1."."""
    without = [text for text in said() if text.split()[0].strip(",.:").lower() in PREPOSITIONS]
    check("texts without a subject", len(without))
