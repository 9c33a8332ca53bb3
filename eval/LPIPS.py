"""Learned perceptual distance (Zhang et al. 2018) of pairs of images, on the `lpips` package.

`python eval/LPIPS.py IMAGES --by-caption`: diversity, the mean distance among images of the same caption (higher is
more diverse). `python eval/LPIPS.py REAL FAKE`: each generated image against the real one whose caption it was made
from (lower is closer). Images enter in [-1, 1], as the network wants them.
"""

import argparse
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from warnings import catch_warnings, simplefilter

if __package__ in (None, ""):  # run as a script: this folder hides the standard library's and others' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import lpips
import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from eval.features.networks import find_weights
from eval.features.sources import CAPTIONS_FILE, ImageSource, batches, drop_broken, open_source, read_samples
from eval.protocol.scores import Score, add_arguments, named_device, report, seed_number
from miscc.checkpoint import hash_tensors, load_file
from miscc.errors import CheckpointError, DataError, run_command
from miscc.images import from_uint8, open_rgb
from miscc.randomness import stream
from models.modes import no_tf32

ALEXNET_FILES = ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")
ALEXNET_LAYERS = {1: 0, 2: 3, 3: 6, 4: 8, 5: 10}  # slice of the lpips package: convolution in torchvision's `features`
ALEXNET_HASH = "f3e382e262aa8545"  # hash_tensors of the convolutions that give the published reference distances

Features = list[torch.Tensor]


class PerceptualDistance(nn.Module):
    """LPIPS with AlexNet, version 0.1: the published linear heads over an ImageNet AlexNet.

    An image's features are computed once and compared with many others', which is what diversity needs.
    """

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        """state: AlexNet's convolutions under torchvision's names, `features.0.weight` to `features.10.bias`."""
        super().__init__()
        wanted = [f"features.{layer}.{kind}" for layer in ALEXNET_LAYERS.values() for kind in ("weight", "bias")]
        missing = [name for name in wanted if name not in state]
        if missing:
            raise CheckpointError(f"no AlexNet with torchvision's names: {missing[0]} is missing")
        with torch.random.fork_rng(devices=[]), catch_warnings():
            simplefilter("ignore")  # the package calls torchvision by names that it has left behind
            self.network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        for piece, layer in ALEXNET_LAYERS.items():
            convolution = getattr(getattr(self.network.net, f"slice{piece}"), str(layer))
            convolution.load_state_dict({kind: state[f"features.{layer}.{kind}"] for kind in ("weight", "bias")})
        self.weights_hash = hash_tensors({name: state[name] for name in wanted})
        self.name = "LPIPS[alex]" if self.weights_hash == ALEXNET_HASH else f"LPIPS[alex:{self.weights_hash[:8]}]"
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def features(self, images: torch.Tensor) -> Features:
        """Images (N, 3, H, W) in [-1, 1], at least 32 px -> five layers' features, of unit length at each place."""
        with no_tf32():
            layers = self.network.net(self.network.scaling_layer(images))
        return [lpips.normalize_tensor(layer) for layer in layers]

    @torch.inference_mode()
    def compare(self, first: Features, second: Features) -> torch.Tensor:
        """The distance (N,) of N images from N others by their features."""
        heads = self.network.lins
        parts = [
            head((one - other) ** 2).mean(dim=(1, 2, 3)) for head, one, other in zip(heads, first, second, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The distance (N,) between images (N, 3, H, W) in [-1, 1] and as many others."""
        return self.compare(self.features(first), self.features(second))


def load_perceptual_distance(
    weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> PerceptualDistance:
    """LPIPS with AlexNet's weights from a file with torchvision's names, or from torch hub's cache.

    Raises CheckpointError that says which file to get, when there is none.
    """
    path = find_weights(weights, ALEXNET_FILES, "LPIPS", "https://download.pytorch.org/models/")
    state = load_file(path)
    if not isinstance(state, dict) or "features.0.weight" not in state:
        raise CheckpointError(f"{path}: is no AlexNet with torchvision's names (`features.0.weight` ...)")
    return PerceptualDistance(state).to(device)


def diversity(
    images: Sequence[np.ndarray], groups: Sequence[Hashable], network: PerceptualDistance
) -> dict[Hashable, float]:
    """The mean distance over all pairs of images of the same group, for each group of two or more.

    images: (H, W, 3) uint8, of one size within a group; groups: each image's group.
    """
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    means = {}
    for group, indices in members.items():
        if len(indices) > 1:
            features = network.features(_stack([images[index] for index in indices], network))
            means[group] = _mean_of_pairs(features, network)
    return means


def _mean_of_pairs(features: Features, network: PerceptualDistance) -> float:
    total, pairs = 0.0, list(itertools.combinations(range(len(features[0])), 2))
    for start in range(0, len(pairs), 64):
        first, second = (list(side) for side in zip(*pairs[start : start + 64], strict=True))
        part = network.compare([layer[first] for layer in features], [layer[second] for layer in features])
        total += float(part.double().sum())
    return total / len(pairs)


def _stack(images: Sequence[np.ndarray], network: nn.Module) -> torch.Tensor:
    device = next(network.parameters()).device
    return from_uint8(torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2))


def caption_diversity(
    path: str | Path,
    network: PerceptualDistance,
    *,
    max_images: int | None = None,
    seed: int = 2020,
    skip_broken: bool = False,
    progress: bool | None = None,
) -> Score:
    """LPIPS diversity of sampled images: mean over captions of the mean distance among a caption's images.

    path: a folder with captions.jsonl; images of one caption are those with the same text. max_images: at most so
    many a caption, drawn by the seed. The ± is the spread over captions.
    """
    groups = defaultdict(list)
    for sample in read_samples(path):
        groups[" ".join(sample.caption.lower().split())].append(sample.file)
    values, used, skipped = [], 0, []
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    for number, files in enumerate(tqdm(groups.values(), "captions", unit="caption", leave=False, disable=hidden)):
        if max_images is not None and len(files) > max_images:
            chosen = stream(seed, "lpips diversity", number).choice(len(files), max_images, replace=False)
            files = [files[index] for index in sorted(chosen)]
        if len(files) < 2:
            continue
        images = _read(Path(path), files, skipped if skip_broken else None)
        if len({image.shape for image in images}) > 1:
            raise DataError(f"{path}: images of one caption differ in size, e.g. {files[0]} and {files[-1]}")
        if len(images) > 1:
            values += diversity(images, [0] * len(images), network).values()
            used += len(images)
    if not values:
        raise DataError(f"{path}: no caption has two images; sample several with --per-caption")
    protocol = {
        **_protocol(network),
        "images": str(path),
        "num_captions": len(values),
        "captions_with_one_image": len(groups) - len(values),
        "num_images": used,
        "pairs": "all of the same caption",
        "max_images": max_images,
        "seed": seed,
        "skipped": len(skipped),
        "skipped_names": skipped,
    }
    warning = (f"{len(skipped)} broken images were left out, e.g. {skipped[0]}",) if skipped else ()
    name = f"{network.name} diversity"
    return Score(name, float(np.mean(values)), protocol, std=float(np.std(values)), warnings=warning)


def _read(folder: Path, files: Sequence[str], skipped: list[str] | None) -> list[np.ndarray]:
    """The images as (H, W, 3) uint8; a broken one is noted in `skipped`, or raised where that is None."""
    images = []
    for file in files:
        try:
            images.append(np.array(open_rgb(folder / file)))
            _require_size(images[-1].shape, folder / file)
        except DataError:
            if skipped is None:
                raise
            skipped.append(file)
    return images


def paired_distance(
    real: str | Path,
    fake: str | Path,
    network: PerceptualDistance,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    skip_broken: bool = False,
    progress: bool | None = None,
) -> Score:
    """Mean LPIPS of generated images against the real ones of the same key.

    A generated image's key stands in captions.jsonl, else it is its file name without suffix. A real image of
    another size is resized to the generated one's (bicubic, antialiased). Raises DataError for a key without image.
    """
    fake_source, real_source = open_source(fake), open_source(real)
    skipped: list[str] = []
    if skip_broken:
        (fake_source, one), (real_source, other) = drop_broken(fake_source), drop_broken(real_source)
        skipped = one + other
    partners = _partners(real_source, fake_source, skip_broken)
    kept = [index for index, partner in enumerate(partners) if partner is not None]
    matched = real_source.subset([partners[index] for index in kept])
    values: list[float] = []
    resized = 0
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=len(kept), desc="pairs", unit="pair", leave=False, disable=hidden) as bar:
        streams = (batches(source, batch_size, workers) for source in (fake_source.subset(kept), matched))
        for fake_images, real_images in zip(*streams, strict=True):
            resized += sum(one.shape != other.shape for one, other in zip(fake_images, real_images, strict=True))
            values += _distances(fake_images, real_images, network, fake)
            bar.update(len(fake_images))
    protocol = {
        **_protocol(network),
        "real": str(real),
        "fake": str(fake),
        "num_pairs": len(values),
        "real_images_resized": resized,
        "without_partner": len(partners) - len(kept),
        "skipped": len(skipped),
        "skipped_names": skipped,
    }
    warnings = [f"{len(skipped)} broken images were left out, e.g. {skipped[0]}"] if skipped else []
    if len(kept) < len(partners):
        warnings.append(f"{len(partners) - len(kept)} generated images have no real partner and were left out")
    return Score(network.name, float(np.mean(values)), protocol, std=float(np.std(values)), warnings=tuple(warnings))


def _distances(fake_images, real_images, network: PerceptualDistance, path: str | Path) -> Iterator[float]:
    """The distance of each pair; pairs of the same size together."""
    together = len({image.shape for image in fake_images}) == 1
    for rows in [range(len(fake_images))] if together else [[i] for i in range(len(fake_images))]:
        chosen = [fake_images[index] for index in rows]
        _require_size(chosen[0].shape, path)
        others = [_resized(real_images[index], chosen[0].shape) for index in rows]
        yield from network(_stack(chosen, network), _stack(others, network)).double().tolist()


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if image.shape == shape:
        return image
    return np.array(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _require_size(shape: Sequence[int], name: str | Path) -> None:
    if min(shape[:2]) < 32:
        raise DataError(f"{name}: {shape[1]}x{shape[0]} px is too small for AlexNet; LPIPS needs 32x32 or more")


def _partners(real: ImageSource, fake: ImageSource, allow_missing: bool) -> list[int | None]:
    """The index of each generated image's real one: by the whole key, or by its last part where that is unique."""
    by_key = {_plain(str(PurePosixPath(name).with_suffix(""))): index for index, name in enumerate(real.names)}
    by_stem = defaultdict(list)
    for index, name in enumerate(real.names):
        by_stem[_plain(PurePosixPath(name).stem)].append(index)
    keys = {}
    if (fake.path / CAPTIONS_FILE).is_file():
        keys = {sample.file: sample.key for sample in read_samples(fake.path)}
    partners: list[int | None] = []
    missing = []
    for name in fake.names:
        key = keys.get(name) or str(PurePosixPath(name).with_suffix(""))
        stems = by_stem.get(_plain(PurePosixPath(key).name), [])  # keys may hold dots: `.stem` would cut them
        partner = by_key.get(_plain(key), stems[0] if len(stems) == 1 else None)
        partners.append(partner)
        if partner is None:
            missing.append(f"{name} (key {key})")
    if missing and (not allow_missing or len(missing) == len(fake)):
        raise DataError(
            f"{real.path}: no real image, or several, for {len(missing)} of {len(fake)} generated ones, e.g. "
            f"{missing[0]}; real images must be called by the `key` in captions.jsonl, or as the generated ones"
        )
    return partners


def _plain(key: str) -> str:
    """A key as the sampler writes it into file names, where odd characters become underscores."""
    return re.sub(r"[^\w.\-/]+", "_", key)


def _protocol(network: PerceptualDistance) -> dict:
    return {
        "network": "alex",
        "heads": "lpips 0.1",
        "weights_hash": network.weights_hash,
        "published_weights": network.weights_hash == ALEXNET_HASH,
        "range": "[-1, 1]",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="LPIPS: diversity for one caption, or generated against real images")
    parser.add_argument("images", nargs="+", help="IMAGES (with --by-caption), or REAL FAKE")
    parser.add_argument("--by-caption", action="store_true", help="diversity among the images of the same caption")
    parser.add_argument("--max-images", type=int, metavar="N", help="with --by-caption: at most N images a caption")
    parser.add_argument("--seed", type=seed_number, default=2020, help="of the choice of --max-images")
    add_arguments(parser, network=False)
    args = parser.parse_args()
    if len(args.images) != (1 if args.by_caption else 2):
        parser.error("give one folder with --by-caption, or REAL FAKE")
    if args.max_images is not None and args.max_images < 2:
        parser.error("--max-images must be at least 2")
    network = load_perceptual_distance(args.weights, named_device(args.device))
    if args.by_caption:
        choices = {"max_images": args.max_images, "seed": args.seed, "skip_broken": args.skip_broken}
        score = caption_diversity(args.images[0], network, **choices, progress=True)
    else:
        choices = {"batch_size": args.batch_size, "workers": args.workers, "skip_broken": args.skip_broken}
        score = paired_distance(*args.images, network, **choices, progress=True)
    report([score], args.json)


if __name__ == "__main__":
    run_command(main)
