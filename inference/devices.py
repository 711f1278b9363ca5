"""What this machine computes with. A broken driver is reported, never raised."""

import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

# What torch raises for a missing, mismatched or crashed driver, and for a build without CUDA.
DEVICE_ERRORS = (RuntimeError, AssertionError, OSError)

DTYPES = ("float32", "bfloat16", "float16")
PARAMETERS_PER_THREAD = 1_000_000
"""A model gets a thread for each so many. With fewer, a further thread gains little on an idle machine, and makes an
update ten times as slow where others compute as well: docs/performance.md has the figures.
"""
MOST_THREADS = torch.get_num_threads()
"""The number with which torch begins: OMP_NUM_THREADS, or the cores."""


def attempt(what: str, query: Callable[[], str]) -> str:
    """The answer of a device query, or a line that names its failure."""
    try:
        return query()
    except DEVICE_ERRORS as error:
        reason = " ".join(str(error).split()) or "no message"
        return f"{what}: query failed ({type(error).__name__}: {reason})"


def device_report() -> str:
    """A few lines on CPU, memory, GPUs and the number formats they compute in; a broken device is one of the lines."""
    lines = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        attempt("CPU", lambda: f"CPU: {cpu_model()}, {usable_cores()} cores usable, {', '.join(DTYPES[:2])}"),
        attempt(
            "memory", lambda: f"memory: {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
        ),
        attempt("CUDA", describe_cuda),
    )
    return "\n".join(lines)


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The name on the chip as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_cuda() -> str:
    """One line per GPU; a GPU that does not answer does not hide the others."""
    if not torch.cuda.is_available():
        return "CUDA: none available" + ("" if torch.version.cuda else " (torch is built without it)")
    count = torch.cuda.device_count()
    return "\n".join(attempt(f"GPU {index}", lambda index=index: describe_gpu(index)) for index in range(count))


def describe_gpu(index: int) -> str:
    """Name, memory, compute capability and number formats of one GPU."""
    properties = torch.cuda.get_device_properties(index)
    formats = [name for name in DTYPES if name != "bfloat16" or properties.major >= 8]
    return (
        f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
        f"compute capability {properties.major}.{properties.minor}, {', '.join(formats)}"
    )


def best_device() -> torch.device:
    """The first GPU if one answers, else the CPU."""
    try:
        if torch.cuda.is_available():
            torch.cuda.get_device_properties(0)
            return torch.device("cuda", 0)
    except DEVICE_ERRORS:  # `device_report` names the failure
        pass
    return torch.device("cpu")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, tried out; the best one that works where no name is given.

    Raises:
        ValueError: no such device, or it does not work.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device would give no number back
    except DEVICE_ERRORS as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(
            f"Device {name!r} does not work here ({reason}): use --device cpu, or leave it out."
        ) from error
    return device


def choose_threads(model: nn.Module, wanted: int | None = None) -> None:
    """Set the number of torch's threads for a model, and log it: `wanted`, or what OMP_NUM_THREADS says, or else this
    rank's share of the cores and, on a CPU, no more than the size of the model is worth.

    Threads wait for each other at the end of each operation, and for a thread whose core is busy with something else
    they wait long. Only the size decides, not the load of the moment: sums depend on the number of threads in their
    last digits, and a run that goes on should repeat the uninterrupted one.

    Args:
        model: What is trained or applied; its parameters may be on any device.
        wanted: Number of threads, at least 1.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    reason = f"for {num_parameters / 1e6:.1f} million parameters on {usable_cores()} cores; OMP_NUM_THREADS changes it"
    if wanted is not None:
        threads, reason = wanted, "as asked for"
    elif os.environ.get("OMP_NUM_THREADS"):
        threads, reason = MOST_THREADS, "as OMP_NUM_THREADS says"
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        threads = MOST_THREADS if ranks == 1 else min(MOST_THREADS, usable_cores() // ranks)
        if all(parameter.device.type in ("cpu", "meta") for parameter in model.parameters()):
            threads = min(threads, num_parameters // PARAMETERS_PER_THREAD)
        threads = max(1, threads)
    torch.set_num_threads(threads)
    logger.info("CPU threads: %d, %s", threads, reason)
