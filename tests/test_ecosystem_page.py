"""docs/ecosystem.md: the tests that it names are there, and those of clients are named."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/ecosystem.md").read_text(encoding="utf-8").split("## Newest versions")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| client |")
]


def test_each_client_has_a_test_or_was_run_by_hand():
    assert len(ROWS) >= 20
    for client, _, works, _, test in ROWS:
        paths = re.findall(r"`(tests/\w+\.py)`", test)
        assert client and works and (paths or test == "by hand"), client
        assert [path for path in paths if not (ROOT / path).exists()] == [], client


def test_each_test_of_clients_is_on_the_page():
    named = {path for row in ROWS for path in re.findall(r"`(tests/\w+\.py)`", row[-1])}
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_clients_*.py")} <= named
