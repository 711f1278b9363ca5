"""Every option has a reader: no field of a configuration class is only declared and checked."""

import ast
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, TrainingArguments

from configs import finetuning, loader, runs
from model import RecurrenceConfig
from model.depth import DepthOptions

ROOT = Path(__file__).parent.parent

# Where the options of a class are read, and what the object is called there (a regular expression). A class inside
# another is also read as `config.<its name there>`.
READERS = {
    "MegaTransformerTextConfig": ("model", r"(self\.)?(text_)?config"),
    "MegaTransformerConfig": ("model", r"(self\.)?config"),
    "MegaTransformerSeq2SeqConfig": ("model", r"(self\.)?config"),
    "MegaTransformerMultimodalSeq2SeqConfig": ("model", r"(self\.)?config"),
    "MegaTransformerSourceConfig": ("model", r"(self\.)?(text_)?config"),
    "MegaTransformerTargetConfig": ("model", r"(self\.)?(text_)?config"),
    "MegaTransformerVisionConfig": ("model", r"(self\.)?config"),
    "MegaTransformerAudioConfig": ("model", r"(self\.)?config"),
    "MegaTransformerImageWriterConfig": ("model", r"(self\.)?(output_head\.)?config"),
    "MegaTransformerAudioWriterConfig": ("model", r"(self\.)?(output_head\.)?config"),
    "MegaTransformerImageAutoencoderConfig": ("model", r"(self\.)?config"),
    "MegaTransformerVocoderConfig": ("model", r"(self\.)?config"),
    "RecurrenceConfig": ("model", r"(self\.)?(config|recurrence)"),
    "TokenizerConfig": ("dataset_loading", "config"),
    "DataConfig": ("dataset_loading", "config"),
    "SourceConfig": ("dataset_loading", "source"),
    "AugmentationConfig": ("dataset_loading/augmentation.py", r"(self\.)?config"),
    "ImageAugmentationConfig": ("dataset_loading/augmentation.py", r"(self\.)?config(\.image)?"),
    "AudioAugmentationConfig": ("dataset_loading/augmentation.py", r"(self\.)?config(\.audio)?"),
    "TextAugmentationConfig": ("dataset_loading/augmentation.py", r"(self\.)?config(\.text)?"),
    "CallbacksConfig": ("callbacks", "config"),
    "SamplesConfig": ("callbacks/samples.py", r"(self\.)?config"),
    "MediaSamplesConfig": ("callbacks/media_samples.py", r"(self\.)?config"),
    "GeneratedMediaConfig": ("callbacks/generated_media.py", r"(self\.)?config"),
    "PicturesConfig": ("callbacks/pictures.py", r"(self\.)?config"),
    "NonFiniteConfig": ("callbacks/non_finite.py", r"(self\.)?config"),
    "StabilityConfig": ("callbacks/stability.py", r"(self\.)?config"),
    "RecurrentTrainingArguments": ("trainers callbacks/stability.py", r"(self\.)?args"),
    "ModalityWeights": ("trainers/losses.py", "weights"),
    "ObjectiveOptions": ("trainers", r"(self\.)?options|self\.objective"),
    "ParameterGroup": ("trainers/parameter_groups.py", "group"),
    "GradientFilterOptions": ("trainers/gradient_filters.py", r"(self\.)?options|self"),
    "ModelOptions": ("configs/finetuning.py", r"options|run\.model"),
    "PeftOptions": ("trainers/finetuning.py", "options"),
    "TargetOptions": ("trainers/finetuning.py", "options"),
    "StepLoraOptions": ("configs/finetuning.py", "options"),
    "QuantizationConfig": ("model/quantization.py", "config"),
}
# Fields that transformers reads: it ties the weights, and its generation takes ids from them. Those of placeholders are
# read by names made of the modality's.
READ_BY_TRANSFORMERS = {"tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
OF_PLACES = ("{}_token_id", "written_{}_token_id", "{}_start_token_id", "{}_end_token_id")
READ_BY_TRANSFORMERS |= {name.format(modality) for name in OF_PLACES for modality in ("image", "audio")}


def classes_within(cls: type, path: str = "") -> Iterable[tuple[type, str]]:
    """A configuration class and those in it, each with the name of the field that holds it."""
    yield cls, path
    for name, hint in loader.option_types(cls).items():
        if nested := loader.nested_class(hint):
            yield from classes_within(nested, name)


def attributes_read(source: str, cls: str) -> set[tuple[str, str]]:
    """(object, attribute) of each attribute read, leaving out the class `cls`; its properties are ("property", ...)."""
    found = set()

    def visit(node: ast.AST, place: str) -> None:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            place = "class"
        elif (
            place == "class"
            and isinstance(node, ast.FunctionDef)
            and "property" in map(ast.unparse, node.decorator_list)
        ):
            place = "property"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and place != "class":
            found.add(("property" if place == "property" else ast.unparse(node.value), node.attr))
        for child in ast.iter_child_nodes(node):
            visit(child, place)

    visit(ast.parse(source), "elsewhere")
    return found


def unread(cls: type, fields: Iterable[str], field_name: str, files: Iterable[Path], receiver: str | None) -> set[str]:
    """The fields that none of the files reads from an object of that name."""
    pattern = "|".join(filter(None, (rf"(.*\.)?config\.{field_name}", "property", receiver)))
    reads = {found for path in files for found in attributes_read(path.read_text(), cls.__name__)}
    return set(fields) - {attribute for value, attribute in reads if re.fullmatch(pattern, value)}


def own_fields(cls: type) -> set[str]:
    """Fields that are not inherited from transformers, which reads its own."""
    base = next((base for base in (PreTrainedConfig, TrainingArguments) if issubclass(cls, base)), None)
    inherited = {item.name for item in dataclasses.fields(base)} if base else set()
    by_name = set(DepthOptions.names()) if cls is RecurrenceConfig else set()  # read by `DepthOptions.resolve`
    return {item.name for item in dataclasses.fields(cls) if item.init} - inherited - READ_BY_TRANSFORMERS - by_name


SECTIONS = (*runs.MODEL_CONFIGS.values(), *runs.SECTIONS.values(), *finetuning.SECTIONS.values())
ALL = [found for cls in SECTIONS for found in classes_within(cls)]


@pytest.mark.parametrize(("cls", "name"), dict(ALL).items(), ids=[cls.__name__ for cls in dict(ALL)])
def test_every_option_is_read(cls: type, name: str) -> None:
    assert cls.__name__ in READERS, f"say in READERS where the options of {cls.__name__} are read"
    place, receiver = READERS[cls.__name__]
    places = map(ROOT.joinpath, place.split())
    files = [file for part in places for file in ([part] if part.suffix else sorted(part.rglob("*.py")))]
    assert unread(cls, own_fields(cls), name, files, receiver) == set()


def test_every_part_of_a_run_is_read() -> None:
    """The name of the trainer and the log level too."""
    fields = [item.name for item in dataclasses.fields(runs.RunConfig)]
    names = ("runs", "pretraining", "running")
    files = [ROOT / "pretrain.py", *(ROOT / f"configs/{name}.py" for name in names)]
    assert unread(runs.RunConfig, fields, "run", files, "run") == set()
    fields = [item.name for item in dataclasses.fields(finetuning.FinetuningConfig)]
    files += [ROOT / "configs/finetuning.py"]
    assert unread(finetuning.FinetuningConfig, fields, "run", files, "run|self") == set()


def test_an_option_without_a_reader_is_found(tmp_path: Path) -> None:
    """What is only checked where it is declared, or read from another object, counts as unread."""

    @dataclasses.dataclass
    class PaintConfig:
        colour: str = "red"
        gloss: int = 1
        coats: int = 2

        def __post_init__(self) -> None:
            assert self.gloss > 0

    (tmp_path / "paint.py").write_text(
        "class PaintConfig:\n    def __post_init__(self):\n        self.gloss\n    @property\n    def twice(self):\n"
        "        return 2 * self.coats\n\n"
        "def paint(config, other):\n    config.colour\n    other.gloss\n    config.gloss = 1\n"
    )
    fields = {"colour", "gloss", "coats"}
    assert unread(PaintConfig, fields, "paint", [tmp_path / "paint.py"], "config") == {"gloss"}
