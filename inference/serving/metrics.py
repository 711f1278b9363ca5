"""The counters of the server, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .messages import Load

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Bounds of the histogram of steps."""


class Metrics:
    """Counters of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        of = {"registry": self.registry, "namespace": "megatransformer"}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **of)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts that were answered.", **of)
        self.new_tokens = Counter("new_tokens", "Tokens of answers.", **of)
        self.steps = Histogram("steps_per_token", "Core steps of each new token.", buckets=STEPS, **of)
        self.launches = Counter("launches", "Launches of the core.", **of)
        self.items = Counter("items", "Tokens in launches of the core, drafts among them.", **of)
        self.batch = Gauge("batch", "Tokens in a launch of the core, lately.", **of)
        self.running = Gauge("jobs", "Answers that are not finished, those that wait among them.", **of)
        self.ready = Gauge("workers_ready", "Workers that take requests.", **of)
        self.deaths = Counter("worker_deaths", "Workers that died.", **of)

    def take_load(self, load: Load) -> None:
        """Adds the work of a worker."""
        self.launches.inc(load.launches)
        self.items.inc(load.items)
        self.batch.set(load.items / load.launches)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
