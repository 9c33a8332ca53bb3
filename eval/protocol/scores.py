"""What a score is, and what the scripts that print scores share: arguments, devices, screen and JSON."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from eval.features.networks import NETWORKS, RESIZE, FeatureNetwork, load_network
from eval.features.statistics import default_cache
from miscc.distributed import choose_device
from miscc.errors import ConfigError
from miscc.files import write_json

PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "transformers", "pillow", "numpy", "scipy")
COUNTS = {  # fields of a protocol that stand beside the number
    "num_real": "real",
    "num_fake": "generated",
    "num_images": "images",
    "num_pairs": "pairs",
    "num_captions": "captions",
    "splits": "splits",
    "subset_size": "a subset",
    "folds": "folds",
}


@dataclass(frozen=True)
class Score:
    """One number with everything that is needed to get it again."""

    name: str  # with its network: "FID[inception-tf]"
    value: float
    protocol: dict
    std: float | None = None  # over splits, folds or subsets, as the protocol says
    interval: tuple[float, float] | None = None  # 95 %
    details: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def line(self) -> str:
        """`IS[imagenet] 4.361 ± 0.032  [30000 images, 10 splits, resize tf1]`"""
        text = f"{self.name} {self.value:.6g}"
        if self.std is not None:
            text += f" ± {self.std:.3g}"
        if self.interval is not None:
            text += f" (95 %: {self.interval[0]:.6g} to {self.interval[1]:.6g})"
        said = [f"{self.protocol[key]} {word}" for key, word in COUNTS.items() if self.protocol.get(key) is not None]
        if "resize" in self.protocol:
            said.append(f"resize {self.protocol['resize']}")
        return f"{text}  [{', '.join(said)}]" if said else text

    def record(self) -> dict:
        """The score as JSON can hold it."""
        return {
            "name": self.name,
            "value": self.value,
            "std": self.std,
            "interval": list(self.interval) if self.interval else None,
            "details": self.details,
            "protocol": self.protocol,
            "warnings": list(self.warnings),
        }


def distance_name(prefix: str, network: FeatureNetwork) -> str:
    """`FID[inception-tf]`, but `FD[efficientnet-lite0]`: only an Inception with its published weights gives an FID."""
    inception = network.name.startswith("inception") and network.published
    return f"{prefix if inception else prefix.replace('I', '')}[{network.label}]"


def score_name(network: FeatureNetwork) -> str:
    """`IS[imagenet]` for the network of the original score, else `IS[<network>]`."""
    return f"IS[{'imagenet' if network.label == 'inception-tf' else network.label}]"


def versions() -> dict[str, str]:
    """The versions of what computed a score."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def add_arguments(parser: argparse.ArgumentParser, network: bool = True, weights: bool = True) -> None:
    """The options that all scores have; `network`: also those for the choice of a feature network."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--batch-size", type=positive, default=32, help="images at a time (default 32)")
    parser.add_argument("--workers", type=positive, help="threads that decode images (default: one a core, up to 8)")
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help="write JSON there; without PATH: print it")
    parser.add_argument("--skip-broken", action="store_true", help="leave out, and count, images that cannot be read")
    if weights:
        parser.add_argument("--weights", metavar="PATH", help="weight file (default: torch hub's cache)")
    if network:
        parser.add_argument("--network", default="inception-tf", choices=list(NETWORKS), help="default inception-tf")
        parser.add_argument(
            "--resize",
            choices=list(RESIZE),
            help="tf1: as torch-fidelity (default of inception-tf); bilinear: as pytorch-fid; clean: as clean-fid",
        )
        parser.add_argument("--seed", type=seed_number, default=2020, help="of shuffles and subsets (default 2020)")


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a script that keeps reference statistics."""
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help=f"folder of kept statistics ({default_cache()})"
    )
    parser.add_argument("--no-cache", dest="cache", action="store_const", const=None, help="keep nothing")


def network_of(args: argparse.Namespace) -> FeatureNetwork:
    """The network that the options name, on the device that they name."""
    return load_network(args.network, args.weights, args.resize, named_device(args.device))


def extraction_of(args: argparse.Namespace) -> dict:
    """The options for `eval.features.extract`."""
    return {"batch_size": args.batch_size, "workers": args.workers, "progress": True}


def named_device(name: str | None) -> torch.device:
    """The device of `--device`, or a GPU if there is one. Raises ConfigError for a device that is not there."""
    if name is None:
        return choose_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: cannot be used here ({reason}); --device cpu always works") from None
    return device


def report(scores: Sequence[Score], json_path: str | None) -> None:
    """Print a line a score and its warnings; with `json_path` also write them there, "-" prints JSON instead."""
    for warning in dict.fromkeys(warning for score in scores for warning in score.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    records = {"scores": [score.record() for score in scores], "versions": versions()}
    lines = sys.stderr if json_path == "-" else sys.stdout
    for score in scores:
        print(score.line(), file=lines)
    if json_path == "-":
        print(json.dumps(records, indent=1, ensure_ascii=False))
    elif json_path:
        write_json(json_path, records)


def seed_number(text: str) -> int:
    """A seed from the command line, 0 to 2³² − 1 as numpy wants it."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError("must be 0 to 4294967295")
    return number


def positive(text: str) -> int:
    """A number of at least 1 from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
