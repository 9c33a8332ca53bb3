"""Optional packages: requirement files and extras of pyproject.toml are the same. The lock file pins all that is required."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("extra", ["serve", "export", "report"])
def test_requirement_files_and_extras_are_the_same(extra):
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(rf"^{extra} = \[(.*)\]$", text, re.M).group(1)
    lines = (ROOT / f"requirements-{extra}.txt").read_text().splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert [word.strip(' "') for word in re.findall(r'"[^"]*"', extras)] == required


def test_the_lock_file_pins_everything_that_is_required():
    """With a version that the requirement admits."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    required = [Requirement(line) for line in lines if line]
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    assert len(required) > 15 and {one.name for one in required} <= pinned.keys()
    assert [one.name for one in required if pinned[one.name] not in one.specifier] == []
