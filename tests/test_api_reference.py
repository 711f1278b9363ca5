"""docs/api.md: up to date, and complete."""

import importlib
import re

import pytest

import model
from configs import api_reference

PAGE = api_reference.PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### ([^\n]+)\n\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


def test_page_is_up_to_date():
    assert api_reference.render_names() == PAGE, "docs/api.md is stale: run `make docs` and commit it"


@pytest.mark.parametrize("name", model.__all__)
def test_a_public_name_has_a_file_and_a_text(name):
    assert re.match(r"`model/\w+\.py`\. \S", SECTIONS[name]), SECTIONS[name]


@pytest.mark.parametrize(("heading", "module", "name"), [(row[0], *row[2:]) for row in api_reference.REGISTRIES])
def test_an_entry_of_a_registry_has_a_text(heading, module, name):
    texts = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", SECTIONS[heading], flags=re.MULTILINE))
    assert list(texts) == list(getattr(importlib.import_module(module), name))
    assert all(texts.values())


def test_signatures_are_those_of_the_code():
    """Compared with what Python shows, in which types have their modules in front."""
    shown = re.search(r"```python\nRecurrentCache(.*?)\n```", SECTIONS["RecurrentCache"], flags=re.DOTALL)[1]
    names = re.findall(r"(\w+):", shown)
    assert names == ["config", "policy", "num_kept_steps", "max_length", "max_steps", "num_kept_tokens"]
    assert "max_steps: int | None = None" in shown


def test_options_of_generate_are_there():
    section = PAGE.split("## `generate`")[1].split("\n### ")[0]
    for option in ("num_steps", "exit_criterion", "cache_policy", "generation_mode", "guidance_scale"):
        assert re.search(rf"^\| `[^`]*\b{option}\b", section, flags=re.MULTILINE), option
