"""E4: a device report that never crashes, and logging that is set up once."""

import logging

import pytest
import torch
import transformers

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
    assert lines[1].startswith("CPU: ") and f" {torch.get_num_threads()} threads, float32, bfloat16" in lines[1]
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
