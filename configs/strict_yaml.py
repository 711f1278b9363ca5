"""YAML of which nothing is executed, lost or multiplied: plain values, each written once, within bounds."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**19
"""Of a file."""
MAX_LEVELS = 32
"""Of lists and mappings in each other."""
MAX_VALUES = 20_000
"""Of a file, each alias counted as all that it stands for."""
MAX_INTEGER = 2**63
_PREFIX = "tag:yaml.org,2002:"
_PLAIN = {_PREFIX + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class RefusedYaml(yaml.YAMLError):
    """It is YAML, but none that a configuration needs."""


class StrictLoader(yaml.SafeLoader):
    """Plain values only, nothing is executed; a key that is there twice is an error instead of lost, and so is whatever
    would take more time or memory than a configuration needs.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.levels, self.sizes = 0, {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """The next node, whose values are counted, those behind aliases each time."""
        line = self.peek_event().start_mark.line + 1
        is_alias = self.check_event(yaml.AliasEvent)
        self.levels += 1
        if self.levels > MAX_LEVELS:
            raise RefusedYaml(f"line {line}: there are more than {MAX_LEVELS} lists and mappings in each other")
        node = super().compose_node(parent, index)
        self.levels -= 1
        if is_alias and node not in self.sizes:
            raise RefusedYaml(f"line {line}: an alias stands within what it stands for")
        if not is_alias:
            self.sizes[node] = 1 + sum(map(self.sizes.__getitem__, _parts_of(node)))
            _check_node(node, line)
        if self.sizes[node] > MAX_VALUES or len(self.sizes) > MAX_VALUES:
            raise RefusedYaml(f"line {line}: there are more than {MAX_VALUES} values, with all that aliases stand for")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most 64 bits."""
        value = super().construct_yaml_int(node) if len(node.value) < 100 else MAX_INTEGER
        if not -MAX_INTEGER <= value < MAX_INTEGER:
            line = node.start_mark.line + 1
            raise RefusedYaml(f"line {line}: {node.value[:40]} is a number of more than 64 bits; give a smaller one")
        return value


class StrictDumper(yaml.SafeDumper):
    """Writes what `StrictLoader` reads."""


# As in YAML 1.2: 1e-4 is a number; `no` and 2026-01-01 are strings.
for cls in (StrictLoader, StrictDumper):
    cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, pairs in cls.yaml_implicit_resolvers.items()
    }
    cls.add_implicit_resolver(_PREFIX + "bool", re.compile(r"^(true|false)$"), list("tf"))
    cls.add_implicit_resolver(_PREFIX + "float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
StrictLoader.add_constructor(_PREFIX + "int", StrictLoader.construct_yaml_int)


def _parts_of(node: yaml.Node) -> list[yaml.Node]:
    """The nodes in one."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_node(node: yaml.Node, line: int) -> None:
    """Raises RefusedYaml for a tag of YAML's own that is none of a plain value, a text that no file can hold, and a key
    that is there twice.
    """
    if node.tag.startswith(_PREFIX) and node.tag not in _PLAIN:
        name = node.tag.removeprefix(_PREFIX)
        raise RefusedYaml(f"line {line}: values of type {name!r} are not read; write a text, a number or a list")
    if isinstance(node, yaml.ScalarNode) and not node.value.isascii():
        try:
            node.value.encode("utf-8")
        except UnicodeEncodeError as error:
            shown = repr(node.value[:40])
            raise RefusedYaml(f"line {line}: half a character is escaped in {shown}; leave it out") from error
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RefusedYaml(f"line {line}: a key is a list or a mapping; give a name")
            if key.value in names:
                raise RefusedYaml(f"line {line}: key {key.value!r} is there twice, join the two")
            names.add(key.value)


def parse_yaml(text: str) -> Any:
    """Plain values; raises yaml.YAMLError for what is none, or refused."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except (ValueError, LookupError) as error:  # of a value that is not of the type that is named before it
        raise yaml.YAMLError(f"a value does not have the type that its tag names ({error})") from error


def _open_at_once(path: str, flags: int) -> int:
    """A pipe into which nobody writes is empty; to open it otherwise waits for somebody who does."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def read_text(path: Path) -> str:
    """The text of a configuration file, a byte-order mark left out; raises ValueError for one that is not UTF-8, or
    longer than any configuration.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"is longer than {MAX_BYTES // 2**10} KiB, which no configuration is")
    if content.startswith(_UTF_16):
        raise ValueError("is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
