"""Locks that killed builds leave where DeepSpeed builds its operations."""

import os

import pytest
from torch.utils import file_baton

from trainers import RecurrentTrainingArguments
from trainers.locks import build_locks, in_words, warn_of_build_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of a build that began 400 seconds ago, as torch takes it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    (tmp_path / "deepspeed_shm_comm").mkdir()
    baton = file_baton.FileBaton(str(tmp_path / "deepspeed_shm_comm" / "lock"))
    assert build_locks() == [] and baton.try_acquire()
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    os.utime(path, (path.stat().st_atime - 400, path.stat().st_mtime - 400))
    return path, baton


def test_a_lock_that_nobody_holds_is_said(lock, caplog):
    path, baton = lock
    os.close(baton.fd)  # as by the end of its process
    warn_of_build_locks()
    (line,) = caplog.messages
    assert f"{path} is the lock of a build, 7 minutes old, that no process of this machine holds" in line
    assert f"remove it: rm {path}" in line and "\n" not in line
    assert path.exists()


def test_a_build_in_progress_is_said(lock, caplog):
    path, baton = lock
    warn_of_build_locks()
    assert caplog.messages == [
        f"{path} is the lock of a build of process {os.getpid()}, begun 7 minutes ago: DeepSpeed waits until it is done"
    ]
    baton.release()
    caplog.clear()
    warn_of_build_locks()
    assert caplog.messages == []


def test_one_rank_of_a_machine_says_it(lock, caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    warn_of_build_locks()
    assert caplog.messages == []


def test_where_torch_builds_by_default(tmp_path, monkeypatch):
    """The folder that torch itself names, with one for each version of Python and CUDA in it."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "torch_extensions" / "py311_cu130" / "cpu_adam" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    assert [found for found, _ in build_locks()] == [path]


def test_it_is_said_before_arguments_set_deepspeed_up(lock, caplog, tmp_path, monkeypatch):
    """Which builds already: here, the step in which it would is where it ends."""

    def set_up(self):
        assert "is the lock of a build" in caplog.text
        raise InterruptedError

    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", set_up)
    with pytest.raises(InterruptedError):
        RecurrentTrainingArguments(str(tmp_path / "out"), deepspeed={"zero_optimization": {"stage": 2}})
    caplog.clear()
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    RecurrentTrainingArguments(str(tmp_path / "out"))
    assert caplog.messages == []


def test_ages_in_words():
    said = [in_words(seconds) for seconds in (0.2, 90, 400, 7300, 200000)]
    assert said == ["0 seconds", "90 seconds", "7 minutes", "2 hours", "2 days"]
