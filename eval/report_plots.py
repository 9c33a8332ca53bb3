"""Curves of stats.jsonl as SVG for the report: one plot a group of values, one line a run and value. By matplotlib, offline."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from miscc.errors import DataError, UserError

AXES = {
    "loss": "loss (no unit)", "logits": "mean logit", "gradient_norm": "gradient norm", "sign": "mean sign of the logits",
    "retrieval": "share that finds its pair", "validation": "validation loss", "images_per_second": "images a second",
    "memory_mib": "memory (MiB)",
}  # fmt: skip
RETRIEVAL = re.compile(r"_r\d+$")  # image_to_text_r5: the share with its own caption among the first five


def read_stats(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{value: [(step, number)]} of a stats.jsonl; {} where there is none. Raises DataError for another file."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return curves
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):  # half a line, of a process that was killed
                break
            raise DataError(f"{path}: line {number} is no line of stats; remove it") from None

        # The epoch is a position, not a value.
        for name, value in entry.items():
            if name != "epoch" and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def plots(runs: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> dict[str, str]:
    """{group: SVG}: what stands before the slash of a value's name is its group.

    runs: curves by the run's name.

    Raises UserError without matplotlib.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for run, curves in runs.items():
        for name in curves:
            group = "retrieval" if RETRIEVAL.search(name) else name.split("/")[0]
            groups.setdefault(group, []).append((run, name))
    return {group: _plot(group, members, runs) for group, members in groups.items()}


def _plot(group: str, members: Sequence[tuple[str, str]], runs: Mapping) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing; pip install -r requirements-report.txt") from None

    # One line a run and value.
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for run, name in members:
        steps, values = zip(*runs[run][name], strict=True)
        label = name.split("/")[-1] if len(runs) == 1 else f"{run}: {name.split('/')[-1]}"
        axes.plot(steps, values, label=label, linewidth=1.2)

    # What the axes mean; the legend stands beside the curves.
    axes.set_xlabel("training step")
    axes.set_ylabel(AXES.get(group, group.replace("_", " ")))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))

    # Without a date: the same run gives the same file.
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]  # without the declaration, which names a file elsewhere
