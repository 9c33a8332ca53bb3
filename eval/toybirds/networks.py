"""The network that reads the attributes of drawn birds, trained by eval/toybirds/classifiers.py, used by eval/attributes.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.toybirds.dataset import ATTRIBUTES
from eval.toybirds.classifiers import convolution

NUM_VALUES = tuple(len(values) for values in ATTRIBUTES.values())


class AttributeNetwork(nn.Module):
    """One convolutional trunk, one linear head for each of ATTRIBUTES: (N, 3, S, S) -> a list of logits (N, values).

    S is 64 or 32; image_size says which.
    """

    def __init__(self, image_size: int, width: int):
        super().__init__()
        stem = convolution(6, width, kernel=5, stride=2) if image_size == 64 else convolution(6, width)
        self.fine = nn.Sequential(
            stem,
            convolution(width, width),
            convolution(width, 2 * width, stride=2),
            convolution(2 * width, 2 * width),
        )
        self.coarse = convolution(2 * width, 4 * width, stride=2)
        self.narrow = convolution(4 * width, width, kernel=1)
        num_features = 8 * 8 * width + 2 * (2 * width + 4 * width)
        self.mix = nn.Sequential(nn.Linear(num_features, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.heads = nn.Linear(128, sum(NUM_VALUES))

    def forward(self, images: Tensor) -> list[Tensor]:
        # Details: without these, spots and bars take twice as many epochs.
        around = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
        details = 3 * (images - around)
        fine = self.fine(torch.cat([images, details], dim=1))
        coarse = self.coarse(fine)

        # Where something is, and what there is anywhere.
        where = self.narrow(coarse).flatten(1)  # tells a crown from a belly
        what = [pooled for grid in (fine, coarse) for pooled in (grid.amax(dim=(2, 3)), grid.mean(dim=(2, 3)))]
        return list(self.heads(self.mix(torch.cat([where, *what], dim=1))).split(NUM_VALUES, dim=1))
