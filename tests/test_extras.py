"""Optional packages: the requirement files and the extras of pyproject.toml name the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("extra", ["serve", "export", "report"])
def test_requirement_files_and_extras_are_the_same(extra):
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(rf"^{extra} = \[(.*)\]$", text, re.M).group(1)
    lines = (ROOT / f"requirements-{extra}.txt").read_text().splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert [word.strip(' "') for word in re.findall(r'"[^"]*"', extras)] == required
