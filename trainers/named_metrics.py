"""Metrics of TRL's trainers under the names of their sources."""

import math
from typing import Any


class NamedMetrics:
    """Goes before a trainer of TRL, whose metrics of an evaluation do not say which of several it was."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As eval_SOURCE_NAME, like the loss; without those that were never a number."""
        loss = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), None)
        if loss is not None:
            source = loss.removeprefix("eval_").removesuffix("loss")
            metrics = self._metrics["eval"]
            named = {source + name: values for name, values in metrics.items() if not all(map(math.isnan, values))}
            metrics.clear()
            metrics.update(named)
        super().log(logs, *args, **kwargs)
