"""What is required has bounds, what is locked is exact and complete, and what the texts say of versions is true."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
VERSIONS = (ROOT / "README.md").read_text().split("## Versions\n")[1]
RANGES_OF = {
    "requirements.lock": ["requirements.txt"],
    "requirements-extra.lock": ["requirements.txt", "requirements-extra.txt"],
}
PYTHONS = ["3.11", "3.12", "3.13"]
HERE = ".".join(map(str, sys.version_info[:2]))


def lines_of(name: str) -> list[str]:
    """The lines of a file of requirements, continued ones joined, without comments."""
    joined = re.sub(r"\\\n", "", (ROOT / name).read_text())
    return [line for line in (re.sub(r"#.*", "", line).strip() for line in joined.splitlines()) if line]


def requirements_of(name: str) -> list[Requirement]:
    return [Requirement(line.split("--hash=")[0]) for line in lines_of(name)]


def counts_in(requirement: Requirement, python: str, machine: str = "x86_64") -> bool:
    """Whether a requirement is one on Linux, of what is needed without the extras of its package."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": machine}
    versions = {"python_version": python, "python_full_version": f"{python}.7"}
    environment = {**default_environment(), **linux, **versions, "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pins_of(lock: str, python: str, machine: str = "x86_64") -> list[tuple[str, str]]:
    """Names and versions of what a lock installs."""
    pins = [pin for pin in requirements_of(lock) if counts_in(pin, python, machine)]
    return [(canonicalize_name(pin.name), str(pin.specifier).removeprefix("==")) for pin in pins]


def has_bounds(specifier: SpecifierSet) -> bool:
    operators = {part.operator for part in specifier}
    return bool(operators & {"==", "~="} or (operators & {">=", ">"} and operators & {"<", "<="}))


RANGES = [(file, requirement) for file in RANGES_OF["requirements-extra.lock"] for requirement in requirements_of(file)]


@pytest.mark.parametrize(("file", "requirement"), RANGES, ids=[requirement.name for _, requirement in RANGES])
def test_a_requirement_has_two_bounds_and_what_is_installed_is_between_them(file, requirement):
    """Also where other versions than the locked ones are installed; the extras may be absent."""
    assert has_bounds(requirement.specifier), f"{file}: {requirement} needs a lower and an upper bound"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        assert file == "requirements-extra.txt", f"{requirement} is not installed: run `make test`"
    else:
        assert requirement.specifier.contains(installed), f"{requirement} is required, {installed} is installed"


@pytest.mark.parametrize(
    ("specifier", "expected"),
    [
        *((unbounded, False) for unbounded in (">=1", "<2", "", "!=1.5", ">=1,!=1.5")),
        *((bounded, True) for bounded in (">=1,<2", ">1,<=2", "==2.11.*", "~=2.1")),
    ],
)
def test_an_absent_bound_is_seen(specifier, expected):
    assert has_bounds(SpecifierSet(specifier)) == expected


@pytest.mark.parametrize("lock", RANGES_OF)
def test_each_line_of_a_lock_is_one_version_known_by_its_hashes(lock):
    """From wherever: a lock names no index, no folder and no address."""
    for line in lines_of(lock):
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [\w .'=<>!()]+?)?( +--hash=sha256:[0-9a-f]{64})+", line), line


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", RANGES_OF)
def test_a_lock_has_one_version_within_the_range_for_each_python(lock, python, machine):
    pins = pins_of(lock, python, machine)
    assert len(dict(pins)) == len(pins)
    for requirement in [requirement for file in RANGES_OF[lock] for requirement in requirements_of(file)]:
        locked = dict(pins).get(canonicalize_name(requirement.name))
        assert locked, f"{requirement} is not in {lock}: run `make lock`"
        assert requirement.specifier.contains(locked), f"{lock} has {locked}, not {requirement}: run `make lock`"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_extras_change_no_version(python):
    assert set(pins_of("requirements.lock", python)) <= set(pins_of("requirements-extra.lock", python))


@pytest.mark.parametrize("lock", RANGES_OF)
def test_a_lock_has_what_its_packages_say_they_need(lock):
    """By the metadata of those that are installed in the locked version."""
    pins, asked = dict(pins_of(lock, HERE)), 0
    for name, locked in pins.items():
        try:
            needed = requires(name) if version(name) == locked else []
        except PackageNotFoundError:
            continue
        for requirement in filter(lambda requirement: counts_in(requirement, HERE), map(Requirement, needed or [])):
            found = pins.get(canonicalize_name(requirement.name))
            assert found and requirement.specifier.contains(found), f"{name} needs {requirement}; locked is {found}"
            asked += 1
    assert asked


def test_the_readme_names_the_locked_versions():
    """And the other release of transformers, as in the Makefile: within the range, of another minor release."""
    locked = {name: ".".join(pin.split(".")[:2]) for name, pin in pins_of("requirements.lock", "3.11")}
    (previous,) = re.findall(r"^PREVIOUS := (.+)$", MAKEFILE, flags=re.MULTILINE)
    (allowed,) = [requirement for _, requirement in RANGES if requirement.name == "transformers"]
    minor = ".".join(previous.split(".")[:2])
    assert allowed.specifier.contains(previous) and minor != locked["transformers"]

    named = [(name.lower(), text) for name, text in re.findall(r"(\w+) (\d+\.\d+)", VERSIONS) if name.lower() in locked]
    assert named.count(("transformers", minor)) == 1
    assert sorted(named) == sorted([*((name, locked[name]) for name in dict(named)), ("transformers", minor)])
    assert len(named) > 7


def test_each_python_that_the_readme_names_is_one_that_the_lock_is_checked_for():
    assert "Python 3.11 on Linux; the lock has versions for\n3.12 and 3.13" in VERSIONS
    assert re.findall(r"for version in (.+);", MAKEFILE) == [" ".join(PYTHONS)]
    assert re.findall(r"--python-version (\d.*?) ", MAKEFILE) == [PYTHONS[0]]


def test_versions_of_tools_are_exact():
    (tools,) = re.findall(r"^TOOLS := (.+)$", MAKEFILE, flags=re.MULTILINE)
    assert [Version(tool.split("==")[1]) for tool in tools.split()]


def test_the_project_installs_its_requirements_and_no_package(tmp_path):
    """By the build backend of `pip install -e .`, on a copy, in which it leaves files."""
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ("model", "trainers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    code = "from setuptools import build_meta; print(build_meta.build_editable('built'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tmp_path / "built" / result.stdout.splitlines()[-1]) as wheel:
        info = [name for name in wheel.namelist() if ".dist-info/" in name]
        others = {name: wheel.read(name).decode() for name in wheel.namelist() if name not in info}
        metadata = wheel.read(next(name for name in info if name.endswith("/METADATA"))).decode()
    assert not any(str(tmp_path) in content for content in others.values())  # nothing leads to its folders
    found = {Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)}
    assert found == set(requirements_of("requirements.txt"))
    assert "Name: megatransformer\n" in metadata
