"""What the tests of the scores share: small pictures in folders, and a network small enough to be instant."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from eval.features.networks import FeatureNetwork
from miscc.checkpoint import hash_tensors


def picture(number: int, size: int = 48, tone: int = 0) -> np.ndarray:
    """(size, size, 3) uint8: a rectangle on a slope of colours, different for each number and tone."""
    random = np.random.default_rng([number, tone])
    y, x = np.mgrid[0:size, 0:size] / size
    slope = np.stack([x * random.random(), y * random.random(), (x + y) / 2 * random.random()], axis=2)
    pixels = slope * 200 + tone
    top, left = random.integers(0, size // 2, 2)
    pixels[top : top + size // 3, left : left + size // 3] = random.integers(0, 256, 3)
    return (pixels + random.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


def write_pictures(folder, count: int, size: int = 48, tone: int = 0, first: int = 0):
    """`count` PNGs 000.png, 001.png ... in a new folder, which is returned."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(picture(first + number, size, tone)).save(folder / f"{number:03d}.png")
    return folder


def tiny_network(resize: str = "bilinear", seed: int = 0) -> FeatureNetwork:
    """Six features and four classes at 16 px."""
    generator = torch.Generator().manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = nn.Linear(6, 4, bias=False)
    for weight in (trunk[0].weight, classifier.weight):
        weight.data = torch.randn(weight.shape, generator=generator)
    weights_hash = hash_tensors({"trunk": trunk[0].weight, "classifier": classifier.weight})
    return FeatureNetwork("tiny", trunk, classifier, weights_hash, resize, 16, (127.5, 127.5), published=False)
