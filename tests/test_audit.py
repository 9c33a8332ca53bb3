"""`make audit` says what was not looked up, instead of ending well."""

import pytest
from audit import summary

KNOWN = {"name": "a", "version": "1", "vulns": []}
HOLE = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("packages", "expected", "code"),
    [
        ([KNOWN], ["1 packages audited: 0 known holes"], 0),
        ([KNOWN, SKIPPED], ["1 packages audited, 1 not known there (c): 0 known holes"], 0),
        ([HOLE, KNOWN], ["b 2: X-1, mended in 3", "2 packages audited: 1 known holes"], 1),
        ([SKIPPED], ["nothing was audited: the index in use gives no advisories; run this where pypi.org can be reached"], 2),
    ],
)  # fmt: skip
def test_the_summary_of_an_audit(packages, expected, code):
    assert summary({"dependencies": packages}) == (expected, code)
