"""Learned perceptual distance (Zhang et al. 2018) of pairs of images, on the `lpips` package.

`python eval/LPIPS.py IMAGES --by-caption`: diversity, the mean distance among images of the same caption (higher is
more diverse). `python eval/LPIPS.py REAL FAKE`: each generated image against the real one whose caption it was made
from (lower is closer). The network takes images in [-1, 1].
"""

import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import lpips
import numpy as np
import torch
from PIL import Image
from torch import nn

from eval.features.networks import find_weights
from eval.features.sources import CAPTIONS_FILE, ImageSource, drop_broken, open_source, read_samples
from eval.metric import Metric, Needs, Run, Score, ScoringBatch
from eval.scripts import add_arguments, broken, extraction_of, open_images, report, score_set, update_from
from miscc.checkpoint import hash_tensors, load_file
from miscc.command_line import CommandParser, named_device, seed_number
from miscc.errors import CheckpointError, DataError, run_command
from miscc.images import from_uint8
from miscc.randomness import stream
from models.modes import no_tf32
from sampling.folders import key_stem

if TYPE_CHECKING:
    from typing_extensions import Self

ALEXNET_FILES = ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")
ALEXNET_LAYERS = {1: 0, 2: 3, 3: 6, 4: 8, 5: 10}  # slice of the lpips package: convolution in torchvision's `features`
ALEXNET_HASH = "f3e382e262aa8545"  # hash_tensors of the convolutions that give the published reference distances

SMALLEST = 32  # pixels a side; AlexNet's pooling leaves nothing of smaller images

Features = list[torch.Tensor]


class PerceptualDistance(nn.Module):
    """LPIPS with AlexNet, version 0.1: the published linear heads over an ImageNet AlexNet.

    An image's features are computed once and compared with many others', which is what diversity needs.
    """

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        """state: AlexNet's convolutions under torchvision's names, `features.0.weight` to `features.10.bias`."""
        super().__init__()
        names = [f"features.{layer}.{kind}" for layer in ALEXNET_LAYERS.values() for kind in ("weight", "bias")]
        missing = [name for name in names if name not in state]
        if missing:
            raise CheckpointError(f"no AlexNet with torchvision's names: {missing[0]} is missing")

        # The package's network and heads, with these convolutions.
        with torch.random.fork_rng(devices=[]), catch_warnings():
            simplefilter("ignore")  # the package uses torchvision's deprecated names
            self.network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        for piece, layer in ALEXNET_LAYERS.items():
            convolution = getattr(getattr(self.network.net, f"slice{piece}"), str(layer))
            convolution.load_state_dict({kind: state[f"features.{layer}.{kind}"] for kind in ("weight", "bias")})

        # The name says whether these are the published convolutions.
        self.weights_hash = hash_tensors({name: state[name] for name in names})
        self.name = "LPIPS[alex]" if self.weights_hash == ALEXNET_HASH else f"LPIPS[alex:{self.weights_hash[:8]}]"
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def features(self, images: torch.Tensor) -> Features:
        """Images (N, 3, H, W) in [-1, 1], at least 32 px -> five layers' features, of unit length at each position."""
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
    weights: str | Path | None = None, device: str | torch.device = "cpu", option: str = "--weights"
) -> PerceptualDistance:
    """LPIPS with AlexNet's weights from a file with torchvision's names, or from torch hub's cache.

    option: by which the user gives the file. Raises CheckpointError that says which file to get, when there is none.
    """
    path = find_weights(weights, ALEXNET_FILES, "LPIPS", "https://download.pytorch.org/models/", option)

    # A file of another network has other names.
    state = load_file(path)
    if not isinstance(state, dict) or "features.0.weight" not in state:
        raise CheckpointError(f"{path}: is no AlexNet with torchvision's names (`features.0.weight` ...)")
    return PerceptualDistance(state).to(device)


class Diversity(Metric):
    """The mean distance over all pairs of images of the same caption; the score is the mean over captions.

    The features of a caption's images are dropped when all of its images have come.
    """

    needs = Needs(repeats=True)
    accumulated = ("means", "num_images")

    def __init__(self, network: PerceptualDistance, captions: Sequence[str]) -> None:
        """captions: of each image that will come; those with a single image give nothing."""
        self.network = network
        self.expected = Counter(captions)
        self.waiting: dict[str, list[np.ndarray]] = defaultdict(list)
        self.means: dict[str, float] = {}
        self.num_images = 0

    @classmethod
    def from_run(cls, run: Run) -> "Diversity":
        network = network_for(run)
        return cls(network, [request.caption for request in run.requests])

    def update(self, batch: ScoringBatch) -> None:
        for image, request in zip(batch.images, batch.requests, strict=True):
            images = self.waiting[request.caption]
            images.append(image)
            if len(images) < self.expected[request.caption]:
                continue

            # The caption's last image.
            del self.waiting[request.caption]
            if len({image.shape for image in images}) > 1:
                raise DataError(f"images of one caption differ in size ({request.caption!r}): sample them again")
            if len(images) > 1:
                require_size(image.shape)
                self.means[request.caption] = _mean_of_pairs(
                    self.network.features(_stack(images, self.network)), self.network
                )
                self.num_images += len(images)

    def merge(self, other: "Self") -> None:
        self.means |= other.means
        self.num_images += other.num_images

    def compute(self) -> list[Score]:
        values = list(self.means.values())
        if not values:
            raise DataError("no caption has two images; sample several with --per-caption")

        about = about_network(self.network) | {"num_captions": len(values), "num_images": self.num_images}
        about |= {"pairs": "all of the same caption"}
        return [Score(f"{self.network.name} diversity", float(np.mean(values)), about, std=float(np.std(values)))]


class PairedDistance(Metric):
    """The mean distance of generated images from the real ones of the same key.

    A real image of another size is resized to the generated one's (bicubic, antialiased).
    """

    needs = Needs(real_images=True)
    accumulated = ("values", "resized")

    def __init__(self, network: PerceptualDistance) -> None:
        self.network = network
        self.values: list[float] = []
        self.resized: list[bool] = []

    @classmethod
    def from_run(cls, run: Run) -> "PairedDistance":
        return cls(network_for(run))

    def update(self, batch: ScoringBatch) -> None:
        pairs = list(zip(batch.images, batch.real_images, strict=True))
        self.resized += [image.shape != other.shape for image, other in pairs]

        # Pairs of one size together, others one by one.
        together = len({image.shape for image in batch.images}) == 1
        for group in [pairs] if together else [[pair] for pair in pairs]:
            images, others = zip(*group, strict=True)
            require_size(images[0].shape)
            others = [_resized(other, images[0].shape) for other in others]
            distances = self.network(_stack(images, self.network), _stack(others, self.network))
            self.values += distances.double().tolist()

    def compute(self) -> list[Score]:
        about = about_network(self.network) | {"num_pairs": len(self.values), "real_images_resized": sum(self.resized)}
        return [Score(self.network.name, float(np.mean(self.values)), about, std=float(np.std(self.values)))]


def network_for(run: Run) -> PerceptualDistance:
    """The network of a protocol's run. Raises DataError for images that are too small, CheckpointError without weights."""
    require_size((run.image_size, run.image_size))
    return load_perceptual_distance(run.tools.lpips_weights, run.device, "--lpips-weights")


def require_size(shape: Sequence[int]) -> None:
    """Raises DataError for images (H, W, ...) of which AlexNet's pooling would leave nothing."""
    if min(shape[:2]) < SMALLEST:
        raise DataError(
            f"images of {shape[1]}x{shape[0]} px are too small for LPIPS, which needs {SMALLEST}x{SMALLEST} or more"
        )


def about_network(network: PerceptualDistance) -> dict:
    """What must be the same for two scores to be comparable."""
    return {
        "network": "alex",
        "heads": "lpips 0.1",
        "weights_hash": network.weights_hash,
        "published_weights": network.weights_hash == ALEXNET_HASH,
        "range": "[-1, 1]",
    }


def _mean_of_pairs(features: Features, network: PerceptualDistance) -> float:
    total, pairs = 0.0, list(itertools.combinations(range(len(features[0])), 2))

    # Pairs in parts, which bounds the memory.
    for start in range(0, len(pairs), 64):
        first, second = (list(side) for side in zip(*pairs[start : start + 64], strict=True))
        part = network.compare([layer[first] for layer in features], [layer[second] for layer in features])
        total += float(part.double().sum())
    return total / len(pairs)


def _stack(images: Sequence[np.ndarray], network: nn.Module) -> torch.Tensor:
    device = next(network.parameters()).device
    return from_uint8(torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2))


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if image.shape == shape:
        return image
    return np.array(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def caption_diversity(
    path: str | Path,
    network: PerceptualDistance,
    *,
    max_images: int | None = None,
    seed: int = 2020,
    skip_broken: bool = False,
    **options,
) -> Score:
    """LPIPS diversity of sampled images: mean over captions of the mean distance among a caption's images.

    path: a folder with captions.jsonl; images of one caption are those with the same text;
    max_images: at most so many a caption, drawn by the seed;
    options: as `eval.scripts.update_from`.
    The ± is the spread over captions.
    """
    # Captions that differ in capitals or spaces alone are the same.
    images = open_images(path, skip_broken, with_samples=True)
    samples = [replace(sample, caption=" ".join(sample.caption.lower().split())) for sample in images.samples]
    groups = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.caption].append(index)

    # The images of one caption in a row, no more than were asked for.
    order: list[int] = []
    for group, indices in enumerate(groups.values()):
        if max_images is not None and len(indices) > max_images:
            chosen = stream(seed, "lpips diversity", group).choice(len(indices), max_images, replace=False)
            indices = [indices[position] for position in sorted(chosen)]
        order += indices if len(indices) > 1 else []

    # Scored as any folder of samples, in the new order.
    chosen = replace(images, source=images.source.subset(order), samples=tuple(samples[index] for index in order))
    metric = Diversity(network, [sample.caption for sample in chosen.samples])
    (score,) = score_set(metric, chosen, **options)
    alone = len(groups) - score.protocol["num_captions"]
    return score.of({"captions_with_one_image": alone, "max_images": max_images, "seed": seed})


def paired_distance(
    real: str | Path, fake: str | Path, network: PerceptualDistance, *, skip_broken: bool = False, **options
) -> Score:
    """Mean LPIPS of generated images against the real ones of the same key.

    A generated image's key stands in captions.jsonl, else it is its file name without suffix. options: as
    `eval.scripts.update_from`. Raises DataError for a key without image.
    """
    fake_source, real_source = open_source(fake), open_source(real)
    skipped: list[str] = []
    if skip_broken:
        (fake_source, one), (real_source, other) = drop_broken(fake_source), drop_broken(real_source)
        skipped = one + other

    # Pairs, in the order of the generated images.
    partners = _partners(real_source, fake_source, skip_broken)
    kept = {index: partner for index, partner in enumerate(partners) if partner is not None}
    matched = real_source.subset(list(kept.values()))
    metric = PairedDistance(network)
    (score,) = update_from(fake_source.subset(list(kept)), metric, real=matched, **options).compute()

    # What was left out.
    alone = len(partners) - len(kept)
    origin = {"real": str(real), "fake": str(fake), "without_partner": alone}
    origin |= {"skipped": len(skipped), "skipped_names": skipped}
    without = (f"{alone} generated images have no real partner and were left out",) if alone else ()
    return score.of(origin, broken(f"{real}, {fake}", skipped) + without)


def _partners(real: ImageSource, fake: ImageSource, allow_missing: bool) -> list[int | None]:
    """The index of each generated image's real one: by the whole key, or by its last part, where one image alone has it."""
    whole = _by_name(real.names, lambda path: str(path.with_suffix("")))
    plain = _by_name(real.names, lambda path: _plain(str(path.with_suffix(""))))
    last = _by_name(real.names, lambda path: _plain(path.stem))

    # The key of each generated image: from captions.jsonl, or its file's name.
    keys = {}
    if (fake.path / CAPTIONS_FILE).is_file():
        keys = {sample.file: sample.key for sample in read_samples(fake.path)}
    partners: list[int | None] = []
    missing = []
    for name in fake.names:
        key = keys.get(name) or str(PurePosixPath(name).with_suffix(""))
        as_written = key_stem(key)  # by `--real`, where odd characters are replaced
        ends = [_plain(PurePosixPath(path).name) for path in (as_written, key)]  # `.stem` would cut keys with dots
        found = [whole[as_written], whole[key], plain[_plain(key)], *(last[end] for end in ends)]
        partner = next((indices[0] for indices in found if len(indices) == 1), None)
        partners.append(partner)
        if partner is None:
            missing.append(f"{name} (key {key})")

    # Generated images without a partner.
    if missing and (not allow_missing or len(missing) == len(fake)):
        raise DataError(
            f"{real.path}: no real image, or several, for {len(missing)} of {len(fake)} generated ones, e.g. "
            f"{missing[0]}; real images must be called by the `key` in captions.jsonl, or as the generated ones"
        )
    return partners


def _by_name(names: Sequence[str], spelling: Callable[[PurePosixPath], str]) -> defaultdict[str, list[int]]:
    """The indices of the files that have each spelling of a name; [] for others."""
    found = defaultdict(list)
    for index, name in enumerate(names):
        found[spelling(PurePosixPath(name))].append(index)
    return found


def _plain(key: str) -> str:
    """A key with underscores for odd characters, as data sets spell keys in file names."""
    return re.sub(r"[^\w.\-/]+", "_", key)


def main() -> None:
    parser = CommandParser(description="LPIPS: diversity for one caption, or generated against real images")
    parser.add_argument("images", nargs="+", help="IMAGES (with --by-caption), or REAL FAKE")
    parser.add_argument("--by-caption", action="store_true", help="diversity among the images of the same caption")
    parser.add_argument("--max-images", type=int, metavar="N", help="with --by-caption: at most N images a caption")
    parser.add_argument("--seed", type=seed_number, default=2020, help="of the choice of --max-images")
    add_arguments(parser, network=False)
    args = parser.parse_args()

    # Which of the two scores, and what goes with it.
    if len(args.images) != (1 if args.by_caption else 2):
        parser.error("give one folder with --by-caption, or REAL FAKE")
    if args.max_images is not None and args.max_images < 2:
        parser.error("--max-images must be at least 2")

    network = load_perceptual_distance(args.weights, named_device(args.device))
    choices = {"skip_broken": args.skip_broken, **extraction_of(args)}
    if args.by_caption:
        score = caption_diversity(args.images[0], network, max_images=args.max_images, seed=args.seed, **choices)
    else:
        real, fake = args.images
        score = paired_distance(real, fake, network, **choices)
    report([score], args.json)


if __name__ == "__main__":
    run_command(main)
