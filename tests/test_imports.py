"""The house keeps its order: imports point one way, and entry scripts are imported by nobody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "miscc": set(),
    "models": {"miscc"},
    "datasets": {"miscc"},
    "eval": {"miscc", "models", "datasets"},
    "training": {"miscc", "models", "datasets", "eval"},
    "bench": {"miscc", "models", "datasets", "eval", "training"},
}
ENTRY_SCRIPTS = {"main", "pretrain_DAMSM"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


def imported_rooms(path):
    """First names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_all_rooms_are_looked_at():
    assert len(FILES) > 25


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path):
    room = path.parent.name
    ours = {name for name in imported_rooms(path) if name in ROOMS or name in ENTRY_SCRIPTS}
    forbidden = ours - ROOMS[room] - {room}
    assert not forbidden, f"{room} must not import {forbidden}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_the_entry_scripts_choose_the_gpu_and_every_file_says_what_lives_there(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "a file opens by saying what lives in it"
    assert ".cuda()" not in source
