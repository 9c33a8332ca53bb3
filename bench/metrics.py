"""How fast the scores are, and whether they say the same as the reference tools: `python -m bench.metrics`.

Features a second against pytorch-fid's and torch-fidelity's own loops over the same files with the same random
weights, in one process, taking turns; the trace of the Fréchet distance against sqrtm. pytorch-fid is not a dependency:
`pip install --no-deps --target /tmp/pytorch-fid pytorch-fid`, then `--pytorch-fid /tmp/pytorch-fid`.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

from eval.features.networks import FeatureNetwork, load_network, random_inception_state
from eval.features.sources import open_source
from eval.features.statistics import collect_features, statistics_of_features
from eval.FID import FrechetDistance, frechet_distance
from eval.metric import ScoringBatch
from eval.scripts import versions
from miscc.command_line import CommandParser
from miscc.errors import DataError, run_command
from miscc.files import write_json, write_text
from miscc.randomness import stream

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 3


def write_images(folder: Path, count: int, size: int, seed: int) -> list[str]:
    """`count` smooth random pictures as PNG; their paths."""
    folder.mkdir()
    for number in range(count):
        coarse = stream(seed, "bench picture", number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
    return sorted(str(path) for path in folder.iterdir())


def pytorch_fid_loop(folder: str | None, state: dict, batch_size: int) -> Callable[[list[str]], np.ndarray]:
    """pytorch-fid's own `get_activations` with these weights; files -> features (N, 2048)."""
    if folder:
        sys.path.append(folder)
    try:
        from pytorch_fid import fid_score, inception
    except ImportError:
        raise DataError(
            "pytorch-fid is not here: `pip install --no-deps --target /tmp/pytorch-fid pytorch-fid` and "
            "`python -m bench.metrics --pytorch-fid /tmp/pytorch-fid`"
        ) from None

    # Our random weights and no progress bar, else its own code.
    inception.load_state_dict_from_url = lambda *_, **__: state  # it would download them
    fid_score.tqdm = lambda batches: batches
    model = inception.InceptionV3([3])
    return lambda files: fid_score.get_activations(files, model, batch_size, num_workers=2)


def torch_fidelity_loop(weights: Path, batch_size: int) -> Callable[[list[str]], np.ndarray]:
    """torch-fidelity's own loop over a data set with these weights; files -> features (N, 2048)."""
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    # Only features of the last layer, as FID reads them.
    network = FeatureExtractorInceptionV3("bench", ["2048"], feature_extractor_weights_path=str(weights))

    def loop(files: list[str]) -> np.ndarray:
        found = get_featuresdict_from_dataset(ImagesPathDataset(files), network, batch_size, False, False, False)
        return found["2048"].numpy()

    return loop


def ours(network: FeatureNetwork, batch_size: int) -> Callable[[list[str]], np.ndarray]:
    """Our loop; files -> features (N, 2048)."""

    def loop(files: list[str]) -> np.ndarray:
        source = open_source(Path(files[0]).parent)
        return collect_features(source, network, batch_size=batch_size, progress=False).numpy()

    return loop


def measure_features(args: argparse.Namespace) -> dict:
    """Images a second of each loop at its fastest, taking turns, and how far the features and FIDs are apart."""
    with tempfile.TemporaryDirectory() as folder:
        # Two sets of pictures, one set of weights.
        root = Path(folder)
        sets = [write_images(root / name, args.images, args.size, seed) for seed, name in enumerate(("real", "fake"))]
        state = random_inception_state(SEED)
        torch.save(state, root / "weights.pth")
        network = load_network("random", resize="tf1", seed=SEED)

        # Every loop with its own filter, and ours with both.
        loops = {
            "pytorch-fid": pytorch_fid_loop(args.pytorch_fid, state, args.batch_size),
            "torch-fidelity": torch_fidelity_loop(root / "weights.pth", args.batch_size),
            "ours, bilinear": ours(load_network("random", resize="bilinear", seed=SEED), args.batch_size),
            "ours, tf1": ours(network, args.batch_size),
        }

        # In turn; the first round warms up.
        rates = {name: [] for name in loops}
        features = {}
        for _ in range(args.rounds + 1):
            for name, loop in loops.items():
                start = time.perf_counter()
                features[name] = loop(sets[0])
                rates[name].append(args.images / (time.perf_counter() - start))

        # The other set, for a distance.
        second = {name: loop(sets[1]) for name, loop in loops.items()}
    result = {name: {"images_per_second": max(values[1:]), "runs": values[1:]} for name, values in rates.items()}
    for name, reference in (("ours, bilinear", "pytorch-fid"), ("ours, tf1", "torch-fidelity")):
        # Ours against the tool with the same filter: speed, features, distance.
        own, theirs = features[name], features[reference]
        result[name] |= {
            "reference": reference,
            "speedup": result[name]["images_per_second"] / result[reference]["images_per_second"],
            "largest_feature_difference": float(np.abs(own - theirs).max()),
            "feature_spread": float(theirs.std(axis=0).mean()),
            "distance": fid_of(own, second[name], network),
            "distance_by_reference": fid_of(theirs, second[reference], network),
        }
    return result


def fid_of(real: np.ndarray, fake: np.ndarray, network: FeatureNetwork) -> float:
    """The Fréchet distance of two sets of features (N, D) of a network."""
    metric = FrechetDistance(network, statistics_of_features(torch.from_numpy(real)))
    metric.update(ScoringBatch(features=torch.from_numpy(fake)))
    return metric.compute()[0].value


def measure_trace(size: int, rounds: int) -> dict:
    """Seconds for the Fréchet distance of two full covariances, by sqrtm and by eigenvalues, at their fastest."""
    # Two full covariances, unlike each other.
    random = stream(SEED, "bench covariance")
    rows = [random.normal(size=(2 * size, size)) @ np.diag(np.linspace(0.05, 1 + k, size)) for k in range(2)]
    (mean1, covariance1), (mean2, covariance2) = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in rows]

    def by_root() -> float:
        root = scipy.linalg.sqrtm(covariance1 @ covariance2)
        return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1 + covariance2 - 2 * root.real))

    # The root of the product, and what the score computes.
    ways = {"sqrtm": by_root, "eigenvalues": lambda: frechet_distance(mean1, covariance1, mean2, covariance2)}
    seconds, values = {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            values[name] = way()
            seconds[name].append(time.perf_counter() - start)
    fastest = {name: min(runs) for name, runs in seconds.items()}
    return {
        "size": size,
        "seconds": fastest,
        "runs": seconds,
        "speedup": fastest["sqrtm"] / fastest["eigenvalues"],
        "relative_difference": abs(values["eigenvalues"] / values["sqrtm"] - 1),
    }


def machine() -> dict:
    """What the figures were measured on."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads(), **versions()}


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def table(results: dict) -> str:
    """The results as Markdown."""
    features, trace, settings = results["features"], results["frechet_trace"], results["settings"]
    lines = [
        "# Scores: speed and agreement on a CPU",
        "",
        f"{results['machine']['cpu']}, {results['machine']['threads']} threads, torch {results['machine']['torch']}. "
        f"{settings['images']} PNGs of {settings['size']} px in batches of {settings['batch_size']}, "
        f"random Inception weights. The loops in turn, one round to warm up, then {settings['rounds']}; the fastest of "
        "each, as others work on the machine too (all runs in the JSON). `python -m bench.metrics`",
        "",
        "| features, with reading the files | images/s | against its reference |",
        "|---|---|---|",
    ]

    # Speed of each loop.
    for name, row in features.items():
        against = f"×{row['speedup']:.2f} of {row['reference']}" if "reference" in row else ""
        lines.append(f"| {name} | {row['images_per_second']:.1f} | {against} |")

    # Whether ours and the reference's say the same.
    lines += [
        "",
        "| same files, same weights | FD ours | FD of the reference's features | largest feature difference |",
    ]
    lines.append("|---|---|---|---|")
    for name, row in features.items():
        if "reference" in row:
            apart = f"{row['largest_feature_difference']:.1e} (features spread by {row['feature_spread']:.2g})"
            lines.append(f"| {name} | {row['distance']:.6f} | {row['distance_by_reference']:.6f} | {apart} |")

    # The trace of the matrix root.
    seconds = trace["seconds"]
    lines += [
        "",
        f"Fréchet distance of {trace['size']} dimensions: sqrtm {seconds['sqrtm']:.1f} s, "
        f"ours {seconds['eigenvalues']:.2f} s "
        f"(×{trace['speedup']:.1f}), relative difference {trace['relative_difference']:.0e}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = CommandParser(description="Speed of the scores against the reference tools")
    parser.add_argument(
        "--pytorch-fid", metavar="DIR", help="where pytorch-fid is installed, if not in the environment"
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--name", default="metrics-cpu", help="of the files under bench/results")
    args = parser.parse_args()

    # Settings for the report: everything but where it goes.
    settings = {key: value for key, value in vars(args).items() if key not in ("pytorch_fid", "name")}
    results = {"machine": machine(), "settings": settings, "features": measure_features(args)}
    results["frechet_trace"] = measure_trace(2048, min(args.rounds, 4))
    write_json(RESULTS / f"{args.name}.json", results)
    write_text(RESULTS / f"{args.name}.md", table(results))
    print(table(results))


if __name__ == "__main__":
    run_command(main)
