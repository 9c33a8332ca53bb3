"""The house keeps its order: imports point one way, and nothing imports entry scripts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {  # room: the rooms that it may import
    "miscc": set(),
    "models": {"miscc"},
    "datasets": {"miscc"},
    "sampling": {"miscc", "models", "datasets"},
    "eval": {"miscc", "models", "datasets", "sampling"},
    "training": {"miscc", "models", "datasets", "sampling", "eval"},
    "serve": {"miscc", "models", "datasets", "sampling"},
    "bench": {"miscc", "models", "datasets", "sampling", "eval", "training"},
}
ENTRY_SCRIPTS = {"main", "pretrain_DAMSM"}
# A former command that starts the one that took its place.
FORMER_COMMANDS = {("models/released.py", "sampling.convert")}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
OURS = re.compile(rf"({'|'.join([*ROOMS, *ENTRY_SCRIPTS])})(\.\w+)*")


def imported_modules(path):
    """All that a file imports: at its top, inside functions, and by name (runpy, importlib, python -m)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Call):
            words = [argument for argument in node.args if isinstance(argument, ast.Constant)]
            lists = [argument.elts for argument in node.args if isinstance(argument, ast.List)]
            for word in [*words, *(element for elements in lists for element in elements)]:
                value = getattr(word, "value", None)
                if isinstance(value, str) and "." in value and OURS.fullmatch(value) and not value.endswith(".py"):
                    yield value


def forbidden_imports(path, room):
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    for module in imported_modules(path):
        first = module.split(".")[0]
        if first not in ROOMS and first not in ENTRY_SCRIPTS:
            continue
        if first != room and first not in ROOMS[room] and (name, module) not in FORMER_COMMANDS:
            yield module


def test_all_rooms_are_looked_at():
    assert len(FILES) > 80
    assert {path.parent.name for path in FILES} >= {"features", "protocol", "toybirds", "sources", "sampling"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    assert not list(forbidden_imports(path, room)), f"{room} must not import these"


@pytest.mark.parametrize(
    "source",
    [
        "from eval.FID import distance",
        "def f():\n    import training.trainer",
        "import runpy\nrunpy.run_module('sampling.convert')",
        "import importlib\nimportlib.import_module('eval.IS')",
        "import subprocess\nsubprocess.run(['python', '-m', 'eval.evaluate'])",
        "import main",
    ],
)
def test_an_import_upwards_is_seen_wherever_it_stands(source, tmp_path):
    (tmp_path / "new.py").write_text(source)
    assert list(forbidden_imports(tmp_path / "new.py", "models"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_entry_scripts_choose_the_gpu_and_every_file_says_what_lives_there(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "a file opens by saying what lives in it"
    assert ".cuda()" not in source
