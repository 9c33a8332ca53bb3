"""Faults of one line: the list of chosen ones (faults.txt), and others drawn by a seed. Nothing is run here.

faults.txt, a block a fault, the blocks of a file below its heading:

    == miscc/losses.py: test_losses.py test_x.py::test_y    the file, and what should notice, cheapest first: files, single tests
    - F.relu(1 - real)           what stands in exactly one line of the file: the line, or a part of it
    + F.relu(1 + real)           what takes its place
    # the sign of real pairs     what is wrong with that
    = why no test can notice     only where the fault changes nothing that matters

equivalent.txt has, in the same form, drawn faults that change nothing that matters.
"""

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHOSEN, EQUIVALENT = HERE / "faults.txt", HERE / "equivalent.txt"

# Lines that talk to people: their faults are those of tests of words.
SPOKEN = re.compile(
    r"\b(raise|assert|logger|print|note|warnings?|argparse|parser|add|add_argument|say|line|lines|label)\b"
)
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//"}
COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
               ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault.

    file: relative to the repository.
    old, new: what is replaced, and by what; old stands once in the file, `line` None, or in line number `line`.
    what: is wrong with that.
    tests: names of test files, or of single tests, that should notice, cheapest first.
    equivalent: why no test can notice; "": one must.
    """

    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]
    equivalent: str = ""
    line: int | None = None

    def apply(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError where `old` is not there, or more than once."""
        if self.line is not None:
            lines = text.splitlines(keepends=True)
            if lines[self.line - 1].strip() != self.old:
                raise ValueError(f"{self.file}:{self.line}: is no longer `{self.old}`")
            lines[self.line - 1] = lines[self.line - 1].replace(self.old, self.new)
            return "".join(lines)

        # Chosen ones are found by what they replace.
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file}: `{self.old}` occurs {count} times, not once; mend tests/mutants/*.txt")
        return text.replace(self.old, self.new)


def read_faults(path: Path = CHOSEN) -> list[Fault]:
    """The faults of a list, in its order. Raises ValueError for a block that is not whole."""
    faults, file, tests, parts = [], "", (), {}

    def close() -> None:
        if not parts:
            return
        if not {"-", "+", "#"} <= parts.keys() or not file or not tests:
            raise ValueError(f"{path.name}: a block lacks one of `-`, `+`, `#`, file or tests: {parts}")
        faults.append(Fault(file, parts["-"], parts["+"], parts["#"], tests, parts.get("=", "")))
        parts.clear()

    for line in path.read_text(encoding="utf-8").splitlines():
        sign, _, rest = line.partition(" ")
        if not line.strip():
            close()
        elif sign == "==":
            close()
            file, _, names = rest.partition(":")
            tests = tuple(names.split())
        elif sign in ("-", "+", "#", "=") and rest and sign not in parts:
            parts[sign] = rest
        else:
            raise ValueError(f"{path.name}: {line!r} is no part of a fault")
    close()
    return faults


# -- faults drawn at random -----------------------------------------------------------------------------------------


def draw_faults(tests_of: dict[str, tuple[str, ...]], number: int, seed: int) -> list[Fault]:
    """`number` different lines of these files, each with one fault, by seed; fewer where there are no more.

    tests_of: {file: tests that should notice}. A line that faults.txt changes is not drawn.
    """
    listed = {(fault.file, place_of(fault)) for fault in read_faults()}
    reasons = {(fault.file, fault.old, fault.new): fault.equivalent for fault in read_faults(EQUIVALENT)}
    places = [
        (file, line, changes)
        for file in sorted(tests_of)
        for line, changes in sorted(changes_of((ROOT / file).read_text(encoding="utf-8")).items())
        if (file, line) not in listed
    ]

    # A line of any file is as likely as another; then one of its changes.
    rng = random.Random(f"mutants-{seed}")
    faults = []
    for file, line, changes in rng.sample(places, min(number, len(places))):
        old, new, what = rng.choice(changes)
        why = reasons.get((file, old, new), "")
        fault = Fault(file, old, new, what, tests_of[file], why, line)
        ast.parse(fault.apply((ROOT / file).read_text(encoding="utf-8")))
        faults.append(fault)
    return faults


def place_of(fault: Fault) -> int:
    """The number of the line that a listed fault changes."""
    before = (ROOT / fault.file).read_text(encoding="utf-8").partition(fault.old)[0]
    return before.count("\n") + 1


def changes_of(text: str) -> dict[int, list[tuple[str, str, str]]]:
    """{line number: [(line, line with a fault, what it is)]}, lines without their indentation; 1 is the first."""
    lines = text.splitlines()
    found: dict[int, list[tuple[str, str, str]]] = {}
    for node in _computing_nodes(ast.parse(text)):
        for start, end, replacement, what in _changes(node, lines):
            number, line = node.lineno, lines[node.lineno - 1]
            if SPOKEN.search(line):
                continue
            changed = line[:start] + replacement + line[end:]
            if changed != line:
                found.setdefault(number, []).append((line.strip(), changed.strip(), what))
    return found


def _computing_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of one line inside functions, without docstrings, annotations, messages and what commands say."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments)):
            continue
        if isinstance(child, ast.FunctionDef) and child.name in ("main", "add_options", "lines", "__repr__"):
            continue
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "setting":
            continue
        if isinstance(child, ast.expr) and child.lineno == child.end_lineno and child.col_offset > 0:
            yield child
        yield from _computing_nodes(_without_annotation(child))


def _without_annotation(node: ast.AST) -> ast.AST:
    """Nor decorators."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return ast.Module(body=node.body, type_ignores=[])
    if isinstance(node, ast.AnnAssign):
        return ast.Module(body=[] if node.value is None else [ast.Expr(node.value)], type_ignores=[])
    return node


def _changes(node: ast.AST, lines: list[str]) -> Iterator[tuple[int, int, str, str]]:
    """(start, end, replacement, what) within the node's line, in characters."""
    for kind in (_operator, _comparison, _constant, _detach, _arguments):
        yield from kind(node, lines)


def _column(lines: list[str], node_line: int, offset: int) -> int:
    """ast counts bytes of UTF-8."""
    return len(lines[node_line - 1].encode()[:offset].decode())


def _between(left: ast.expr, right: ast.expr, lines: list[str]) -> tuple[int, int, str] | None:
    if left.end_lineno != right.lineno:
        return None
    line = left.end_lineno or 1
    start, end = _column(lines, line, left.end_col_offset or 0), _column(lines, line, right.col_offset)
    return start, end, lines[line - 1][start:end]


def _replaced(node: ast.AST, left: ast.expr, right: ast.expr, lines: list[str], old: str, new: str) -> Iterator:
    place = _between(left, right, lines)
    if place is not None and place[2].count(old) == 1:
        start, end, text = place
        yield start, end, text.replace(old, new), f"{old} is {new}"


def _operator(node: ast.AST, lines: list[str]) -> Iterator:
    if (
        isinstance(node, ast.BinOp)
        and type(node.op) in SWAPPED
        and not isinstance(node.left, (ast.List, ast.JoinedStr))
    ):
        old, new = SIGNS[type(node.op)], SIGNS[SWAPPED[type(node.op)]]
        yield from _replaced(node, node.left, node.right, lines, old, new)


def _comparison(node: ast.AST, lines: list[str]) -> Iterator:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield from _replaced(node, node.left, node.comparators[0], lines, *COMPARISONS[type(node.ops[0])])


def _constant(node: ast.AST, lines: list[str]) -> Iterator:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (bool, int, float)):
        return
    start, end = (_column(lines, node.lineno, offset or 0) for offset in (node.col_offset, node.end_col_offset))
    changed = (
        not node.value if isinstance(node.value, bool) else node.value + 1 if node.value in (0, 1) else node.value * 2
    )
    yield start, end, str(changed), f"{node.value} is {changed}"


def _detach(node: ast.AST, lines: list[str]) -> Iterator:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        inner = node.func.value
        start, end = (_column(lines, node.lineno, o or 0) for o in (inner.end_col_offset, node.end_col_offset))
        yield start, end, "", "without detach"


def _arguments(node: ast.AST, lines: list[str]) -> Iterator:
    if not isinstance(node, ast.Call) or len(node.args) < 2 or any(isinstance(a, ast.Starred) for a in node.args[:2]):
        return
    first, second = node.args[:2]
    start, middle, after, end = (
        _column(lines, node.lineno, offset or 0)
        for offset in (first.col_offset, first.end_col_offset, second.col_offset, second.end_col_offset)
    )
    line = lines[node.lineno - 1]
    swapped = line[after:end] + line[middle:after] + line[start:middle]
    yield start, end, swapped, "two arguments are swapped"
