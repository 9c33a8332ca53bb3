"""What an evaluation writes: a table for people, and evaluation.json, a list to which every run adds a record."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eval.metric import COUNTS
from eval.scripts import versions
from miscc.errors import DataError, UserError
from miscc.files import write_json
from sampling.publish import read_evaluations

ROOT = Path(__file__).resolve().parents[2]


def environment(device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """When, where and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": f"{device} ({name})",
        "num_processes": num_processes,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """This project's commit, with "-dirty" where tracked files were changed; None where it is not known."""
    # Asked of git: there may be none, or no repository.
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def check_writable(path: Path) -> None:
    """Before an hour of work: raises DataError when results cannot be added to this file."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: cannot be written; give another file with --out")
    read_evaluations(path)


def add_record(path: str | Path, record: dict[str, Any]) -> None:
    """Add a record to the list in a file, whole or not at all; earlier ones are kept. Raises DataError."""
    try:
        write_json(path, [*read_evaluations(path), record])
    except (OSError, UserError) as error:
        raise DataError(f"{error}; give another file with --out") from None


def print_record(record: Mapping[str, Any]) -> None:
    """The record as a table, with what was not computed and every warning."""
    print("\n".join(lines(record)))


def lines(record: Mapping[str, Any]) -> list[str]:
    """A title, a line for each score, for each metric that was not computed, and for each warning."""
    # What was scored, and against what.
    protocol, real = record["protocol"], record["real"]
    changed = ", ".join(f"{name} {value}" for name, value in record["overrides"].items())
    quick = f", NOT its own numbers: {changed}" if changed else ""
    checkpoint = record.get("checkpoint") or {}
    source = record.get("image_source") or record["judged"]  # as records of earlier versions call it
    made_by = f" of {checkpoint['path']} (step {checkpoint['step']})" if source == "generated" else ""
    images = f"{record['num_images']} {source.removesuffix(' images')} images"
    title = f"{images}{made_by} by protocol {protocol['name']}{quick}"
    table = [title if made_by else f"{title}, no generator"]
    if real.get("read_by", True):  # records of earlier versions do not say which metrics read real images
        crop = protocol["real_crop"]
        table.append(f"against {real['num_images']} of {real['data_set']}'s {real['split']} set, {crop} crop")

    # Scores in columns.
    width = max(len(score["name"]) for score in record["scores"])
    for score in record["scores"]:
        spread = "" if score["std"] is None else f"± {score['std']:.3g}"
        table.append(f"{score['name']:<{width}}  {score['value']:>9.4g} {spread:<9} {_beside(score)}".rstrip())

    table += [f"not computed: {metric}: {reason}" for metric, reason in record["not_computed"].items()]
    table += [f"warning: {warning}" for warning in record["warnings"]]
    seconds = sum(record["seconds"].values())
    return [*table, f"{seconds:.0f} s on {record['device']}, {record['num_processes']} process(es)"]


def _beside(score: Mapping[str, Any]) -> str:
    """What stands beside a score so that it can be read: whether it flatters, baselines, and counts."""
    # Baselines.
    about = score["protocol"]
    beside = [f"FLATTERING (trained with it: {score['flattering']})"] if score.get("flattering") else []
    beside += [f"{name} {value:.3g}" for name, value in (about.get("beside") or {}).items() if value is not None]
    if "chance" in about and "beside" not in about:
        beside.append(f"chance {about['chance']:.3g}")

    # Counts and filter.
    counts = [f"{about[key]} {word}" for key, word in COUNTS.items() if about.get(key) is not None]
    if "num_named" in about:
        counts = [f"named by {about['num_named']}"]
    if "resize" in about:
        counts.append(f"resize {about['resize']}")
    return ", ".join([*beside, *counts])
