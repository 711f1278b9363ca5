"""Checkpoints of other projects as ours: `python convert.py huginn`, `ouro` and `retrofit`."""

from .huginn import convert_huginn
from .ouro import convert_ouro

CONVERTERS = {"huginn": convert_huginn, "ouro": convert_ouro}
"""Source -> model, by the command."""
