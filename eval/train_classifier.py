"""Train the classifier behind `IS[cub]`: `python eval/train_classifier.py --cfg cfg/bird.yml`.

Fine-tunes an Inception-v3 on a data set's training classes and measures it on held-out images of these classes. The networks
and their file are in eval/features/classifier.py; the score is `python eval/IS.py IMAGES --classifier FILE`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

if __package__ in (None, ""):  # run as a script: this folder hides other packages' names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from datasets import load_records
from datasets.loading import EpochBatches, ordered_loader, training_loader
from datasets.records import Records
from datasets.settings import DataSettings
from datasets.text_image import TextImageDataset
from eval.features.classifier import (
    CLASSIFIERS,
    ImageClassifier,
    InceptionClassifier,
    SmallClassifier,
    classifier_input,
)
from eval.features.networks import TORCHVISION_FILES, find_weights
from miscc.checkpoint import load_file, save_checkpoint
from miscc.command_line import CommandParser, add_device_option, named_device, positive, setting_pairs
from miscc.config import OutputSettings, RunSettings
from miscc.errors import CheckpointError, ConfigError, DataError, TrainingError, run_command
from miscc.progress import ProgressBar
from miscc.randomness import seed_everything, stream
from models.choice import load_for_system, schema_with_systems
from models.modes import eval_mode
from models.registry import to_state

LEARNING_RATES = {"inception": 3e-4, "small": 4e-3}  # highest of the one-cycle schedule
SMOOTHING = 0.1  # of the labels: less extreme probabilities, so that the score tells generators apart


class Settings(NamedTuple):
    """All that the classifier depends on, beside the data. learning_rate 0: the network's own."""

    network: str = "inception"
    image_size: int = 256
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.0
    held_out: float = 0.1
    seed: int = 100


def split_within_classes(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Images to train on, and of each class a share to measure with: at least one, and never all.

    Classes with a single image are left out. Raises DataError where fewer than two classes have two images.
    """
    # Class by class: each must be learnt and measured.
    learned, held_out, used = [], [], 0
    for class_id in np.unique(records.class_ids):
        members = np.flatnonzero(records.class_ids == class_id)
        if len(members) < 2:
            continue
        num_held_out = min(len(members) - 1, max(1, round(share * len(members))))
        order = stream(seed, "classifier held out", int(class_id)).permutation(members)
        held_out += order[:num_held_out].tolist()
        learned += order[num_held_out:].tolist()
        used += 1

    if used < 2:
        raise DataError(
            f"{records.name}: {used} class(es) with two images or more in the split {records.split!r}: nothing to tell "
            f"apart; a data set without classes (prepare folder: --class-column) has no class score of its own"
        )
    return records.select(sorted(learned)), records.select(sorted(held_out))


def build(settings: Settings, num_classes: int, weights: str | Path | None = None) -> tuple[ImageClassifier, str]:
    """The network to train, and where its first weights are from. Raises CheckpointError without ImageNet's."""
    if settings.network == "small":
        return SmallClassifier(num_classes, settings.image_size), "from scratch"

    # Inception from ImageNet's weights.
    source = "https://download.pytorch.org/models/"
    try:
        path = find_weights(weights, TORCHVISION_FILES, "Inception-v3", source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or train a light one from scratch: --network small") from None

    state = load_file(path)
    network = InceptionClassifier(num_classes)
    network.load_imagenet(state if isinstance(state, dict) else {}, path)
    return network, f"from ImageNet's weights ({path.name})"


def train_classifier(
    records: Records,
    settings: Settings,
    device: str | torch.device = "cpu",
    *,
    weights: str | Path | None = None,
    workers: int = 0,
    skip_broken: bool = False,
) -> dict[str, Any]:
    """Train on the classes of these records: what `save_checkpoint` takes and `load_classifier` reads.

    Crops, flips and order are functions of the seed; images come at image_size and pass through the filter that
    scoring uses. Raises DataError without classes, TrainingError when the loss is no longer finite.
    """
    device = torch.device(device)
    learned, held_out = split_within_classes(records, settings.held_out, settings.seed)
    classes = np.unique(learned.class_ids)

    # The network, with weights that depend on the seed alone.
    with torch.random.fork_rng(devices=[]):
        seed_everything(settings.seed)
        network, origin = build(settings, len(classes), weights)
    network.to(device).to(memory_format=torch.channels_last)

    # Training, then the accuracy on held-out images.
    sizes = [settings.image_size]
    dataset = TextImageDataset(learned, sizes, seed=settings.seed, augment=True, skip_broken=skip_broken)
    batch_size = min(settings.batch_size, len(learned))
    loader = training_loader(dataset, batch_size, settings.seed, workers=workers)
    num_steps = settings.epochs * cast(EpochBatches, loader.batch_sampler).batches_per_epoch
    rate = settings.learning_rate or LEARNING_RATES[settings.network]
    _fit(network, loader, classes, rate, num_steps, device)
    unseen = TextImageDataset(held_out, sizes, augment=False, skip_broken=skip_broken)
    measured = {"accuracy": accuracy(network, unseen, classes, batch_size), "num_held_out": len(held_out)}
    measured |= {"num_images": len(learned), "chance": 1 / len(classes)}

    return {
        "networks": {"classifier": to_state(settings.network, network.cpu())},
        "classes": classes.tolist(),
        "dataset": records.name,
        "data": records.fingerprint(),
        "measured": measured,
        "settings": settings._asdict() | {"learning_rate": rate},
        "statement": (
            f"{settings.network} classifier trained {origin} by this project's eval/train_classifier.py on {len(learned)} "
            f"images of {len(classes)} training classes of {records.name}: {100 * measured['accuracy']:.1f} % of "
            f"{len(held_out)} held-out images of these classes right; it is not StackGAN's, whose download is gone, and "
            f"its scores compare only with scores by the same weights"
        ),
    }


def _fit(
    network: ImageClassifier, loader: DataLoader, classes: np.ndarray, rate: float, num_steps: int, device: torch.device
) -> None:
    """Train in place: AdamW, one cycle of the learning rate, smoothed labels. Raises TrainingError."""
    # As the ToyBirds' networks: one cycle, no restarts.
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, num_steps), pct_start=0.2)
    network.train()

    batches = iter(loader)
    with ProgressBar(what="training the classifier", total=num_steps) as bar:
        for step in range(num_steps):
            batch = next(batches)
            labels = torch.from_numpy(np.searchsorted(classes, batch.class_ids.numpy())).to(device)
            logits = network(classifier_input(batch.images.to(device), network))  # (N, num_classes)
            loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss is not finite at step {step + 1}; give a lower --learning-rate")

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_facts(loss=f"{loss.item():.3f}")


def accuracy(network: ImageClassifier, dataset: TextImageDataset, classes: np.ndarray, batch_size: int) -> float:
    """Share of the images whose class has the largest logit.

    classes: (K,) rising class ids, in the logits' order.
    """
    device = next(network.parameters()).device
    right = 0
    with eval_mode(network), torch.inference_mode():
        for batch in ProgressBar(ordered_loader(dataset, batch_size), "held-out images", unit="batches"):
            chosen: Tensor = network(classifier_input(batch.images.to(device), network)).argmax(dim=1)
            right += int((classes[chosen.cpu().numpy()] == batch.class_ids.numpy()).sum())
    return right / len(dataset)


def arguments() -> argparse.ArgumentParser:
    parser = CommandParser(description="train the classifier of IS[cub]", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", default="cfg/bird.yml", metavar="FILE", help="settings that name the data set (cfg/bird.yml)")
    add("--set", nargs="+", action="append", default=[], metavar="KEY VALUE", help="change settings")
    add("--network", default="inception", choices=list(CLASSIFIERS), help="small: from scratch, for small data sets")
    add("--weights", metavar="PATH", help="ImageNet weights of torchvision's inception_v3 (default: torch hub's cache)")
    add("--epochs", type=positive, default=20, metavar="N", help="default 20")
    add("--batch-size", type=positive, default=32, metavar="N", help="images at a time (default 32)")
    add("--learning-rate", type=float, default=0.0, metavar="R", help="default 3e-4, small: 4e-3")
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of each class, to measure with (default 0.1)")
    add_device_option(parser)
    add("--out", metavar="FILE", help="default: OUTPUT_DIR/classifier-<data set>.pth")
    add("--overwrite", action="store_true", help="replace a classifier that is there")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    if not 0 < args.held_out < 1 or args.learning_rate < 0:
        raise ConfigError("--held-out must lie between 0 and 1, --learning-rate must be above 0")

    # The data set, and where the classifier goes.
    parts = [RunSettings, OutputSettings, DataSettings]
    cfg = load_for_system(args.cfg, setting_pairs(args.set), parts, schema_with_systems(parts), skip_unknown=True)
    out = Path(args.out or Path(cfg.OUTPUT_DIR) / f"classifier-{cfg.DATASET_NAME}.pth")
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out}: is there already; give --overwrite, or another file with --out")
    size = cfg.TREE.BASE_SIZE * 2 ** (cfg.TREE.BRANCH_NUM - 1)  # what the system draws in the end
    if size < 16:
        raise ConfigError(f"TREE.BASE_SIZE: {size} px show no classes; take 16 or more")

    # Trained, measured, saved.
    settings = Settings(args.network, size, args.epochs, args.batch_size, args.learning_rate, args.held_out, cfg.SEED)
    records, _ = load_records(cfg.DATASET_NAME, cfg.DATA_DIR, "train")
    choices = {"weights": args.weights, "workers": cfg.WORKERS, "skip_broken": cfg.SKIP_BROKEN}
    content = train_classifier(records, settings, named_device(args.device), **choices)
    save_checkpoint(out, content)
    print(content["statement"])
    print(f"chance {100 * content['measured']['chance']:.2g} %; saved: {out}")
    print(f"use it with: python eval/IS.py IMAGES --classifier {out}")


if __name__ == "__main__":
    run_command(main)
