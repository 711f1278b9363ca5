"""A server in a process of its own, and a client without a library."""

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Client:
    """What a server answers.

    Args:
        process: The server.
        port: Where it listens.
    """

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port = process, port

    def send(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body of an answer; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", path, content, given)
        response = connection.getresponse()
        found = response.status, response.read()
        connection.close()
        return found

    def ask(self, path: str, body: Any = None) -> Any:
        """An answer that is JSON, of a request that is good."""
        status, content = self.send(path, body)
        assert status == 200, content
        return json.loads(content)

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends as it should."""
        status, content = self.send(path, {**body, "stream": True})
        assert status == 200, content
        *events, last, end = content.decode().split("\n\n")
        assert last == "data: [DONE]" and not end
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def refusal(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and message of an answer that refuses."""
        status, content = self.send(path, body, headers)
        error = json.loads(content)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return status, error["message"]


@contextmanager
def server(*arguments: Any) -> Iterator[Client]:
    """A server of runs, with options, as its user starts it."""
    command = [sys.executable, "-m", "inference.serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("ready: "):
                break
        assert lines and lines[-1].startswith("ready: "), "".join(lines)
        yield Client(process, int(lines[-1].strip().rpartition(":")[2]))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
