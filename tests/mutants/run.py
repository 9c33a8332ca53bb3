"""`make mutants N=40 SEED=1`: does the suite notice one-line faults? Those of faults.txt, and N drawn by the seed.

Each fault is put into a copy of the working tree, and the tests of its file run there; where they pass, those of WIDER do,
too. A parent that has imported torch forks for each fault, so that no test waits for that. Without --only this takes an
hour of one core.
"""

import argparse
import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What the tests import of others, once for all of them; nothing of ours.
import hypothesis.strategies  # noqa: F401
import numpy  # noqa: F401
import PIL.Image  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import scipy.special  # noqa: F401
import torch
import torchvision.models  # noqa: F401
import yaml  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutants.faults import Fault, draw_faults, read_faults  # noqa: E402

from miscc.progress import ProgressBar  # noqa: E402

# By room, for what the tests of the file have not noticed.
TRAINING = "test_systems.py test_stepping.py test_golden.py test_galip.py test_pinned_steps.py"
SCORING = (
    "test_metrics_features.py test_metrics_sources.py test_metrics_scripts.py test_evaluate.py test_evaluate_command.py"
)
DATA = "test_datasets.py test_text_image.py test_image_cache.py test_folder_dataset.py test_prepare.py"
DRAWING = "test_pipeline.py test_cli.py test_publish.py test_serve_api.py"
WIDER = {
    "miscc": TRAINING,
    "models": TRAINING,
    "training": TRAINING,
    "eval": SCORING,
    "datasets": DATA,
    "sampling": DRAWING,
}
LONGEST = 1200  # seconds that test files may take
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"


def copy_tree(folder: Path) -> Path:
    """The files of the working tree that git knows or would add, in a folder of their own."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


def run_tests(copy: Path, tests: tuple[str, ...], seconds: float, keeps_bytecode: bool = False) -> tuple[str, str]:
    """(killed, survived or timeout; what pytest printed) of test files in the copy, in a process forked from this one.

    keeps_bytecode: whether the process may leave compiled files there. Those of a fault would be taken for the file's own.
    """
    scratch = Path(tempfile.mkdtemp(prefix="tests-", dir=copy.parent))
    log = scratch / "log"
    child = os.fork()
    if child == 0:
        _become_pytest(copy, tests, scratch, log, keeps_bytecode)

    # Its whole group, when it takes too long: tests start processes of their own.
    status, deadline = None, time.monotonic() + seconds
    while status is None and time.monotonic() < deadline:
        finished, code = os.waitpid(child, os.WNOHANG)
        status = code if finished else None
        time.sleep(0.02)
    _kill_group(child)
    if status is None:
        os.waitpid(child, 0)
    text = log.read_text(errors="replace") if log.exists() else ""
    shutil.rmtree(scratch, ignore_errors=True)
    return outcome_of(status), text


def outcome_of(status: int | None) -> str:
    """Of the status of a process that ran pytest, None for one that was stopped."""
    if status is None:
        return TIMEOUT
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) in (
        pytest.ExitCode.USAGE_ERROR,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        raise SystemExit("error: pytest found no tests; mend the names of test files in tests/mutants/")
    return SURVIVED if status == 0 else KILLED


def _kill_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _become_pytest(copy: Path, tests: tuple[str, ...], scratch: Path, log: Path, keeps_bytecode: bool) -> None:
    """In the forked process: the copy in place of this tree, output into a file, and pytest. Does not return."""
    code = 1
    try:
        os.setsid()
        with log.open("w") as stream:
            for descriptor in (1, 2):
                os.dup2(stream.fileno(), descriptor)

        # Nothing of the user's tree.
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(
                f"{ROOT}/"
            ) and "site-packages" not in module.__file__:
                del sys.modules[name]
        for name in ("miscc", "mutants"):
            sys.modules.pop(name, None)
        sys.path[:] = [
            str(copy),
            *(path for path in sys.path if not path.startswith(str(ROOT)) or "site-packages" in path),
        ]
        os.chdir(copy)
        sys.dont_write_bytecode = not keeps_bytecode
        os.environ |= {"TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "" if keeps_bytecode else "1"}
        tempfile.tempdir = None
        torch.set_num_threads(1)
        names = [f"tests/{name}" for name in tests]
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"--rootdir={copy}", *names]))
    finally:
        sys.stdout.flush()
        os._exit(code)


class Tree:
    """A copy of the working tree, without a fault outside `put_in`; and how long test files take there that pass."""

    def __init__(self, folder: Path):
        self.path = copy_tree(folder / "tree")
        self.seconds: dict[str, float] = {}

    def limit(self, names: tuple[str, ...]) -> float:
        """Seconds after which these test files are stopped: far more than they need, where that is known."""
        known = [self.seconds[name] for name in names if name in self.seconds]
        return 60 + 8 * sum(known) if len(known) == len(names) else LONGEST

    def check(self, names: tuple[str, ...]) -> None:
        """Ends the program where one of these test files fails without a fault: then it says nothing of one."""
        for name in names:
            if name in self.seconds:
                continue
            started = time.monotonic()
            result, text = run_tests(self.path, (name,), LONGEST, keeps_bytecode=True)
            self.seconds[name] = time.monotonic() - started
            if result != SURVIVED:
                raise SystemExit(
                    f"error: tests/{name} fails without a fault, or takes too long; mend it\n{text[-800:]}"
                )


def try_fault(tree: Tree, fault: Fault, quick: bool = False) -> tuple[str, str]:
    """(what became of it, the first test that noticed or the test files that did not). quick: only the tests of its file."""
    wider = tuple(name for name in WIDER[fault.file.split("/")[0]].split() if name not in fault.tests and not quick)
    for tests in filter(None, (*((name,) for name in fault.tests), wider)):
        with put_in(tree.path / fault.file, fault):
            result, printed = run_tests(tree.path, tests, tree.limit(tests))
        if result == SURVIVED:
            continue

        # A failure counts only of tests that pass otherwise.
        failed = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
        tree.check(tests)
        return result, failed[0] if failed else f"one of {' '.join(tests)}"
    return SURVIVED, " ".join((*fault.tests, *wider))


@contextmanager
def put_in(path: Path, fault: Fault) -> Iterator[None]:
    """Inside, the file has the fault."""
    text, times = path.read_text(encoding="utf-8"), path.stat()
    try:
        path.write_text(fault.apply(text), encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime + 100))  # or Python would take the compiled file for this one's
        yield
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime))


def report(results: list[tuple[Fault, bool, str]]) -> str:
    """A table by room."""
    rows = collections.defaultdict(collections.Counter)
    for fault, drawn, result in results:
        for room in (fault.file.split("/")[0], "all"):
            counts = rows[room]
            counts["drawn" if drawn else "chosen"] += 1
            counts["equivalent" if result == SURVIVED and fault.equivalent else result] += 1
    lines = [f"{'':10} {'chosen':>7} {'drawn':>6} {'killed':>7} {'survived':>9} {'equivalent':>11}"]
    for room in (*sorted(rows.keys() - {"all"}), "all"):
        counts = rows[room]
        killed = counts[KILLED] + counts[TIMEOUT]
        lines.append(
            f"{room:10} {counts['chosen']:7} {counts['drawn']:6} {killed:7} {counts[SURVIVED]:9} {counts['equivalent']:11}"
        )
    killed, survived = rows["all"][KILLED] + rows["all"][TIMEOUT], rows["all"][SURVIVED]
    lines.append(f"{100 * killed / max(1, killed + survived):.1f} % of those that are not equivalent are killed")
    return "\n".join(lines)


def place(fault: Fault) -> tuple[str, str, str]:
    """What tells a fault from others."""
    return fault.file, fault.old, fault.new


def earlier_results(path: Path | None) -> set[tuple[str, str, str]]:
    """The faults that were killed by the runs that wrote this file."""
    if path is None or not path.exists():
        return set()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["file"], line["old"], line["new"]) for line in lines if line["result"] != SURVIVED}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=40, help="faults that are drawn beside the listed ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="FILE", help="faults of this file alone, or of a room: models/, eval/")
    parser.add_argument("--quick", action="store_true", help="only the tests of a fault's file, not the wider sets")
    parser.add_argument(
        "--json", metavar="PATH", type=Path, help="a line for each fault; those killed there are not tried again"
    )
    options = parser.parse_args()

    # What is tried.
    chosen = read_faults()
    tests_of = {fault.file: fault.tests for fault in chosen if fault.file.startswith(options.only or "")}
    tried = [(fault, False) for fault in chosen if fault.file in tests_of]
    tried += [(fault, True) for fault in draw_faults(tests_of, options.number, options.seed)]
    if not tried:
        parser.error(f"no fault in {options.only}; tests/mutants/faults.txt has the files")

    # Those that an earlier run has killed, and the others.
    before = earlier_results(options.json)
    results = [(fault, drawn, KILLED) for fault, drawn in tried if place(fault) in before]
    tried = [(fault, drawn) for fault, drawn in tried if place(fault) not in before]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder))
        for fault, drawn in ProgressBar(tried, "faults", unit="faults"):
            started = time.monotonic()
            result, noticed = try_fault(tree, fault, options.quick)
            results.append((fault, drawn, result))
            if result != KILLED:
                print(f"{result}: {fault.file}\n- {fault.old}\n+ {fault.new}\n# {fault.what}", flush=True)
                print(f"= {fault.equivalent}\n" if fault.equivalent else "", flush=True)
            if options.json:
                about = {"file": fault.file, "old": fault.old, "new": fault.new, "drawn": drawn, "result": result}
                about |= {"noticed": noticed, "seconds": round(time.monotonic() - started, 1)}
                with options.json.open("a") as stream:
                    stream.write(json.dumps(about, ensure_ascii=False) + "\n")
    print(report(results))
    return 1 if any(result == SURVIVED and not fault.equivalent for fault, _, result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
