"""docs/many_machines.md and the files of `accelerate launch`: what they name is there, and is what accelerate reads."""

import inspect
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.elastic.multiprocessing.api import PContext

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def test_what_the_page_names_is_there():
    text = PAGE + "".join(path.read_text() for path in FILES)
    paths = set(re.findall(r"(?:configs|tests)/[\w/]+\.(?:yaml|py)", text))
    assert len(paths) >= 8
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_torchrun_gives_its_ranks_as_many_seconds_as_the_page_says():
    seconds = inspect.signature(PContext.close).parameters["timeout"].default
    assert f"`torchrun` gives its ranks {seconds} seconds" in PAGE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_accelerate_reads_each_file_and_its_header_says_that_it_was_not_run(path):
    """An unknown key is an error there."""
    config = load_config_from_file(str(path))
    assert "Not run" in path.read_text().replace("#", "")
    assert config.num_processes == 8 * config.num_machines
    if path.name.startswith("fsdp2"):
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
