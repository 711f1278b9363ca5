"""What all tests share: no network, and the same random numbers in each, whichever run before it."""

import os

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import random

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global generators."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
