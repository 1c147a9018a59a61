"""tests/CASES.md names only files and tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_file_and_test_of_the_table_exists() -> None:
    rows = re.findall(r"^\| .* \| `(.+)` \| `(.+)::(.+)` \|$", CASES, re.MULTILINE)
    assert len(rows) == CASES.count("\n| ") - CASES.count("\n| case |")
    for fix, file, test in rows:
        assert (TESTS.parent / fix).is_file(), fix
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), test


CASES = (TESTS / "CASES.md").read_text()
