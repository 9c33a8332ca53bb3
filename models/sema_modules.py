"""SEMA's two judges of meaning beside its discriminator: the redescription module R and the feature extractor F.

The paper (Yuan et al., IEEE TMM 2024) says what they do; their layers are ours, as the authors released none.
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

GRID = 8  # the trunk's features are GRID × GRID
MULTIPLIERS = (2, 4, 8)  # of nf after each halving, the last one repeated


class ImageTrunk(nn.Sequential):
    """Images (N, 3, S, S) -> features (N, channels, 8, 8), S a power of two from 8 on.

    Normalised over each image alone: real and fake images come in different calls, and batch statistics would tell them
    apart by themselves.
    """

    def __init__(self, nf: int, image_size: int):
        layers, channels = [nn.Conv2d(3, nf, 3, padding=1), nn.LeakyReLU(0.2)], nf
        for number in range(num_upsamples(image_size) - 1):
            wider = nf * MULTIPLIERS[min(number, len(MULTIPLIERS) - 1)]
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.GroupNorm(1, wider), nn.LeakyReLU(0.2)]
            channels = wider
        super().__init__(*layers)
        self.channels = channels


class Redescriber(Network):
    """R: writes an image back into a sentence state.

    Convolutional features are keys and values; an LSTM looks at them by scaled dot-product attention, once a step, and a
    linear layer reads the sentence off its last state. nf: base number of channels; image_size: a power of two from 8
    on; sentence_dim: of what it writes, and width of keys, values and LSTM; steps: how often it looks.
    """

    @dataclass(frozen=True)
    class Settings(SentenceSettings, SizeSettings):
        nf: int = 32
        steps: int = setting("SEMA.STEPS", 8, "how often R's LSTM looks at an image", above=0)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        sentence_dim, self.steps = self.settings.sentence_dim, self.settings.steps
        self.trunk = ImageTrunk(self.settings.nf, self.settings.image_size)
        channels = self.trunk.channels
        self.place = nn.Parameter(0.02 * torch.randn(1, channels, GRID, GRID))  # so that keys may say where
        self.keys = nn.Conv2d(channels, sentence_dim, 1)
        self.values = nn.Conv2d(channels, sentence_dim, 1)
        self.query = nn.Linear(sentence_dim, sentence_dim)
        self.start = nn.Linear(sentence_dim, 2 * sentence_dim)
        self.cell = nn.LSTMCell(sentence_dim, sentence_dim)
        self.sentence = nn.Linear(sentence_dim, sentence_dim)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) in [-1, 1] -> (N, sentence_dim)
        features = self.trunk(images)
        keys = self.keys(features + self.place).flatten(2)  # (N, D, 64)
        values = self.values(features).flatten(2)
        hidden, memory = self.start(values.mean(dim=2)).tanh().chunk(2, dim=1)
        for _ in range(self.steps):
            scores = torch.einsum("nd,ndr->nr", self.query(hidden), keys) / keys.shape[1] ** 0.5
            context = torch.einsum("nr,ndr->nd", scores.softmax(dim=1), values)
            hidden, memory = self.cell(context, (hidden, memory))
        return self.sentence(hidden)


class FeatureExtractor(Network):
    """F: features of an image, learned by telling real images from fake ones.

    nf: base number of channels; image_size: a power of two from 8 on; feature_dim: length of the features.
    """

    compiled_methods = ("logits", "forward")

    @dataclass(frozen=True)
    class Settings(SizeSettings):
        nf: int = 32
        feature_dim: int = setting("SEMA.FEATURE_DIM", 256, "length of F's features", above=0)

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.trunk = ImageTrunk(self.settings.nf, self.settings.image_size)
        self.project = nn.Linear(self.trunk.channels, self.settings.feature_dim)
        self.classify = nn.Linear(self.settings.feature_dim, 2)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) in [-1, 1] -> features (N, feature_dim)
        return self.project(self.trunk(images).mean(dim=(2, 3)))

    def logits(self, features: Tensor) -> Tensor:  # (N, feature_dim) -> (N, 2): fake, real
        return self.classify(F.leaky_relu(features, 0.2))
