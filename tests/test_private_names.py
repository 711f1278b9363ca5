"""The list of private names of libraries is whole, and the installed libraries have them as it says."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pkgutil import resolve_name
from types import ModuleType

import pytest
from transformers import Trainer

from tests.private_name_scanner import Use, classes_of, library_owner, module_of, overrides, path_of, scan
from tests.private_names import LIMITS, PRIVATE_NAMES, PrivateName
from tests.test_imports import SOURCES, TESTS

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


# ------------------------------------------------------------------------------------------- the list and the libraries


def changes(entry: PrivateName) -> list[str]:
    """What the installed library has otherwise than the entry says; empty if all is as listed."""
    owner = resolve_name(entry.owner)
    value = getattr(owner, entry.name, None)
    if value is None:  # what methods assign is there without an object, too
        is_there = isinstance(owner, type) and library_owner(owner, entry.name) is not None
        return [] if is_there else [f"{entry}: the library has it no more"]
    if not inspect.isroutine(value):
        return [f"{entry}: there is no {path} in it" for path in entry.relies_on if not has(value, path)]
    if not entry.relies_on:
        return []
    signature = inspect.signature(value)
    there = tuple(name for name in signature.parameters if name in entry.relies_on)
    wanted = ", ".join(entry.relies_on)
    return [] if there == entry.relies_on else [f"{entry}: its parameters are {signature}, and we rely on {wanted}"]


def has(module: ModuleType, path: str) -> bool:
    """Whether there is an attribute, or a submodule, at the end of a dotted path."""
    try:
        resolve_name(f"{module.__name__}.{path}")
    except (ImportError, AttributeError):
        return False
    return True


def not_taken(ours: Callable, theirs: Callable) -> list[str]:
    """Parameters of a library's method that the one in its place would not accept."""
    taken = inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    num_positional = sum(parameter.kind in POSITIONAL for parameter in taken.values())
    missing = []
    for place, (name, parameter) in enumerate(inspect.signature(theirs).parameters.items()):
        by_place = parameter.kind in POSITIONAL and (place < num_positional or parameter.VAR_POSITIONAL in kinds)
        if not (by_place or name in taken or parameter.VAR_KEYWORD in kinds or parameter.kind == parameter.VAR_KEYWORD):
            missing.append(name)
    return missing


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=str)
def test_the_installed_library_has_the_name_as_listed(entry: PrivateName) -> None:
    assert changes(entry) == []


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every function in the list, when a parameter that we rely on is gone."""
    functions = [
        it for it in PRIVATE_NAMES if it.relies_on and inspect.isroutine(getattr(resolve_name(it.owner), it.name))
    ]
    assert len(functions) > 5
    for entry in functions:
        with monkeypatch.context() as patch:
            patch.setattr(resolve_name(entry.owner), entry.name, lambda self, other: None)
            (problem,) = changes(entry)
        assert f"{entry.owner}.{entry.name} (" in problem and "(self, other)" in problem
        assert all(name in problem for name in entry.relies_on)


def test_a_name_that_is_gone_is_named() -> None:
    gone = PrivateName("transformers.Trainer", "_no_such_name", "call", "nothing")
    assert changes(gone) == ["transformers.Trainer._no_such_name (call): the library has it no more"]
    renamed = PrivateName("torch", "_dynamo", "read", "nothing", ("config.no_such_limit", "no_such_module.x"))
    assert len(changes(renamed)) == 2


def test_overrides_accept_what_the_library_gives() -> None:
    """A parameter that a release adds would otherwise be found by users."""
    methods = overrides(classes_of([module_of(path) for path in SOURCES]))
    missing = {
        f"{use.where}.{use.name}": not_taken(function, getattr(resolve_name(use.owner), use.name))
        for use, function in methods.items()
        if use.kind == "override"
    }
    assert {name: parameters for name, parameters in missing.items() if parameters} == {}


def test_an_override_that_takes_too_little_is_seen() -> None:
    def theirs(self, model, trial, *, metrics=None, **kwargs): ...

    assert not_taken(lambda self, model, trial: None, theirs) == ["metrics"]
    assert not_taken(lambda self, model, **kwargs: None, theirs) == []
    assert not_taken(lambda self, model, *, metrics: None, theirs) == ["trial"]
    assert not_taken(lambda self, *args, **kwargs: None, theirs) == []


# ------------------------------------------------------------------------------------------------ the list and our code


@cache
def uses() -> list[Use]:
    return list(scan(SOURCES))


def key(kind: str, owner: str, name: str) -> tuple[str, ...]:
    """By which uses and entries are compared: only of methods, which class has them is known with certainty."""
    return (kind, owner, name) if kind == "override" else (kind, name)


def key_of(entry: PrivateName) -> tuple[str, ...]:
    owner = resolve_name(entry.owner)
    definer = library_owner(owner, entry.name) if isinstance(owner, type) else None
    return key(entry.kind, path_of(definer) if definer else entry.owner, entry.name)


def unlisted(found: Iterable[Use]) -> list[str]:
    """Uses that have no entry."""
    listed = set(map(key_of, PRIVATE_NAMES))
    return sorted(
        f"{use.where}: {use.kind} of {use.owner or '?'}.{use.name} is not in tests/private_names.py"
        for use in found
        if key(use.kind, use.owner, use.name) not in listed
    )


def test_every_private_name_is_listed() -> None:
    assert unlisted(uses()) == []


def test_every_entry_is_used() -> None:
    used = {key(use.kind, use.owner, use.name) for use in uses()}
    entries = [entry for entry in PRIVATE_NAMES if entry.kind != "test"]
    assert [str(entry) for entry in entries if key_of(entry) not in used] == []
    assert len(set(map(key_of, PRIVATE_NAMES))) == len(PRIVATE_NAMES)


def test_there_are_no_more_than_there_were() -> None:
    """A public way is the better one; the limits go down with the list, and never up."""
    overriding = sum(use.kind == "override" for use in set(uses()))
    counts = Counter(entry.kind for entry in PRIVATE_NAMES) | Counter(override=overriding)
    assert {kind: count for kind, count in counts.items() if count > LIMITS[kind]} == {}


def test_names_that_only_tests_use_are_listed_too() -> None:
    listed = {entry.name for entry in PRIVATE_NAMES}
    found = {use for use in scan(SOURCES + TESTS) if use.where.startswith("tests")}
    assert sorted(f"{use.where}: {use.name}" for use in found if use.name not in listed) == []
    assert {entry.name for entry in PRIVATE_NAMES if entry.kind == "test"} - {use.name for use in found} == set()


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("import torch\ntorch._weird(1)", "call", "_weird"),
        ("import torch._weird", "read", "_weird"),
        ("from torch.nn import _weird", "read", "_weird"),
        ("def f(model):\n    return model._weird", "read", "_weird"),
        ("def f(model):\n    model._weird = 1", "set", "_weird"),
        ("def f(model):\n    return getattr(model, '_weird', None)", "read", "_weird"),
        ("def f(model):\n    return [getattr(model, it) for it in ('_weird', '_odd')]", "read", "_odd"),
        ("def f(model):\n    setattr(model, '_weird', 1)", "set", "_weird"),
        ("from torch import nn\ndef f(it: nn.Module):\n    it._read(1)\ndef _read(): ...", "call", "_read"),
        ("def f(model):\n    model.save(_weird=True)", "read", "_weird"),
    ],
)
def test_a_private_name_is_found(source: str, kind: str, name: str) -> None:
    """Also one of a library's object that has a name of ours."""
    found = [use for use in scan([], source) if use.name == name]
    assert [use.kind for use in found] == [kind], found
    (line,) = unlisted(found)
    assert line.startswith(f"extra:{1 + source[: source.index(name)].count(chr(10))}: {kind} of ")


def test_what_is_no_private_name_of_a_library_is_not_found() -> None:
    source = """
import torch
def f(state, name):
    state.__class__, torch.nn.Module.__init__, name.endswith("_token_id"), getattr(state, f"{name}_token_id")
    return state._own
class Own:
    def _own(self): ...
"""
    assert list(scan([], source)) == []


def test_an_override_is_found_in_what_a_mixin_is_mixed_into() -> None:
    class Mixin:
        _remove_unused_columns = None

        def _save(self): ...

        def _ours(self): ...

    class Mixed(Mixin, Trainer): ...

    Mixed._prepare_inputs = Trainer._prepare_inputs  # as a library may do it while code runs
    found = {(use.kind, use.name, use.owner) for use in overrides([Mixin, Mixed])}
    assert found == {
        ("override", "_save", "transformers.trainer.Trainer"),
        ("set", "_remove_unused_columns", "transformers.trainer.Trainer"),
    }
