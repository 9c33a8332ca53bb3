"""SEMA's two adversaries of G beside the discriminator: the redescription module R and the feature extractor F.

Their purpose is the paper's (Yuan et al., IEEE TMM 2024); their layers are ours, as the authors released none.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miscc.settings import setting
from models.layers import num_upsamples
from models.settings import SentenceSettings, SizeSettings
from models.types import Network

GRID = 8  # height and width of the trunk's features
MULTIPLIERS = (2, 4, 8)  # of nf, after each downsampling; the last one is repeated


class ImageTrunk(nn.Sequential):
    """Images (N, 3, S, S) -> features (N, channels, 8, 8); S: a power of two from 8 on.

    Group norm, not batch norm: real and fake images come in different calls, and batch statistics alone would tell them
    apart.
    """

    def __init__(self, nf: int, image_size: int):
        layers, channels = [nn.Conv2d(3, nf, 3, padding=1), nn.LeakyReLU(0.2)], nf

        # Downsample by 2 to 8×8: one step fewer than to 4×4.
        for index in range(num_upsamples(image_size) - 1):
            wider = nf * MULTIPLIERS[min(index, len(MULTIPLIERS) - 1)]
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.GroupNorm(1, wider), nn.LeakyReLU(0.2)]
            channels = wider

        super().__init__(*layers)
        self.channels = channels


class Redescriber(Network):
    """R: predicts an image's sentence features.

    Convolutional features are keys and values. In each step an LSTM attends to them by scaled dot-product attention. A
    linear layer maps its last state to the sentence features.

    nf: base number of channels.
    image_size: pixels; a power of two from 8 on.
    sentence_dim: length of the predicted features; also the width of keys, values and LSTM.
    steps: number of LSTM steps.
    """

    @dataclass(frozen=True)
    class Settings(SentenceSettings, SizeSettings):
        nf: int = 32
        steps: int = setting(
            "SEMA.STEPS", 8, "number of R's LSTM steps, each with attention to the image", above=0, maximum=64
        )

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        sentence_dim, self.steps = self.settings.sentence_dim, self.settings.steps

        # Features of the image, as keys and values; a learned position embedding lets keys depend on where they are.
        self.trunk = ImageTrunk(self.settings.nf, self.settings.image_size)
        channels = self.trunk.channels
        self.place = nn.Parameter(0.02 * torch.randn(1, channels, GRID, GRID))
        self.keys = nn.Conv2d(channels, sentence_dim, 1)
        self.values = nn.Conv2d(channels, sentence_dim, 1)

        # The LSTM: its queries, its initial state, its output.
        self.query = nn.Linear(sentence_dim, sentence_dim)
        self.start = nn.Linear(sentence_dim, 2 * sentence_dim)
        self.cell = nn.LSTMCell(sentence_dim, sentence_dim)
        self.sentence = nn.Linear(sentence_dim, sentence_dim)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) in [-1, 1] -> (N, sentence_dim)
        features = self.trunk(images)
        keys = self.keys(features + self.place).flatten(2)  # (N, D, 64)
        values = self.values(features).flatten(2)  # (N, D, 64)

        # The initial state comes from the mean of the values; each step attends to the image again.
        hidden, memory = self.start(values.mean(dim=2)).tanh().chunk(2, dim=1)
        for _ in range(self.steps):
            scores = torch.einsum("nd,ndr->nr", self.query(hidden), keys) / keys.shape[1] ** 0.5  # (N, 64)
            context = torch.einsum("nr,ndr->nd", scores.softmax(dim=1), values)
            hidden, memory = self.cell(context, (hidden, memory))

        return self.sentence(hidden)


class FeatureExtractor(Network):
    """F: features of an image, learned by classifying images as real or fake.

    nf: base number of channels.
    image_size: pixels; a power of two from 8 on.
    feature_dim: length of the features.
    """

    compiled_methods = ("logits", "forward")

    @dataclass(frozen=True)
    class Settings(SizeSettings):
        nf: int = 32
        feature_dim: int = setting("SEMA.FEATURE_DIM", 256, "length of F's features", above=0, maximum=65536)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.trunk = ImageTrunk(self.settings.nf, self.settings.image_size)
        self.project = nn.Linear(self.trunk.channels, self.settings.feature_dim)
        self.classify = nn.Linear(self.settings.feature_dim, 2)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) in [-1, 1] -> features (N, feature_dim)
        return self.project(self.trunk(images).mean(dim=(2, 3)))

    def logits(self, features: Tensor) -> Tensor:  # (N, feature_dim) -> (N, 2): fake, real
        return self.classify(F.leaky_relu(features, 0.2))
