"""The table of docs/optimizers.md says what the code refuses, and that is one clear error."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainers import PlannedTrainingArguments
from trainers.gradient_filters import GradientFilterOptions
from trainers.optimizers import OPTIMIZERS, check_distribution

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
COLUMNS = {"one process, DDP": (None, False), "FSDP2": (None, True)} | {
    f"ZeRO-{stage}": ({"stage": stage}, False) for stage in range(4)
}


def cells():
    """Option, column, and what stands there."""
    table = PAGE.read_text(encoding="utf-8").split("## Where they run")[1].split("\n\n")[1]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [(row[0], column, cell) for row in rows[2:] for column, cell in zip(rows[0][1:], row[1:], strict=True)]


def arguments(option="", **others):
    """What of a run's arguments is looked at."""
    kind, _, name = option.partition(": ")
    given = {
        "optim": name if kind == "optim" else "adamw_torch",
        "optimizer_name": name if kind == "optimizer" else None,
        "gradient_filter": GradientFilterOptions("ema" if kind == "gradient_filter" else None),
        "max_grad_norm": 0.0,
        "fp16": False,
    }
    return SimpleNamespace(**given | others)


def test_all_optimizers_are_in_the_table():
    assert {option for option, _, _ in cells() if option.startswith("optimizer")} == {
        f"optimizer: {name}" for name in OPTIMIZERS
    }
    assert {column for _, column, _ in cells()} == set(COLUMNS)


@pytest.mark.parametrize(("option", "column", "cell"), cells())
def test_a_cell_is_what_the_code_says(option, column, cell):
    zero, is_fsdp = COLUMNS[column]
    if cell == "works":
        check_distribution(arguments(option), zero, is_fsdp)
        return
    assert cell == "error"
    where = "FSDP" if is_fsdp else column
    with pytest.raises(ValueError, match=f"{re.escape(option.partition(': ')[2])}.* {where}.*; .*take .*DDP") as error:
        check_distribution(arguments(option), zero, is_fsdp)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("deepspeed", [{"zero_optimization": {"stage": 2}}, "configs/deepspeed/zero2.json"])
def test_it_is_refused_with_the_arguments(deepspeed):
    """Before data, model or folder are there; also of a run that is only planned."""
    given = {"output_dir": "unused", "deepspeed": deepspeed, "optimizer": "adamuon", "muon_learning_rate": 0.01}
    with pytest.raises(ValueError, match=r"training\.optimizer is 'adamuon', which does not run under ZeRO-2"):
        PlannedTrainingArguments(**given)
    given |= {"optimizer": "muon", "max_grad_norm": 0.0}
    assert PlannedTrainingArguments(**given).optimizer_name == "muon"


@pytest.mark.parametrize(
    ("others", "zero", "message"),
    [
        (
            {"max_grad_norm": 1.0},
            {},
            "max_grad_norm is 1.0, but under ZeRO-2 DeepSpeed would clip Muon's .*; set it to 0",
        ),
        ({"optim": "sgd"}, {}, "training.optim is sgd, but DeepSpeed's Muon trains all but matrices with AdamW; leave"),
        (
            {},
            {"offload_optimizer": {"device": "cpu"}},
            "'muon', which does not run with offload_optimizer .*; take it out",
        ),
    ],
)
def test_what_muon_does_not_do_under_zero(others, zero, message):
    with pytest.raises(ValueError, match=message):
        check_distribution(arguments("optimizer: muon", **others), {"stage": 2, **zero}, False)


def test_gradient_filters_are_refused_with_fp16():
    """A fused optimizer makes a step of gradients that overflowed, and looks at them itself."""
    given = {"output_dir": "unused", "gradient_filter": GradientFilterOptions("ema")}
    with pytest.raises(ValueError, match=r"name is 'ema', but with fp16 .*; set bf16 in place of fp16") as error:
        PlannedTrainingArguments(**given, fp16=True)
    assert "\n" not in str(error.value)
    assert PlannedTrainingArguments(**given, bf16=True).bf16
