"""The benchmarks of the server, each with little to do: what they count, and that they see what is wrong."""

import pytest

from benchmarks import hostile, serving
from tests.tiny_artist import save_artist
from tests.tiny_talker import save_talker


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, save in (("talker", save_talker), ("artist", save_artist)):
        (folder / name).mkdir()
        save(folder / name)
    return [str(folder / name) for name in ("talker", "artist")]


@pytest.mark.slow
def test_requests_that_mean_harm(runs, capsys):
    """Three of each kind."""
    assert hostile.main([*runs, "--number", "36"]) == 0
    assert "36 attacks, 0 faults" in capsys.readouterr().out


@pytest.mark.slow
def test_many_clients(runs, capsys):
    assert serving.main(["--load", *runs, "--clients", "4", "--seconds", "4", "--compared", "3"]) == 0
    said = capsys.readouterr().out
    assert "faults that are not documented: 0 []" in said and "differ from generate: 0 of" in said
    assert "clients that got an answer: 4" in said


@pytest.mark.slow
def test_the_throughput_is_beside_that_of_the_engine(capsys):
    sizes = ["--hidden-size", "32", "--intermediate-size", "64", "--heads", "2", "--key-value-heads", "2"]
    some = ["--requests", "2", "--new-tokens", "2", "3", "--num-steps", "1", "2", "--rounds", "1", "--warmup", "1"]
    assert serving.main([*sizes, *some, "--vocab-size", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines[-3:]] == ["| engine", "| server", "| server, streams"]
    assert "| 1.00 (1.00 to 1.00) |" in lines[-3]


class Answers:
    """A server that answers what it is told to."""

    def __init__(self, content: bytes):
        self.content = content

    def __call__(self, *args, **kwargs) -> "Answers":
        return self

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *args) -> None:
        """Nothing is open."""

    def sendall(self, content: bytes) -> None:
        """Takes all."""

    def recv(self, size: int) -> bytes:
        content, self.content = self.content, b""
        return content


@pytest.mark.parametrize(
    ("content", "status", "fault"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n{}", "400", ""),
        (b"HTTP/1.1 503 Busy\r\n\r\n{}", "503", ""),
        (b"HTTP/1.1 500 No\r\n\r\n{}", "500", "status 500"),
        (b"HTTP/1.1 400 No\r\n\r\nTraceback (most", "400", "the answer says too much"),
        (b'HTTP/1.1 404 No\r\n\r\n{"message": "/home/a"}', "404", "the answer says too much"),
        (b"", "closed", "closed without an answer"),
    ],
)
def test_faults_are_seen(content, status, fault, monkeypatch):
    monkeypatch.setattr(hostile.socket, "create_connection", Answers(content))
    found = hostile.outcome_of(("127.0.0.1", 1), hostile.Attack("numbers", b""))
    assert found[0] == status and found[1].startswith(fault) and bool(found[1]) is bool(fault)
