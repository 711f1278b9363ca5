"""Training arguments of a run that is only planned."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .arguments import RecurrentTrainingArguments


class PlannedTrainingArguments(RecurrentTrainingArguments):
    """Checked like those of a run, but for what only the machine of the run can answer: whether its GPUs know bf16 and
    TF32, what is installed there, and whether its processes find each other. No device, process group or DeepSpeed
    engine is set up.
    """

    def __post_init__(self) -> None:
        deepspeed, self.deepspeed = self.deepspeed, None
        self.use_cpu, self.tf32 = True, None
        super().__post_init__()
        self.deepspeed = deepspeed

    def _check_device(self) -> None:
        """Nothing: the machine of the run is another one."""

    def _installed_integrations(self) -> list[str]:
        """All: the machine of the run is another one."""
        return list(INTEGRATION_TO_CALLBACK)

    @property
    def device(self) -> torch.device:
        """Where the model of a plan stands: it has shapes and no numbers."""
        return torch.device("meta")

    @property
    def world_size(self) -> int:
        """Number of ranks of the planned run: WORLD_SIZE, 1 where that is not set.

        Raises:
            ValueError: if it is no number of processes.
        """
        text = os.environ.get("WORLD_SIZE", "1")
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"WORLD_SIZE is {text!r} in the environment; give the number of GPUs, at least 1")
        return int(text)

    @property
    def deepspeed_settings(self) -> dict[str, Any] | None:
        """Content of the DeepSpeed file; None for a run without DeepSpeed."""
        if not isinstance(self.deepspeed, str):
            return self.deepspeed
        return json.loads(Path(self.deepspeed).read_text(encoding="utf-8"))
