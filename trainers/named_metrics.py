"""Metrics of TRL's trainers under the names of their sources."""

import math
from typing import Any

from transformers import Trainer


class NamedMetrics(Trainer):
    """Goes behind a trainer of TRL, whose metrics of an evaluation do not say which of several it was."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As eval_SOURCE_NAME, like the loss; without those that were never a number."""
        loss = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), None)
        if loss is not None:
            source = loss.removesuffix("loss")
            for name in [name for name in logs if name.startswith("eval_") and not name.startswith(source)]:
                value = logs.pop(name)
                if value is not None and not math.isnan(value):
                    logs[source + name.removeprefix("eval_")] = value
        super().log(logs, *args, **kwargs)
