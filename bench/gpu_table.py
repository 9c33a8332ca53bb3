"""The table of what bench/gpu.sh measured: `python -m bench.gpu_table FOLDER`. It names what was not measured."""

import json
from pathlib import Path
from typing import Any

from bench import common
from miscc.command_line import CommandParser
from miscc.errors import DataError, run_command

EPOCHS, CUB_IMAGES = 600, 8855
STEPS = ("fp32", "tf32", "bf16", "bf16-channels-last", "bf16-channels-last-compiled", "bf16-checkpointing")
OTHERS = ("losses", "data", "data-workers", "sample", "attributes-fp32", "attributes-bf16")


def hours(images_per_second: float) -> float:
    """Hours that 600 epochs of CUB's 8,855 training images take."""
    return EPOCHS * CUB_IMAGES / images_per_second / 3600


def step_row(name: str, found: dict) -> list[str]:
    """One line for one way to take the step, against the plain step in the same run."""
    ours, peaks = found["steps"]["ours"], found["peak_flops"]
    peak = peaks["bfloat16" if name.startswith("bf16") and "bfloat16" in peaks else "float32"]
    memory = ours["peak_bytes"]
    return [
        name,
        f"{ours['seconds']['median'] * 1e3:.0f} ± {ours['seconds']['spread'] * ours['seconds']['median'] * 500:.0f}",
        f"{ours['images_per_second']:.1f}",
        f"×{found['ratio']['of_medians']:.2f}",
        f"{ours['flops_per_second'] / peak:.0%}",
        "" if memory is None else f"{memory / 2**30:.1f}",
        f"{hours(ours['images_per_second']):.1f}",
    ]


def other_lines(found: dict[str, dict]) -> list[str]:
    """A line for each figure of losses, data, sampling and the two ToyBirds trainings."""
    # Losses and data.
    lines = []
    for name, row in found.get("losses", {}).get("losses", {}).items():
        lines.append(f"{name}: ×{row['ratio']['of_medians']:.2f} of its plain form")
    for name in ("data", "data-workers"):
        for path, row in found.get(name, {}).get("paths", {}).items():
            lines.append(f"{name}, {path}: {row['images_per_second']:.0f} images/s (×{row['ratio']['of_medians']:.2f})")

    # Sampling and training.
    for way, row in found.get("sample", {}).get("ways", {}).items():
        lines.append(f"sampling, {way}: {row['images_per_second']:.0f} images/s")
    for precision in ("fp32", "bf16"):
        if f"attributes-{precision}" in found:
            lines.append(f"ToyBirds in {precision}: {short(found[f'attributes-{precision}'])}")
    return lines


def short(scores: Any) -> str:
    """The numbers of a score's record, as JSON, cut off after 400 characters."""
    numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float, list))}
    return json.dumps(numbers)[:400]


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder

    # The results that are there.
    names = [*(f"step-{name}" for name in STEPS), *OTHERS]
    found = {name: json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").is_file()}
    if not found:
        raise DataError(f"{folder}: holds no figures of bench/gpu.sh")

    # The steps as a table, ours and the plain ones.
    steps = {name: found[f"step-{name}"] for name in STEPS if f"step-{name}" in found}
    if steps:
        first = next(iter(steps.values()))
        settings = first["settings"]
        print(f"# SSA-GAN, {settings['image_size']} px, nf {settings['nf']}, batch {settings['batch']}\n")
        print(f"{common.machine_line(first['machine'])}\n")
        header = ["step", "ms", "images/s", "of the plain eager step", "of the measured peak", "GiB", "h for CUB"]
        plain = {"fp32": steps.get("fp32"), "tf32": steps.get("tf32")}
        rows = [step_row(name, run) for name, run in steps.items()]
        for name, run in plain.items():
            if run is not None and "reference" in run["steps"]:
                aside = {"steps": {"ours": run["steps"]["reference"]}, "peak_flops": run["peak_flops"]}
                rows.append(step_row(f"plain, {name}", aside | {"ratio": {"of_medians": 1.0}}))
        print(common.markdown_table(header, rows))

    # Everything else as a list.
    for line in other_lines(found):
        print(f"- {line}")
    missing = [name for name in names if name not in found]
    if missing:
        print(f"- not measured: {', '.join(missing)}")


if __name__ == "__main__":
    run_command(main)
