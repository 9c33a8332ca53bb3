"""Mutants: every listed fault stands in the code as it is today; what is drawn, and what is made of pytest's end."""

import ast

import pytest
from mutants import faults
from mutants.faults import ROOT, Fault, changes_of, draw_faults, read_faults
from mutants.run import KILLED, SURVIVED, TIMEOUT, WIDER, outcome_of, report

CHOSEN = read_faults()
TESTS_OF = {fault.file: fault.tests for fault in CHOSEN}


@pytest.mark.parametrize("file", TESTS_OF)
def test_every_listed_fault_can_be_applied_and_compiles(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for fault in [*CHOSEN, *read_faults(faults.EQUIVALENT)]:
        if fault.file == file:
            changed = fault.apply(text)
            assert changed != text and changed.count("\n") == text.count("\n"), fault
            compile(changed, file, "exec")
    assert all((ROOT / "tests" / name.partition("::")[0]).is_file() for name in TESTS_OF[file])
    assert file.split("/")[0] in WIDER


def test_no_fault_is_listed_twice():
    assert len({(fault.file, fault.old, fault.new) for fault in CHOSEN}) == len(CHOSEN) >= 80
    assert all(fault.equivalent for fault in read_faults(faults.EQUIVALENT))


def test_tests_of_the_wider_sets_are_there():
    assert all((ROOT / "tests" / name).is_file() for names in WIDER.values() for name in names.split())


def test_a_fault_whose_line_is_gone_or_there_twice_is_an_error():
    fault = Fault("x.py", "a = 1", "a = 2", "off by one", ("test_x.py",))
    assert fault.apply("b = 0\na = 1\n") == "b = 0\na = 2\n"
    for text in ("a = 3\n", "a = 1\nb = 0\na = 1\n"):
        with pytest.raises(ValueError, match=f"occurs {text.count('a = 1')} times, not once"):
            fault.apply(text)
    drawn = Fault("x.py", "a = 1", "a = 2", "off by one", ("test_x.py",), line=3)
    assert drawn.apply("a = 1\nb = 0\na = 1\n") == "a = 1\nb = 0\na = 2\n"
    with pytest.raises(ValueError, match="x.py:3: is no longer"):
        drawn.apply("a = 1\nb = 0\nc = 1\n")


def test_a_block_that_is_not_whole_is_an_error(tmp_path):
    path = tmp_path / "faults.txt"
    for text in (
        "== x.py: test_x.py\n- a\n+ b\n",
        "- a\n+ b\n# c\n",
        "== x.py: test_x.py\nodd\n",
        "== x.py: t.py\n- a\n- b\n",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="faults.txt"):
            read_faults(path)
    path.write_text("== x.py: test_x.py test_y.py\n- a  # b\n+ c\n# why\n= same\n")
    assert read_faults(path) == [Fault("x.py", "a  # b", "c", "why", ("test_x.py", "test_y.py"), "same")]


CODE = """
SIZE = 1 / 8  # of the side


@cache(2)
def f(x: int | None = 3, y=True):
    \"\"\"Of 4 things.\"\"\"
    assert x < 3
    if x < 3:
        raise ValueError(f"more than {x + 1} of 5")
    return g(x.detach(), y) * 0.5 + 0
"""


def test_what_may_be_changed_in_a_file():
    """Operators, comparisons, numbers, detach, arguments; no decorator, docstring, annotation, default, assertion or message."""
    found = {line: [changed for _, changed, _ in changes] for line, changes in changes_of(CODE).items()}
    assert found == {
        2: ["SIZE = 1 * 8  # of the side", "SIZE = 2 / 8  # of the side", "SIZE = 1 / 16  # of the side"],
        9: ["if x <= 3:", "if x < 6:"],
        11: [
            "return g(x.detach(), y) * 0.5 - 0",
            "return g(x.detach(), y) / 0.5 + 0",
            "return g(y, x.detach()) * 0.5 + 0",
            "return g(x, y) * 0.5 + 0",
            "return g(x.detach(), y) * 1.0 + 0",
            "return g(x.detach(), y) * 0.5 + 1",
        ],
    }


def test_drawn_faults_depend_on_the_seed_alone_and_compile():
    first = draw_faults(TESTS_OF, 30, seed=4)
    assert first == draw_faults(TESTS_OF, 30, seed=4) and len(first) == 30
    assert len({(fault.file, fault.line) for fault in first}) == 30
    assert first != draw_faults(TESTS_OF, 30, seed=5)
    for fault in first:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        changed = fault.apply(text)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert len(draw_faults({"training/ema.py": ("test_trainer.py",)}, 10**6, seed=1)) < 30


def test_what_becomes_of_pytest_is_told_from_its_status():
    assert outcome_of(0) == SURVIVED and outcome_of(None) == TIMEOUT
    assert outcome_of(1 << 8) == outcome_of(2 << 8) == outcome_of(9) == KILLED  # failed, not even collected, killed
    for code in (4, 5):
        with pytest.raises(SystemExit, match="found no tests"):
            outcome_of(code << 8)


def test_the_share_counts_no_equivalent_fault_that_survived():
    of_losses = Fault("miscc/losses.py", "a", "b", "c", ("test_losses.py",))
    same = Fault("miscc/losses.py", "a", "d", "c", ("test_losses.py",), equivalent="why")
    results = [
        (of_losses, False, KILLED),
        (of_losses, True, TIMEOUT),
        (of_losses, True, SURVIVED),
        (same, True, SURVIVED),
    ]
    table = report(results).splitlines()
    assert table[1].split() == ["miscc", "1", "3", "2", "1", "1"] and table[2].split() == [
        "all",
        "1",
        "3",
        "2",
        "1",
        "1",
    ]
    assert table[3] == "66.7 % of those that are not equivalent are killed"
