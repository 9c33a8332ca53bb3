"""`make audit`: pip-audit over what is installed, in lines that say what was not looked up; pip-audit alone ends well then."""

import json
import subprocess
import sys
from typing import Any


def summary(report: dict[str, Any]) -> tuple[list[str], int]:
    """Lines to print of pip-audit's JSON, and the exit code: 0 without holes, 1 with some, 2 where nothing was looked up."""
    packages = report["dependencies"]
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    lines = [
        f"{one['name']} {one['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for one in packages
        for hole in one.get("vulns", ())
    ]

    # Nothing at all: no connection, or an index without advisories.
    if packages and len(skipped) == len(packages):
        return ["nothing was audited: the index in use gives no advisories; run this where pypi.org can be reached"], 2
    left = f", {len(skipped)} not known there ({', '.join(skipped[:8])})" if skipped else ""
    return [
        *lines,
        f"{len(packages) - len(skipped)} packages audited{left}: {len(lines)} known holes",
    ], 1 if lines else 0


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, *sys.argv[1:]], capture_output=True, text=True)
    try:
        lines, code = summary(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        lines, code = [f"nothing was audited: pip-audit could not look anything up ({reason})"], 2
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
