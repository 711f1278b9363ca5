"""Which keys of a mapping somebody has looked for."""

from collections.abc import Iterator, Mapping
from typing import Any


class Recorder(dict):
    """A mapping that remembers which keys it was asked for, and the defaults that were given with them.

    Libraries that look for each key that they know, and have no list of them, leave a misspelt one unread.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__({name: Recorder(it) if isinstance(it, dict) else it for name, it in content.items()})
        self.given = tuple(content)
        self.asked: dict[str, Any] = {}
        self.history: list[str] = []

    def note(self, name: str, default: Any = None) -> None:
        """Remember that somebody looks for a key."""
        self.asked.setdefault(name, default)
        self.history.append(name)

    @property
    def last_asked(self) -> str | None:
        """The key that was looked for last, of those that are there."""
        return next((name for name in reversed(self.history) if dict.__contains__(self, name)), None)

    def get(self, name: str, default: Any = None) -> Any:
        self.note(name, default)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.note(name)
        return super().__getitem__(name)

    def __contains__(self, name: str) -> bool:
        self.note(name)
        return super().__contains__(name)

    def keys(self) -> Any:
        return RecordedKeys(self)


class RecordedKeys:
    """The keys of a `Recorder`, which remembers those that are looked for here too."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __contains__(self, name: str) -> bool:
        return name in self.recorder

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorder)

    def __len__(self) -> int:
        return len(self.recorder)
