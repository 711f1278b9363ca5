"""What this machine computes with. A broken driver is reported, never raised."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

# What torch raises for a missing, mismatched or crashed driver, and for a build without CUDA.
DEVICE_ERRORS = (RuntimeError, AssertionError, OSError)

DTYPES = ("float32", "bfloat16", "float16")


def attempt(what: str, query: Callable[[], str]) -> str:
    """The answer of a device query, or a line that names its failure."""
    try:
        return query()
    except DEVICE_ERRORS as error:
        reason = " ".join(str(error).split()) or "no message"
        return f"{what}: query failed ({type(error).__name__}: {reason})"


def device_report() -> str:
    """A few lines on CPU, memory, GPUs and the number formats they compute in; a broken device is one of the lines."""
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        attempt("CPU", describe_cpu),
        attempt("memory", describe_memory),
        attempt("CUDA", describe_cuda),
    ]
    return "\n".join(lines)


def describe_cpu() -> str:
    """Model, cores and torch's threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU: {cpu_model()}, {cores} cores usable, {torch.get_num_threads()} threads, {', '.join(DTYPES[:2])}"


def cpu_model() -> str:
    """The name on the chip as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_memory() -> str:
    """Main memory of the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"memory: {total / 2**30:.1f} GiB"


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
