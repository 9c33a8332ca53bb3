"""What the benchmarks share: clocks, taking turns, the machine's name and peak, tables, files."""

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from miscc import distributed
from miscc.command_line import CommandParser, add_device_option, gpu_number, positive
from miscc.files import write_json, write_text

RESULTS = Path(__file__).resolve().parent / "results"


class Clock:
    """Seconds by phase: `clock("D forward")` ends a phase of this name; phases of the same name add up.

    On a GPU the end of a phase waits for the work that the phase started.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.phases: dict[str, float] = {}
        synchronise(device)
        self._last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    device: torch.device | None = None,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call, the ways one after the other in every round, so that a busy machine slows all of them.

    ways: what is timed, by name
    rounds, warm_up: that count, and that do not
    prepare: prepare(name) runs before each call and does not count
    """
    device = device or torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, run in ways.items():
            prepare(name)
            value = seconds_of(run, device)

            # The first rounds warm up caches and compilers.
            if number >= warm_up:
                seconds[name].append(value)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, fastest, and the spread: the interquartile range as a share of the median."""
    median = statistics.median(values)

    # With one or two runs the whole range stands for the quarters.
    quarters = statistics.quantiles(values, n=4) if len(values) > 2 else [min(values), median, max(values)]
    return {"median": median, "fastest": min(values), "spread": (quarters[2] - quarters[0]) / median}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster: by the medians, by the fastest runs, and the median of each round's own ratio."""
    return {
        "of_medians": statistics.median(slow) / statistics.median(fast),
        "of_fastest": min(slow) / min(fast),
        "by_round": statistics.median(a / b for a, b in zip(slow, fast, strict=True)),
    }


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32, rounds: int = 10) -> float:
    """Operations a second of a large square matrix product, 2 for a multiply-add: the device's measured peak."""
    # Large enough that the product alone counts, not its launch.
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = take_turns({"product": lambda: a @ b}, rounds, warm_up=3, device=device)["product"]
    return 2 * size**3 / min(seconds)


class _FlopCounter(TorchDispatchMode):
    """Adds up torch's own formulas. torch's FlopCounterMode also follows modules, and that breaks in a double backward."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*arguments, **(keywords or {}), out_val=output)
        return output


def count_flops(run: Callable[[], object]) -> int:
    """Operations of one call by the formulas of torch.utils.flop_counter: convolutions and products, 2 a multiply-add."""
    with _FlopCounter() as counter:
        run()
    return counter.total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of one call beyond those held before; None where the system does not say."""
    # On a GPU torch counts them.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    # On a CPU Linux does: the peak of the resident size, reset before the call.
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but kept would hide as much of the growth
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status names no {name}")


def machine(device: torch.device) -> dict:
    """The machine that the figures were measured on."""
    # The processor and the versions.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    return found


def machine_line(found: Mapping) -> str:
    """The machine in a few words."""
    gpu = f"{found['gpu']}, " if "gpu" in found else ""
    return f"{gpu}{found['cpu']}, {found['threads']} threads, Python {found['python']}, torch {found['torch']}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = CommandParser(description=description)
    add_device_option(options)
    options.add_argument(
        "--rounds", type=positive, default=7, metavar="N", help="measured rounds, after those to warm up"
    )

    # Where the figures go, beside the screen.
    options.add_argument("--json", metavar="FILE", help="write all figures there, and the table beside it as .md")
    options.add_argument("--name", help="the same under bench/results, e.g. train-step-cpu")
    return options


def start(options: argparse.Namespace) -> torch.device:
    """The device to measure on."""
    return distributed.start(gpu_number(options.device)).device


def report(options: argparse.Namespace, results: dict, text: str) -> None:
    """Print the table; write figures and table where --json and --name ask for it."""
    print(text)
    for path in [options.json, options.name and RESULTS / f"{options.name}.json"]:
        if path:
            write_json(path, results)
            write_text(Path(path).with_suffix(".md"), text)
