"""Writes docs/config.md (`python -m configs.reference`): every option of a run, read from the class that holds it; and
docs/api.md.
"""

import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import docstring_parser
from jsonargparse import ArgumentParser
from transformers import TrainingArguments

from model import (
    CODEC_CONFIGS,
    MegaTransformerConfig,
    MegaTransformerMultimodalSeq2SeqConfig,
    MegaTransformerSeq2SeqConfig,
    MegaTransformerTextConfig,
)
from model.configuration_megatransformer_seq2seq import SHARED
from trainers import RecurrentTrainingArguments
from trainers.arguments import MINIMUMS, SHARES
from trainers.finetuning import FINETUNERS, ModelOptions

from . import api_reference, finetuning
from .loader import build_parser, nested_class, option_types
from .runs import MODEL_CONFIGS, SECTIONS, RunConfig

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
INTRODUCTION = """\
# Configuration

Written by `make docs` from the configuration classes; to change a text, change the docstring in the class.

A run is one YAML with the sections below; what is left out has its default. Every key is also a flag, written with its
section: `--model.recurrence.mean_steps 8`. Several `--config` files may be given; later files and flags override
earlier ones. What is wrong with a key, a type, a choice or a range is said in one line that names the key, before
anything is built. The `config.yaml` of a run folder holds every option as it was resolved. An option that has been
renamed is still read by its old name, and a line on standard error says the new one; one that is gone may still be
given with the value that is left.

`training.optimizer` and `training.rewards` may name functions, which are imported and run. Where a file names one that
is not in `trainers` or `evaluation`, it is refused unless the command line has `--allow-code`, which no file can say.

A YAML holds plain values: a text, a number of 64 bits, true, false, null, lists and mappings, at most 32 in each other,
with each key once. It is UTF-8 of at most 512 KiB, and of 20,000 values, in which each alias counts as all that it
stands for.

`finetune.py` reads `data`, `callbacks` and the sections of [fine-tuning](#the-run-finetunepy): `model` is then another
one, and `training` has the options of the trainer as well.
"""
OF_TRAINING = """\
The options that this project adds to `transformers.TrainingArguments`, or declares anew; all others are those of
`transformers.TrainingArguments`. `metric_for_best_model` is `eval_loss`, the mean of the losses of all validation
sources, or `eval_NAME_loss`, `eval_NAME_perplexity` or `eval_NAME_bits_per_byte` of one; where a best model is
asked for, `eval_loss` by default. `max_steps` is at least 1, or -1 to count in `num_train_epochs`, and
these inherited ones have a range here that transformers does not check:

"""
OF_TUNING = """\
With `trainer: {name}`: the options of [training](#training){theirs}, but for what the other sections
say. Declared here:
"""
HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
# How a validator of transformers words its range, and how we do.
WORDS = {
    "Value must be ": "",
    ", got nan.": "",
    "greater or equal to": "at least",
    "greater than": "above",
    "smaller or equal to": "at most",
    "smaller than": "below",
}


def main() -> None:
    """Write the page, and that of the names of the code."""
    PAGE.write_text(render_page(), encoding="utf-8")
    api_reference.PAGE.write_text(api_reference.render_names(), encoding="utf-8")


def render_page() -> str:
    """The page, in Markdown."""
    headings = headings_of_run()
    parts = [
        INTRODUCTION,
        "## The run\n",
        HEAD + "".join(rows_of_run(build_parser(RunConfig.layout([])))),
    ]
    for cls, heading in headings.items():
        if cls is ModelOptions:
            rows = rows_of_run(build_parser(finetuning.FinetuningConfig.layout([])))
            parts += ["## The run [finetune.py]\n", HEAD + "".join(rows)]
        level = "###" if "." in heading.partition(" [")[0] else "##"
        rows = "".join(rows_of(cls, headings))
        parts += [f"{level} {heading}\n", about(cls), *([HEAD + rows] if rows else [])]
    return "\n".join(parts)


def headings_of_run() -> dict[type, str]:
    """The heading of each class: its keys in a YAML, and, where other classes have the same, what tells it from them,
    which is the type of the model, and the trainer of training arguments.
    """
    of_sequences = (MegaTransformerSeq2SeqConfig, MegaTransformerMultimodalSeq2SeqConfig)
    marks = {cls: cls.model_type for cls in (*CODEC_CONFIGS, *of_sequences)}
    marks |= {ModelOptions: "finetune.py"}
    marks |= {cls: name for name, cls in tuning_arguments().items()}
    found = {cls: ", ".join(keys) for cls, keys in classes_of_run().items()}
    return {cls: f"{keys} [{marks[cls]}]" if cls in marks else keys for cls, keys in found.items()}


def tuning_arguments() -> dict[str, type]:
    """The training arguments of each trainer of fine-tuning that declares some."""
    return {
        name: cls for name, (_, cls) in FINETUNERS.items() if cls is not RecurrentTrainingArguments and documented(cls)
    }


def classes_of_run() -> dict[type, list[str]]:
    """Each class that holds options, outer before inner, and the keys under which it stands in a YAML."""
    found: dict[type, list[str]] = {}

    def add(cls: type, key: str) -> None:
        found.setdefault(cls, []).append(key)
        for name, hint in documented(cls).items():
            if nested := nested_class(hint):
                add(nested, f"{key}.{name}")

    models = (("model", cls) for cls in MODEL_CONFIGS.values())
    tuning = ((key, cls) for key, cls in finetuning.SECTIONS.items() if cls not in SECTIONS.values())
    arguments = (("training", cls) for cls in tuning_arguments().values())
    for key, cls in (*models, *SECTIONS.items(), *tuning, *arguments):
        add(cls, key)
    return found


def documented(cls: type) -> dict[str, Any]:
    """Names and types of the options, in the order of the class; of training arguments, and of the parts of a model of
    sequence to sequence, those declared here; of one that also has media, none.
    """
    own, is_further = inspect.get_annotations(cls), issubclass(cls, TrainingArguments) or is_part(cls) or is_sum(cls)
    return {name: hint for name, hint in option_types(cls).items() if name in own or not is_further}


def is_part(cls: type) -> bool:
    """Whether it is the encoder or the decoder of a model of sequence to sequence, whose options are a text model's."""
    return issubclass(cls, MegaTransformerTextConfig) and cls is not MegaTransformerTextConfig


def is_sum(cls: type) -> bool:
    """Whether it is the model of sequence to sequence with media, whose options are those of two others."""
    return cls is MegaTransformerMultimodalSeq2SeqConfig


def about(cls: type) -> str:
    """What stands under the heading of a class."""
    if cls in tuning_arguments().values():
        bases = [base.__name__ for base in cls.__mro__ if base.__module__.startswith("trl.")]
        name = next(name for name, arguments in tuning_arguments().items() if arguments is cls)
        return OF_TUNING.format(name=name, theirs=f", and what `trl.{bases[0]}` adds" if bases else "")
    if is_part(cls):
        shared = ", ".join(f"`{name}`" for name in SHARED)
        return (
            f"{docstring_parser.parse(cls.__doc__).short_description} Its options are those of "
            f"[a text model](#model-modeltext_config), but for {shared}, which are those of the whole.\n"
        )
    if is_sum(cls):
        seq2seq, media = (anchor(headings_of_run()[it]) for it in (MegaTransformerSeq2SeqConfig, MegaTransformerConfig))
        return (
            f"{docstring_parser.parse(cls.__doc__).short_description} Its options are those of [a model of sequence to "
            f"sequence](#{seq2seq}), and but for `text_config` those of [a model with media](#{media}).\n"
        )
    if not issubclass(cls, TrainingArguments):
        return f"{docstring_parser.parse(cls.__doc__).short_description}\n"
    inherited = {name: f"at least {least}" for name, least in MINIMUMS.items() if name not in documented(cls)}
    inherited |= {name: "from 0 to below 1" for name in SHARES if name not in documented(cls)}
    lines = [
        f"- {words}: {', '.join(f'`{name}`' for name in inherited if inherited[name] == words)}\n"
        for words in dict.fromkeys(inherited.values())
    ]
    return OF_TRAINING + "".join(lines)


def rows_of_run(parser: ArgumentParser) -> Iterator[str]:
    """The keys outside of the sections."""
    meanings = descriptions(RunConfig)
    for action in parser._actions:
        if action.dest in meanings.keys() - {"model", *SECTIONS}:
            choices = Literal[tuple(action.metavar.strip("{}").split(","))]
            yield row(action.dest, type_in_words(choices), code(action.default), meanings[action.dest])


def rows_of(cls: type, headings: dict[type, str]) -> Iterator[str]:
    """The options of a class."""
    fields, meanings = {item.name: item for item in dataclasses.fields(cls)}, descriptions(cls)
    if cls in MODEL_CONFIGS.values():
        meaning = "Selects the class of this section."
        yield row("model_type", type_in_words(Literal[tuple(MODEL_CONFIGS)]), code(cls.model_type), meaning)
    for name, hint in documented(cls).items():
        nested, is_list = nested_class(hint), typing.get_origin(hint) is list
        kind = f"[{'list' if is_list else 'group'}](#{anchor(headings[nested])})" if nested else type_in_words(hint)
        default = "" if nested and not is_list else default_of(fields[name])
        yield row(name, kind, default, f"{meanings.get(name, '')} {range_of(cls, fields[name])}")


def row(key: str, kind: str, default: str, meaning: str) -> str:
    """A line of a table."""
    cells = (f"`{key}`", kind, default, " ".join(meaning.split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def code(value: Any) -> str:
    """A value as it would be written in a YAML."""
    return f"`{json.dumps(value)}`"


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def descriptions(cls: type) -> dict[str, str]:
    """The docstrings of the fields, inherited ones included."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return {
        item.arg_name: item.description for base in bases for item in docstring_parser.parse_from_object(base).params
    }


def type_in_words(hint: Any) -> str:
    """Choices spelled out; a whole number where a float is expected goes without saying."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    words = []
    for part in parts:
        if typing.get_origin(part) is Literal:
            words += [json.dumps(value) for value in typing.get_args(part)]
        elif not (part is int and float in parts):
            name = part.__name__ if isinstance(part, type) else str(part).replace("typing.", "")
            words.append("null" if part is NoneType else name)
    return " or ".join(f"`{word}`" for word in words)


def default_of(item: dataclasses.Field) -> str:
    """What stands where the option is left out."""
    if item.default_factory is not dataclasses.MISSING:
        return code(item.default_factory())
    return "required" if item.default is dataclasses.MISSING else code(item.default)


def range_of(cls: type, item: dataclasses.Field) -> str:
    """The range that a table or a validator enforces, as a sentence; other rules stand in the docstrings."""
    if issubclass(cls, TrainingArguments) and item.name in MINIMUMS:
        return f"At least {MINIMUMS[item.name]}."
    for validator in item.metadata.get("validator", ()):
        try:
            validator(math.nan)  # lies in no interval, so that the error says which
        except ValueError as error:
            message = re.sub(r"\.0\b", "", str(error))
            for theirs, ours in WORDS.items():
                message = message.replace(theirs, ours)
            return f"{message.capitalize()}."
    return ""


if __name__ == "__main__":
    main()
