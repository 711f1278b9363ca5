"""docs/config.md: up to date, complete, and true of the classes; read back from its Markdown."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from transformers import TrainingArguments

import configs
from callbacks import CallbacksConfig
from configs import flatten_keys, load_run_config, loader, reference
from configs.finetuning import FinetuningConfig
from dataset_loading.configuration import DataConfig, SourceConfig, TokenizerConfig
from model import (
    MegaTransformerAudioConfig,
    MegaTransformerAudioWriterConfig,
    MegaTransformerImageAutoencoderConfig,
    MegaTransformerImageWriterConfig,
    MegaTransformerTextConfig,
    MegaTransformerVisionConfig,
    MegaTransformerVocoderConfig,
)
from trainers import RecurrentTrainingArguments
from trainers.dpo import PreferenceArguments
from trainers.finetuning import FINETUNERS, ModelOptions
from trainers.grpo import RolloutArguments
from trainers.parameter_groups import ParameterGroup
from trainers.sft import SupervisedArguments

PAGE = reference.PAGE.read_text(encoding="utf-8")
GENERATED = {"kind": "generated", "task": "stories"}
SOURCES = "data.train, data.validation"
LISTS = {SOURCES, "training.parameter_groups"}  # groups of which a run has any number
MEDIA = ["--model.model_type", "megatransformer", "--model.vision_config.patch_size", "8"]
MEDIA += ["--model.audio_config.subsampling", "4", "--model.image_writer_config.patch_size", "8"]
MEDIA += ["--model.audio_writer_config.frames_per_token", "4"]
CODECS = {
    f"model [{model_type}]": ["--model.model_type", model_type, "--trainer", "reconstruction"]
    for model_type in ("megatransformer_image_autoencoder", "megatransformer_vocoder")
}
SORTING = ["--data.packing", "false", "--data.train", "[{kind: generated, task: sorting, loss_on: answer}]"]
SEQ2SEQ = {"model [megatransformer_seq2seq]": ["--model.model_type", "megatransformer_seq2seq", *SORTING]}
OTHERS = CODECS | SEQ2SEQ  # models that are not the default
SUMS = ["model [megatransformer_multimodal_seq2seq]"]  # those whose options are listed with others
TUNING = ["--model.path", "some/run"]
OF_TUNING = ["The run [finetune.py]", "model [finetune.py]", "peft", "peft.target_modules", "step_lora", "quantization"]
OF_TRAINERS = {f"training [{name}]": name for name in FINETUNERS if name not in ("continued", "exit_probe")}


class Line(NamedTuple):
    """A row of a table."""

    group: str
    key: str
    type: str
    default: str
    meaning: str

    @property
    def name(self) -> str:
        """The first of `names`."""
        return self.names[0]

    @property
    def names(self) -> list[str]:
        """The option in a YAML, in all places where its class stands."""
        keys = self.group.partition(" [")[0]
        groups = [""] if keys == "The run" else [f"{key}." for key in keys.split(", ")]
        return [f"{group}{self.key}" for group in groups]


def lines_of(page: str) -> list[Line]:
    """The rows of all tables."""
    lines, group = [], ""
    for text in page.splitlines():
        if text.startswith("#"):
            group = text.lstrip("# ")
        elif text.startswith("| `"):
            cells = text.removeprefix("| ").removesuffix(" |").split(" | ")
            lines.append(Line(group, cells[0].strip("`"), *cells[1:]))
    return lines


LINES = lines_of(PAGE)
PARTS = ("vision_config", "audio_config", "image_writer_config", "audio_writer_config")
OF_MEDIA = ("model", *(f"model.{part}" for part in PARTS))  # of the class that is not the default


def of(group: str) -> dict[str, Line]:
    return {line.key: line for line in LINES if line.group == group}


def tree_of_defaults() -> dict[str, Any]:
    """Every documented default, as the YAML that a user would write; one source, for its defaults too."""
    tree: dict[str, Any] = {}
    for line in LINES:
        others = {*LISTS, *OF_MEDIA, *OTHERS, *SUMS, *OF_TUNING, *OF_TRAINERS}
        if line.group in others or not line.default.startswith("`"):
            continue
        inner = tree
        for name in line.name.split(".")[:-1]:
            inner = inner.setdefault(name, {})
        inner[line.key] = yaml.safe_load(line.default.strip("`"))
    source = {key: yaml.safe_load(line.default.strip("`")) for key, line in of(SOURCES).items()} | GENERATED
    tree["data"]["train"] = [source]
    return tree


def test_page_is_up_to_date():
    assert reference.render_page() == PAGE, "docs/config.md is stale: run `make docs` and commit it"


def test_the_documented_defaults_are_those_of_the_classes(tmp_path: Path):
    """Written to a YAML and loaded, they give what the classes give without any argument."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree_of_defaults()))
    run = load_run_config(path)
    assert run.model.to_dict() == MegaTransformerTextConfig().to_dict()
    assert run.tokenizer == TokenizerConfig()
    assert run.data == DataConfig(train=[SourceConfig(**GENERATED)])
    assert run.callbacks == CallbacksConfig()
    assert (run.trainer, run.log_level) == ("pretrain", "info")
    for item in dataclasses.fields(RecurrentTrainingArguments):
        if item.name in of("training"):
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            plain = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
            assert run.resolved["training"][item.name] == plain, item.name


def test_the_documented_defaults_of_fine_tuning_are_those_of_the_classes():
    """As those of pretraining; a group that is named has the defaults of its class."""
    tuned = configs.resolve([*TUNING, "--peft.rank", "8", "--step_lora.rank", "4"], FinetuningConfig)
    flat = flatten_keys(tuned) | {"model.path": ""}
    documented = {line.name: line.default for line in LINES if line.group in OF_TUNING and line.default}
    assert {name: yaml.safe_load(default.strip("`")) for name, default in documented.items()}.items() <= flat.items()


def test_every_option_stands_there_once(tmp_path: Path):
    """Those that the loader resolves, flattened, and of training arguments those that differ from the inherited."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"train": [GENERATED]}}))
    theirs = {item.name: (item.default, item.type, item.metadata) for item in dataclasses.fields(TrainingArguments)}
    ours = {
        item.name: (item.default, item.type, item.metadata) for item in dataclasses.fields(RecurrentTrainingArguments)
    }
    expected: set[str] = set()
    for given in ([], MEDIA, *OTHERS.values()):
        resolved = load_run_config(path, given).resolved
        (source,), resolved["data"]["train"] = resolved["data"]["train"], []
        inherited = [name for name in resolved["training"] if ours[name] == theirs.get(name)]
        for name in inherited:
            del resolved["training"][name]
        expected |= {
            *flatten_keys(resolved),
            *(f"{group}.{key}" for group in SOURCES.split(", ") for key in source),
        }
    expected |= {f"training.parameter_groups.{item.name}" for item in dataclasses.fields(ParameterGroup)}
    tuned = configs.resolve([*TUNING, "--peft.rank", "2", "--step_lora.rank", "2"], FinetuningConfig)
    expected |= flatten_keys({name: tuned[name] for name in ("model", "peft", "step_lora", "quantization")}).keys()
    for cls in (SupervisedArguments, PreferenceArguments, RolloutArguments):
        expected |= {f"training.{name}" for name in cls.__annotations__ if name in loader.option_types(cls)}
    assert len({(line.group, line.key) for line in LINES}) == len(LINES)
    groups = {part for line in LINES for part in line.group.partition(" [")[0].split(", ")}
    groups |= {"model.text_config.model_type", "model.encoder_config", "model.decoder_config"}
    parts = ("model.encoder_config.", "model.decoder_config.")  # whose options are those of a text model
    found = {name.replace(part, "model.") for part in parts for name in expected if name.startswith(part)}
    expected = {name for name in expected if not name.startswith(parts)} | found
    documented = {name for line in LINES for name in line.names}
    assert documented - groups == expected - groups


def test_every_option_has_a_meaning_and_a_type():
    assert [line for line in LINES if not (line.meaning.rstrip(" .") and line.type)] == []


def test_links_lead_to_headings():
    anchors = {reference.anchor(line.lstrip("# ")) for line in PAGE.splitlines() if line.startswith("#")}
    links = re.findall(r"\]\(#([\w-]*)\)", PAGE)
    assert links and set(links) <= anchors


def test_choices_are_those_the_loader_takes():
    """An unknown choice is refused with the list of the known ones."""
    named = [line for line in LINES if line.type.startswith('`"') and line.group not in LISTS]
    assert len(named) >= 5
    for line in named:
        choices = set(re.findall(r'`"([^"]+)"`', line.type))
        given = OTHERS.get(line.group, MEDIA if line.group in OF_MEDIA else [])
        given = [] if line.key == "model_type" else given
        kind = configs.RunConfig
        if line.group in (*OF_TUNING, *OF_TRAINERS):
            kind, given = FinetuningConfig, TUNING
        with pytest.raises(ValueError, match="unknown") as error:
            configs.resolve([*given, f"--{line.name}=nonsense"], kind)
        assert set(re.search(r"known: (.*)", str(error.value))[1].split(", ")) == choices


def test_nothing_of_this_machine_is_in_the_page():
    assert "cuda" not in PAGE
    assert not re.search(r"[`'\"]/", PAGE), "an absolute path"


# ------------------------------------------------------------ ranges


BOUND = re.compile(r"\b(at least|above|at most|below) (-?\d+(?:\.\d+)?)", re.IGNORECASE)
NUMBERS = [line for line in LINES if re.match(r"`(int|float)`", line.type)]
# What a class needs to be built at all, and for its other rules to stand aside.
NEEDED = {
    SourceConfig: GENERATED,
    MegaTransformerTextConfig: {"position_embedding": "none", "head_dim": 4},
    MegaTransformerVisionConfig: {"head_dim": 4, "patch_size": 1},
    MegaTransformerAudioConfig: {"head_dim": 4, "hop_length": 1},
    MegaTransformerImageWriterConfig: {"patch_size": 1},
    MegaTransformerAudioWriterConfig: {"hop_length": 1, "num_mel_bins": 1},
    MegaTransformerImageAutoencoderConfig: {"patch_size": 1, "bottleneck": "fsq"},
    MegaTransformerVocoderConfig: {
        "hop_length": 1,
        "num_mel_bins": 1,
        "stft_sizes": [16],
        "clip_seconds": 100.0,
        "sampling_rate": 100_000,
    },
    ParameterGroup: {"pattern": "*"},
    RecurrentTrainingArguments: {"output_dir": "unused", "use_cpu": True},
    SupervisedArguments: {"output_dir": "unused", "use_cpu": True},
    PreferenceArguments: {"output_dir": "unused", "use_cpu": True},
    RolloutArguments: {"output_dir": "unused", "use_cpu": True, "rewards": ["some:reward"]},
    ModelOptions: {"path": "some/run"},
}


# What an option needs besides, to be given at all.
NEEDED_BESIDE = {
    "early_stopping_patience": {"eval_strategy": "steps"},
    "early_stopping_threshold": {"eval_strategy": "steps", "early_stopping_patience": 1},
    "stem_depth": {"stem": "conv", "patch_size": 2},
}


def class_of(line: Line) -> type:
    return next(cls for cls, heading in reference.headings_of_run().items() if heading == line.group)


def is_taken(line: Line, value: float) -> bool:
    cls = class_of(line)
    try:
        cls(**{**NEEDED.get(cls, {}), **NEEDED_BESIDE.get(line.key, {}), line.key: value})
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("line", NUMBERS, ids=lambda line: line.name)
def test_a_documented_bound_is_enforced_and_none_is_missing(line: Line):
    """Just inside is taken, just outside is refused; where no least or largest value stands, -1 and 10 are taken."""
    unit = 1 if line.type.startswith("`int`") else 1e-3
    bounds = {word.lower(): float(number) if unit < 1 else int(number) for word, number in BOUND.findall(line.meaning)}
    for word, value in bounds.items():
        inwards = unit if word in ("at least", "above") else -unit
        inside, outside = (value, value - inwards) if word.startswith("at ") else (value + inwards, value)
        assert is_taken(line, inside), f"{inside} is refused"
        assert not is_taken(line, outside), f"{outside} is taken"
    if not bounds.keys() & {"at least", "above"}:
        assert is_taken(line, -1), "a least value is enforced that the page does not name"
    if unit < 1 and not bounds.keys() & {"at most", "below"}:
        assert is_taken(line, 10.0), "a largest value is enforced that the page does not name"
