"""A device report that never crashes, and logging that is set up once."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
import transformers

from inference import devices
from inference.devices import best_device, choose_device, device_report
from inference.logs import ConsoleHandler, set_up_logging


@pytest.fixture(autouse=True)
def root_logger():
    """Leave logging as it was."""
    root, library = logging.getLogger(), logging.getLogger("transformers")
    before = (root.handlers[:], root.level, library.handlers[:], library.level, library.propagate)
    yield root
    root.handlers[:], library.handlers[:] = before[0], before[2]
    root.setLevel(before[1])
    library.setLevel(before[3])
    library.propagate = before[4]


def console_handlers(root):
    return [handler for handler in root.handlers if isinstance(handler, ConsoleHandler)]


def fail(error):
    def query(*args, **kwargs):
        raise error

    return query


def test_report_names_cpu_memory_and_the_lack_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = device_report().splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, Python 3.")
    assert lines[1].startswith("CPU: ") and lines[1].endswith(" cores usable, float32, bfloat16")
    assert lines[2].startswith("memory: ") and lines[2].endswith(" GiB") and float(lines[2].split()[1]) > 0.1
    assert lines[3].startswith("CUDA: none available")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA unknown error -\n this may be due to an incorrectly set up environment"),
        AssertionError("Torch not compiled with CUDA enabled"),
        OSError("libcuda.so.1: cannot open shared object file"),
    ],
)
def test_report_survives_a_broken_cuda_and_names_the_failure(monkeypatch, error):
    for name in ("is_available", "device_count", "get_device_properties", "current_device", "init"):
        monkeypatch.setattr(torch.cuda, name, fail(error))
    report = device_report()
    assert f"CUDA: query failed ({type(error).__name__}: {' '.join(str(error).split())})" in report
    assert "CPU: " in report and "memory: " in report
    assert best_device() == torch.device("cpu")


def test_one_broken_gpu_does_not_hide_the_other(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "Some GPU", 16 * 2**30, 7, 5

    def properties(index):
        if index == 0:
            raise RuntimeError("GPU has fallen off the bus")
        return Properties()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    lines = device_report().splitlines()
    assert lines[3] == "GPU 0: query failed (RuntimeError: GPU has fallen off the bus)"
    assert lines[4] == "GPU 1: Some GPU, 16.0 GiB, compute capability 7.5, float32, float16"  # no bfloat16 before 8.0
    assert best_device() == torch.device("cpu")


def test_other_errors_are_not_swallowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", fail(KeyError("a defect of ours")))
    with pytest.raises(KeyError, match="a defect of ours"):
        device_report()


def test_choosing_a_device():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"Device 'toaster' does not work here .*: use --device cpu, or leave it out"):
        choose_device("toaster")


def test_logging_set_up_twice_has_one_handler(root_logger, capsys):
    transformers.utils.logging.enable_default_handler()
    set_up_logging("info")
    set_up_logging("info")
    assert len(console_handlers(root_logger)) == 1
    assert not [
        handler for handler in logging.getLogger("transformers").handlers if type(handler) is logging.StreamHandler
    ]
    logging.getLogger("somewhere").info("said once")
    transformers.utils.logging.get_logger("transformers.somewhere").warning("this too")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO somewhere: said once",
        "WARNING transformers.somewhere: this too",
    ]


def test_the_level_decides_and_can_change(root_logger, capsys):
    for level, expected in (("error", 0), ("warning", 1), ("info", 2), ("debug", 3)):
        set_up_logging(level)
        for say in ("debug", "info", "warning"):
            getattr(logging.getLogger("somewhere"), say)("x")
        assert len(capsys.readouterr().err.splitlines()) == expected


def test_other_ranks_only_warn_and_say_who_they_are(root_logger, capsys):
    set_up_logging("debug", rank=3)
    logging.getLogger("somewhere").info("unheard")
    logging.getLogger("somewhere").warning("heard")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("[rank 3] WARNING somewhere: heard")
    set_up_logging("error", rank=3)
    logging.getLogger("somewhere").warning("unheard")
    assert capsys.readouterr().err == ""


def test_an_unknown_level_is_an_error():
    with pytest.raises(ValueError, match="Log level 'loud' is not known: choose one of debug, info, warning, error"):
        set_up_logging("loud")


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine of eight cores and an environment that says nothing; the threads of this process come back."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(devices, "MOST_THREADS", 8)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


def threads_for(num_parameters, device="meta", wanted=None):
    model = torch.nn.Linear(num_parameters // 1000, 1000, bias=False, device=device)
    devices.choose_threads(model, wanted)
    return torch.get_num_threads()


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("num_parameters", "ranks", "threads"),
    [
        (1_000, 1, 1),  # never none
        (1_999_000, 1, 1),
        (2_000_000, 1, 2),
        (5_000_000, 1, 5),
        (90_000_000, 1, 8),  # no more than cores
        (90_000_000, 2, 4),  # ranks share them
        (90_000_000, 16, 1),
        (1_000, 2, 1),
    ],
)
def test_threads_are_those_that_a_model_is_worth(monkeypatch, num_parameters, ranks, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE" if ranks % 2 else "LOCAL_SIZE", str(ranks))
    assert threads_for(num_parameters) == threads


@pytest.mark.usefixtures("eight_cores")
def test_who_asks_for_threads_gets_them_and_the_log_says_why(monkeypatch, caplog):
    caplog.set_level("INFO")
    assert threads_for(3_000_000) == 3
    assert "CPU threads: 3, for 3.0 million parameters on 8 cores; OMP_NUM_THREADS changes it" in caplog.text
    assert threads_for(1_000, wanted=6) == 6
    assert "CPU threads: 6, as asked for" in caplog.text
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(devices, "MOST_THREADS", 7)  # torch has read it
    assert threads_for(1_000) == 7
    assert "CPU threads: 7, as OMP_NUM_THREADS says" in caplog.text


@pytest.mark.usefixtures("eight_cores")
def test_a_model_on_a_gpu_keeps_all_threads(monkeypatch):
    """What is computed on the CPU then is not the model's."""
    monkeypatch.setattr(
        torch.nn.Linear, "parameters", lambda self: [SimpleNamespace(numel=lambda: 9, device=torch.device("cuda"))]
    )
    assert threads_for(1_000) == 8
