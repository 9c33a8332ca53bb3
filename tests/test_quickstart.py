"""docs/quickstart.ipynb runs top to bottom; it needs no Jupyter for that."""

import ast
import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def code_cells():
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_it_is_a_notebook_without_outputs_whose_cells_parse():
    content = json.loads(NOTEBOOK.read_text())
    assert content["nbformat"] == 4 and len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert all(cell["outputs"] == [] for cell in content["cells"] if cell["cell_type"] == "code")
    for source in code_cells():
        ast.parse(source)


@pytest.mark.slow
def test_it_runs_top_to_bottom_in_five_minutes(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    start, names = time.monotonic(), {}
    for source in code_cells():
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert time.monotonic() - start < 300
    assert names["drawn"].images.shape == (2, 32, 32, 3) and names["picture"].width > 200
