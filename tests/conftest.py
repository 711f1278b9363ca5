"""What all tests share: no network, and the same random numbers in each, whichever run before it."""

import gc
import os

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import logging
import random
from collections.abc import Iterator

import numpy
import pytest
import torch

PREFIXES = ("ACCELERATE_", "FSDP_")


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What libraries hold for good is not looked through again by each collection: trainers ask for one several times,
    and then it is most of what a short training takes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global generators."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Take back what a command that ran before, in another test or in a fixture, has set up for its messages."""
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler).__name__ != "ConsoleHandler"]
    root.setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def undistributed() -> Iterator[None]:
    """Take back what accelerate and transformers have put into the environment for processes that they would start:
    once a test has asked for FSDP, every later trainer of the process would be one of FSDP.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    yield
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished run of a few updates. Read only."""
    import pretrain  # transformers is imported by the tests that need it
    from tests.test_pretrain import write_config

    folder = tmp_path_factory.mktemp("tiny_run")
    argv = ["--config", write_config(folder), "--training.output_dir", folder / "out", "--training.eval_strategy", "no"]
    assert pretrain.main(list(map(str, argv))) == 0
    return folder / "out"
